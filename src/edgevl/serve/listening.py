"""Sockets that listen, and signals that stop who listens."""

from __future__ import annotations

import ipaddress
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from edgevl.errors import EdgeVLError

if TYPE_CHECKING:
    import uvicorn


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens; ``port`` 0 takes one that is free.

    Raises:
        EdgeVLError: the host is no address of this machine, or the port is taken.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        # A name such as localhost may have both: most clients try IPv4, and some only that.
        family, _, _, _, address = min(found, key=lambda place: place[0] != socket.AF_INET)
        return socket.create_server(address[:2], family=family, backlog=2048)
    except UnicodeError:
        raise EdgeVLError(f"--host {host!r}: not the name of a host") from None
    except OSError as error:
        # Python adds the address to what the system says.
        reason = str(error.strerror).partition(" (while")[0]
        raise EdgeVLError(
            f"cannot listen at {host}, port {port}: {reason}; choose others with --host and --port"
        ) from None


def is_loopback(sock: socket.socket) -> bool:
    """Tell whether only this machine reaches a socket that listens."""
    return ipaddress.ip_address(sock.getsockname()[0]).is_loopback


def url_of(sock: socket.socket) -> str:
    """Return where a socket that listens is reached."""
    host, port = sock.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


@contextmanager
def signals_end_well(server: uvicorn.Server) -> Iterator[None]:
    """Ignore the signals that uvicorn repeats once it has stopped: to be stopped is no failure.

    The end of the terminal stops it, too, unless that is ignored (``nohup``).
    """
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    for number, handler in before.items():
        if number != signal.SIGHUP:
            signal.signal(number, lambda *_: None)
        elif handler != signal.SIG_IGN:
            signal.signal(number, server.handle_exit)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
