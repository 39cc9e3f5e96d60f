"""Prompt lookup: what it drafts, when it stops drafting, and that answers stay the same."""

import numpy as np
import pytest

import edgevl
from edgevl.engine import native_missing
from edgevl.generate import speculation
from edgevl.generate.speculation import FIRST_DRAFT, MAX_PAUSE, Drafts

ENGINES = [
    "reference",
    pytest.param(
        "cpu", marks=pytest.mark.skipif(bool(native_missing()), reason="no native engine")
    ),
]


def confident(tokens, max_draft):
    """Return a lookup whose first draft was right, so that the next may be longer."""
    lookup = Drafts(tokens, max_draft)
    lookup.learn(1, 2, 0.0)
    return lookup


def test_the_draft_is_what_followed_the_last_time():
    lookup = confident([1, 2, 3, 4, 5, 6, 1, 2, 3, 7, 8, 1, 2, 3], 4)
    assert lookup.draft(9) == [7, 8, 1, 2]
    assert lookup.draft(2) == [7, 8]
    assert lookup.draft(0) == []
    lookup.add(4)
    assert lookup.draft(9) == [5, 6, 1, 2]


def test_longer_matches_come_first():
    tokens = [1, 2, 3, 10, 9, 2, 3, 20, 1, 2, 3]
    assert Drafts(tokens, 1).draft(1) == [10]
    assert Drafts([*tokens[:-3], 5, 2, 3], 1).draft(1) == [20]
    assert Drafts([8, *tokens[:-3], 7, 1, 2, 3, 30, 8, 1, 2, 3], 1).draft(1) == [10]


@pytest.mark.parametrize("tokens", [[], [1], [1, 2, 3, 4], [1, 2, 3, 1, 3]])
def test_nothing_known_nothing_drafted(tokens):
    assert Drafts(tokens, 4).draft(4) == []


def test_a_repetition_continues_itself():
    assert confident([5, 5, 5], 4).draft(4) == [5]
    assert confident([1, 2, 1, 2, 1, 2], 4).draft(4) == [1, 2]


def test_drafts_grow_while_they_are_right_to_their_end():
    lookup = Drafts([*range(20), 0, 1, 2, 3], 9)
    assert len(lookup.draft(9)) == FIRST_DRAFT
    for drafted, gained, following in ((2, 3, 5), (5, 6, 9), (9, 10, 9), (9, 5, 5), (5, 1, 2)):
        lookup.learn(drafted, gained, 1.0)
        assert len(lookup.draft(99)) == following
    lookup.learn(0, 1, 1.0)  # a plain step says nothing of drafts
    assert len(lookup.draft(99)) == 2


def test_engines_without_it_get_no_draft():
    assert Drafts([1, 2, 3, 1, 2, 3, 1, 2], 0).draft(9) == []


def drafts_of(lookup, opportunities, gained, elapsed_ms):
    """Count drafts among some opportunities, each draft giving ``gained`` tokens."""
    count = 0
    for _ in range(opportunities):
        drafted = bool(lookup.draft(4))
        count += drafted
        lookup.learn(4 * drafted, gained if drafted else 1, elapsed_ms if drafted else 10)
    return count


def test_it_stops_where_it_does_not_pay_and_comes_back():
    lookup = Drafts([1, 2, 3] * 3, 4)
    lookup.learn(0, 1, 10)
    assert drafts_of(lookup, 100, 3, 15) == 100  # three tokens in the time of one and a half
    few = drafts_of(lookup, 1000, 1, 15)
    assert few < 40
    assert drafts_of(lookup, 2 * MAX_PAUSE, 3, 15) > MAX_PAUSE // 2
    assert drafts_of(lookup, 100, 3, 15) == 100


@pytest.fixture(params=ENGINES)
def model(request, mini_checkpoint):
    # INT4's steps of one and of several tokens agree to the last bit; INT8's do not.
    precision = "int4" if request.param == "cpu" else "auto"
    model = edgevl.load(mini_checkpoint("mini-qwen3"), engine=request.param, precision=precision)
    model.engine.max_draft = 7
    return model


@pytest.fixture
def extended(model, monkeypatch):
    """Numbers of tokens that the engine was given at once; every draft is made, and is long."""
    monkeypatch.setattr(Drafts, "learn", lambda *args: None)
    monkeypatch.setattr(speculation, "FIRST_DRAFT", 7)
    counts = []
    extend = model.engine.extend

    def count(sequence, token_ids):
        counts.append(len(token_ids))
        return extend(sequence, token_ids)

    monkeypatch.setattr(model.engine, "extend", count)
    return counts


QUESTION = "Repeat: one two three four, one two three four, one two three"


@pytest.mark.parametrize(
    "sampling",
    [
        {},
        {"repetition_penalty": 1.02},
        {"frequency_penalty": 0.005},
        {"presence_penalty": 0.02},
        {"frequency_penalty": -0.1, "presence_penalty": -2, "logit_bias": {40: 0.3, 41: -100}},
        {"temperature": 1, "top_p": 0},
        {"temperature": 1, "top_k": 1},
        {"max_tokens": 37},
        {"stop": "e"},
    ],
)
def test_answers_stay_the_same(model, extended, sampling):
    sampling = {"max_tokens": 150} | sampling
    with_drafts = model.ask(QUESTION, **sampling)
    turns = model.chat()
    turns.ask(QUESTION, **sampling)
    second = turns.ask("And again?", **sampling)
    if "stop" not in sampling:
        assert extended  # a random model soon repeats itself
    extended.clear()

    model.engine.max_draft = 0
    with model.sequence():  # which is empty afterwards
        pass
    plain = model.ask(QUESTION, **sampling)
    turns = model.chat()
    turns.ask(QUESTION, **sampling)
    assert plain.token_ids == with_drafts.token_ids
    assert plain.text == with_drafts.text
    assert plain.finish_reason == with_drafts.finish_reason
    assert turns.ask("And again?", **sampling).token_ids == second.token_ids
    assert not extended


def test_the_cache_holds_exactly_the_answer(model, extended):
    first = model.ask(QUESTION, max_tokens=60)
    assert extended
    kept = model._rounds.slots.first.sequence
    # All but the last token, which was never computed.
    assert kept.length == first.usage.prompt_tokens + first.usage.completion_tokens - 1
    logits = np.array(model.engine.decode([kept], [first.token_ids[-1]])[0])
    ids = [*model.prompts.encode([edgevl.preprocess.Message.user(QUESTION, [])]).token_ids]
    ids += first.token_ids
    fresh = model.engine.new_sequence()
    expected = model.engine.prefill(fresh, model.engine.embed(np.array(ids)))
    assert np.argmax(logits) == np.argmax(expected)
    assert np.linalg.norm(logits - expected) < 0.05 * np.linalg.norm(expected)


def test_a_limit_of_the_context_is_kept(mini_checkpoint, monkeypatch):
    monkeypatch.setattr(Drafts, "learn", lambda *args: None)
    monkeypatch.setattr(speculation, "FIRST_DRAFT", 7)
    for engine in ("reference", *(() if native_missing() else ("cpu",))):
        model = edgevl.load(mini_checkpoint("mini-qwen3"), engine, max_context=120)
        model.engine.max_draft = 7
        answer = model.ask(QUESTION, max_tokens=500)
        assert answer.finish_reason == "length"
        assert answer.usage.prompt_tokens + answer.usage.completion_tokens == 120


def test_drawn_answers_are_not_speculated(model, extended):
    model.ask(QUESTION, max_tokens=60, temperature=1.0, seed=3)
    assert not extended
