"""Answers with drafts are what the model says, whatever is drafted and wherever they end."""

from contextlib import closing

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgevl.checkpoint import Checkpoint
from edgevl.engine.base import Engine, Sequence
from edgevl.errors import EdgeVLError
from edgevl.generate import Model
from edgevl.generate.sampling import Sampler, SamplingParams
from edgevl.generate.speculation import Drafts
from edgevl.preprocess import Prompt, PromptEncoder

VOCABULARY = 600
#: What the model says after tokens that are not its own.
NONSENSE = 599


class Scripted(Engine):
    """Says what a script says, as long as the tokens before are the prompt and the script's."""

    max_context, chunk, max_draft = 4096, 128, 7

    def __init__(self):
        super().__init__()
        self.script = []
        self.cache = []  # of the one sequence
        self.extended = []

    def new_sequence(self):
        return Sequence()

    def _encode(self, pixels):
        raise NotImplementedError

    def embed(self, token_ids):
        return token_ids[:, None].astype(np.float32)

    def _prefill(self, sequence, embeddings):
        return [self.append(sequence, int(token_id)) for token_id in embeddings[:, 0]][-1]

    def _decode(self, sequences, token_ids):
        return np.array([self.append(sequences[0], token_ids[0])])

    def _extend(self, sequence, token_ids):
        self.extended.append(list(token_ids))
        return np.array([self.append(sequence, token_id) for token_id in token_ids])

    def append(self, sequence, token_id):
        self.cache[sequence.length :] = [token_id]
        sequence.length += 1
        right = self.cache == self.script[: sequence.length]
        logits = np.zeros(VOCABULARY, np.float32)
        logits[self.script[sequence.length] if right else NONSENSE] = 1
        return logits


@pytest.fixture(scope="module")
def prompts(mini_checkpoint):
    return PromptEncoder(Checkpoint.open(mini_checkpoint("mini-qwen3")))


@pytest.fixture(scope="module")
def stop(prompts):
    return prompts.tokenizer.token_to_id("<|im_end|>")


@pytest.fixture(scope="module", autouse=True)
def every_draft():
    """Drafts are never given up: each one counts as a success."""
    learn = Drafts.learn
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Drafts, "learn", lambda self, *args: learn(self, 1, 2, 0.0))
        yield


def pieces_of(model, prompt, said, max_tokens):
    """Start the answer ``said`` to ``prompt``."""
    # What the model would say after its answer shows up if anything asks for it.
    model.engine.script = [*prompt, *said, *[NONSENSE] * 20]
    params = SamplingParams(max_tokens=max_tokens)
    return model.run(Prompt(np.array(prompt), ()), params, 0.0)


def answer_of(*args):
    """Return the answer and the text that was streamed."""
    pieces, text = pieces_of(*args), ""
    while True:
        try:
            text += next(pieces)
        except StopIteration as end:
            return end.value, text


def held(model):
    """Return the tokens in the cache."""
    return model.engine.cache[: model._rounds.slots.first.sequence.length]


# Few different tokens: drafts are frequent, and right or wrong at any place.
FEW = st.lists(st.integers(64, 66), min_size=1, max_size=40)


@given(prompt=FEW, said=FEW, max_tokens=st.integers(1, 50), ends=st.integers(0, 40))
def test_any_answer(prompts, stop, prompt, said, max_tokens, ends):
    prompt.insert(min(ends, len(prompt)), stop)  # so that drafts have it too
    model = Model(None, Scripted(), prompts)
    answer, text = answer_of(model, prompt, [*said, stop], max_tokens)
    assert answer.token_ids == tuple(said[:max_tokens])
    assert answer.finish_reason == ("stop" if len(said) < max_tokens else "length")
    assert answer.text == text == prompts.tokenizer.decode(said[:max_tokens])
    # All but the last token have been computed, the drafts have been taken back.
    computed = len(said) if answer.finish_reason == "stop" else max_tokens - 1
    assert held(model) == [*prompt, *said[:computed]]


TEXT = [*range(70, 90)]


def test_the_end_of_the_turn_inside_a_draft(prompts, stop):
    prompt = [1, *TEXT, stop, 2, 3, 4, 5, 6, 1]
    model = Model(None, Scripted(), prompts)
    answer, _ = answer_of(model, prompt, [*TEXT, stop], 100)
    assert answer.finish_reason == "stop"
    assert list(answer.token_ids) == TEXT
    assert any(stop in draft[1:-1] for draft in model.engine.extended)
    assert held(model) == [*prompt, *TEXT]


@pytest.mark.parametrize("at", range(1, 20))
def test_what_was_chosen_before_a_failure_is_given(prompts, monkeypatch, at):
    """As it would be without drafts: an error comes with the token that it is about."""
    choose = Sampler.choose
    left = iter(range(at))

    def failing(self, logits):
        if next(left, None) is None:
            raise EdgeVLError("no")
        return choose(self, logits)

    monkeypatch.setattr(Sampler, "choose", failing)
    model = Model(None, Scripted(), prompts)
    given = []
    with pytest.raises(EdgeVLError, match="no"):
        given.extend(pieces_of(model, [1, *TEXT, 2, 3, 1], TEXT, 20))
    assert "".join(given) == prompts.tokenizer.decode(TEXT[:at])


@pytest.mark.parametrize("max_tokens", range(1, 21))
def test_no_draft_goes_beyond_the_limit(prompts, max_tokens):
    prompt = [1, *TEXT, 2, 3, 1]
    model = Model(None, Scripted(), prompts)
    answer, _ = answer_of(model, prompt, TEXT, max_tokens)
    assert list(answer.token_ids) == TEXT[:max_tokens]
    assert answer.finish_reason == "length"
    assert held(model) == [*prompt, *TEXT][: len(prompt) + max_tokens - 1]
    computed = sum(map(len, model.engine.extended))
    assert computed <= max_tokens - 1


@pytest.mark.parametrize("read", range(1, 20))
def test_a_stream_that_is_closed_inside_a_draft(prompts, stop, read):
    prompt = [1, *TEXT, stop, 2, 3, 1]
    model = Model(None, Scripted(), prompts)
    with closing(pieces_of(model, prompt, [*TEXT, stop], 100)) as pieces:
        for _ in range(read):
            next(pieces)
    # The next turn goes on from what was read, whatever the cache holds beyond.
    following = [*prompt, *TEXT[: read - 1], stop, 4, 5, *TEXT[:3]]
    answer, _ = answer_of(model, following, [*TEXT[3:], stop], 100)
    assert list(answer.token_ids) == TEXT[3:]
    assert answer.usage.cached_tokens == len(prompt) + read - 1
    assert held(model) == [*following, *TEXT[3:]]
