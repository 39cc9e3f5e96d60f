"""What JSON of a schema must go on with, in the layout that the answer has."""

import json

import pytest

import edgevl
from edgevl import Constraint
from edgevl.generate.token_mask import TokenMasks
from edgevl.preprocess.tools import Tool

ITEM = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "price": {"type": "number"}},
    "required": ["name", "price"],
}
RECEIPT = {
    "type": "object",
    "properties": {
        "shop": {"type": "string"},
        "items": {"type": "array", "items": ITEM, "minItems": 2, "maxItems": 2},
        "paid": {"type": "boolean"},
        "note": {"const": 'so: {"a", [b] \\'},
    },
    "required": ["shop", "items", "paid", "note"],
}
VALUE = {
    "shop": 'A "b"',
    "items": [{"name": "x", "price": 1}, {"name": "y, z", "price": 2}],
    "paid": True,
    "note": 'so: {"a", [b] \\',
}
LAYOUTS = [{"separators": (",", ":")}, {}, {"indent": 2}, {"indent": 4}, {"indent": 0}]


@pytest.fixture(scope="module")
def tiny():
    return edgevl.load("tiny")


@pytest.fixture(scope="module")
def start(tiny):
    """Start the mask of a constraint, and take a text."""
    masks = TokenMasks(tiny.prompts.tokenizer, tiny.prompts.stop_ids)

    def start(constraint, text=""):
        mask = masks.start(constraint)
        for token_id in tiny.prompts.tokenizer.encode(text, add_special_tokens=False).ids:
            mask.accept(token_id)
        return mask

    return start


def foreseen(mask):
    return mask._vocabulary.decode_str(mask.foreseen())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_has_been_seen_of_a_layout_is_foreseen(start, layout):
    """From the second item on, at every place where a value has ended and the next begins."""
    text = json.dumps(VALUE, **layout)
    value, last = text.index('"y, z"'), text.index("true")
    for begin, until in (
        (value + 2, value + 2),  # a string goes on as it likes
        (value + len('"y, z"'), text.index("2")),
        (last + 4, len(text)),
        (last + 2, len(text)),
    ):
        mask = start(Constraint.json_schema(RECEIPT), text[:begin])
        assert foreseen(mask) == text[begin:until]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_guess_is_right_once_the_layout_is_known(start, layout):
    """Wherever the answer stands, also in the middle of what is forced or of white space."""
    text = json.dumps(VALUE, **layout)
    forced = 0
    for place in range(text.index("{", text.index("[")) + 12, len(text)):
        guess = foreseen(start(Constraint.json_schema(RECEIPT), text[:place]))
        assert text[place:].startswith(guess), text[:place]
        forced += bool(guess)
    assert forced > len(text) / 4


def test_a_layout_that_is_not_known_is_taken_to_be_indented(start):
    constraint = Constraint.json_schema(RECEIPT)
    assert foreseen(start(constraint)) == '{\n  "shop": "'
    assert foreseen(start(constraint, '{"shop"')) == ': "'
    assert foreseen(start(constraint, '{"shop":"a"')) == ',"items":[{"name":"'
    assert foreseen(start(constraint, '{"shop" :"a"\n')) == ""  # unusual: anything may follow
    assert foreseen(start(constraint, '{"shop": "a"')) == ', "items": [{"name": "'
    indented = ',\n   "items": [\n      {\n         "name": "'
    assert foreseen(start(constraint, '{\n   "shop": "a"')) == indented


def test_where_nothing_can_be_foreseen(start):
    assert start(Constraint.json_object(), '{"').foreseen() == []
    assert start(Constraint.json_schema({"type": "string"}), '"a').foreseen() == []
    assert start(Constraint.regex("[ab]+")).foreseen() == []


def test_the_foreseen_tokens_are_those_of_the_whole_text(start, tiny):
    """As models write them: not those of its parts."""
    text = json.dumps(VALUE, indent=2)
    ids = tiny.prompts.tokenizer.encode(text, add_special_tokens=False).ids
    mask, right, wrong = start(Constraint.json_schema(RECEIPT)), 0, 0
    for place, token_id in enumerate(ids):
        draft = mask.foreseen()
        assert mask.allowed(draft) == len(draft)
        if draft and place > len(ids) / 2:
            right += draft == ids[place : place + len(draft)]
            wrong += draft[:-1] != ids[place : place + len(draft) - 1]  # the last may go on
        mask.accept(token_id)
    assert wrong == 0
    assert right > 10


def test_the_mask_alone_forces_where_white_space_is_not_free(start):
    tool = Tool(
        "weather",
        parameters={
            "type": "object",
            "properties": {"city": {"enum": ["Rome"]}},
            "required": ["city"],
        },
    )
    calls = Constraint.tool_calls([tool])
    call = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
    mask = start(calls)
    said = []
    while forced := mask.foreseen():
        assert mask.allowed(forced) == len(forced)
        for token_id in forced:
            mask.accept(token_id)
        said += forced
    assert mask._vocabulary.decode_str(said) == call
    assert mask.complete
    assert foreseen(start(Constraint.regex("ab(c|d)efg"), "abc")) == "efg"


@pytest.mark.parametrize(
    ("values", "expected"), [(["cash", "card"], ' "'), (["in cash", "in kind"], ' "in')]
)
def test_a_word_that_may_go_on_is_no_draft(start, values, expected):
    constraint = Constraint.json_schema(
        {"type": "object", "properties": {"paid": {"enum": values}}, "required": ["paid"]}
    )
    assert foreseen(start(constraint, '{"paid":')) == expected
    assert foreseen(start(constraint, '{"paid"')) == ":" + expected


TOOL = Tool("weather", parameters={"type": "object", "properties": {"city": {"type": "string"}}})


@pytest.mark.parametrize(
    ("constraint", "text"),
    [
        (Constraint.json_schema(RECEIPT), json.dumps(VALUE, indent=2)),
        (
            Constraint.tool_calls([TOOL]),
            '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>',
        ),
        (Constraint.regex("(one|two) and (one|three)[.]"), "two and three."),
    ],
)
def test_asking_changes_nothing(start, tiny, constraint, text):
    """Neither the foreseen text nor a draft that was not taken moves the mask on."""
    asked, plain = start(constraint), start(constraint)
    for token_id in tiny.prompts.tokenizer.encode(text, add_special_tokens=False).ids:
        asked.allowed(asked.foreseen())
        asked.allowed([5, 6, 7])
        assert asked._matcher.compute_bitmask() == plain._matcher.compute_bitmask()
        asked.accept(token_id)
        plain.accept(token_id)
    assert asked.complete


def test_drafts_end_where_the_form_does_not_allow_them(start, tiny):
    ids = tiny.prompts.tokenizer.encode("123x4", add_special_tokens=False).ids
    mask = start(Constraint.regex("[0-9]{9}"))
    digits = mask._vocabulary.tokenize_str("123")
    assert mask.allowed(ids) == len(digits)
