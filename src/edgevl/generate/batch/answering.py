"""Rows to answers, one after the other; the next row's pictures are decoded meanwhile."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from edgevl.errors import ContextLengthError, ImageError, PromptError
from edgevl.generate.batch.rows import Row
from edgevl.generate.model import Model
from edgevl.generate.sampling import SamplingParams
from edgevl.preprocess import Picture, prepare_picture
from edgevl.preprocess.picture import most_tiles


def answer_rows(
    model: Model,
    rows: Iterable[Row],
    *,
    system: str | None = None,
    thinking: bool = False,
    max_tiles: int | None = None,
    **sampling: Any,
) -> Generator[dict[str, Any], None, None]:
    """Answer every row by itself, in order.

    Rows that follow each other and begin alike, with the same system message and pictures, have
    that beginning computed once.

    Args:
        model: what to ask.
        rows: what to ask it.
        system: system message of rows that have none of their own; default is the chat template's.
        thinking: ask the model to think before it answers.
        max_tiles: most tiles a picture is cut into; default is the checkpoint's.
        **sampling: fields of `SamplingParams`.

    Yields:
        ``id``, ``images`` and ``question``, then the fields of `Answer`, or ``error`` where a
        line, a picture or a prompt is at fault.

    Raises:
        PromptError: ``max_tiles`` or a sampling value is out of range.
        EdgeVLError: the model fails, not a row.
    """
    SamplingParams(**sampling)
    most_tiles(model.checkpoint.config, max_tiles)
    options = {"system": system, "thinking": thinking, **sampling}
    prepare = _Preparation(model, max_tiles)
    waiting: tuple[Row, Future[list[Any]]] | None = None
    # One thread and one row ahead: no more than two rows' pictures are in memory.
    with ThreadPoolExecutor(max_workers=1) as pool:
        for row in rows:
            ready, waiting = waiting, (row, pool.submit(prepare, row))
            if ready is not None:
                yield _answer(model, *ready, options)
        if waiting is not None:
            yield _answer(model, *waiting, options)


class _Preparation:
    """Prepares the pictures of one row after the other."""

    def __init__(self, model: Model, max_tiles: int | None) -> None:
        self._model = model
        self._max_tiles = max_tiles
        self._latest: tuple[tuple[Any, ...], list[Any]] = ((), [])

    def __call__(self, row: Row) -> list[Any]:
        """Return the row's pictures; those of the row before are not decoded again."""
        if not self._model.checkpoint.has_vision:
            return list(row.sources)  # asking about them says what is missing
        if row.sources != self._latest[0]:
            try:
                self._latest = row.sources, self._pictures(row)
            except MemoryError:
                raise ImageError("not enough memory for the pictures; shrink them") from None
        return self._latest[1]

    def _pictures(self, row: Row) -> list[Picture]:
        config, context = self._model.checkpoint.config, self._model.engine.max_context
        pictures: list[Picture] = []
        tiles = 0
        for source in row.sources:
            pictures.append(prepare_picture(source, config, self._max_tiles))
            tiles += len(pictures[-1].pixels)
            if tiles * config.image_tokens >= context:  # before more of them fill the memory
                raise ContextLengthError(
                    f"the first {len(pictures)} pictures need {tiles * config.image_tokens} tokens,"
                    f" but the context holds {context}: use fewer pictures or tiles (max_tiles)"
                )
        return pictures


def _answer(
    model: Model, row: Row, pictures: Future[list[Any]], options: dict[str, Any]
) -> dict[str, Any]:
    result: dict[str, Any] = {"id": row.id, "images": list(row.images), "question": row.question}
    if row.error:
        return result | {"error": row.error}
    try:
        answer = model.ask(row.question, images=pictures.result(), **{**options, **row.options})
    except (ImageError, PromptError) as error:
        return result | {"error": str(error)}
    return result | answer.to_dict()
