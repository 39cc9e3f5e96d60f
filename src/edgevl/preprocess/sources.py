"""What pictures and videos have in common as files: ``data:`` URLs, paths, names in messages."""

from __future__ import annotations

import base64
import binascii
import string
from urllib.parse import unquote_to_bytes

from edgevl.errors import EdgeVLError

#: Most %-escapes of a ``data:`` URL. Decoding one takes half a kilobyte of memory.
_MAX_ESCAPES = 2**17
#: Characters of base64 that are decoded at a time, a multiple of four.
_BASE64_STEP = 2**20


def data_url(url: str, max_bytes: int, error_type: type[EdgeVLError]) -> bytes:
    """Return the payload of a ``data:`` URL (RFC 2397), base64 or percent-encoded.

    Args:
        url: the whole URL.
        max_bytes: a URL that must hold more is refused before it is decoded; what is returned can
            still be somewhat more.
        error_type: what to raise.

    Raises:
        EdgeVLError: of ``error_type``: the URL is too long or malformed.
    """
    # Each byte takes at most three characters, and some more for the media type.
    if len(url) > 3 * max_bytes + 1024:
        raise error_type(f"the data: URL is over the limit of {max_bytes // 2**20} MiB")
    header, comma, payload = url.partition(",")
    if not comma:
        raise error_type(f"{short_name(url)}: a data: URL needs a comma before its data")
    try:
        data = payload.encode()
    except UnicodeEncodeError:
        raise error_type("the data: URL has half a surrogate pair; correct it") from None
    del payload  # as large as a video may be
    if data.count(b"%") > _MAX_ESCAPES:
        raise error_type(f"the data: URL has more than {_MAX_ESCAPES} %-escapes: use base64")
    data = unquote_to_bytes(data)
    if not header.lower().rstrip().endswith(";base64"):
        return data
    data = data.translate(None, string.whitespace.encode()).rstrip(b"=")
    data += b"=" * (-len(data) % 4)
    try:
        # In steps, between which other threads can run.
        steps = range(0, len(data), _BASE64_STEP)
        return b"".join(base64.b64decode(data[i : i + _BASE64_STEP], validate=True) for i in steps)
    except binascii.Error as error:
        raise error_type(f"the data: URL is not valid base64 ({error})") from None


def short_name(name: str) -> str:
    """Return a path or URL fit for a message: one line, at most 100 characters."""
    name = name.encode("utf-8", "backslashreplace").decode()
    name = "".join(char if char.isprintable() else "?" for char in name[:200])
    return name if len(name) <= 100 else f"{name[:97]}…"
