"""One sequence as the decoder sees it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Sample:
    """A conversation or a text, embedded.

    Attributes:
        token_ids: int64 [T].
        embeddings: float32 [T, H], with the features of pictures in their places.
        is_image: bool [T], which positions are image tokens.
        reply_start: first position of the assistant's last reply; 0 for plain text. Positions from
            ``reply_start - 1`` to the last but one predict the tokens that a comparison counts.
    """

    token_ids: NDArray[np.int64]
    embeddings: NDArray[np.float32]
    is_image: NDArray[np.bool_]
    reply_start: int
