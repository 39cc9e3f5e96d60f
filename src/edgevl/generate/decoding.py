"""One answer at a time, with one sequence of an engine."""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property

from edgevl.engine import base
from edgevl.engine.base import Engine, Floats
from edgevl.errors import ContextLengthError, EdgeVLError
from edgevl.generate.answer import Answer
from edgevl.generate.generation import Generation
from edgevl.generate.prefix import PrefixRunner, drain
from edgevl.generate.sampling import SamplingParams
from edgevl.generate.text import Piece
from edgevl.generate.token_mask import TokenMasks
from edgevl.preprocess import Prompt, PromptEncoder

#: Tokens of a given answer whose logits are computed at once: 78 MB with 151,936 in the vocabulary.
FORCED_BLOCK = 128


class AnswerGenerator:
    """Turns prompts into answers with one engine, one answer at a time.

    Attributes:
        engine: what computes.
        prompts: the tokenizer and the ids that end a turn.
        load_ms: passed on to every answer's timings.
    """

    def __init__(self, engine: Engine, prompts: PromptEncoder, load_ms: float) -> None:
        """Compute nothing yet."""
        self.engine = engine
        self.prompts = prompts
        self.load_ms = load_ms
        self._masks = TokenMasks(prompts.tokenizer, prompts.stop_ids)
        self._lock = threading.Lock()
        self._owner: int | None = None

    @cached_property
    def _runner(self) -> PrefixRunner:
        # Made when it is needed: an NPU has but one sequence, which may be a scheduler's.
        return PrefixRunner(self.engine)

    @property
    def max_context(self) -> int:
        """Most tokens of prompt and answer."""
        return self.engine.max_context

    def run(
        self, prompt: Prompt, params: SamplingParams, started: float
    ) -> Generator[Piece, None, Answer]:
        """Yield the answer's text as it comes; return the answer.

        Another thread's answer is waited for.

        Args:
            prompt: what to answer; shorter than the engine's context.
            params: how.
            started: ``time.perf_counter()`` when the question was asked.

        Raises:
            EdgeVLError: this thread has an answer of this model under way, which could never end.
        """
        with self._turn():
            return (yield from self._run(prompt, params, started))

    def score(self, prompt: Prompt, token_ids: Sequence[int]) -> Generator[Floats, None, None]:
        """Yield the logits with which a given answer would be generated (teacher forcing).

        Those of each of ``token_ids`` come first, then those of the token after them: in blocks,
        float32 [T, V], which the engine's next call overwrites.

        Args:
            prompt: what is answered.
            token_ids: the answer.

        Raises:
            ContextLengthError: prompt and answer exceed the engine's context.
            EdgeVLError: this thread has an answer of this model under way.
        """
        length = len(prompt.token_ids) + len(token_ids)
        if length > self.engine.max_context:
            raise ContextLengthError(
                f"prompt and answer are {length} tokens, but the context holds "
                f"{self.engine.max_context}: let answers be shorter, or use fewer tiles (max_tiles)"
            )
        with self._turn():
            yield drain(self._runner.prefill(prompt)).logits[None]
            for begin in range(0, len(token_ids), FORCED_BLOCK):
                yield self._runner.extend(list(token_ids[begin : begin + FORCED_BLOCK]))

    @contextmanager
    def sequence(self) -> Iterator[base.Sequence]:
        """See `Model.sequence`."""
        with self._turn():
            self._runner.truncate(0)
            try:
                yield self._runner.sequence
            finally:
                self._runner.truncate(0)

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """Have the engine to oneself; wait for other threads."""
        thread = threading.get_ident()
        if self._owner == thread:
            raise EdgeVLError("an answer is still being streamed: read it to its end or close it")
        with self._lock:
            self._owner = thread
            try:
                yield
            finally:
                self._owner = None

    def embed(self, prompt: Prompt) -> Floats:
        """Return what the decoder reads for ``prompt``, float32 [T, H]; the cache stays as it is.

        Not from between the pieces of an answer that this thread has under way: it would wait for
        ever.
        """
        with self._lock:
            return self._runner.embed(prompt)

    def _run(
        self, prompt: Prompt, params: SamplingParams, started: float
    ) -> Generator[Piece, None, Answer]:
        generation = Generation(
            self.prompts, self._masks, prompt, params, self.engine.max_context, started
        )
        yield from drain(generation.prefill(self._runner)).pieces
        while not generation.finish_reason:
            yield from generation.step(self._runner).pieces
        return generation.answer(self.load_ms)
