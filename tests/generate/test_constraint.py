"""Constraints: what is refused, and answers that are of their form whatever the model would say."""

import json
import re
import sys
import threading

import numpy as np
import pytest

import edgevl
from edgevl import Constraint
from edgevl.errors import EdgeVLError, PromptError
from edgevl.generate.constraint import MAX_CONSTRAINT_BYTES, MAX_SCHEMA_LEVELS
from edgevl.generate.token_mask import TokenMasks
from edgevl.preprocess.tools import Tool
from repository import EXAMPLES

METER = EXAMPLES / "meter.png"
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "kind": {"enum": ["cat", "dog", "猫"]},
        "scores": {
            "type": "array",
            "items": {"type": "integer", "minimum": -5, "maximum": 120},
            "minItems": 2,
            "maxItems": 4,
        },
        "where": {
            "type": "object",
            "properties": {"x": {"type": "number", "minimum": 0, "maximum": 1, "multipleOf": 0.25}},
            "required": ["x"],
            "additionalProperties": False,
        },
        "sure": {"type": ["boolean", "null"]},
    },
    "required": ["name", "kind", "scores", "where", "sure"],
    "additionalProperties": False,
}


def assert_person(text):
    person = json.loads(text)
    assert list(person) == ["name", "kind", "scores", "where", "sure"]
    assert isinstance(person["name"], str)
    assert len(person["name"]) <= 12
    assert person["kind"] in ("cat", "dog", "猫")
    assert 2 <= len(person["scores"]) <= 4
    assert all(type(score) is int and -5 <= score <= 120 for score in person["scores"])
    assert list(person["where"]) == ["x"]
    assert person["where"]["x"] in (0, 0.25, 0.5, 0.75, 1)
    assert person["sure"] in (True, False, None)


@pytest.fixture(scope="module")
def tiny():
    return edgevl.load("tiny")


@pytest.fixture(scope="module")
def noise(mini_checkpoint):
    """A model of random weights: without a constraint it says anything."""
    return edgevl.load(mini_checkpoint("mini-qwen3"))


@pytest.mark.parametrize("seed", [None, 0, 1, 2, 3])
def test_answers_are_of_the_schema(tiny, noise, seed):
    constraint = Constraint.json_schema(PERSON)
    for model in (tiny, noise):
        answer = model.ask(
            "Who?",
            max_tokens=600,
            temperature=0 if seed is None else 1,
            seed=seed,
            constraint=constraint,
        )
        assert answer.finish_reason == "stop"
        assert_person(answer.text)


def test_what_the_model_reads_is_in_the_answer(tiny):
    question = "What number is on the display?"
    read = tiny.ask(question, METER).text
    for constraint in (Constraint.json_schema({"type": "integer"}), Constraint.regex("[0-9]+")):
        assert tiny.ask(question, METER, constraint=constraint).text == read == "7305"
    digit = {"type": "integer", "minimum": 0, "maximum": 9}
    schema = {"type": "object", "properties": {"number": digit}, "required": ["number"]}
    constraint = Constraint.json_schema(json.dumps(schema | {"additionalProperties": False}))
    assert json.loads(tiny.ask(question, METER, constraint=constraint).text) == {"number": 7}


@pytest.mark.parametrize("seed", range(4))
def test_any_object(noise, seed):
    answer = noise.ask(
        "?", max_tokens=300, temperature=0.7, seed=seed, constraint=Constraint.json_object()
    )
    if answer.finish_reason == "stop":
        assert isinstance(json.loads(answer.text), dict)
    else:
        assert answer.text.startswith("{")


@pytest.mark.parametrize("seed", range(4))
def test_regular_expression(noise, seed):
    pattern = "(North|South)-[0-9]{2,3}( 汉字)?"
    answer = noise.ask("?", temperature=1, seed=seed, constraint=Constraint.regex(pattern))
    assert re.fullmatch(pattern, answer.text)
    assert answer.finish_reason == "stop"


def test_characters_of_several_tokens(noise):
    text = "ñ😀汉"
    answer = noise.ask("?", constraint=Constraint.json_schema({"const": text}))
    assert json.loads(answer.text) == text
    assert len(answer.token_ids) > len(text) + 2  # each is some bytes of a character


@pytest.mark.parametrize("text", ["<box>", "a<|im_end|>b", "<tool_call>", "e\u0301"])
def test_text_that_the_tokenizer_reads_otherwise(noise, text):
    """What looks like an added token, or is not in normal form, is written as text all the same."""
    for constraint in (
        Constraint.json_schema({"type": "object", "required": [text], "properties": {text: {}}}),
        Constraint.json_schema({"enum": [text]}),
    ):
        assert text in noise.ask("?", max_tokens=200, constraint=constraint).text
    said = noise.ask("?", constraint=Constraint.regex(re.escape(text)))
    assert (said.text, said.finish_reason) == (text, "stop")
    added = noise.prompts.tokenizer.get_added_tokens_decoder()
    assert not added.keys() & set(said.token_ids)


@pytest.mark.parametrize("seed", [None, 0])
def test_penalties_and_biases_do_not_break_the_form(noise, seed):
    """Not even those of the very tokens that it needs, over and over."""
    token = noise.prompts.tokenizer.token_to_id
    against = {token(text): -100 for text in "-,0123456789"}
    pattern = "[0-9]{5}-[0-9]{5},[0-9]{5}"
    answer = noise.ask(
        "Which?",
        temperature=0 if seed is None else 1,
        seed=seed,
        constraint=Constraint.regex(pattern),
        repetition_penalty=10,
        frequency_penalty=2,
        presence_penalty=2,
        logit_bias=against,
    )
    assert re.fullmatch(pattern, answer.text)
    assert answer.finish_reason == "stop"
    assert against.keys() & set(answer.token_ids)


def test_an_answer_that_is_cut_off(noise):
    constraint = Constraint.json_schema(PERSON)
    whole = noise.ask("Who?", max_tokens=600, constraint=constraint)
    cut = noise.ask("Who?", max_tokens=5, constraint=constraint)
    assert cut.finish_reason == "length"
    assert cut.token_ids == whole.token_ids[:5]
    last = noise.ask("Who?", max_tokens=len(whole.token_ids), constraint=constraint)
    assert (last.finish_reason, last.text) == ("stop", whole.text)


def test_the_turn_ends_only_where_the_text_may(tiny):
    """Here the text may end or go on: the model chooses, by a token that ends its turn."""
    tokenizer, stop_ids = tiny.prompts.tokenizer, tiny.prompts.stop_ids
    mask = TokenMasks(tokenizer, stop_ids).start(Constraint.regex("a+b?"))
    logits = np.zeros(tokenizer.get_vocab_size() + 9, np.float32)  # ids that are no token

    def allowed():
        return set(np.flatnonzero(np.isfinite(mask.apply(logits))))

    def token(text):
        [token_id] = tokenizer.encode(text, add_special_tokens=False).ids
        return token_id

    assert token("a") in allowed()
    assert not stop_ids & allowed()
    mask.accept(token("a"))
    assert {token("a"), token("b"), *stop_ids} <= allowed()
    assert not mask.complete
    mask.accept(token("b"))
    assert allowed() == stop_ids
    assert mask.complete
    assert logits.max() == logits.min() == 0  # they are the engine's


def test_text_has_no_control_tokens(tiny):
    mask = TokenMasks(tiny.prompts.tokenizer, tiny.prompts.stop_ids).start(Constraint.regex(".*"))
    tokens = tiny.prompts.tokenizer.get_added_tokens_decoder()
    special = {token_id for token_id, token in tokens.items() if token.special}
    logits = mask.apply(np.zeros(tiny.prompts.tokenizer.get_vocab_size(), np.float32))
    assert special > tiny.prompts.stop_ids
    assert special & set(np.flatnonzero(np.isfinite(logits))) == tiny.prompts.stop_ids


def test_the_next_turn_continues_the_cache(noise):
    chat = noise.chat()
    first = chat.ask("Who?", max_tokens=600, constraint=Constraint.json_schema(PERSON))
    second = chat.ask("And?", max_tokens=600, constraint=Constraint.json_schema(PERSON))
    said = first.usage.prompt_tokens + first.usage.completion_tokens
    assert said - 1 <= second.usage.cached_tokens <= said
    assert_person(second.text)
    assert chat.ask("And?", max_tokens=4).usage.cached_tokens > said  # and the state is gone


def test_drafts_obey_too(mini_checkpoint, monkeypatch):
    """Lists of equal numbers are drafted, and the constraint ends them."""
    items = {"type": "array", "items": {"enum": [12345]}, "minItems": 9, "maxItems": 9}
    constraint = Constraint.json_schema(items)
    model = edgevl.load(mini_checkpoint("mini-qwen3"), engine="reference")
    plain = model.ask("?", max_tokens=400, constraint=constraint)
    drafted = []
    extend = model.engine.extend
    monkeypatch.setattr(
        model.engine, "extend", lambda sequence, ids: drafted.append(ids) or extend(sequence, ids)
    )
    monkeypatch.setattr(model.engine, "max_draft", 7, raising=False)
    answer = model.ask("?", max_tokens=400, constraint=constraint)
    assert drafted
    assert answer.token_ids == plain.token_ids
    assert json.loads(answer.text) == [12345] * 9


def test_threads_and_forms_do_not_mix(noise):
    forms = ["a{3}", "b{5}", "c{7}", "d{9}"] * 2
    said = dict.fromkeys(range(len(forms)))

    def ask(index):
        said[index] = noise.ask("?", constraint=Constraint.regex(forms[index])).text

    threads = [threading.Thread(target=ask, args=(index,)) for index in said]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [said[i] for i in said] == ["aaa", "bbbbb", "ccccccc", "ddddddddd"] * 2


def test_an_engine_with_few_logits(noise, monkeypatch):
    """A board may give only its likeliest tokens: -inf stands for the others."""
    decode = noise.engine.decode

    def likeliest(sequences, token_ids):
        logits = decode(sequences, token_ids).copy()
        logits[logits < logits.max()] = -np.inf
        return logits

    monkeypatch.setattr(noise.engine, "decode", likeliest)
    chat = noise.chat()
    with pytest.raises(EdgeVLError, match=r"only the likeliest tokens.*post-topk"):
        chat.ask("?", constraint=Constraint.json_schema(PERSON))
    # The last token is not needed to know that the answer is complete.
    assert noise.ask("?", constraint=Constraint.regex("[ -~]")).finish_reason == "stop"


def test_a_form_that_no_text_has(noise):
    endless = {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}
    with pytest.raises(EdgeVLError, match="no text can meet it"):
        noise.ask("?", constraint=Constraint.json_schema(endless))


@pytest.mark.parametrize(
    ("schema", "says"),
    [
        ({"not": {"type": "string"}}, r'\["not"\]'),
        ({"type": "foo"}, "foo"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "oneOf"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        # A schema cannot switch the checks off.
        ({"x-guidance": {"lenient": True}, "not": {}}, r'\["not"\]'),
        ({"type": "integer", "minimum": 5, "maximum": 3}, "greater than maximum"),
        ({"type": "string", "pattern": "(?=a)b"}, "look-ahead"),
        ({"$ref": "#/$defs/none"}, "/\\$defs/none"),
        ({"$ref": "http://localhost:9/schema"}, "does not fetch"),
        ({"$ref": "file:///etc/passwd"}, "does not fetch"),
        ('{"type": "object"', "not JSON"),
        ('{"const": "\\ud800"}', "not JSON"),
        ({"const": float("nan")}, "not JSON"),
        ({"const": object()}, "not JSON"),
        ({"type": "object", "minProperties": ["x" * 96 + "汉"]}, "llguidance fails"),
        ("[1]", "must be an object"),
        ("null", "is null: it must be an object"),
        ("[" * 100_000, "levels"),
        ('{"items":' * 70 + "{}" + "}" * 70, f"nested more than {MAX_SCHEMA_LEVELS} levels"),
        ({"const": "x" * MAX_CONSTRAINT_BYTES}, "bytes: the limit is"),
    ],
)
def test_refused_schemas(schema, says):
    with pytest.raises(PromptError, match=f"^json_schema.*{says}") as raised:
        Constraint.json_schema(schema)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("pattern", "says"),
    [
        ("a|(", "unclosed group"),
        ("(?=a)b", "look-around"),
        (7, "a string"),
        ("\ud800", "Unicode"),
        ("x" * 200_000, "has"),
    ],
)
def test_refused_regular_expressions(pattern, says):
    with pytest.raises(PromptError, match=f"^regex.*{says}"):
        Constraint.regex(pattern)


def test_too_complex_to_follow(noise):
    properties = {f"p{i}": {"type": "string", "pattern": "^[a-z]{3}$"} for i in range(2000)}
    schema = {"type": "object", "properties": properties}
    with pytest.raises(EdgeVLError, match=r"^constraint: .*; simplify it$") as raised:
        noise.ask("?", constraint=Constraint.json_schema(schema))
    assert len(str(raised.value)) < 400


@pytest.mark.parametrize(
    ("schema", "start", "most"),
    [
        ({"type": "integer"}, "", 19),  # as a 64-bit integer has
        ({"type": "integer"}, "-", 19),
        ({"type": "number"}, "", 19),
        ({"type": "number"}, "0.", 19),
        ({"type": "number", "minimum": 0, "maximum": 1}, "0.", 19),
        ({"type": "number"}, "1e", 2),  # larger ones are no doubles
        ({"type": "number"}, "1.5E-", 2),
        ({"type": "array"}, "[1,2.5, ", 19),
        ({"type": "object"}, '{"a \\"1": true, "e": ', 19),
        ({"type": "string"}, '"', None),
        ({"type": "object"}, '{"a": "\\\\\\"', None),
        # What the schema itself wants longer.
        ({"enum": [10**22]}, "", 23),
    ],
)
def test_numbers_end(tiny, schema, start, most):
    """A model that repeats a digit does not do so until it is out of tokens."""
    tokenizer = tiny.prompts.tokenizer
    mask = TokenMasks(tokenizer, tiny.prompts.stop_ids).start(Constraint.json_schema(schema))

    def token(text):
        [token_id] = tokenizer.encode(text, add_special_tokens=False).ids
        return token_id

    logits = np.zeros(tokenizer.get_vocab_size(), np.float32)
    for token_id in tokenizer.encode(start, add_special_tokens=False).ids:
        assert np.isfinite(mask.apply(logits)[token_id])
        mask.accept(token_id)
    one, zero = token("1"), token("0")
    count = 0
    while count < 40:
        masked = mask.apply(logits)
        digit = next((digit for digit in (one, zero) if np.isfinite(masked[digit])), None)
        if digit is None:
            break
        mask.accept(digit)
        count += 1
    assert count == (most or 40)
    assert np.isfinite(masked).any()


def test_regular_expressions_say_themselves_how_long(tiny):
    said = tiny.ask("?", constraint=Constraint.regex("1{30}"))
    assert said.text == "1" * 30
    mask = TokenMasks(tiny.prompts.tokenizer, tiny.prompts.stop_ids)
    mask = mask.start(Constraint.regex("1+"))
    [one] = tiny.prompts.tokenizer.encode("1", add_special_tokens=False).ids
    for _ in range(40):
        assert np.isfinite(mask.apply(np.zeros(one + 1, np.float32))[one])
        mask.accept(one)


def test_calls_or_an_object(noise):
    """Before its first token an answer may be either; then it is that."""
    tools = [Tool("now", "", None), Tool("f", "", {"properties": {"x": {"enum": [1]}}})]
    constraint = Constraint.tool_calls(
        tools, several=True, otherwise=Constraint.json_schema({"enum": [{"n": 1}]})
    )
    kinds = set()
    for seed in range(12):
        answer = noise.ask("?", max_tokens=400, temperature=1, seed=seed, constraint=constraint)
        text, calls = edgevl.split_tool_calls(answer.text)
        if answer.finish_reason != "stop":
            continue
        assert bool(calls) != bool(text)
        assert {call.name for call in calls} <= {"now", "f"}
        assert not text or json.loads(text) == {"n": 1}
        kinds.add(bool(calls))
    assert kinds == {True, False}


def test_deepest_schema_that_is_allowed():
    levels = MAX_SCHEMA_LEVELS - 1
    Constraint.json_schema('{"items":' * levels + "{}" + "}" * levels)


def test_misuse(noise):
    with pytest.raises(PromptError, match=r"^constraint is \{\}: it must be an edgevl.Constraint"):
        noise.ask("?", constraint={})
    with pytest.raises(PromptError, match=r"^constraint: .*thinking"):
        noise.ask("?", thinking=True, constraint=Constraint.json_object())
    with pytest.raises(PromptError, match=r"^constraint: "):
        noise.ask("?", constraint=Constraint("start: nothing"))


def test_a_missing_library_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(EdgeVLError, match=r"pip install 'edgevl\[constrained\]'"):
        Constraint.json_object()
