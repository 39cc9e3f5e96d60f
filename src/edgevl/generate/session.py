"""A conversation: its turns, and what of them the model is told with the next."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, Protocol

from edgevl.checkpoint import ModelDirectory
from edgevl.errors import CheckpointError, EdgeVLError, PromptError
from edgevl.generate.generation import Answer, check_length
from edgevl.generate.sampling import SamplingParams
from edgevl.generate.text import Piece, spoken_text
from edgevl.generate.tool_calls import split_tool_calls
from edgevl.preprocess import (
    GeneratedTokens,
    Message,
    Prompt,
    PromptEncoder,
    Tool,
    ToolCall,
    prepare_picture,
    prepare_video,
)
from edgevl.preprocess.video import DEFAULT_FRAMES

#: Most turns that are kept, some tens of megabytes of text; the oldest are forgotten.
MAX_TURNS = 2048


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
        self._pieces = pieces
        self._answer: Answer | None = None

    def __next__(self) -> Piece:
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


@dataclass(frozen=True)
class Attachment:
    """A picture or video that is shown with a question.

    Attributes:
        source: what `Session.ask` takes for it.
        is_video: which of the two it is.
        name: what a saved conversation calls it.
    """

    source: Any
    is_video: bool = False
    name: str = ""


@dataclass(eq=False)
class Turn:
    """A question and what has been said to it so far.

    Attributes:
        text: the question.
        shown: the pictures and videos that go with it; `ask` and `stream` do not keep them.
        thinking: the model's thoughts.
        reply: its answer.
        answer: the same and more, once the answer is complete.
        messages: what of the turn the model is told with the next.
    """

    text: str = ""
    shown: list[Attachment] = field(default_factory=list)
    thinking: str = ""
    reply: str = ""
    answer: Answer | None = None
    messages: list[Message] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return the turn as plain types, for JSON."""
        images = [each.name for each in self.shown if not each.is_video]
        videos = [each.name for each in self.shown if each.is_video]
        turn = {"question": self.text, "images": images} | ({"videos": videos} if videos else {})
        if self.answer:
            return turn | self.answer.to_dict()
        return turn | {"text": self.reply, "finish_reason": "interrupted"}


class Session:
    """A conversation of many turns.

    The engine computes only what a turn adds, and a picture once. When the conversation outgrows
    the context, its oldest turns are left out.

    Args:
        checkpoint: says how pictures are prepared.
        generator: answers prompts.
        system: system message; default is the chat template's own.
        thinking: True asks the model to think before it answers, False tells its template that it
            should not; None leaves it to the template.
        max_tiles: most tiles a picture is cut into; default is the checkpoint's.
        tools: what the model may call; `edgevl.split_tool_calls` finds the calls in an answer.

    Attributes:
        turns: those that were answered, if not to the end; oldest first. They may be edited.
        system, thinking, max_tiles: may be changed, and go with the next question then.
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
        self.turns: list[Turn] = []
        self.system = system
        self.thinking = thinking
        self.max_tiles = max_tiles
        self._checkpoint = checkpoint
        self._generator = generator
        self._tools = tuple(tools)

    @property
    def messages(self) -> tuple[Message, ...]:
        """What the model is told of the turns, without the system message."""
        return tuple(message for turn in self.turns for message in turn.messages)

    def ask(
        self,
        text: str = "",
        images: Any = (),
        videos: Any = (),
        frames: int = DEFAULT_FRAMES,
        tool_results: str | Sequence[str] = (),
        frame_threshold: float = 0.0,
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
            frame_threshold: a frame of a video that differs by less from the last one that was
                shown, in any patch on average and of 255, is that one again and costs no vision:
                3 to 10 for cameras that stand still; 0 shows all as they are. See
                `edgevl.preprocess.video.frame_difference`.
            **sampling: fields of `SamplingParams`. What is left out, or None, is as
                ``generation_config.json`` has it; see `params`.

        Raises:
            ImageError: a picture cannot be read or exceeds a limit.
            VideoError: a video cannot be read or exceeds a limit, or PyAV is missing.
            PromptError: pictures and marks do not match, a sampling value, ``frames`` or
                ``frame_threshold`` is out of range, or a constraint is given to a conversation with
                thinking.
            ContextLengthError: this message alone is longer than the context.
        """
        stream = self.stream(
            text, images, videos, frames, tool_results, frame_threshold, **sampling
        )
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
        frame_threshold: float = 0.0,
        **sampling: Any,
    ) -> Stream:
        """Ask and receive the answer as it is generated; see `ask`.

        Pictures and videos are read, and errors raised, before this returns.
        """
        shown = [Attachment(image) for image in _listed(images)]
        shown += [Attachment(video, is_video=True) for video in _listed(videos)]
        turn = Turn(text, shown)
        stream = self.answer(turn, None, frames, tool_results, frame_threshold, **sampling)
        turn.shown = []  # what it takes in memory is the caller's affair
        return stream

    def answer(
        self,
        turn: Turn,
        after: Sequence[Turn] | None = None,
        frames: int = DEFAULT_FRAMES,
        tool_results: str | Sequence[str] = (),
        frame_threshold: float = 0.0,
        **sampling: Any,
    ) -> Stream:
        """Answer a turn, which is filled as the answer is generated; for the rest see `ask`.

        Where it ends, or is broken off after its first word, it becomes the last of `turns`;
        otherwise these stay as they were. One of which nothing came may be asked again.

        Args:
            turn: what is asked.
            after: the turns that it follows, in place of `turns`.
            frames: see `ask`, and for what follows.
            tool_results: likewise.
            frame_threshold: likewise.
            **sampling: likewise.
        """
        started = time.perf_counter()
        params = self.params(**sampling)
        if params.constraint and self.thinking:
            # The thoughts would have to be of its form too.
            raise PromptError("constraint: it cannot be met while thinking: leave one of them out")
        turn.thinking, turn.reply, turn.answer = "", "", None
        results = [tool_results] if isinstance(tool_results, str) else tool_results
        turn.messages = [Message.tool(result) for result in results]
        if turn.text or turn.shown or not turn.messages:
            turn.messages.append(self._question(turn, frames, frame_threshold))
        turns = [*(self.turns if after is None else after), turn]
        left_out, prompt = self._fit(turns, params)
        return Stream(self._run(turns, left_out, prompt, params, started))

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
        """Return what the model would read if this were asked now, with room for the answer.

        For ``text`` and ``images`` see `ask`; ``answer_tokens`` is the room that is wanted.
        """
        turn = Turn(text, [Attachment(image) for image in _listed(images)])
        turn.messages = [self._question(turn, DEFAULT_FRAMES)]
        return self._fit([*self.turns, turn], SamplingParams(max_tokens=answer_tokens))[1]

    def reset(self) -> None:
        """Forget all turns; the system message stays."""
        self.turns = []

    def undo(self) -> Turn | None:
        """Forget the last turn, its question and its answer, and return it, if there is one."""
        return self.turns.pop() if self.turns else None

    def _question(self, turn: Turn, frames: int, frame_threshold: float = 0.0) -> Message:
        """Return what a turn asks, with its pictures and videos prepared."""
        if turn.shown and not self._checkpoint.has_vision:
            raise CheckpointError(
                f"{self._checkpoint.path} has no vision weights: it answers text only; for "
                "pictures give the whole model",
                "这个模型没有视觉部分，只能回答文字问题",
            )
        config = self._checkpoint.config
        images = [each.source for each in turn.shown if not each.is_video]
        pictures = [prepare_picture(image, config, self.max_tiles) for image in images]
        videos = [each.source for each in turn.shown if each.is_video]
        clips = [prepare_video(video, config, frames, frame_threshold) for video in videos]
        return Message.user(turn.text, pictures, clips)

    def _fit(self, turns: Sequence[Turn], params: SamplingParams) -> tuple[int, Prompt]:
        """Leave out the oldest messages until prompt and answer fit: -> how many, the prompt."""
        context = self._generator.max_context
        # No more is kept free, so that a generous `max_tokens` does not cost the whole history.
        reserve = min(params.max_tokens, context // 2)
        system = [Message.system(self.system)] if self.system is not None else []
        messages = [message for turn in turns for message in turn.messages]
        # A conversation begins with a question: what tools gave is not parted from it.
        begins = [i for i, message in enumerate(messages) if message.role == "user" and i]
        for left_out in [0, *begins]:
            prompt = self._generator.prompts.encode(
                [*system, *messages[left_out:]], thinking=self.thinking, tools=self._tools
            )
            length = len(prompt.token_ids)
            if length + reserve <= context:
                break
        else:
            check_length(length, context)
        return left_out, prompt

    def _run(
        self,
        turns: list[Turn],
        left_out: int,
        prompt: Prompt,
        params: SamplingParams,
        started: float,
    ) -> Generator[Piece, None, Answer]:
        """Answer the last turn, and keep the turns if anything was said."""
        turn = turns[-1]
        said: GeneratedTokens | str | None = None
        try:
            # Closed here and not when it is collected: it holds the engine until then.
            with closing(self._generator.run(prompt, params, started)) as pieces:
                while True:
                    try:
                        piece = next(pieces)
                    except StopIteration as stop:
                        answer: Answer = stop.value
                        break
                    if piece.thinking:
                        turn.thinking += piece
                    else:
                        turn.reply += piece
                    yield piece
            turn.answer = answer
            # The very tokens, so that the next prompt continues the cache; but not those of
            # thinking, which is the template's to place, nor of a cut-off stop string.
            tokenizer = self._generator.prompts.tokenizer
            exact = spoken_text(tokenizer, answer.token_ids) == answer.text
            said = GeneratedTokens(answer.token_ids) if exact else answer.text
            return answer
        except (GeneratorExit, KeyboardInterrupt):
            said = turn.reply or None
            raise
        finally:
            if said is not None:
                calls: list[ToolCall] = []
                if isinstance(said, str):
                    said, calls = split_tool_calls(said, self._tools)
                thoughts = turn.thinking if turn.answer else ""
                turn.messages.append(Message.assistant(said, calls, thoughts))
                for each in turns:
                    gone = min(left_out, len(each.messages))
                    del each.messages[:gone]
                    left_out -= gone
                self.turns = turns[-MAX_TURNS:]


def _listed(sources: Any) -> list[Any]:
    """Return one source or several, or none, as a list."""
    if sources is None:
        return []
    return list(sources) if isinstance(sources, (list, tuple)) else [sources]
