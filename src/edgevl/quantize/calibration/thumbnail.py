"""Pictures small enough for a report."""

from __future__ import annotations

import io

from PIL import Image

#: Most bytes of one.
MAX_BYTES = 20_000
_SIDE = 384


def thumbnail(image: Image.Image) -> bytes:
    """Return an RGB picture as a JPEG of at most `MAX_BYTES` and `_SIDE` pixels a side."""
    small = image.copy()
    small.thumbnail((_SIDE, _SIDE))
    while True:
        for quality in (80, 60, 40):
            file = io.BytesIO()
            small.save(file, "JPEG", quality=quality)
            if file.tell() <= MAX_BYTES:
                return file.getvalue()
        small = small.reduce(2)  # noise compresses badly
