"""A conversation on the web page: its turns, and the session that answers them.

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
from typing import Any, TypeAlias

from edgevl.errors import EdgeVLError, PromptError
from edgevl.evaluate.boxes import draw_boxes, parse_boxes
from edgevl.generate import Answer, Session
from edgevl.preprocess import Message, load_image
from edgevl.preprocess.video import DEFAULT_FRAMES

#: Makes a session: system message, thinking, most tiles. `edgevl.generate.Model.chat` is one.
NewSession: TypeAlias = Callable[[str | None, bool | None, int | None], Session]

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
        sampling: fields of `edgevl.generate.SamplingParams`.
    """

    system: str | None = None
    thinking: bool | None = None
    max_tiles: int | None = None
    frames: int = DEFAULT_FRAMES
    sampling: dict[str, Any] = field(default_factory=dict)


@dataclass(eq=False)
class Turn:
    """A question and what has been said to it so far.

    Attributes:
        text: the question.
        pictures: files.
        videos: files.
        thinking: the model's thoughts.
        reply: its answer.
        drawing: a file with the first picture and the answer's boxes on it.
        answer: set once the answer is complete.
        error: why there is none.
        messages: what of the turn the session still remembers.
    """

    text: str
    pictures: tuple[Path, ...] = ()
    videos: tuple[Path, ...] = ()
    thinking: str = ""
    reply: str = ""
    drawing: Path | None = None
    answer: Answer | None = None
    error: Exception | None = None
    messages: list[Message] = field(default_factory=list)

    def again(self, text: str | None = None) -> Turn:
        """Return the same question, or another about the same pictures, without an answer."""
        return Turn(self.text if text is None else text, self.pictures, self.videos)


class Conversation:
    """The turns of one tab, answered one at a time.

    Attributes:
        turns: the turns, oldest first; the last one may still be growing.
        asked: what was asked last, if it was not taken back.
    """

    def __init__(self, new_session: NewSession, drawings: Path) -> None:
        """Start an empty conversation.

        Args:
            new_session: makes the session, with the first question and when settings change.
            drawings: directory for pictures with boxes.
        """
        self.turns: list[Turn] = []
        self.asked: Turn | None = None
        self._new_session = new_session
        self._drawings = drawings
        self._session: Session | None = None
        self._kind: tuple[str | None, bool | None, int | None] | None = None
        self._reading: _Reading | None = None
        self._lock = threading.Lock()

    def ask(
        self, turn: Turn, settings: Settings, keep: Sequence[Turn] | None = None
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
            before = list(self.turns)
            self.turns = [*(before if keep is None else keep), turn]
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
            forgotten = self.turns.pop() if self.turns else None
            if self._session:
                self._session.messages[:] = _remembered(self.turns)
            return forgotten

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._stop()
            self.asked = None
            self.turns = []
            self._session = self._kind = None

    def stop(self) -> None:
        """End the answer that is being given within a token, without waiting for that."""
        if self._reading:
            self._reading.stopping.set()

    def _stop(self) -> None:
        if self._reading:
            self._reading.stopping.set()
            self._reading.join()

    def _answer(self, turn: Turn, settings: Settings, before: list[Turn]) -> Iterator[None]:
        """Fill ``turn``, yielding after each piece; restore ``before`` if nothing comes of it."""
        session = self._session_for(settings)
        old = list(session.messages)
        session.messages[:] = history = _remembered(self.turns[:-1])
        try:
            _check(turn)
            stream = session.stream(
                turn.text,
                images=list(turn.pictures),
                videos=list(turn.videos),
                frames=settings.frames,
                **settings.sampling,
            )
            with closing(stream):
                yield
                for piece in stream:
                    if piece.thinking:
                        turn.thinking += piece
                    else:
                        turn.reply += piece
                    yield
                turn.answer = stream.answer
        except Exception as error:
            turn.error = error
        finally:
            if turn.error or not (turn.answer or turn.reply):
                self.turns = before
                session.messages[:] = old
            else:
                known = {id(message) for message in history}
                turn.messages = [m for m in session.messages if id(m) not in known]
                held = {id(message) for message in session.messages}
                for other in self.turns:  # the oldest may have been left out to make room
                    other.messages = [m for m in other.messages if id(m) in held]
                turn.drawing = self._draw(turn)

    def _session_for(self, settings: Settings) -> Session:
        """Return the session, made anew if a setting has changed that it is made with."""
        kind = (settings.system, settings.thinking, settings.max_tiles)
        if self._session is None or kind != self._kind:
            self._session, self._kind = self._new_session(*kind), kind
        return self._session

    def _draw(self, turn: Turn) -> Path | None:
        """Draw the answer's boxes on the first picture of the latest turn that has one."""
        found = parse_boxes(turn.reply)
        shown = next((other.pictures for other in reversed(self.turns) if other.pictures), None)
        if not found or not shown:
            return None
        try:
            image = load_image(shown[0])
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


def _remembered(turns: Sequence[Turn]) -> list[Message]:
    return [message for turn in turns for message in turn.messages]


def _check(turn: Turn) -> None:
    if len(turn.text) > MAX_QUESTION:
        raise PromptError(
            f"the question exceeds {MAX_QUESTION} characters: shorten it",
            f"问题超过 {MAX_QUESTION} 个字符，请缩短",
        )
    if len(turn.pictures) + len(turn.videos) > MAX_FILES:
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
