"""Pictures and videos of requests: found, decoded and cut up in a few threads of their own."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, nullcontext
from typing import TypeVar

import numpy as np

from edgevl.checkpoint import ModelConfig, ModelDirectory
from edgevl.errors import ContextLengthError, EdgeVLError, ImageError, VideoError
from edgevl.machine import this_machine
from edgevl.preprocess import Picture, prepare_picture, prepare_video
from edgevl.preprocess.image import MAX_BYTES, is_large
from edgevl.preprocess.sources import data_url, short_name
from edgevl.serve.errors import busy
from edgevl.serve.fetch import Fetcher

Result = TypeVar("Result")

#: Pictures decoded at the same time, one of them a large one (`is_large`) at most.
THREADS = 2
#: Files that are fetched, or wait to be decoded, at the same time.
FETCHES = 8
#: Most bytes of a video fetched; one in a ``data:`` URL is bounded by the size of requests.
MAX_VIDEO_BYTES = 64 * 2**20
#: Share of the free memory that the tiles of all requests under way may take: a picture of a few
#: kilobytes may come to a hundred megabytes of them.
MEMORY_SHARE = 0.25


class Media:
    """Loads what URLs of requests name, for one model."""

    def __init__(self, model: ModelDirectory, max_context: int, fetcher: Fetcher) -> None:
        """Start no thread yet.

        Args:
            model: that will see the pictures.
            max_context: tokens that a prompt may have at most, pictures included.
            fetcher: fetches ``http(s):`` URLs.
        """
        self._config = model.config
        self._has_vision = model.has_vision
        self._max_context = max_context
        self._fetcher = fetcher
        self._fetches = asyncio.Semaphore(FETCHES)
        self._large = asyncio.Lock()
        self._pool = ThreadPoolExecutor(THREADS, "edgevl-media")
        one_request = max_context // self._config.image_tokens * _tile_bytes(self._config)
        share = int(MEMORY_SHARE * this_machine().available_bytes)
        self._most_bytes = max(share, one_request)
        self._held: list[weakref.ref[Picture]] = []  # some are gone by now

    async def picture(self, url: str, max_tiles: int | None, budget: TileBudget) -> Picture:
        """Load a picture.

        Args:
            url: of it.
            max_tiles: most tiles it is cut into.
            budget: of the request.

        Raises:
            ImageError: the URL is of another kind, or what it holds no picture that can be read.
            FetchError: the URL may not be fetched.
            ContextLengthError: the request's pictures have more tiles than the context holds.
            ApiError: those of all requests take too much memory.
        """
        budget.check(1)
        async with self._loading(url):
            data = await self._bytes(url, MAX_BYTES, ImageError)
            # One large one at a time, and none waits for it in a thread that others could use.
            is_one = await self._run(lambda: is_large(data))
            async with self._large if is_one else nullcontext():
                picture = await self._run(lambda: prepare_picture(data, self._config, max_tiles))
        budget.take(len(picture.pixels))
        self._hold([picture])
        return picture

    async def video(self, url: str, frames: int, budget: TileBudget) -> list[Picture]:
        """Load a video's frames; as `picture`.

        Raises:
            VideoError: the URL is of another kind, or what it holds no video that can be read.
            FetchError: the URL may not be fetched.
            ContextLengthError: the request's pictures have more tiles than the context holds.
            ApiError: those of all requests take too much memory.
        """
        budget.take(frames)
        async with self._loading(url):
            data = await self._bytes(url, MAX_VIDEO_BYTES, VideoError)
            pictures = await self._run(lambda: prepare_video(data, self._config, frames))
        self._hold(pictures)
        return pictures

    def _hold(self, pictures: Sequence[Picture]) -> None:
        """Count pictures for as long as anything uses them."""
        held = [*pictures, *(picture for ref in self._held if (picture := ref()) is not None)]
        if sum(picture.pixels.nbytes for picture in held) > self._most_bytes:
            raise busy()
        self._held = list(map(weakref.ref, held))

    def budget(self) -> TileBudget:
        """Return the budget of a new request."""
        return TileBudget(self._max_context, self._config.image_tokens)

    def _loading(self, url: str) -> AbstractAsyncContextManager[None]:
        """Return what to hold while a URL is loaded: ``data:`` URLs are in memory already."""
        return nullcontext() if url[:5].lower() == "data:" else self._fetches

    async def _run(self, work: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)

    async def _bytes(self, url: str, max_bytes: int, error_type: type[EdgeVLError]) -> bytes:
        if not self._has_vision:
            raise error_type("this model has no vision: send text only")
        scheme = url[:8].lower()
        if scheme.startswith("data:"):
            return await self._run(lambda: data_url(url, max_bytes, error_type))
        if scheme.startswith(("http://", "https://")):
            return await self._fetcher.get(url, max_bytes)
        raise error_type(f"{short_name(url)}: give a data: URL, or one of http or https")


def _tile_bytes(config: ModelConfig) -> int:
    return 3 * config.vision.image_size**2 * np.dtype(np.float32).itemsize


class TileBudget:
    """Counts the tiles of a request, so that no more are decoded than its prompt can have."""

    def __init__(self, max_context: int, image_tokens: int) -> None:
        """Start at none, each of ``image_tokens`` tokens."""
        self._max_context = max_context
        self._image_tokens = image_tokens
        self._tiles = 0

    def check(self, tiles: int) -> None:
        """Check that there is room for so many more.

        Raises:
            ContextLengthError: they do not fit into the context.
        """
        if (self._tiles + tiles) * self._image_tokens >= self._max_context:
            raise ContextLengthError(
                f"the pictures are more than {self._max_context} tokens, all that the context "
                "holds: send fewer pictures or frames, or use fewer tiles (max_tiles)"
            )

    def take(self, tiles: int) -> None:
        """Count so many more, after `check`."""
        self.check(tiles)
        self._tiles += tiles
