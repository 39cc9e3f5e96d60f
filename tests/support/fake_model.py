"""A model that says what a test tells it to, through the real stream and answer types."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from edgevl.generate import Answer, Piece, SamplingParams, Stream, Timings, Usage
from edgevl.generate.session import Turn

#: What the model says: pieces of text, thinking ones as Piece(text, True); or an error to raise.
Script = Sequence[str | BaseException]


class FakeModel:
    """Answers with ``say(question)`` and keeps what it was asked in ``calls``."""

    def __init__(self, say: Callable[[str], Script], finish_reason: str = "stop") -> None:
        self.say = say
        self.finish_reason = finish_reason
        self.calls: list[dict[str, Any]] = []
        self.load_options: dict[str, Any] = {}
        self.resets = self.undone = 0
        self.turns: list[Turn] = []
        self.system: str | None = None
        self.engine = SimpleNamespace(notes=())
        self.defaults: dict[str, Any] = {}
        self.checkpoint = SimpleNamespace(
            path=Path("/models/tiny"), config=SimpleNamespace(sampling=self.defaults, ignored=())
        )

    def load(self, model: str, **options: Any) -> FakeModel:
        """Take the place of ``edgevl.load``."""
        self.load_options = {"model": model, **options}
        return self

    def chat(self, **options: Any) -> FakeModel:
        self.load_options |= options
        return self

    def params(self, **sampling: Any) -> SamplingParams:
        return SamplingParams.resolve(self.defaults, sampling)

    def reset(self) -> None:
        self.resets += 1
        self.turns = []

    def undo(self) -> Turn | None:
        self.undone += bool(self.turns)
        return self.turns.pop() if self.turns else None

    def answer(self, turn: Turn, **options: Any) -> Stream:
        """Fill a turn, and keep it if anything was said, as `Session.answer` does."""
        turn.reply, turn.answer = "", None
        images = [each.source for each in turn.shown if not each.is_video]
        options["videos"] = [each.source for each in turn.shown if each.is_video]
        return Stream(self._answered(turn, self.stream(turn.text, images, **options)))

    def _answered(self, turn: Turn, stream: Stream) -> Generator[Piece, None, Answer]:
        try:
            for piece in stream:
                turn.reply += "" if piece.thinking else piece
                yield piece
            turn.answer = stream.answer
        except (GeneratorExit, KeyboardInterrupt):
            self.turns += [turn] if turn.reply else []
            raise
        self.turns.append(turn)
        return stream.answer

    def stream(self, question: str, images: Any = (), **options: Any) -> Stream:
        self.calls.append({"question": question, "images": list(images), **options})
        return Stream(self._pieces(self.say(question)))

    def ask(self, question: str, images: Any = (), **options: Any) -> Answer:
        stream = self.stream(question, images, **options)
        for _ in stream:
            pass
        return stream.answer

    def _pieces(self, script: Script) -> Generator[Piece, None, Answer]:
        said: dict[bool, str] = {False: "", True: ""}
        for part in script:
            if isinstance(part, BaseException):
                raise part
            piece = part if isinstance(part, Piece) else Piece(part)
            said[piece.thinking] += piece
            yield piece
        return Answer(
            text=said[False],
            thinking=said[True],
            token_ids=(1, 2),
            finish_reason=self.finish_reason,
            usage=Usage(10, 4, 2, 0),
            timings=Timings(1.0, 2.0, 3.0, 40.0, 5.0, 200.0),
        )
