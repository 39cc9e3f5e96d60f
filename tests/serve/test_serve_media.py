"""Where pictures and videos of requests may come from."""

import asyncio
import gc
import threading
from types import SimpleNamespace

import pytest

import edgevl
from edgevl.errors import ContextLengthError, ImageError, VideoError
from edgevl.preprocess import prepare_picture
from edgevl.serve.errors import ApiError
from edgevl.serve.media import FETCHES, Media, TileBudget
from repository import EXAMPLES
from running_server import METER


class FakeFetcher:
    def __init__(self):
        self.asked = []
        self.at_once = self.most_at_once = 0

    async def get(self, url, max_bytes):
        self.asked.append((url, max_bytes))
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        await asyncio.sleep(0.01)
        self.at_once -= 1
        return (EXAMPLES / "meter.png").read_bytes()


@pytest.fixture(scope="module")
def model():
    return edgevl.load("tiny", threads=1)


@pytest.fixture
def fetcher():
    return FakeFetcher()


@pytest.fixture
def media(model, fetcher):
    return Media(model.checkpoint, 2048, fetcher)


def test_addresses_are_fetched(media, fetcher):
    fetched = asyncio.run(media.picture("HTTPS://host.example/a.png", None, media.budget()))
    assert fetched == asyncio.run(media.picture(METER, None, media.budget()))
    assert fetcher.asked == [("HTTPS://host.example/a.png", 64 * 2**20)]


def test_not_all_are_fetched_at_once(media, fetcher):
    async def many():
        url = "http://host.example/a.png"
        await asyncio.gather(*(media.picture(url, None, media.budget()) for _ in range(20)))

    asyncio.run(many())
    assert len(fetcher.asked) == 20
    assert fetcher.most_at_once <= FETCHES


@pytest.mark.parametrize(
    "url", ["", "a.png", "/etc/passwd", "file:///etc/passwd", "-", "ftp://a/b"]
)
def test_nothing_else_is(media, fetcher, url):
    with pytest.raises(ImageError, match="give a data: URL"):
        asyncio.run(media.picture(url, None, media.budget()))
    with pytest.raises(VideoError, match="give a data: URL"):
        asyncio.run(media.video(url, 1, media.budget()))
    assert fetcher.asked == []


@pytest.mark.parametrize("url", ["data:image/png;base64,\ud83d", "data:image/png,\ud83d"])
def test_half_a_surrogate_pair_is_the_requests_fault(media, url):
    with pytest.raises(ImageError, match="half a surrogate pair"):
        asyncio.run(media.picture(url, None, media.budget()))
    with pytest.raises(VideoError, match="half a surrogate pair"):
        asyncio.run(media.video(url, 1, media.budget()))


def test_large_pictures_wait_and_small_ones_pass(model, fetcher, monkeypatch):
    picture = prepare_picture((EXAMPLES / "meter.png").read_bytes(), model.checkpoint.config)
    go, begun = threading.Event(), []

    def prepare(data, *_):
        begun.append(data)
        if data == b"large":
            assert go.wait(10)
        return picture

    monkeypatch.setattr("edgevl.serve.media.is_large", lambda data: data == b"large")
    monkeypatch.setattr("edgevl.serve.media.prepare_picture", prepare)

    async def load():
        media = Media(model.checkpoint, 2048, fetcher)

        def start(url):
            return asyncio.ensure_future(media.picture(url, None, media.budget()))

        large = [start("data:,large") for _ in range(4)]
        await asyncio.wait_for(start("data:,small"), 10)
        assert begun == [b"large", b"small"]
        go.set()
        await asyncio.gather(*large)
        assert begun.count(b"large") == 4

    asyncio.run(load())


def test_what_does_not_fit_is_not_loaded(media, fetcher, model):
    budget = media.budget()
    tiles = (2048 - 1) // model.checkpoint.config.image_tokens
    budget.take(tiles)
    with pytest.raises(ContextLengthError):
        asyncio.run(media.picture("http://host.example/a.png", None, budget))
    with pytest.raises(ContextLengthError):
        asyncio.run(media.video("http://host.example/a.mp4", tiles + 1, media.budget()))
    assert fetcher.asked == []


def test_tiles_of_all_requests_are_bounded(media):
    async def load(count):
        return [await media.picture(METER, None, media.budget()) for _ in range(count)]

    (first,) = asyncio.run(load(1))
    media._most_bytes = 3 * first.pixels.nbytes
    others = asyncio.run(load(2))
    with pytest.raises(ApiError, match="too many requests") as error:
        asyncio.run(load(1))
    del first, others, error
    gc.collect()
    assert asyncio.run(load(3))


def test_one_request_may_have_what_its_context_holds(media, model, fetcher):
    config = model.checkpoint.config
    tiles = 10**9 // config.image_tokens
    assert Media(model.checkpoint, 10**9, fetcher)._most_bytes == tiles * (
        3 * config.vision.image_size**2 * 4
    )


def test_a_model_without_vision(model, fetcher):
    blind = SimpleNamespace(config=model.checkpoint.config, has_vision=False)
    media = Media(blind, 2048, fetcher)
    with pytest.raises(ImageError, match="no vision"):
        asyncio.run(media.picture(METER, None, media.budget()))


def test_pictures_that_came_with_the_request_wait_for_no_fetch(model):
    async def load():
        go = asyncio.Event()

        async def get(url, max_bytes):
            await go.wait()
            return (EXAMPLES / "meter.png").read_bytes()

        media = Media(model.checkpoint, 2048, SimpleNamespace(get=get))
        url = "http://host.example/a.png"
        fetching = [
            asyncio.ensure_future(media.picture(url, None, media.budget())) for _ in range(FETCHES)
        ]
        await asyncio.sleep(0)
        await asyncio.wait_for(media.picture(METER, None, media.budget()), 5)
        go.set()
        await asyncio.gather(*fetching)

    asyncio.run(load())


def test_the_tiles_of_a_request_leave_room_for_an_answer():
    budget = TileBudget(72, 36)
    budget.take(1)
    with pytest.raises(ContextLengthError, match="72 tokens"):
        budget.check(1)  # the context would be full
    TileBudget(73, 36).take(2)


def test_frames_of_videos_are_counted_as_well(media, model, monkeypatch):
    frame = prepare_picture((EXAMPLES / "meter.png").read_bytes(), model.checkpoint.config, 1)
    monkeypatch.setattr("edgevl.serve.media.prepare_video", lambda *_: [frame, frame])
    url = "http://host.example/a.mp4"
    assert asyncio.run(media.video(url, 2, media.budget())) == [frame, frame]
    media._most_bytes = 2 * frame.pixels.nbytes - 1
    with pytest.raises(ApiError, match="too many requests"):
        asyncio.run(media.video(url, 2, media.budget()))
