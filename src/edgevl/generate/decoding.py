"""One answer: from a prompt to text, a token at a time."""

from __future__ import annotations

import threading
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager

from edgevl.engine.base import Engine, Floats
from edgevl.errors import ContextLengthError, EdgeVLError
from edgevl.generate.answer import Answer, Timings, Usage
from edgevl.generate.prefix import PrefixRunner
from edgevl.generate.sampling import Sampler, SamplingParams
from edgevl.generate.speculation import PromptLookup
from edgevl.generate.text import Detokenizer, StopStrings, ThinkingSplitter
from edgevl.generate.token_mask import TokenMasks
from edgevl.preprocess import Prompt, PromptEncoder

#: Tokens of a given answer whose logits are computed at once: 78 MB with 151,936 in the vocabulary.
FORCED_BLOCK = 128


class Piece(str):
    """A piece of streamed text; ``thinking`` tells whether it stands in the thinking part."""

    thinking: bool
    __slots__ = ("thinking",)

    def __new__(cls, text: str, thinking: bool = False) -> Piece:
        """Make a piece."""
        piece = super().__new__(cls, text)
        piece.thinking = thinking
        return piece


class AnswerText:
    """Collects the text of an answer from its tokens and passes it on in pieces."""

    def __init__(self, prompts: PromptEncoder, params: SamplingParams) -> None:
        """Start an empty answer."""
        self._detokenizer = Detokenizer(prompts.tokenizer)
        self._stops = StopStrings(params.stop)
        self._splitter = ThinkingSplitter()
        self._parts: dict[bool, list[str]] = {False: [], True: []}

    @property
    def stopped(self) -> bool:
        """Whether a stop string has been reached."""
        return self._stops.found

    @property
    def text(self) -> str:
        """The answer so far, without thinking."""
        return "".join(self._parts[False])

    @property
    def thinking(self) -> str:
        """The thinking so far."""
        return "".join(self._parts[True]).strip()

    def add(self, token_id: int) -> Iterator[Piece]:
        """Take a token; yield the text that is now certain."""
        text = self._stops.add(self._detokenizer.add(token_id))
        yield from self._collect(self._splitter.add(text))

    def finish(self) -> Iterator[Piece]:
        """Yield what was held back, unless a stop string cut it off."""
        if not self.stopped:
            text = self._stops.add(self._detokenizer.finish())
            text += "" if self.stopped else self._stops.finish()
            yield from self._collect(self._splitter.add(text))
        yield from self._collect(self._splitter.finish())

    def _collect(self, pieces: Iterator[tuple[bool, str]]) -> Iterator[Piece]:
        for thinking, text in pieces:
            self._parts[thinking].append(text)
            yield Piece(text, thinking)


class AnswerGenerator:
    """Turns prompts into answers with one engine, one answer at a time.

    Attributes:
        engine: the engine; nothing else may move its cache.
        prompts: the tokenizer and the ids that end a turn.
        load_ms: passed on to every answer's timings.
    """

    def __init__(self, engine: Engine, prompts: PromptEncoder, load_ms: float) -> None:
        """Take charge of ``engine``."""
        self.engine = engine
        self.prompts = prompts
        self.load_ms = load_ms
        self._runner = PrefixRunner(engine)
        self._masks = TokenMasks(prompts.tokenizer, prompts.stop_ids)
        self._lock = threading.Lock()
        self._owner: int | None = None

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

    def force(self, prompt: Prompt, token_ids: Sequence[int]) -> Generator[Floats, None, None]:
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
            yield self._runner.prefill(prompt).logits[None]
            for begin in range(0, len(token_ids), FORCED_BLOCK):
                yield self._runner.extend(list(token_ids[begin : begin + FORCED_BLOCK]))

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

    def _step(self, token_id: int, room: int, sampler: Sampler, lookup: PromptLookup) -> list[int]:
        """Append a token, with a draft of what follows if there is one: -> the tokens after it.

        Args:
            token_id: the latest token of the answer.
            room: tokens that the answer may still have, at least 1.
            sampler: chooses them.
            lookup: drafts them.
        """
        begun = time.perf_counter()
        lookup.add(token_id)
        draft = lookup.draft(room - 1)
        if not draft:
            chosen = [sampler.choose(self._runner.decode(token_id))]
        else:
            chosen = []
            for logits, drafted in zip(
                self._runner.extend([token_id, *draft]), [*draft, None], strict=True
            ):
                chosen.append(sampler.choose(logits))
                if chosen[-1] != drafted or drafted in self.prompts.stop_ids:
                    break
            self._runner.drop(len(draft) + 1 - len(chosen))
            for accepted in chosen[:-1]:
                lookup.add(accepted)
        lookup.learn(len(draft), len(chosen), 1000 * (time.perf_counter() - begun))
        return chosen

    def _run(
        self, prompt: Prompt, params: SamplingParams, started: float
    ) -> Generator[Piece, None, Answer]:
        before = self.engine.timings()
        mask = self._masks.start(params.constraint) if params.constraint else None
        prefilled = self._runner.prefill(prompt)
        sampler = Sampler(params, prompt.token_ids.tolist(), mask)
        text = AnswerText(self.prompts, params)
        token_ids: list[int] = []
        room = min(params.max_tokens, self.engine.max_context - len(prompt.token_ids))
        finish_reason, steps, decode_ms = "length", 0, 0.0
        # Only for greedy answers: a seed promises the same draws, and logits that are computed
        # together differ in the last bits.
        max_draft = self.engine.max_draft if params.temperature == 0 else 0
        lookup = PromptLookup(prompt.token_ids.tolist(), max_draft)
        chosen = [sampler.choose(prefilled.logits)]
        ttft_ms = 1000 * (time.perf_counter() - started)
        while True:
            token_id = chosen.pop(0)
            if token_id in self.prompts.stop_ids:
                finish_reason = "stop"
                break
            token_ids.append(token_id)
            yield from text.add(token_id)
            if text.stopped or (sampler.complete and not chosen):
                finish_reason = "stop"
                break
            if len(token_ids) == room:
                break
            steps += 1
            if not chosen:
                # Timed without the yields: who reads the stream may take as long as they like.
                begun = time.perf_counter()
                chosen = self._step(token_id, room - len(token_ids), sampler, lookup)
                decode_ms += 1000 * (time.perf_counter() - begun)
        yield from text.finish()
        after = self.engine.timings()
        per_token_ms = decode_ms / steps if steps else 0.0
        return Answer(
            text=text.text,
            thinking=text.thinking,
            token_ids=tuple(token_ids),
            finish_reason=finish_reason,
            usage=Usage(
                prompt_tokens=len(prompt.token_ids),
                image_tokens=sum(span.length for span in prompt.images),
                completion_tokens=len(token_ids),
                cached_tokens=prefilled.cached_tokens,
            ),
            timings=Timings(
                load_ms=self.load_ms,
                vision_ms=after.vision_ms - before.vision_ms,
                prefill_ms=after.prefill_ms - before.prefill_ms,
                ttft_ms=ttft_ms,
                decode_ms_per_token=per_token_ms,
                decode_tokens_per_s=1000 / per_token_ms if per_token_ms else 0.0,
            ),
        )
