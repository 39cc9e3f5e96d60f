"""Pictures and videos of requests: found or fetched, decoded and cut up in a few threads.

They are fetched so that nobody reaches through the server what is internal. A URL is taken apart
once. Its host must be one that the operator has named, and every address that the name stands for
must be public. The connection then goes to such an address itself: the name is not looked up again,
and so cannot come to mean another one in between. Redirects are new URLs.
"""

from __future__ import annotations

import asyncio
import io
import socket
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager, nullcontext
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from typing import TypeAlias, TypeVar

import numpy as np

from edgevl.checkpoint import ModelDirectory
from edgevl.errors import ContextLengthError, EdgeVLError, FetchError, ImageError, VideoError, needs
from edgevl.machine import this_machine
from edgevl.preprocess import Picture, prepare_picture, prepare_video
from edgevl.preprocess.image import MAX_BYTES, is_large
from edgevl.preprocess.sources import data_url, short_name
from edgevl.serve.errors import busy
from edgevl.version import __version__

with needs("serve", FetchError):
    import httpx2

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
#: Redirects that are followed.
MAX_REDIRECTS = 3
#: How long one of several addresses may take to answer before the next is tried, in seconds.
CONNECT_S = 5.0
_PORTS = {"http": 80, "https": 443}
#: IPv6 hosts on the internet have their addresses here (RFC 4291); outside of it are, among others,
#: loopback, link-local, unique local, multicast and IPv4-compatible addresses.
_GLOBAL_UNICAST = ip_network("2000::/3")
#: The last 32 bits are an IPv4 address: where a network has IPv6 only, IPv4 hosts are called so.
_NAT64 = ip_network("64:ff9b::/96")
#: What ``ipaddress`` takes for global, in some or all of the Python versions that are supported.
_NOT_PUBLIC = (
    ip_network("168.63.129.16/32"),  # Azure's services for its virtual machines
    ip_network("192.0.0.0/24"),  # protocol assignments, services of clouds among them
    ip_network("192.88.99.0/24"),  # relays of 6to4
    ip_network(
        "2001::/23"
    ),  # protocol assignments, Teredo (which embeds IPv4 addresses) among them
    ip_network("2002::/16"),  # 6to4, which embeds IPv4 addresses
    ip_network("3fff::/20"),  # documentation
)

#: Looks up the addresses of a host, given with a port.
Resolver: TypeAlias = Callable[[str, int], Awaitable[Sequence[str]]]


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
        tile_bytes = 3 * self._config.vision.image_size**2 * np.dtype(np.float32).itemsize
        one_request = max_context // self._config.image_tokens * tile_bytes
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

    async def video(
        self, url: str, frames: int, budget: TileBudget, threshold: float = 0.0
    ) -> list[Picture]:
        """Load a video's frames; as `picture`. For ``threshold`` see `prepare_video`.

        Raises:
            VideoError: the URL is of another kind, or what it holds no video that can be read.
            FetchError: the URL may not be fetched.
            ContextLengthError: the request's pictures have more tiles than the context holds.
            ApiError: those of all requests take too much memory.
        """
        budget.take(frames)
        async with self._loading(url):
            data = await self._bytes(url, MAX_VIDEO_BYTES, VideoError)
            pictures = await self._run(lambda: prepare_video(data, self._config, frames, threshold))
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


def is_public(text: str) -> bool:
    """Tell whether an address is that of a host on the public internet.

    Private, shared (100.64.0.0/10), loopback, link-local, multicast, reserved and unspecified
    addresses are not, nor those that embed one of these; 6to4 and Teredo are not at all.

    Args:
        text: the address, of IPv4 or IPv6.
    """
    try:
        address = ip_address(text)
    except ValueError:
        return False
    if isinstance(address, IPv6Address):
        if address.ipv4_mapped is not None:
            address = address.ipv4_mapped
        elif address in _NAT64:
            address = IPv4Address(int(address) & 0xFFFFFFFF)
        elif address not in _GLOBAL_UNICAST:
            return False
    return (
        address.is_global
        and not address.is_multicast
        and not any(address in network for network in _NOT_PUBLIC)
    )


async def look_up(host: str, port: int) -> list[str]:
    """Return the addresses of a host, as the system knows them.

    Raises:
        OSError: it is not known.
        UnicodeError: it cannot be the name of a host.
    """
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(place[0]) for *_, place in found]


class Fetcher:
    """Fetches what ``http:`` and ``https:`` URLs name, from allowed hosts that are public.

    Nothing is kept between two calls: no connection, no cookies. Proxies of the environment are not
    used. Many calls may be under way at once.
    """

    def __init__(
        self,
        allowed_hosts: Collection[str] = (),
        timeout_s: float = 20.0,
        *,
        resolve: Resolver = look_up,
        transport: Callable[[], httpx2.AsyncBaseTransport] | None = None,
    ) -> None:
        """Say what may be fetched.

        Args:
            allowed_hosts: ``example.org`` allows that host at ports 80 and 443, and none below it;
                ``example.org:8080`` at that port.
            timeout_s: most seconds of a call, redirects and all.
            resolve: looks up names.
            transport: makes what connects to the address in a URL; used once.

        Raises:
            FetchError: something in ``allowed_hosts`` is no host.
        """
        self._allowed = {place for host in allowed_hosts for place in _places(host)}
        self._timeout_s = timeout_s
        self._resolve = resolve
        if transport is None:
            certificates = httpx2.create_ssl_context()  # once: reading them takes a while
            self._transport: Callable[[], httpx2.AsyncBaseTransport] = lambda: (
                httpx2.AsyncHTTPTransport(verify=certificates)
            )
        else:
            self._transport = transport

    async def get(self, url: str, max_bytes: int) -> bytes:
        """Return what a URL names, whatever type the host says it has.

        Args:
            url: the URL.
            max_bytes: most bytes of it.

        Raises:
            FetchError: the URL is malformed, its host is not allowed, not public or does not
                answer with the whole file in time; there are too many bytes or redirects.
        """
        name = short_name(url)
        try:
            return await asyncio.wait_for(self._get(name, url, max_bytes), self._timeout_s)
        except asyncio.TimeoutError:
            raise FetchError(f"{name}: not fetched within {self._timeout_s:g} s") from None
        except httpx2.HTTPError as error:
            raise FetchError(f"{name}: cannot be fetched ({type(error).__name__})") from None

    async def _get(self, name: str, url: str, max_bytes: int) -> bytes:
        place = _parse(name, url)
        for _ in range(MAX_REDIRECTS + 1):
            self._check(name, place)
            async with self._opened(name, place) as response:
                if not response.has_redirect_location:
                    return await _read(name, response, max_bytes)
                before, place = place, _parse(name, response.headers["location"], place)
            if (before.scheme, place.scheme) == ("https", "http"):
                raise FetchError(f"{name}: redirects from https to http, which is not followed")
        raise FetchError(f"{name}: redirects more than {MAX_REDIRECTS} times; give the last URL")

    def _check(self, name: str, url: httpx2.URL) -> None:
        """Raise a FetchError if the URL, or its host, is not one that may be fetched."""
        if url.scheme not in _PORTS or not url.raw_host:
            raise FetchError(f"{name}: not a URL of http or https; give one, or a data: URL")
        host = short_name(url.netloc.decode())
        if url.userinfo:
            raise FetchError(f"the URL of {host} has a user name or password: leave it out")
        if (url.raw_host.decode(), _port(url)) not in self._allowed:
            raise FetchError(
                f"{name}: the host {host} is not allowed; give a data: URL, or ask the operator to "
                f"allow it: --allow-host {host}"
            )

    @asynccontextmanager
    async def _opened(self, name: str, url: httpx2.URL) -> AsyncIterator[httpx2.Response]:
        """Ask one of the host's addresses, all of which must be public."""
        host = url.raw_host.decode()
        try:
            addresses = list(dict.fromkeys(await self._resolve(host, _port(url))))
        except (OSError, UnicodeError):
            addresses = []
        if not addresses or not all(map(is_public, addresses)):
            # One text for both, so that it does not tell which names an internal network knows.
            raise FetchError(f"{name}: {host} is unknown, or its address is not public")
        headers = {
            "Host": url.netloc.decode(),
            "Accept-Encoding": "identity",
            "User-Agent": f"edgevl/{__version__}",
        }
        extensions = {
            "sni_hostname": host,  # TLS: the name whose certificate is asked for and checked
            "timeout": httpx2.Timeout(self._timeout_s, connect=CONNECT_S).as_dict(),
        }
        for address in addresses:
            place = url.copy_with(host=address)
            request = httpx2.Request("GET", place, headers=headers, extensions=extensions)
            # Without a client, nothing else decides: no redirects, cookies, proxies. And one for
            # each request: a connection to this address under another name is another one.
            async with self._transport() as transport:
                try:
                    response = await transport.handle_async_request(request)
                except (httpx2.ConnectError, httpx2.ConnectTimeout):
                    continue
                async with aclosing(response):
                    yield response
                    return
        raise FetchError(f"{name}: no connection to {host}")


def _parse(name: str, url: str, base: httpx2.URL | None = None) -> httpx2.URL:
    """Take a URL apart; host names come out in lower case and IDNA."""
    try:
        return httpx2.URL(url) if base is None else base.join(url)
    except (httpx2.InvalidURL, ValueError):  # ValueError: half a surrogate pair
        raise FetchError(f"{name}: not a URL; correct it") from None


def _port(url: httpx2.URL) -> int:
    return _PORTS[url.scheme] if url.port is None else url.port


def _places(host: str) -> list[tuple[str, int]]:
    """Return the host and ports that the operator allows."""
    try:
        url = httpx2.URL(f"//{host}")
    except (httpx2.InvalidURL, ValueError):
        url = httpx2.URL()
    ports = _PORTS.values() if url.port is None else [url.port]
    whole = url.path in ("", "/") and not url.query and not url.fragment and not url.userinfo
    if not whole or not url.raw_host or "*" in host or not all(0 < port < 65536 for port in ports):
        raise FetchError(
            f"--allow-host {short_name(host)}: not a host; write example.org or example.org:8080"
        )
    return [(url.raw_host.decode(), port) for port in ports]


async def _read(name: str, response: httpx2.Response, max_bytes: int) -> bytes:
    if response.status_code != 200:
        raise FetchError(f"{name}: the host answers with status {response.status_code}")
    if response.headers.get("content-encoding", "identity").lower() != "identity":
        raise FetchError(f"{name}: the host compresses the file, which was not asked for")
    too_long = f"{name}: over the limit of {max_bytes / 2**20:.3g} MiB; give a smaller file"
    if int(response.headers.get("content-length", 0)) > max_bytes:
        raise FetchError(too_long)
    body = io.BytesIO()  # no list: a host may send chunks of one byte
    async for chunk in response.aiter_raw():
        body.write(chunk)
        if body.tell() > max_bytes:
            raise FetchError(too_long)
    return body.getvalue()
