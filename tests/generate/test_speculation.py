"""Drafts: where they come from, when they are given up, and that answers stay the same."""

import json
import queue

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import edgevl
from edgevl import Constraint
from edgevl.engine import native_missing
from edgevl.generate import SamplingParams, speculation
from edgevl.generate.generation import Delta, Generation
from edgevl.generate.rounds import MOST_DRAFTED, Rounds
from edgevl.generate.scheduler import Scheduler
from edgevl.generate.speculation import FIRST_DRAFT, MAX_PAUSE, AnswerPool, Drafts, StepCosts
from edgevl.preprocess import Message

ENGINES = [
    "reference",
    pytest.param(
        "cpu", marks=pytest.mark.skipif(bool(native_missing()), reason="no native engine")
    ),
]


def confident(tokens, max_draft):
    """Return a lookup whose first draft was right, so that the next may be longer."""
    lookup = Drafts(tokens, max_draft)
    lookup.learn(1, 2)
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
        lookup.learn(drafted, gained)
        assert len(lookup.draft(99)) == following
    lookup.learn(0, 1)  # a plain step says nothing of drafts
    assert len(lookup.draft(99)) == 2


def test_engines_without_it_get_no_draft():
    assert Drafts([1, 2, 3, 1, 2, 3, 1, 2], 0).draft(9) == []


def drafts_of(lookup, opportunities, gained):
    """Count drafts among some opportunities, each giving ``gained`` tokens for half a step more."""
    count = 0
    for _ in range(opportunities):
        drafted = bool(lookup.draft(4))
        count += drafted
        lookup.learn(4 * drafted, gained if drafted else 1, 10, 5 / 4)
    return count


def test_it_stops_where_it_does_not_pay_and_comes_back():
    lookup = Drafts([1, 2, 3] * 3, 4)
    assert drafts_of(lookup, 100, 3) == 100  # three tokens in the time of one and a half
    few = drafts_of(lookup, 1000, 1)
    assert few < 40
    assert drafts_of(lookup, 2 * MAX_PAUSE, 3) > MAX_PAUSE // 2
    assert drafts_of(lookup, 100, 3) == 100


def test_what_a_step_takes_is_known_of_those_around_it():
    costs = StepCosts()
    assert costs.of(1) is None
    costs.learn(4, 10.0)
    assert costs.of(1) is costs.of(5) is None
    costs.learn(12, 26.0)
    assert [costs.of(tokens) for tokens in (4, 5, 8, 12)] == [10.0, 12.0, 18.0, 26.0]
    for _ in range(99):
        costs.learn(4, 18.0)
    assert costs.of(8) == pytest.approx(22.0)


def test_what_is_forced_comes_first_and_is_looked_up_from():
    drafts = confident([1, 2, 3, 4, 5, 6, 7, 8, 1, 2], 4)
    assert drafts.draft(9, [3, 4]) == [3, 4, 5, 6]
    assert drafts.draft(9, [9, 9]) == [9, 9]
    assert drafts.draft(9, [6, 7]) == [6, 7]  # which are not telling enough by themselves
    assert drafts.draft(3, [3, 4]) == [3, 4, 5]
    assert drafts.draft(1, [3, 4]) == [3]
    assert drafts.draft(9, [3, 4], 1) == [3, 4, 5]
    assert drafts.draft(9, [3, 4], 0) == [3, 4]
    assert Drafts([1, 2, 3], 0).draft(9, [2, 3]) == []


def test_forced_tokens_are_drafted_whatever_looking_up_gains():
    drafts = Drafts([1, 2, 3, 1, 2, 9, 1, 2], 4)
    while drafts.draft(9):  # until it pauses
        drafts.learn(2, 1, 10, 10)
    for _ in range(9):
        assert drafts.draft(9, [7, 7]) == [7, 7]
        drafts.learn(2, 3, 10, 2.5)


def test_each_kind_is_judged_by_its_own_tokens():
    """Forced tokens that are right do not keep up looking up what is wrong; nor the other way."""
    drafts = Drafts([1, 2, 3, 4, 5, 6, 1, 2], 4)
    looked_up = 0
    for _ in range(100):
        draft = drafts.draft(9, [3, 4])
        looked_up += draft == [3, 4, 5, 6]
        drafts.learn(len(draft), 3, 10, 3)
    assert draft[:2] == [3, 4]
    assert looked_up < 20
    drafts = Drafts([1, 2, 3, 4, 5, 6, 7, 2, 3], 4)
    forced = 0
    for _ in range(100):
        draft = drafts.draft(9, [8, 8])
        forced += draft[:1] == [8]
        drafts.learn(len(draft), 1 if draft[0] == 8 else 1 + len(draft), 10, 3)
    assert forced < 20


def test_a_pool_finds_what_answers_said():
    pool = AnswerPool(64)
    pool.add([0, 1, 2, 3, 4], [5, 6, 7])
    pool.add([1, 2, 3, 9], [5])
    assert pool.find([8, 1, 2, 3, 4], 9) == [5, 6, 7]  # as far as the answer goes
    assert pool.find([2, 3, 4, 5], 1) == [6]
    assert pool.find([1, 2, 3, 9], 9) == [5]
    assert pool.find([4, 5, 6, 7], 9) == []
    assert pool.find([0, 1, 2, 3], 9) == []  # that was the prompt
    assert pool.find([3, 4, 5], 9) == []
    pool.add([1, 2, 3, 4], [8, 8])
    assert pool.find([1, 2, 3, 4], 9) == [8, 8]  # the latest


@given(
    answers=st.lists(st.lists(st.integers(0, 2), max_size=20), max_size=20),
    wanted=st.lists(st.integers(0, 2), min_size=4, max_size=4),
    most=st.integers(1, 9),
)
def test_a_pool_is_bounded_and_makes_nothing_up(answers, wanted, most):
    pool = AnswerPool(32)
    size = len(pool._tokens), len(pool._places)
    for answer in answers:
        pool.add(answer[:6], answer[6:])
    assert (len(pool._tokens), len(pool._places)) == size
    found = pool.find(wanted, most)
    assert len(found) <= most
    text = [*wanted, *found]
    assert not found or any(
        text == answer[i : i + len(text)] for answer in answers for i in range(2, len(answer))
    )


def test_own_words_come_before_those_of_others():
    pool = AnswerPool()
    pool.add([1, 2, 3, 4], [50, 51])
    assert Drafts([1, 2, 3, 4], 4, pool).draft(9) == [50, 51]
    assert Drafts([3, 4, 60, 1, 2, 3, 4], 4, pool).draft(9) == [60, 1]
    assert Drafts([0, 1], 4, pool).draft(9, [2, 3, 4]) == [2, 3, 4, 50]
    assert Drafts([0, 1], 0, pool).draft(9) == []


@pytest.fixture(params=ENGINES)
def model(request, mini_checkpoint):
    model = edgevl.load(mini_checkpoint("mini-qwen3"), engine=request.param)
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
        # Of two tokens, so that what is drawn repeats what was drawn.
        {"temperature": 1, "seed": 1, "logit_bias": {40: 100, 41: 100}},
        {"temperature": 1, "seed": 2, "logit_bias": {40: 99, 41: 100}, "presence_penalty": 2},
        {"temperature": 2, "seed": 3, "logit_bias": {40: 100, 41: 100}, "min_p": 0.1, "top_k": 5},
        {"temperature": 1, "seed": 4, "logit_bias": {40: 100, 41: 100}, "top_p": 0.9},
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


ITEM = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 3}, "kind": {"enum": ["cat", "dog"]}},
    "required": ["name", "kind"],
}
ITEMS = Constraint.json_schema(
    {
        "type": "object",
        "properties": {
            "items": {"type": "array", "items": ITEM, "minItems": 3, "maxItems": 5},
            "note": {"const": "e\u0301 and <|im_end|>"},  # what llguidance cannot encode
        },
        "required": ["items", "note"],
    }
)


@pytest.mark.parametrize(
    "sampling",
    [
        {},
        {"repetition_penalty": 1.2, "frequency_penalty": 0.1},
        {"temperature": 1, "seed": 1},
        {"temperature": 5, "seed": 2, "top_p": 0.9, "min_p": 0.01},
        {"max_tokens": 31},
        {"stop": '"kind'},
    ],
)
def test_constrained_answers_stay_the_same(model, extended, sampling):
    sampling = {"max_tokens": 400, "constraint": ITEMS} | sampling
    with_drafts = [model.ask(QUESTION, **sampling) for _ in range(2)]  # the second knows the first
    assert extended
    if sampling["max_tokens"] == 400 and "stop" not in sampling:
        json.loads(with_drafts[0].text)
        passes = with_drafts[1].usage.completion_tokens - sum(extended) + len(extended)
        assert passes < with_drafts[1].usage.completion_tokens
    model.engine.max_draft = 0
    plain = model.ask(QUESTION, **sampling)
    for answer in with_drafts:
        assert answer.token_ids == plain.token_ids
        assert answer.finish_reason == plain.finish_reason


def test_what_the_form_does_not_allow_is_not_drafted(model, monkeypatch):
    """After "bc" comes a comma in the question, which the answer must not have."""
    computed = []
    extend = model.engine.extend
    monkeypatch.setattr(
        model.engine, "extend", lambda sequence, ids: computed.append(ids) or extend(sequence, ids)
    )
    monkeypatch.setattr(Drafts, "learn", lambda *args: None)
    letters = Constraint.regex("[abc]{60}")
    model.ask("abc, abc, abc, abc,", constraint=letters, temperature=50, seed=1, max_tokens=100)
    assert computed
    text = "".join(model.prompts.tokenizer.decode(ids) for ids in computed)
    assert set(text) <= set("abc")


@pytest.mark.parametrize("constraint", [None, ITEMS])
def test_log_probabilities_stay_the_same(model, extended, constraint):
    def deltas(max_draft):
        model.engine.max_draft = max_draft
        rounds = Rounds(model.engine, 1)
        params = SamplingParams(max_tokens=60, constraint=constraint)
        prompt = model.prompts.encode([Message.user(QUESTION)])
        answer = Generation(
            model.prompts, model.masks, prompt, params, model.max_context, 0.0, top_logprobs=2
        )
        rounds.start(answer)
        gains = []
        while not answer.finish_reason:
            gains += [gain for _, gain in rounds.step()]
        return [logprobs for gain in gains for logprobs in gain.logprobs]

    drafted = deltas(7)
    assert extended
    for ours, plain in zip(drafted, deltas(0), strict=True):
        assert ours.token_id == plain.token_id
        assert [token_id for token_id, _ in ours.top] == [token_id for token_id, _ in plain.top]
        # NumPy's sums depend on how many rows there are.
        tolerance = 0 if model.engine.threads else 1e-3
        assert ours.logprob == pytest.approx(plain.logprob, abs=tolerance)


def test_forced_tokens_cost_one_step(model, extended):
    """Where the form leaves no choice, an answer of T tokens takes T / 8 steps."""
    answer = model.ask(QUESTION, constraint=Constraint.regex("The one and only answer: 42[.]"))
    tokens = answer.usage.completion_tokens
    assert sum(extended) <= tokens  # none was in vain but the last
    assert len(extended) == -(-(tokens - 1) // 8)


def test_a_model_remembers_what_it_answered(model, extended):
    """As for the lines of a batch, one after the other."""
    sampling = {"max_tokens": 30, "temperature": 50}
    first = model.ask("Go on", seed=2, **sampling)
    assert not extended  # of so many tokens none comes again
    model.ask("And another", seed=1, **sampling)
    again = model.ask("Go on", seed=2, **sampling)
    assert again.token_ids == first.token_ids
    assert extended == [8, 8, 8, 5]


def test_requests_of_a_server_share_what_they_said(mini_checkpoint, monkeypatch):
    model = edgevl.load(mini_checkpoint("mini-qwen3"), engine="reference")
    model.engine.max_draft = 7
    found = []
    find = AnswerPool.find
    monkeypatch.setattr(
        AnswerPool,
        "find",
        lambda pool, tokens, most: found.append(find(pool, tokens, most)) or found[-1],
    )
    scheduler = Scheduler(model)
    events = queue.SimpleQueue()
    said = []
    try:
        for _ in range(2):
            prompt = model.prompts.encode([Message.user("Go on")])
            params = SamplingParams(max_tokens=20, temperature=50, seed=5)
            scheduler.submit(prompt, params, events.put)
            while isinstance(event := events.get(timeout=60), Delta):
                pass
            said.append(event.token_ids)
            assert any(found) == (len(said) == 2)
    finally:
        scheduler.close(0)
    assert said[0] == said[1]
    drafted = {token_id for draft in found for token_id in draft}
    assert drafted <= set(said[0])


def answers_together(model, questions):
    """Answer several questions at once: -> their tokens, and how many each round computed."""
    computed = []
    rounds = Rounds(model.engine, len(questions))
    answers = []
    for question, sampling in questions:
        prompt = model.prompts.encode([Message.user(question)])
        params = SamplingParams(**{"max_tokens": 60, **sampling})
        answers.append(
            Generation(model.prompts, model.masks, prompt, params, model.max_context, 0.0)
        )
    waiting = list(answers)
    while any(not answer.finish_reason for answer in answers):
        if waiting and rounds.start(waiting[0]):
            waiting.pop(0)
        before = model.engine.timings().decode_tokens
        for _, gain in rounds.step():
            assert not isinstance(gain, Exception), gain
        computed.append(model.engine.timings().decode_tokens - before)
    return [answer.answer(0.0).token_ids for answer in answers], computed


def test_answers_together_are_drafted_and_stay_the_same(model, monkeypatch):
    """Forms, draws and words of their own; some are read while others are answered."""
    if not model.engine.batched:
        pytest.skip("it answers one question at a time")
    monkeypatch.setattr(Drafts, "learn", lambda *args: None)
    monkeypatch.setattr(speculation, "FIRST_DRAFT", 7)
    model.engine.chunk = 16  # so that prompts are read beside answers
    questions = [
        (QUESTION, {}),
        ("List them", {"constraint": ITEMS, "max_tokens": 200}),
        (QUESTION + " and then?", {"temperature": 1, "seed": 1, "logit_bias": {40: 100, 41: 100}}),
        ("Say it", {"constraint": Constraint.regex("The one and only answer: 42[.]")}),
        ("And again", {"constraint": ITEMS, "max_tokens": 90, "temperature": 1, "seed": 3}),
    ]
    drafted, rounds = answers_together(model, questions)
    model.engine.max_draft = 0
    plain, plain_rounds = answers_together(model, questions)
    assert drafted == plain
    assert len(rounds) < 0.8 * len(plain_rounds)
    assert max(plain_rounds) == len(questions)
    assert max(rounds) > 2 * len(questions)
    assert max(rounds) <= len(questions) + MOST_DRAFTED


def test_what_drafts_cost_several_answers_is_learned(model):
    """A token's share of a step without drafts, and what a step with them takes beyond it."""
    costs = Rounds(model.engine, 4)
    plain_ms, each_ms = costs._cost(4, 4, 0.020)
    assert plain_ms == 20.0
    plain_ms, each_ms = costs._cost(4, 12, 0.036)
    assert (plain_ms, each_ms) == (pytest.approx(5.0), pytest.approx(2.0))
    assert costs._cost(2, 8, 0.030)[0] is None  # nothing is known of so few
