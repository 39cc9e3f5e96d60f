"""Rows to answers, and to a file: what is done survives an interruption."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Generator, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, TypeAlias

from edgevl.batch.rows import BatchError, BatchInput, Row
from edgevl.checkpoint import Checkpoint
from edgevl.errors import ContextLengthError, ImageError, PromptError, VideoError
from edgevl.files import Journal, sync_file
from edgevl.generate.constraint import Constraint
from edgevl.generate.model import Model
from edgevl.preprocess import prepare_picture, prepare_video
from edgevl.preprocess.picture import most_tiles
from edgevl.preprocess.video import DEFAULT_FRAMES, check_frames, check_threshold
from edgevl.version import __version__
from edgevl.work import opened, publish

#: The finished rows in the work directory, ``OUT.partial``.
ROWS = "rows.jsonl"

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
    frame_threshold: float = 0.0,
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
        frame_threshold: likewise; see `Session.ask`.
        **sampling: fields of `SamplingParams`, where the row does not say; see `Session.ask`.

    Yields:
        ``id``, ``images``, ``videos`` if there are any, and ``question``, then the fields of
        `Answer`, or ``error`` where a line, a picture, a video or a prompt is at fault.

    Raises:
        PromptError: ``max_tiles``, ``frames``, ``frame_threshold`` or a sampling value is out of
            range.
        EdgeVLError: the model fails, not a row.
    """
    model.chat().params(**sampling)
    most_tiles(model.checkpoint.config, max_tiles)
    taken = {
        "frames": check_frames(frames),
        "frame_threshold": check_threshold(frame_threshold),
    }
    options = {"system": system, "thinking": thinking, **taken, **sampling}
    # What the row before showed is not decoded again.
    decoded = lru_cache(maxsize=1)(partial(_prepare, model, max_tiles))

    def prepare(row: Row) -> _Prepared:
        images = tuple(shown.source for shown in row.images)
        videos = tuple(shown.source for shown in row.videos)
        if not model.checkpoint.has_vision:
            return list(images), list(videos)  # asking about them says what is missing
        return decoded(images, videos, *(row.options.get(name, taken[name]) for name in taken))

    waiting: tuple[Row, Future[_Prepared]] | None = None
    # One thread and one row ahead: no more than two rows' pictures are in memory.
    with ThreadPoolExecutor(max_workers=1) as pool:
        for row in rows:
            ready, waiting = waiting, (row, pool.submit(prepare, row))
            if ready is not None:
                yield _answer(model, *ready, options)
        if waiting is not None:
            yield _answer(model, *waiting, options)


def _prepare(
    model: Model,
    max_tiles: int | None,
    images: Iterable[Any],
    videos: Iterable[Any],
    frames: int,
    frame_threshold: float,
) -> _Prepared:
    """Decode what a row shows; what cannot be asked about is refused before it fills the memory."""
    config = model.checkpoint.config
    clips: list[Any] = []
    pictures: list[Any] = []

    def check_context(tiles: int) -> None:
        tokens = tiles * config.image_tokens
        if tokens >= model.max_context:
            raise ContextLengthError(
                f"the pictures and videos need {tokens} tokens or more, but the context holds "
                f"{model.max_context}: use fewer pictures, tiles (max_tiles) or frames of videos"
            )

    try:
        for source in videos:
            check_context((len(clips) + 1) * frames)  # known before they are decoded
            clips.append(prepare_video(source, config, frames, frame_threshold))
        tiles = len(clips) * frames
        for source in images:
            pictures.append(prepare_picture(source, config, max_tiles))
            tiles += len(pictures[-1].pixels)
            check_context(tiles)
    except MemoryError:
        raise ImageError("not enough memory for the pictures and videos; shrink them") from None
    return pictures, clips


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


@dataclass(frozen=True)
class BatchResult:
    """How many rows there were, and how many of them have an ``error``."""

    rows: int
    failed: int


def run_batch(
    model: Model,
    source: BatchInput,
    output: str | Path,
    *,
    loading: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], object] | None = None,
    **options: Any,
) -> BatchResult:
    """Answer the rows of ``source`` into a JSONL file, in their order.

    ``OUT.partial`` has what is done until all is; a run that was interrupted, however it ended,
    goes on there when it is called with the same arguments again.

    Args:
        model: what to ask.
        source: what to ask it, from `open_batch`.
        output: file to write; it must not exist. A line is what `answer_rows` yields.
        loading: how the model was loaded, as far as that may change answers.
        progress: called after every row with the rows done and all there are.
        **options: of `answer_rows`.

    Raises:
        BatchError: ``output`` exists or cannot be written, or was begun with other arguments.
        EdgeVLError: the model fails, not a row.
    """
    output = Path(output)
    check_output(output)
    # What decides the rows, by names that a message can show.
    begun: dict[str, Any] = {
        "edgevl": __version__,
        "model": str(model.checkpoint.path.resolve()),
        "input": str(source.path.resolve()),
        "input, its contents": source.digest,
        "question": source.question,
    }
    if isinstance(model.checkpoint, Checkpoint):
        begun["checkpoint"] = model.checkpoint.fingerprint()
    begun |= dict(loading or {}) | options

    def digest(constraint: Constraint) -> str:  # short enough for a message
        return hashlib.sha256(constraint.grammar.encode()).hexdigest()[:16]

    begun = json.loads(json.dumps(begun, default=digest))
    with opened(output, begun, settled=ROWS, error=BatchError) as work:
        path = work.path / ROWS
        rows = Journal(path)
        done = failed = 0
        for row in rows.recover():
            done += 1
            failed += "error" in row
        with closing(answer_rows(model, source.rows(done), **options)) as results:
            for result in results:
                rows.add(result)
                done += 1
                failed += "error" in result
                if progress is not None:
                    progress(done, len(source))
        sync_file(path)
        check_output(output)
        publish(path, output)
    return BatchResult(done, failed)


def check_output(output: Path) -> None:
    """Refuse an output that is there already.

    Raises:
        BatchError: it is.
    """
    if output.exists():
        raise BatchError(f"{output}: exists already; choose another name, or remove it")
