"""Fetching from other hosts: what is refused, where connections go, what bounds them.

The internet of these tests is one server on loopback: `Pinned` notes the address that a connection
was meant for and goes to that server instead.
"""

import asyncio
import gzip
import shutil
import ssl
import subprocess
import time

import httpx2
import pytest

from edgevl.errors import FetchError
from edgevl.serve import media
from edgevl.serve.media import is_public

PUBLIC, OTHER = "93.184.215.14", "2606:4700::6810:84e5"
FILE = bytes(range(256)) * 1000
#: Trusts no authority; one for all, since making them takes a while.
NOBODY = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


class Pinned(httpx2.AsyncHTTPTransport):
    """Goes to a port of loopback whatever the address; ``unreachable`` ones do not answer."""

    def __init__(self, port, connections, unreachable=(), trusted=NOBODY):
        super().__init__(verify=trusted)
        self.port, self.connections, self.unreachable = port, connections, unreachable

    async def handle_async_request(self, request):
        self.connections.append((request.url.scheme, request.url.host, request.url.port))
        if request.url.host in self.unreachable:
            raise httpx2.ConnectError("unreachable")
        request.url = request.url.copy_with(host="127.0.0.1", port=self.port)
        return await super().handle_async_request(request)


class Internet:
    """A server, and names for it.

    Attributes:
        pages: path -> what is sent, in pieces: bytes, or seconds to wait.
        names: host -> addresses, or what they are the first, the second, … time.
        requests: the heads of the requests that arrived.
        connections: scheme, address and port that were meant.
    """

    def __init__(self):
        self.pages, self.requests, self.connections, self.looked_up = {}, [], [], []
        self.names = {"a.example": [PUBLIC], "b.example": [PUBLIC]}
        self.unreachable, self.certificate, self.trusted = (), None, NOBODY

    def get(self, url, max_bytes=10**6, allowed=("a.example", "b.example"), timeout_s=10.0):
        async def run():
            server = await asyncio.start_server(self._answer, "127.0.0.1", ssl=self.certificate)
            async with server:
                port = server.sockets[0].getsockname()[1]
                fetcher = media.Fetcher(
                    allowed,
                    timeout_s,
                    resolve=self._resolve,
                    transport=lambda: Pinned(
                        port, self.connections, self.unreachable, self.trusted
                    ),
                )
                return await fetcher.get(url, max_bytes)

        return asyncio.run(run())

    def refused(self, url, **options):
        """Return the one line that says why."""
        with pytest.raises(FetchError) as error:
            self.get(url, **options)
        assert "\n" not in str(error.value)
        return str(error.value)

    async def _resolve(self, host, port):
        self.looked_up.append((host, port))
        addresses = self.names.get(host, OSError("no such host"))
        if isinstance(addresses, Exception):
            raise addresses
        return addresses.pop(0) if addresses and isinstance(addresses[0], list) else addresses

    async def _answer(self, reader, writer):
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            self.requests.append(head.decode())
            path = head.split()[1].decode()
            for piece in self.pages[path]:
                if isinstance(piece, bytes):
                    writer.write(piece)
                    await writer.drain()
                else:
                    await asyncio.sleep(piece)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # the client has seen enough
        finally:
            writer.close()


def ok(body=FILE, *headers, length=None):
    lines = ["HTTP/1.1 200 OK", f"Content-Length: {len(body) if length is None else length}"]
    return ["\r\n".join([*lines, *headers, "", ""]).encode(), body]


def redirect(location, status=302):
    return [
        f"HTTP/1.1 {status} Found\r\nLocation: {location}\r\nContent-Length: 0\r\n\r\n".encode()
    ]


@pytest.fixture
def internet():
    return Internet()


def test_a_file(internet):
    internet.pages["/a%20b.png?x=1"] = ok(FILE, "Content-Type: text/html", "Set-Cookie: a=b")
    assert internet.get("HTTP://A.Example/a b.png?x=1#part") == FILE
    assert internet.connections == [("http", PUBLIC, None)]
    head = internet.requests[0].lower()
    assert "\r\nhost: a.example\r\n" in head
    assert "\r\naccept-encoding: identity\r\n" in head
    assert "user-agent: edgevl/" in head
    assert PUBLIC not in head


def test_an_international_name_and_a_port_of_its_own(internet):
    internet.pages["/"] = ok()
    internet.names["xn--bcher-kva.example"] = [PUBLIC]
    allowed = ["Bücher.Example:8080"]
    assert internet.get("http://xn--BCHER-kva.example:8080/", allowed=allowed) == FILE
    assert internet.get("http://bücher.example:8080", allowed=allowed) == FILE
    assert set(internet.connections) == {("http", PUBLIC, 8080)}
    assert "host: xn--bcher-kva.example:8080\r\n" in internet.requests[0].lower()
    for url in ("http://bücher.example/", "https://bücher.example/", "http://bücher.example:80/"):
        assert "is not allowed" in internet.refused(url, allowed=allowed)
    assert "not allowed" in internet.refused("http://bücher.example:8081/", allowed=allowed)


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd",
        "FILE:///etc/passwd",
        "ftp://a.example/x",
        "gopher://a.example/x",
        "//a.example/x",
        "/etc/passwd",
        "a.example/x",
        " http://a.example/",
        "http:a.example",
        "http:///a.example",
        "http:\\\\a.example\\x",
        "\\\\a.example\\x",
        "http://a.example/\tx",
        "http://a.example\r\nHost: b.example/",
        "http://a.example/\ud800",
        "http://\ud800/",
        "http://a.example:99999x/",
        "http://[::1",
        "http://a.example/" + "x" * 70_000,
        "",
    ],
)
def test_no_url_of_http(internet, url):
    message = internet.refused(url)
    assert "not a URL" in message
    assert len(message) < 200
    assert internet.looked_up == internet.connections == []


@pytest.mark.parametrize(
    "url",
    [
        "http://c.example/",
        "http://sub.a.example/",
        "http://a.example.c.example/",
        "http://a.example./",
        "http://a.example:8080/",
        "http://a.example:0/",
        "http://a.example:-80/",
        "http://a.example%2f@127.0.0.1/",
        "http://a.example\\.c.example/",
        "http://a.example%00.c.example/",
        "http://localhost/",
        "http://127.0.0.1/",
        "http://2130706433/",
        "http://0x7f.1/",
        "http://0x7f000001/",
        "http://0177.0.0.1/",
        "http://127.1/",
        "http://127。0。0。1/",
        "http://１２７.0.0.1/",
        "http://[::1]/",
        "http://[::ffff:127.0.0.1]/",
        "http://[::ffff:7f00:1]/",
        "http://[fe80::1%25eth0]/",
        "http://0/",
    ],
)
def test_other_hosts(internet, url):
    message = internet.refused(url)
    assert any(text in message for text in ("is not allowed", "not a URL", "user name"))
    assert internet.looked_up == internet.connections == []


def test_the_message_names_the_mend(internet):
    assert internet.refused("http://c.example:81/x") == (
        "http://c.example:81/x: the host c.example:81 is not allowed; give a data: URL, or ask the "
        "operator to allow it: --allow-host c.example:81"
    )
    assert "is not allowed" in internet.refused("http://a.example/", allowed=())


def test_passwords_are_refused_and_not_repeated(internet):
    for url in ("http://me:secret@a.example/", "http://a.example\\@b.example/"):
        message = internet.refused(url)
        assert "user name or password" in message
        assert "secret" not in message
    assert internet.looked_up == []


@pytest.mark.parametrize(
    "entry",
    ["", "*.a.example", "http://a.example", "a.example/x", "me@a.example", "a b\n", ":80", "::1",
     "a.example:0", "a.example:65536", "a.example:x", "a.example?x", "a.example#x", "\ud800"],
)  # fmt: skip
def test_entries_that_are_no_host(entry):
    with pytest.raises(FetchError, match=r"--allow-host .*: not a host"):
        media.Fetcher([entry])


NOT_PUBLIC = [
    "0.0.0.0", "10.1.2.3", "100.64.0.1", "100.127.255.254", "127.0.0.1", "127.255.0.1",
    "169.254.169.254", "172.16.0.1", "172.31.255.255", "192.168.1.1", "192.0.0.8", "192.0.0.192",
    "192.0.2.1", "192.88.99.1", "198.18.0.1", "198.51.100.1", "203.0.113.1", "168.63.129.16",
    "224.0.0.1", "239.255.255.250", "240.0.0.1", "255.255.255.255",
    "::", "::1", "fe80::1", "fe80::1%eth0", "fec0::1", "fc00::1", "fd00:ec2::254", "ff02::1",
    "ff0e::1", "100::1", "2001:db8::1", "3fff::1", "4000::1",
    "::ffff:127.0.0.1", "::ffff:10.0.0.1", "::ffff:169.254.169.254", "::ffff:0:127.0.0.1",
    "::127.0.0.1", "::8.8.8.8", "2002:7f00:1::", "2002:a00:1::1", "2002:808:808::1",
    "2001:0:4136:e378:8000:63bf:80ff:fffe", "64:ff9b::127.0.0.1", "64:ff9b::10.0.0.1",
    "64:ff9b::a9fe:a9fe", "64:ff9b:1::8.8.8.8", "64:ff9b::e000:1", "", "localhost", "1",
]  # fmt: skip


@pytest.mark.parametrize("address", NOT_PUBLIC)
def test_addresses_that_are_not_public(internet, address):
    assert not is_public(address)
    internet.names["a.example"] = [PUBLIC, address]  # one is enough
    message = internet.refused("http://a.example/")
    assert message == "http://a.example/: a.example is unknown, or its address is not public"
    assert internet.connections == []


@pytest.mark.parametrize(
    "address",
    ["8.8.8.8", "100.63.255.255", "100.128.0.1", "172.32.0.1", "169.253.0.1", "192.0.1.1", PUBLIC,
     OTHER, "2001:4860:4860::8888", "2a00:1450:4001::1", "64:ff9b::8.8.8.8", "::ffff:8.8.8.8"],
)  # fmt: skip
def test_public_addresses(address):
    assert is_public(address)


@pytest.mark.parametrize(
    "answer", [OSError("unknown"), UnicodeError("label too long"), [], ["10.0.0.1"]]
)
def test_internal_names_look_like_unknown_ones(internet, answer):
    internet.names["a.example"] = answer
    message = internet.refused("http://a.example/")
    assert message == "http://a.example/: a.example is unknown, or its address is not public"


def test_an_allowed_name_that_is_a_number_is_looked_up_and_refused(internet):
    allowed = ["2130706433", "127.0.0.1", "[::1]", "localhost"]
    for url in ("http://2130706433/", "http://127.0.0.1/", "http://[::1]/", "http://localhost/"):

        async def run(url=url):
            await media.Fetcher(allowed).get(url, 100)  # with the system's own look-up

        with pytest.raises(FetchError, match="is not public"):
            asyncio.run(run())


def test_a_name_is_looked_up_once(internet):
    """DNS that answers otherwise the second time: the connection goes to what was checked."""
    internet.pages["/"] = ok()
    internet.names["a.example"] = [[PUBLIC], ["127.0.0.1"]]
    assert internet.get("http://a.example/") == FILE
    assert internet.looked_up == [("a.example", 80)]
    assert internet.connections == [("http", PUBLIC, None)]
    assert "is not public" in internet.refused("http://a.example/")
    assert len(internet.connections) == 1


def test_a_redirect_to_the_same_name_is_checked_again(internet):
    internet.pages["/"] = redirect("/secret")
    internet.names["a.example"] = [[PUBLIC], ["127.0.0.1"]]
    assert "is not public" in internet.refused("http://a.example/")
    assert len(internet.requests) == 1


def test_the_next_address_where_one_does_not_answer(internet):
    internet.pages["/"] = ok()
    internet.names["a.example"] = [OTHER, PUBLIC, OTHER]
    internet.unreachable = (OTHER,)
    assert internet.get("http://a.example/") == FILE
    assert [address for _, address, _ in internet.connections] == [OTHER, PUBLIC]
    internet.unreachable = (OTHER, PUBLIC)
    message = internet.refused("http://a.example/")
    assert message == "http://a.example/: no connection to a.example"


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects(internet, status):
    internet.pages["/1"] = redirect("2", status)
    internet.pages["/2"] = redirect("http://b.example/3", status)
    internet.pages["/3"] = redirect("//a.example/4", status)
    internet.pages["/4"] = ok()
    assert internet.get("http://a.example/1") == FILE
    hosts = [head.partition("Host: ")[2].partition("\r\n")[0] for head in internet.requests]
    assert hosts == ["a.example", "a.example", "b.example", "a.example"]
    internet.pages["/0"] = redirect("1")
    assert "more than 3 times" in internet.refused("http://a.example/0")


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("http://127.0.0.1/", "127.0.0.1 is not allowed"),
        ("http://169.254.169.254/latest/meta-data", "169.254.169.254 is not allowed"),
        ("http://2130706433/", "is not allowed"),
        ("http://[::ffff:127.0.0.1]/", "is not allowed"),
        ("//localhost/", "localhost is not allowed"),
        ("http://a.example:22/", "a.example:22 is not allowed"),
        ("http://inside.example/", "is not public"),
        ("http://me@a.example/", "user name"),
        ("file:///etc/passwd", "not a URL of http"),
        ("gopher://a.example/", "not a URL of http"),
        ("http://0177.0.0.1/", "not a URL"),
        ("http://a.example/\tx", "not a URL"),
    ],
)
def test_redirects_are_checked_like_urls(internet, location, message):
    internet.pages["/"] = redirect(location)
    internet.names["inside.example"] = ["10.0.0.1"]
    told = internet.refused("http://a.example/", allowed=["a.example", "inside.example"])
    assert message in told
    assert "10.0.0.1" not in told
    assert len(internet.connections) == 1


def test_sizes(internet):
    internet.pages["/"] = ok()
    assert internet.get("http://a.example/", max_bytes=len(FILE)) == FILE
    message = internet.refused("http://a.example/", max_bytes=len(FILE) - 1)
    assert message == "http://a.example/: over the limit of 0.244 MiB; give a smaller file"


def test_a_length_over_the_limit_is_not_waited_for(internet):
    internet.pages["/"] = [*ok(b"x", length=10**12), 30]
    started = time.monotonic()
    assert "over the limit" in internet.refused("http://a.example/", timeout_s=20)
    assert time.monotonic() - started < 10


def test_an_endless_body_without_a_length(internet):
    chunk = b"10000\r\n" + bytes(0x10000) + b"\r\n"
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    internet.pages["/chunks"] = [head, *[chunk] * 10_000]
    internet.pages["/close"] = [b"HTTP/1.1 200 OK\r\n\r\n", *[bytes(0x10000)] * 10_000]
    internet.pages["/drops"] = [head, *[b"1\r\nx\r\n" * 1000] * 10_000]
    for path in ("chunks", "close", "drops"):
        url = f"http://a.example/{path}"
        assert "over the limit of 0.0954 MiB" in internet.refused(url, max_bytes=100_000)


def test_a_slow_drip_is_bounded_as_a_whole(internet):
    drip = [piece for _ in range(200) for piece in (b"x", 0.05)]
    internet.pages["/body"] = [*ok(b"", length=200), *drip]
    internet.pages["/head"] = [b"HTTP/1.1 200 OK\r\nX: ", *drip]
    internet.pages["/"] = redirect("/body")
    for path in ("body", "head", ""):
        started = time.monotonic()
        message = internet.refused(f"http://a.example/{path}", timeout_s=0.5)
        assert message == f"http://a.example/{path}: not fetched within 0.5 s"
        assert time.monotonic() - started < 5


def test_a_slow_look_up_is_bounded(internet):
    async def resolve(host, port):
        await asyncio.sleep(60)

    internet._resolve = resolve
    assert "within 0.1 s" in internet.refused("http://a.example/", timeout_s=0.1)


def test_compressed_bodies_are_refused_unread(internet):
    bomb = gzip.compress(bytes(10**7))
    for encoding in ("gzip", "br", "identity, gzip", "x-unknown"):
        internet.pages["/"] = ok(bomb, f"Content-Encoding: {encoding}")
        assert "compresses" in internet.refused("http://a.example/")
    internet.pages["/"] = ok(bomb, "Content-Encoding: Identity")
    assert internet.get("http://a.example/") == bomb


@pytest.mark.parametrize(
    "answer",
    [
        [b"nonsense\r\n\r\n"],
        [b"HTTP/1.1 200 OK\r\nContent-Length: 1" + b"0" * 5000 + b"\r\n\r\n"],
        [b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n"],
        [b"HTTP/1.1 200 OK\r\nX: " + b"x" * 10**6],
        [b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nshort"],
        [],
    ],
)
def test_broken_answers(internet, answer):
    internet.pages["/"] = answer
    assert "cannot be fetched (" in internet.refused("http://a.example/")


def test_other_statuses_tell_no_more_than_their_number(internet):
    for status in (204, 206, 304, 404, 500):
        body = b"" if status in (204, 304) else b"secret"
        head = f"HTTP/1.1 {status} x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        internet.pages["/"] = [head, body]
        message = internet.refused("http://a.example/")
        assert message == f"http://a.example/: the host answers with status {status}"
    internet.pages["/"] = [b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\n\r\n"]  # to nowhere
    assert "status 302" in internet.refused("http://a.example/")


def test_nothing_of_the_environment_and_no_cookies(internet, monkeypatch):
    """With the transport that is used without tests, to an address that passes for public."""
    monkeypatch.setattr(media, "is_public", lambda address: address == "127.0.0.1")
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    internet.pages["/"] = [redirect("/2")[0].replace(b"\r\n", b"\r\nSet-Cookie: a=b\r\n", 1)]
    internet.pages["/2"] = ok()

    async def run():
        server = await asyncio.start_server(internet._answer, "127.0.0.1")
        async with server:
            place = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
            return await media.Fetcher([place]).get(f"http://{place}/", 10**6)

    assert asyncio.run(run()) == FILE
    assert len(internet.requests) == 2
    assert "cookie" not in internet.requests[1].lower()


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """A server's and a client's context: the certificate is for a.example, and is trusted."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl makes the certificate")
    directory = tmp_path_factory.mktemp("certificate")
    key, file = directory / "key.pem", directory / "certificate.pem"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2"
    command += f" -subj /CN=test -addext subjectAltName=DNS:a.example -keyout {key} -out {file}"
    subprocess.run(command.split(), check=True, capture_output=True)
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(file, key)
    return server, ssl.create_default_context(cafile=file)


def test_tls_is_with_the_name_and_not_the_address(internet, certificate):
    internet.certificate, internet.trusted = certificate
    names = []
    internet.certificate.sni_callback = lambda _, name, __: names.append(name)
    internet.pages["/"] = ok()
    assert internet.get("https://a.example/") == FILE
    assert internet.connections == [("https", PUBLIC, None)]
    assert internet.looked_up == [("a.example", 443)]
    assert internet.refused("https://b.example/").endswith("no connection to b.example")
    assert names == ["a.example", "b.example"]
    internet.trusted = NOBODY
    assert internet.refused("https://a.example/").endswith("no connection to a.example")
    assert len(internet.requests) == 1


def test_certificates_are_checked_without_tests_too(internet, certificate, monkeypatch):
    monkeypatch.setattr(media, "is_public", lambda address: address == "127.0.0.1")

    async def run():
        server = await asyncio.start_server(internet._answer, "127.0.0.1", ssl=certificate[0])
        async with server:
            place = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
            await media.Fetcher([place]).get(f"https://{place}/", 10**6)

    with pytest.raises(FetchError, match="no connection"):
        asyncio.run(run())
    assert internet.requests == []


def test_https_does_not_lead_to_http(internet, certificate):
    internet.certificate, internet.trusted = certificate
    internet.pages["/"] = redirect("http://a.example/2")
    assert "from https to http" in internet.refused("https://a.example/")
    assert len(internet.connections) == 1


def test_many_at_once(internet):
    """Two names of one address share no connection."""
    internet.pages["/"] = ok()

    async def run():
        server = await asyncio.start_server(internet._answer, "127.0.0.1")
        async with server:
            port = server.sockets[0].getsockname()[1]
            fetcher = media.Fetcher(
                ["a.example", "b.example"],
                resolve=internet._resolve,
                transport=lambda: Pinned(port, internet.connections),
            )
            urls = ["http://a.example/", "http://b.example/"] * 10
            return await asyncio.gather(*(fetcher.get(url, 10**6) for url in urls))

    assert asyncio.run(run()) == [FILE] * 20
    hosts = [head.partition("Host: ")[2].partition("\r\n")[0] for head in internet.requests]
    assert sorted(hosts) == ["a.example"] * 10 + ["b.example"] * 10
