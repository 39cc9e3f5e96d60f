"""Rounds, gone through by hand: whose turn it is, and what an interrupt leaves."""

import pytest

import edgevl
from edgevl.errors import EdgeVLError
from edgevl.generate.generation import Generation
from edgevl.generate.rounds import Rounds
from edgevl.generate.sampling import SamplingParams
from edgevl.generate.token_mask import TokenMasks
from edgevl.preprocess import Message


@pytest.fixture
def model(mini_checkpoint, monkeypatch):
    model = edgevl.load(mini_checkpoint("mini-qwen3", "internvl_chat"), threads=1)
    monkeypatch.setattr(model.prompts, "stop_ids", frozenset())
    model.engine.chunk = 8
    return model


def answering(model, text, **sampling):
    prompt = model.prompts.encode([Message.user(text)])
    masks = TokenMasks(model.prompts.tokenizer, model.prompts.stop_ids)
    params = SamplingParams(**sampling)
    return Generation(model.prompts, masks, prompt, params, model.max_context, started=0.0)


def raising(error):
    """Return what raises an error, whatever it is given."""

    def fail(*_):
        raise error

    return fail


def gains(rounds):
    """Go through a round: which answers gained something."""
    return [answer for answer, _ in rounds.step()]


def test_answers_go_on_while_a_prompt_is_read(model):
    model.engine.max_draft = 0  # a draft would take rows of the prompt
    rounds = Rounds(model.engine, 2)
    first = answering(model, "Go on", max_tokens=10**6)
    assert rounds.start(first)
    while not gains(rounds):
        pass
    second = answering(model, "word " * 30, max_tokens=10**6)
    assert rounds.start(second)
    length = second.left
    rounds_of_both = -(-length // 7)  # of the 8 rows of a pass, one is the answer's token
    for done in range(1, rounds_of_both):
        assert gains(rounds) == [first]
        assert second.left == length - 7 * done
    assert gains(rounds) == [second, first]
    assert gains(rounds) == [first, second]
    rounds.end(first)
    assert gains(rounds) == [second]


def test_a_whole_prompt_is_one_round(model):
    rounds = Rounds(model.engine, 1, whole_prompts=True)
    only = answering(model, "word " * 30, max_tokens=3)
    assert rounds.start(only)
    assert not rounds.start(answering(model, "x"))
    assert [gains(rounds) for _ in range(3)] == [[only]] * 3
    assert only.finish_reason == "length"
    assert rounds.under_way == []
    expected = model.ask("word " * 30, max_tokens=3)
    assert only.answer(0).token_ids == expected.token_ids


def test_an_answer_that_fails_has_ended(model, monkeypatch):
    rounds = Rounds(model.engine, 2)
    both = [answering(model, "Go on"), answering(model, "x")]
    for answer in both:
        assert rounds.start(answer)
    while len(set(gains(rounds))) < 2:  # both decode
        pass

    monkeypatch.setattr(model.engine, "decode", raising(EdgeVLError("no")))
    assert sorted(str(error) for _, error in rounds.step()) == ["no", "no"]
    assert rounds.under_way == []


def test_an_answer_that_fails_to_draft_ends_alone(model, monkeypatch):
    rounds = Rounds(model.engine, 2)
    first, second = both = [answering(model, "Go on"), answering(model, "x")]
    for answer in both:
        assert rounds.start(answer)
    while len(set(gains(rounds))) < 2:  # both decode
        pass
    monkeypatch.setattr(first, "following", raising(EdgeVLError("no")))
    gained = dict(rounds.step())
    assert str(gained[first]) == "no"
    assert gained[second].token_ids
    assert rounds.under_way == [second]
    monkeypatch.setattr(second, "following", raising(EdgeVLError("neither")))
    [(failed, error)] = rounds.step()
    assert (failed, str(error)) == (second, "neither")
    assert rounds.under_way == []


def test_a_prompt_that_fails_ends_no_other_answer(model, monkeypatch):
    expected = model.ask("Go on", max_tokens=20).token_ids
    rounds = Rounds(model.engine, 2)
    first, second = answering(model, "Go on", max_tokens=20), answering(model, "word " * 30)
    assert rounds.start(first)
    while not gains(rounds):
        pass
    assert rounds.start(second)
    with monkeypatch.context() as patch:
        patch.setattr(model.engine, "step", raising(MemoryError()))
        [(failed, _)] = rounds.step()
    assert failed is second
    assert rounds.under_way == [first]
    while rounds.under_way:
        gains(rounds)
    assert first.answer(0).token_ids == expected


def test_a_prompt_that_was_read_takes_no_memory(model):
    rounds = Rounds(model.engine, 1)
    answer = answering(model, "word " * 30, max_tokens=9)
    assert rounds.start(answer)
    while not gains(rounds):
        assert answer.unread is not None
    assert answer.unread is None


@pytest.mark.parametrize("at", [1, 2])
def test_an_interrupt_where_a_slot_is_taken_or_released_harms_nothing(model, monkeypatch, at):
    expected = model.ask("Go on", max_tokens=4).token_ids
    marked = []

    def mark(slot):
        marked.append(slot)
        if len(marked) == at:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(model._rounds.slots, "_mark", mark)
        with pytest.raises(KeyboardInterrupt):
            model.ask("Go on", max_tokens=4)
    assert model.ask("Go on", max_tokens=4).token_ids == expected
