"""A conversation: its messages, and their place in the engine's cache."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from typing import Any, Protocol

from edgevl.checkpoint import ModelDirectory
from edgevl.errors import CheckpointError, ContextLengthError, EdgeVLError, PromptError
from edgevl.generate.answer import Answer
from edgevl.generate.sampling import SamplingParams
from edgevl.generate.text import Piece, spoken_text
from edgevl.generate.tool_calls import split_tool_calls
from edgevl.preprocess import (
    GeneratedTokens,
    Message,
    Picture,
    Prompt,
    PromptEncoder,
    Tool,
    prepare_picture,
    prepare_video,
)
from edgevl.preprocess.video import DEFAULT_FRAMES


class Answerer(Protocol):
    """What answers prompts: a `Model` one at a time, a `Scheduler` many."""

    @property
    def prompts(self) -> PromptEncoder:
        """Turns messages into prompts."""

    @property
    def max_context(self) -> int:
        """Most tokens of prompt and answer."""

    def run(
        self, prompt: Prompt, params: SamplingParams, started: float
    ) -> Generator[Piece, None, Answer]:
        """Yield the answer's text as it comes; return the answer."""


class Stream(Iterator[Piece]):
    """An answer that is being given: iterate over its pieces of text, then read ``answer``.

    The work is done while iterating, in the caller's thread. ``close`` ends the answer early.
    """

    def __init__(self, pieces: Generator[Piece, None, Answer]) -> None:
        """Stream what ``pieces`` yields and keep what it returns."""
        self._pieces = pieces
        self._answer: Answer | None = None

    def __next__(self) -> Piece:
        """Compute and return the next piece."""
        try:
            return next(self._pieces)
        except StopIteration as stop:
            if stop.value is not None:
                self._answer = stop.value
            raise

    @property
    def answer(self) -> Answer:
        """The whole answer, once the stream has been read to its end.

        Raises:
            EdgeVLError: it has not.
        """
        if self._answer is None:
            raise EdgeVLError("the answer is not complete: read the stream to its end first")
        return self._answer

    def close(self) -> None:
        """Stop generating; a conversation keeps what was said so far."""
        self._pieces.close()


class Session:
    """A conversation of many turns.

    The engine computes only what a turn adds, and a picture once. When the conversation outgrows
    the context, its oldest turns are left out.

    Attributes:
        messages: the turns so far, without the system message; they may be edited.
        system: system message, None for the chat template's own; it may be changed, and goes with
            the next question then.
    """

    def __init__(
        self,
        checkpoint: ModelDirectory,
        generator: Answerer,
        system: str | None = None,
        thinking: bool | None = None,
        max_tiles: int | None = None,
        tools: Sequence[Tool] = (),
    ) -> None:
        """Start a conversation.

        Args:
            checkpoint: says how pictures are prepared.
            generator: answers prompts.
            system: system message; default is the chat template's own.
            thinking: True asks the model to think before it answers, False tells its template that
                it should not; None leaves it to the template.
            max_tiles: most tiles a picture is cut into; default is the checkpoint's.
            tools: what the model may call.
        """
        self.messages: list[Message] = []
        self._checkpoint = checkpoint
        self._generator = generator
        self.system = system
        self._thinking = thinking
        self._max_tiles = max_tiles
        self._tools = tuple(tools)

    def ask(
        self,
        text: str = "",
        images: Any = (),
        videos: Any = (),
        frames: int = DEFAULT_FRAMES,
        tool_results: str | Sequence[str] = (),
        **sampling: Any,
    ) -> Answer:
        """Ask and wait for the whole answer.

        Args:
            text: the question; ``<image>`` marks the place of each picture, and without marks they
                come first. It may be left out where there are results of tools.
            images: a picture or several: path, bytes, PIL image, array [rows, columns, 3], ``-``
                for standard input, or ``data:`` URL.
            videos: a video or several: path, bytes, ``-``, ``data:`` URL, or what
                `edgevl.preprocess.open_video` returned. They come before pictures and text.
            frames: how many are taken of each video, uniformly sampled.
            tool_results: what the call of the last answer gave, or its calls in their order; they
                come before the question.
            **sampling: fields of `SamplingParams`. What is left out, or None, is as
                ``generation_config.json`` has it; see `params`.

        Raises:
            ImageError: a picture cannot be read or exceeds a limit.
            VideoError: a video cannot be read or exceeds a limit, or PyAV is missing.
            PromptError: pictures and marks do not match, a sampling value or ``frames`` is out of
                range, or a constraint is given to a conversation with thinking.
            ContextLengthError: this message alone is longer than the context.
        """
        stream = self.stream(text, images, videos, frames, tool_results, **sampling)
        for _ in stream:
            pass
        return stream.answer

    def stream(
        self,
        text: str = "",
        images: Any = (),
        videos: Any = (),
        frames: int = DEFAULT_FRAMES,
        tool_results: str | Sequence[str] = (),
        **sampling: Any,
    ) -> Stream:
        """Ask and receive the answer as it is generated; see `ask`.

        Pictures and videos are read, and errors raised, before this returns.
        """
        started = time.perf_counter()
        params = self.params(**sampling)
        if params.constraint and self._thinking:
            # The thoughts would have to be of its form too.
            raise PromptError("constraint: it cannot be met while thinking: leave one of them out")
        results = [tool_results] if isinstance(tool_results, str) else tool_results
        asked = [Message.tool(result) for result in results]
        pictures, clips = self._pictures(images), self._videos(videos, frames)
        if text or pictures or clips or not asked:
            asked.append(Message.user(text, pictures, clips))
        messages, prompt = self._fit(asked, params)
        return Stream(self._turn(messages, prompt, params, started))

    @property
    def defaults(self) -> Mapping[str, Any]:
        """What the checkpoint has of fields of `SamplingParams`."""
        return self._checkpoint.config.sampling

    def params(self, **sampling: Any) -> SamplingParams:
        """Return how a question is answered that is asked with ``sampling``.

        Raises:
            PromptError: a value is out of range.
        """
        params = SamplingParams.resolve(self.defaults, sampling)
        params.check_tokens(self._generator.prompts.tokenizer)
        return params

    def prompt(self, text: str, images: Any = (), answer_tokens: int = 1) -> Prompt:
        """Return what the model would read if this were asked now; see `ask`.

        Args:
            text: the question.
            images: a picture or several.
            answer_tokens: room that is wanted for the answer.
        """
        message = Message.user(text, self._pictures(images))
        return self._fit([message], SamplingParams(max_tokens=answer_tokens))[1]

    def reset(self) -> None:
        """Forget all turns; the system message stays."""
        self.messages.clear()

    def undo(self) -> None:
        """Forget the last turn: its question and its answer."""
        while self.messages and self.messages.pop().role != "user":
            pass

    def _pictures(self, images: Any) -> list[Picture]:
        config = self._checkpoint.config
        return [prepare_picture(source, config, self._max_tiles) for source in self._seen(images)]

    def _videos(self, videos: Any, frames: int) -> list[list[Picture]]:
        config = self._checkpoint.config
        return [prepare_video(source, config, frames) for source in self._seen(videos)]

    def _seen(self, sources: Any) -> Sequence[Any]:
        """Return one source or several, or none, as a sequence, if the model can see."""
        if sources is None:
            sources = ()
        sources = sources if isinstance(sources, (list, tuple)) else [sources]
        if sources and not self._checkpoint.has_vision:
            raise CheckpointError(
                f"{self._checkpoint.path} has no vision weights: it answers text only; for "
                "pictures give the whole model",
                "这个模型没有视觉部分，只能回答文字问题",
            )
        return sources

    def _fit(
        self, asked: Sequence[Message], params: SamplingParams
    ) -> tuple[list[Message], Prompt]:
        """Leave out the oldest turns until prompt and answer fit: -> messages kept, the prompt.

        Half of the context at most is kept free for the answer, so that a generous ``max_tokens``
        does not cost the whole history.
        """
        context = self._generator.max_context
        reserve = min(params.max_tokens, context // 2)
        system = [Message.system(self.system)] if self.system is not None else []
        messages = [*self.messages, *asked]
        while True:
            prompt = self._generator.prompts.encode(
                [*system, *messages], thinking=self._thinking, tools=self._tools
            )
            length = len(prompt.token_ids)
            if length + reserve <= context:
                return messages, prompt
            shorter = without_oldest_turn(messages)
            if not shorter:
                break
            messages = shorter
        if length >= context:
            raise ContextLengthError(
                f"the message needs {length} tokens, but the context holds {context}, answer "
                "included: shorten it, or use fewer pictures, tiles (max_tiles) or frames of "
                "videos",
                f"这条消息需要 {length} 个词元，而上下文只能容纳 {context} 个（含回答）："
                "请缩短文字，或减少图片、图块或视频帧",
            )
        return messages, prompt

    def _turn(
        self,
        messages: list[Message],
        prompt: Prompt,
        params: SamplingParams,
        started: float,
    ) -> Generator[Piece, None, Answer]:
        """Answer ``prompt`` and record the turn, also one that is broken off in mid-answer."""
        said: list[str] = []
        thoughts = ""
        reply: GeneratedTokens | str | None = None
        try:
            # Closed here and not when it is collected: it holds the engine until then.
            with closing(self._generator.run(prompt, params, started)) as pieces:
                while True:
                    try:
                        piece = next(pieces)
                    except StopIteration as stop:
                        answer: Answer = stop.value
                        break
                    if not piece.thinking:
                        said.append(piece)
                    yield piece
            # The very tokens, so that the next prompt continues the cache; but not those of
            # thinking, which is the template's to place, nor of a cut-off stop string.
            tokenizer = self._generator.prompts.tokenizer
            exact = spoken_text(tokenizer, answer.token_ids) == answer.text
            reply = GeneratedTokens(answer.token_ids) if exact else answer.text
            thoughts = answer.thinking
            return answer
        except (GeneratorExit, KeyboardInterrupt):
            reply = "".join(said) or None
            raise
        finally:
            if reply is not None:
                text, calls = (
                    split_tool_calls(reply, self._tools) if isinstance(reply, str) else (reply, [])
                )
                self.messages[:] = [*messages, Message.assistant(text, calls, thoughts)]


def without_oldest_turn(history: Sequence[Message]) -> list[Message]:
    """Drop messages up to the second user message (or all)."""
    for index, message in enumerate(history[1:], start=1):
        if message.role == "user":
            return list(history[index:])
    return []
