"""An answer: under way, what comes of the next logits, and what it has come to at the end."""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from edgevl.engine.base import Floats
from edgevl.errors import ContextLengthError
from edgevl.generate.prefix import Slot
from edgevl.generate.sampling import Sampler, SamplingParams, TokenLogprobs, token_logprobs
from edgevl.generate.speculation import LENGTHS, AnswerPool, Drafts
from edgevl.generate.text import AnswerText, Piece
from edgevl.generate.token_mask import TokenMask, TokenMasks
from edgevl.preprocess import Prompt, PromptEncoder


@dataclass(frozen=True)
class Usage:
    """Tokens of one answer.

    Attributes:
        prompt_tokens: the whole prompt: history, pictures, question.
        image_tokens: those of them that stand for pictures.
        completion_tokens: tokens generated, without the one that ended the turn.
        cached_tokens: prompt tokens that were in the cache, or on disk, already and cost nothing.
    """

    prompt_tokens: int
    image_tokens: int
    completion_tokens: int
    cached_tokens: int


@dataclass(frozen=True)
class Timings:
    """Where the time of one answer went, in milliseconds.

    Attributes:
        load_ms: loading the model, once.
        vision_ms: encoding the pictures that had not been encoded before.
        prefill_ms: computing the prompt tokens that were not cached.
        ttft_ms: from the question to the first token, everything included.
        decode_ms_per_token: mean over the tokens after the first; 0 if there was only one.
        decode_tokens_per_s: the same as a rate; 0 if there was only one.
    """

    load_ms: float
    vision_ms: float
    prefill_ms: float
    ttft_ms: float
    decode_ms_per_token: float
    decode_tokens_per_s: float


@dataclass(frozen=True)
class Answer:
    """One answer.

    Attributes:
        text: what the model says, without its thinking.
        thinking: what stood between ``<think>`` and ``</think>``; empty if it did not think.
        token_ids: the tokens generated, without the one that ended the turn.
        finish_reason: ``stop`` (end of turn, a stop string, or all that a constraint allows) or
            ``length`` (out of tokens).
        usage: token counts.
        timings: times.
    """

    text: str
    thinking: str
    token_ids: tuple[int, ...]
    finish_reason: str
    usage: Usage
    timings: Timings

    def __str__(self) -> str:
        """Return the text."""
        return self.text

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain types, for JSON; ``thinking`` only if there was some."""
        result = asdict(self) | {"token_ids": list(self.token_ids)}
        if not self.thinking:
            del result["thinking"]
        return result


@dataclass(frozen=True)
class Delta:
    """What a step added to an answer.

    Attributes:
        pieces: text that is now certain; characters may need several tokens.
        token_ids: its tokens, without one that ends the turn.
        logprobs: of each of them, if they were asked for.
    """

    pieces: tuple[Piece, ...]
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]


def check_length(prompt_tokens: int, max_context: int) -> None:
    """Check that a prompt leaves room for an answer.

    Raises:
        ContextLengthError: it does not.
    """
    if prompt_tokens >= max_context:
        raise ContextLengthError(
            f"the prompt needs {prompt_tokens} tokens, but the context holds {max_context}, answer "
            "included: shorten it, or use fewer pictures, tiles (max_tiles) or frames of videos",
            f"这条消息需要 {prompt_tokens} 个词元，而上下文只能容纳 {max_context} 个（含回答）："
            "请缩短文字，或减少图片、图块或视频帧",
        )


class Generation:
    """An answer, from its prompt on; who computes it decides when, and with what else.

    Args:
        prompts: has the tokenizer and the ids that end a turn.
        masks: start what follows ``params.constraint``.
        prompt: what to answer.
        params: how.
        max_context: most tokens of prompt and answer.
        started: ``time.perf_counter()`` when the question was asked.
        top_logprobs: give the log-probability of each token, and of this many alternatives.

    Attributes:
        prompt: what is answered.
        slot: the sequence that it has got.
        preparation: encodes the prompt's pictures, a tile at a time.
        unread: embeddings of what is left of the prompt to compute, float32 [T, H]; None before
            its pictures are encoded, and at its end.
        latest_token: when the latest token had been passed on, ``time.perf_counter()``.
        finish_reason: empty while the answer is under way.

    Raises:
        ContextLengthError: the prompt leaves no room for an answer.
        PromptError: the constraint's grammar is malformed.
        EdgeVLError: constraints cannot be followed here.
    """

    slot: Slot
    preparation: Generator[None, None, None]

    def __init__(
        self,
        prompts: PromptEncoder,
        masks: TokenMasks,
        prompt: Prompt,
        params: SamplingParams,
        max_context: int,
        started: float,
        top_logprobs: int | None = None,
    ) -> None:
        token_ids = prompt.token_ids.tolist()
        check_length(len(token_ids), max_context)
        self.prompt = prompt
        self.unread: Floats | None = None
        self.latest_token = 0.0
        self.finish_reason = ""
        mask = masks.start(params.constraint) if params.constraint else None
        self._mask_after_thinking: TokenMask | None = None
        if params.constraint and prompt.thinking and not params.constraint.with_thinking:
            mask, self._mask_after_thinking = None, mask
        self._sampler = Sampler(params, token_ids, mask)
        self._text = AnswerText(prompts.tokenizer, params.stop, prompt.thinking)
        self._stop_ids = prompts.stop_ids
        self._room = min(params.max_tokens, max_context - len(token_ids))
        self._pool: AnswerPool | None = None
        self._drafts: Drafts | None = None
        self._draft: list[int] = []  # of what is being computed
        self._failure: Exception | None = None  # of the token after `latest`
        self._top_logprobs = top_logprobs
        self._token_ids: list[int] = []
        self._chosen = 0  # tokens, the one that ended the turn among them
        self._cached_tokens = 0
        self._started = started
        self._vision_ms = self._prefill_ms = self._ttft_ms = self._decode_ms = 0.0

    @property
    def left(self) -> int:
        """Tokens of the prompt that have not been computed, once it has a slot."""
        return len(self.prompt.token_ids) - len(self.slot)

    @property
    def latest(self) -> int:
        """The latest token, which the model has not read yet."""
        return self._token_ids[-1]

    @property
    def most_tokens(self) -> int:
        """The most tokens that prompt and answer may come to."""
        return len(self.prompt.token_ids) + self._room

    def start(self, slot: Slot, pool: AnswerPool) -> None:
        """Take a sequence. Drafts come from ``pool`` too, and the answer goes into it."""
        self.slot = slot
        self._pool = pool
        self.preparation = self._prepare()

    def read(self, count: int, elapsed_ms: float) -> None:
        """Take note that so many positions of the prompt were computed, and how long that took."""
        assert self.unread is not None
        self.unread = self.unread[count:] if count < len(self.unread) else None
        self._prefill_ms += elapsed_ms

    def begin(self, logits: Floats) -> Delta:
        """Choose the first token: logits of the prompt's last position, float32 [1, V]."""
        delta = self._take(logits, ())
        self._ttft_ms = 1000 * (time.perf_counter() - self._started)
        return delta

    def following(self, most_drafted: int, looked_up: int | None = None) -> list[int]:
        """Return what is to be computed next: `latest`, and up to so many tokens as a draft.

        ``looked_up`` bounds those of them that no form forces; see `Drafts.draft`.
        """
        self._draft = []
        if most_drafted:
            if self._drafts is None:
                prompt = self.prompt.token_ids.tolist()
                self._drafts = Drafts(prompt, self.slot.engine.max_draft, self._pool)
            self._drafts.follow(self._token_ids)
            # The last token of an answer is never computed.
            most = min(most_drafted, self._room - len(self._token_ids) - 1)
            draft = self._drafts.draft(most, self._sampler.foreseen(), looked_up)
            self._draft = self._sampler.allowed(draft)
        return [self.latest, *self._draft]

    def take(self, logits: Floats, plain_ms: float | None = None, each_ms: float = 0.0) -> Delta:
        """Choose the tokens after those that `following` returned; take back what was not right.

        Args:
            logits: after each of them, float32 [T, V].
            plain_ms: what a token takes without drafts; None where that is not known.
            each_ms: what each drafted token took.
        """
        draft, self._draft = self._draft, []
        before = self._chosen
        delta = self._take(logits, draft)
        gained = self._chosen - before
        if draft:
            self.slot.truncate(len(self.slot) - (len(draft) + 1 - gained))
        if self._drafts:
            self._drafts.learn(len(draft), gained, plain_ms, each_ms)
        self._decode_ms += 1000 * (time.perf_counter() - self.latest_token)
        return delta

    def cut(self) -> Delta:
        """End the answer for want of room; return the text that was held back."""
        self.finish_reason = "length"
        return Delta(tuple(self._text.finish()), (), ())

    def answer(self, load_ms: float) -> Answer:
        """Return the answer as far as it has come; ``load_ms`` is passed on."""
        decoded = max(self._chosen - 1, 0)
        per_token_ms = self._decode_ms / decoded if decoded else 0.0
        return Answer(
            text=self._text.text,
            thinking=self._text.thinking,
            token_ids=tuple(self._token_ids),
            finish_reason=self.finish_reason,
            usage=Usage(
                prompt_tokens=len(self.prompt.token_ids),
                image_tokens=sum(span.length for span in self.prompt.images),
                completion_tokens=len(self._token_ids),
                cached_tokens=self._cached_tokens,
            ),
            timings=Timings(
                load_ms=load_ms,
                vision_ms=self._vision_ms,
                prefill_ms=self._prefill_ms,
                ttft_ms=self._ttft_ms,
                decode_ms_per_token=per_token_ms,
                decode_tokens_per_s=1000 / per_token_ms if per_token_ms else 0.0,
            ),
        )

    def _prepare(self) -> Generator[None, None, None]:
        engine = self.slot.engine
        steps = self.slot.prepare(self.prompt)
        while self.unread is None:
            before = engine.timings()  # between the steps the engine computes for others
            try:
                next(steps)
            except StopIteration as stop:
                self.unread = stop.value
                self._cached_tokens = len(self.slot)
                return
            finally:
                self._vision_ms += engine.timings().vision_ms - before.vision_ms
            yield

    def _take(self, logits: Floats, draft: Sequence[int]) -> Delta:
        """Choose a token from each row [T, V], as long as it is what the draft had there."""
        if self._failure:
            raise self._failure
        pieces: list[Piece] = []
        token_ids: list[int] = []
        logprobs: list[TokenLogprobs] = []
        for row, drafted in zip(logits, [*draft, None], strict=True):
            try:
                token_id = self._sampler.choose(row)
            except Exception as error:
                if not token_ids:
                    raise
                self._failure = error  # the tokens before it stand, as they would without a draft
                break
            self._chosen += 1
            if token_id in self._stop_ids:
                self.finish_reason = "stop"
                break
            token_ids.append(token_id)
            if self._top_logprobs is not None:
                logprobs.append(token_logprobs(row, token_id, self._top_logprobs))
            pieces += self._text.add(token_id)
            if self._mask_after_thinking and not self._text.splitter.in_thinking:
                self._sampler.constrain(self._mask_after_thinking)
                self._mask_after_thinking = None
            if self._text.stops.found or self._sampler.complete:
                self.finish_reason = "stop"
            elif len(self._token_ids) + len(token_ids) == self._room:
                self.finish_reason = "length"
            if self.finish_reason or token_id != drafted:
                break
        self._token_ids += token_ids
        if self.finish_reason:
            pieces += self._text.finish()
            if self._pool is not None:
                self._pool.add(self.prompt.token_ids[-LENGTHS[0] :].tolist(), self._token_ids)
        return Delta(tuple(pieces), tuple(token_ids), tuple(logprobs))
