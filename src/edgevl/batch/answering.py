"""Rows to answers, one after the other; what the next row shows is decoded meanwhile."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeAlias

from edgevl.batch.rows import Row
from edgevl.errors import ContextLengthError, ImageError, PromptError, VideoError
from edgevl.generate.model import Model
from edgevl.preprocess import prepare_picture, prepare_video
from edgevl.preprocess.picture import most_tiles
from edgevl.preprocess.video import DEFAULT_FRAMES, check_frames

#: Pictures and videos as `Model.ask` takes them.
_Prepared: TypeAlias = tuple[list[Any], list[Any]]


def answer_rows(
    model: Model,
    rows: Iterable[Row],
    *,
    system: str | None = None,
    thinking: bool | None = None,
    max_tiles: int | None = None,
    frames: int = DEFAULT_FRAMES,
    **sampling: Any,
) -> Generator[dict[str, Any], None, None]:
    """Answer every row by itself, in order.

    Rows that follow each other and begin alike, with the same system message and pictures, have
    that beginning computed once.

    Args:
        model: what to ask.
        rows: what to ask it.
        system: system message of rows that have none of their own; default is the chat template's.
        thinking: ask the model to think before it answers, or not to; None leaves it to its
            template.
        max_tiles: most tiles a picture is cut into; default is the checkpoint's.
        frames: how many are taken of a video, where the row does not say.
        **sampling: fields of `SamplingParams`, where the row does not say; see `Session.ask`.

    Yields:
        ``id``, ``images``, ``videos`` if there are any, and ``question``, then the fields of
        `Answer`, or ``error`` where a line, a picture, a video or a prompt is at fault.

    Raises:
        PromptError: ``max_tiles``, ``frames`` or a sampling value is out of range.
        EdgeVLError: the model fails, not a row.
    """
    model.chat().params(**sampling)
    most_tiles(model.checkpoint.config, max_tiles)
    check_frames(frames)
    options = {"system": system, "thinking": thinking, "frames": frames, **sampling}
    prepare = _Preparation(model, max_tiles, frames)
    waiting: tuple[Row, Future[_Prepared]] | None = None
    # One thread and one row ahead: no more than two rows' pictures are in memory.
    with ThreadPoolExecutor(max_workers=1) as pool:
        for row in rows:
            ready, waiting = waiting, (row, pool.submit(prepare, row))
            if ready is not None:
                yield _answer(model, *ready, options)
        if waiting is not None:
            yield _answer(model, *waiting, options)


class _Preparation:
    """Prepares the pictures and videos of one row after the other."""

    def __init__(self, model: Model, max_tiles: int | None, frames: int) -> None:
        self._model = model
        self._max_tiles = max_tiles
        self._frames = frames
        self._latest: tuple[tuple[Any, ...], _Prepared] = ((), ([], []))

    def __call__(self, row: Row) -> _Prepared:
        """Return what the row shows; what the row before showed is not decoded again."""
        images = tuple(shown.source for shown in row.images)
        videos = tuple(shown.source for shown in row.videos)
        if not self._model.checkpoint.has_vision:
            return list(images), list(videos)  # asking about them says what is missing
        frames = int(row.options.get("frames", self._frames))
        wanted = (images, videos, frames)
        if wanted != self._latest[0]:
            try:
                self._latest = wanted, self._prepare(*wanted)
            except MemoryError:
                raise ImageError(
                    "not enough memory for the pictures and videos; shrink them"
                ) from None
        return self._latest[1]

    def _prepare(self, images: tuple[Any, ...], videos: tuple[Any, ...], frames: int) -> _Prepared:
        config = self._model.checkpoint.config
        clips: list[Any] = []
        pictures: list[Any] = []
        for source in videos:
            self._check_context((len(clips) + 1) * frames)  # known before they are decoded
            clips.append(prepare_video(source, config, frames))
        tiles = len(videos) * frames
        for source in images:
            pictures.append(prepare_picture(source, config, self._max_tiles))
            tiles += len(pictures[-1].pixels)
            self._check_context(tiles)
        return pictures, clips

    def _check_context(self, tiles: int) -> None:
        """Refuse what cannot be asked about before more of it fills the memory."""
        tokens = tiles * self._model.checkpoint.config.image_tokens
        context = self._model.engine.max_context
        if tokens >= context:
            raise ContextLengthError(
                f"the pictures and videos need {tokens} tokens or more, but the context holds "
                f"{context}: use fewer pictures, tiles (max_tiles) or frames of videos"
            )


def _answer(
    model: Model, row: Row, prepared: Future[_Prepared], options: dict[str, Any]
) -> dict[str, Any]:
    result: dict[str, Any] = {"id": row.id, "images": [shown.name for shown in row.images]}
    if row.videos:
        result["videos"] = [shown.name for shown in row.videos]
    result["question"] = row.question
    if row.error:
        return result | {"error": row.error}
    try:
        images, videos = prepared.result()
        answer = model.ask(row.question, images=images, videos=videos, **{**options, **row.options})
    except (ImageError, VideoError, PromptError) as error:
        return result | {"error": str(error)}
    return result | answer.to_dict()
