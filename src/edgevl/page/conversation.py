"""A conversation on the web page: a session, and what is shown of it.

An answer is read in a thread of its own: the engine must not wait for a slow browser, and Gradio
continues a generator in whichever of its threads is free.
"""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from edgevl.errors import EdgeVLError, PromptError
from edgevl.evaluate.boxes import draw_boxes, parse_boxes
from edgevl.generate import Session
from edgevl.generate.session import Attachment, Turn
from edgevl.preprocess import load_image
from edgevl.preprocess.video import DEFAULT_FRAMES

#: Longest question, characters: what is tokenized must be bounded.
MAX_QUESTION = 1 << 20
#: Most pictures and videos in one question.
MAX_FILES = 32
#: The page is redrawn at most this often, seconds, and at least that often while waiting.
REDRAW_S, WAIT_S = 0.08, 0.5
#: Longest side of a picture with boxes drawn on it, pixels.
DRAWING_SIDE = 1600


@dataclass(frozen=True)
class Settings:
    """How a question is answered.

    Attributes:
        system: system message; None for the chat template's own.
        thinking: let the model think first; None leaves it to its template.
        max_tiles: most tiles of a picture; None for the model's own number.
        frames: taken of each video.
        frame_threshold: a frame that differs by less from the last one shown is that one again.
        sampling: fields of `edgevl.generate.SamplingParams`.
    """

    system: str | None = None
    thinking: bool | None = None
    max_tiles: int | None = None
    frames: int = DEFAULT_FRAMES
    frame_threshold: float = 0.0
    sampling: dict[str, Any] = field(default_factory=dict)


@dataclass(eq=False)
class PageTurn(Turn):
    """A turn whose pictures and videos are files.

    Attributes:
        drawing: a file with the first picture and the answer's boxes on it.
        error: why there is no answer.
    """

    drawing: Path | None = None
    error: Exception | None = None

    @classmethod
    def of(cls, text: str, pictures: Sequence[Path] = (), videos: Sequence[Path] = ()) -> PageTurn:
        """Return a question about pictures and videos."""
        shown = [Attachment(path) for path in pictures]
        return cls(text, shown + [Attachment(path, is_video=True) for path in videos])

    @property
    def files(self) -> list[Path]:
        """What is shown: pictures, then videos."""
        return [each.source for each in self.shown]

    def again(self, text: str | None = None) -> PageTurn:
        """Return the same question, or another about the same pictures, without an answer."""
        return PageTurn(self.text if text is None else text, self.shown)


class Conversation:
    """What one tab shows of a session, which answers one question at a time.

    Attributes:
        asked: what was asked last, if it was not taken back.
    """

    def __init__(self, session: Session, drawings: Path) -> None:
        """Start an empty conversation.

        Args:
            session: answers, and keeps the turns.
            drawings: directory for pictures with boxes.
        """
        self.asked: PageTurn | None = None
        self._session = session
        self._drawings = drawings
        self._growing: list[PageTurn] | None = None
        self._reading: _Reading | None = None
        self._lock = threading.Lock()

    @property
    def turns(self) -> list[PageTurn]:
        """The turns, oldest first; the last one may still be growing."""
        return self._growing or cast("list[PageTurn]", self._session.turns)

    def ask(
        self, turn: PageTurn, settings: Settings, keep: Sequence[PageTurn] | None = None
    ) -> Iterator[None]:
        """Have ``turn`` answered; yield whenever the page should show what has come.

        Afterwards ``turn`` is the last of ``turns``. Or it is not, and everything is as it was
        before: there was an error (``turn.error``), or it was stopped before the first word.
        Closing the iterator stops the answer, too.

        Args:
            turn: the question.
            settings: how to answer it.
            keep: the turns it follows; default all.
        """
        with self._lock:
            self._stop()
            self.asked = turn
            before = self.turns if keep is None else keep
            self._growing = [*before, turn]
            self._reading = reading = _Reading(lambda: self._answer(turn, settings, before))
            reading.start()
        try:
            while not reading.finished:
                reading.news.wait(WAIT_S)
                reading.news.clear()
                yield
                time.sleep(REDRAW_S)
        finally:
            reading.stopping.set()

    def undo(self) -> Turn | None:
        """Forget the last turn and return it."""
        with self._lock:
            self._stop()
            self.asked = None
            return self._session.undo()

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._stop()
            self.asked = None
            self._session.reset()

    def stop(self) -> None:
        """End the answer that is being given within a token, without waiting for that."""
        if self._reading:
            self._reading.stopping.set()

    def _stop(self) -> None:
        if self._reading:
            self._reading.stopping.set()
            self._reading.join()

    def _answer(
        self, turn: PageTurn, settings: Settings, before: Sequence[PageTurn]
    ) -> Iterator[None]:
        """Fill ``turn``, yielding after each piece."""
        session = self._session
        session.system, session.thinking = settings.system, settings.thinking
        session.max_tiles = settings.max_tiles
        try:
            _check(turn)
            answer = session.answer(
                turn,
                before,
                settings.frames,
                frame_threshold=settings.frame_threshold,
                **settings.sampling,
            )
            with closing(answer):
                yield
                for _ in answer:
                    yield
        except Exception as error:
            turn.error = error
        finally:
            self._growing = None
            if turn in session.turns:
                turn.drawing = self._draw(turn)

    def _draw(self, turn: PageTurn) -> Path | None:
        """Draw the answer's boxes on the first picture of the latest turn that has one."""
        found = parse_boxes(turn.reply)
        pictures = (
            each.source
            for other in reversed(self.turns)
            for each in other.shown
            if not each.is_video
        )
        picture = next(pictures, None)
        if not found or picture is None:
            return None
        try:
            image = load_image(picture)
        except EdgeVLError:  # it has been deleted since
            return None
        image.thumbnail((DRAWING_SIDE, DRAWING_SIDE))
        with tempfile.NamedTemporaryFile(dir=self._drawings, suffix=".jpg", delete=False) as file:
            draw_boxes(image, found).save(file, "JPEG", quality=90)
        return Path(file.name)


class _Reading(threading.Thread):
    """Reads an answer to its end, or until ``stopping`` is set."""

    def __init__(self, pieces: Callable[[], Iterator[None]]) -> None:
        super().__init__(daemon=True)
        self.news = threading.Event()
        self.stopping = threading.Event()
        self.finished = False
        self._pieces = pieces

    def run(self) -> None:
        try:
            for _ in (pieces := self._pieces()):
                self.news.set()
                if self.stopping.is_set():
                    pieces.close()  # type: ignore[attr-defined]
                    break
        finally:
            self.finished = True
            self.news.set()


def _check(turn: PageTurn) -> None:
    if len(turn.text) > MAX_QUESTION:
        raise PromptError(
            f"the question exceeds {MAX_QUESTION} characters: shorten it",
            f"问题超过 {MAX_QUESTION} 个字符，请缩短",
        )
    if len(turn.shown) > MAX_FILES:
        raise PromptError(
            f"the question has more than {MAX_FILES} files: ask in several turns",
            f"一个问题最多 {MAX_FILES} 个文件，请分几次提问",
        )


class Conversations:
    """The conversations of all tabs, by the name that Gradio gives a tab.

    One whose tab is closed is kept for a while, since a phone that sleeps looks the same; and only
    so many are kept at all.
    """

    #: How long one outlives its tab, seconds.
    LINGER_S = 600.0
    #: Most conversations; the one that was used longest ago makes room.
    MOST = 256

    def __init__(self, new: Callable[[], Conversation]) -> None:
        """Start without any; ``new`` makes one."""
        self._new = new
        self._all: dict[str, Conversation] = {}  # the latest used comes last
        self._closed: dict[str, float] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._all)

    def of(self, tab: str) -> Conversation:
        """Return the conversation of a tab, a new one if it has none."""
        with self._lock:
            self._closed.pop(tab, None)
            self._forget(room=tab not in self._all)
            conversation = self._all.pop(tab) if tab in self._all else self._new()
            self._all[tab] = conversation
            return conversation

    def close(self, tab: str) -> None:
        """Stop what a tab that is closed was being told."""
        with self._lock:
            if conversation := self._all.get(tab):
                conversation.stop()
                self._closed[tab] = time.monotonic()
            self._forget()

    def _forget(self, room: bool = False) -> None:
        now = time.monotonic()
        old = [tab for tab, closed in self._closed.items() if now - closed > self.LINGER_S]
        old += list(self._all)[: max(0, len(self._all) + room - self.MOST)]
        for tab in old:
            self._closed.pop(tab, None)
            if conversation := self._all.pop(tab, None):
                conversation.stop()
