"""What the operator of a server decides."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """What the operator of a server decides.

    Attributes:
        name: What clients call the model.
        api_key: What clients must present; None lets everyone in.
        max_queue: Most requests that wait for their turn.
        max_request_bytes: Largest body of a request.
        timeout_s: Most seconds that a request may take, waiting included.
        stall_s: A client that takes nothing of a streamed answer, or sends nothing of its request,
            for so many seconds is given up.
        grace_s: Seconds that requests under way have when the server stops.
        allowed_hosts: Hosts from which pictures and videos are fetched.
        cors_origins: Origins whose pages may call the server; ``*`` is any.
        loopback: Whether it listens to this machine only; then it answers to names of this machine
            only, so that no web page can reach it by a name of its own (DNS rebinding).
        strict: Whether fields of requests that are not known are refused; else they are ignored.
    """

    name: str
    api_key: str | None = None
    max_queue: int = 64
    max_request_bytes: int = 32 * 10**6
    timeout_s: float = 600.0
    stall_s: float = 30.0
    grace_s: float = 10.0
    allowed_hosts: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    loopback: bool = True
    strict: bool = False
