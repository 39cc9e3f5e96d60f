"""What the operator of a server decides."""

from __future__ import annotations

from dataclasses import dataclass

from edgevl.options import option


@dataclass(frozen=True)
class Settings:
    """What the operator of a server decides; what is an option says itself what it does.

    Attributes:
        name: What clients call the model.
        api_key: What clients must present; None lets everyone in.
        stall_s: A client that takes nothing of a streamed answer, or sends nothing of its request,
            for so many seconds is given up.
        loopback: Whether it listens to this machine only; then it answers to names of this machine
            only, so that no web page can reach it by a name of its own (DNS rebinding).
    """

    name: str
    api_key: str | None = None
    max_queue: int = option(
        64,
        "integer",
        "Most requests that wait; more are told to come later.",
        "N",
        low=1,
        high=10_000,
    )
    max_request_bytes: int = option(
        32 * 10**6,
        "integer",
        "Largest request, pictures included.",
        "MB",
        low=1,
        high=1024,
        flag="--max-request-mb",
        unit=10**6,
    )
    timeout_s: float = option(
        600.0,
        "number",
        "Most seconds for a request, waiting included.",
        "S",
        low=0,
        above=True,
        flag="--timeout",
    )
    stall_s: float = 30.0
    grace_s: float = option(
        10.0,
        "number",
        "Seconds that requests under way have when the server is stopped.",
        "S",
        low=0,
        flag="--grace",
    )
    allowed_hosts: tuple[str, ...] = option(
        (),
        "texts",
        "A host from which pictures and videos are fetched. Repeatable.  [default: none]",
        "NAME",
        flag="--allow-host",
    )
    cors_origins: tuple[str, ...] = option(
        (),
        "texts",
        "An origin whose pages may call the server. Repeatable.  [default: none]",
        "ORIGIN",
        flag="--cors-origin",
    )
    loopback: bool = True
    strict: bool = option(False, "switch", "Refuse fields that are not known, not ignore them.")
