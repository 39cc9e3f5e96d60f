"""What a peer is: how to install it, how to build its model, and how to run that."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray


class Peer(ABC):
    """A stack that runs the model. An instance is loaded, in a process of its own.

    The class methods run in the peer's environment, too; its libraries are imported where they are
    used, so that every peer can be listed anywhere.

    Shapes: T tokens, V vocabulary, S tile size, H hidden size of the text model.
    """

    #: Name of the environment and of the directory of its models.
    name: ClassVar[str]
    #: What pip installs, pinned. Nothing: the Python that runs the comparison is used.
    requirements: ClassVar[tuple[str, ...]] = ()
    #: What it installs after that without looking at their dependencies.
    requirements_alone: ClassVar[tuple[str, ...]] = ()
    #: Options of pip.
    pip_options: ClassVar[tuple[str, ...]] = ()
    #: Environment of pip, such as the options of a build.
    pip_environment: ClassVar[dict[str, str]] = {}
    #: Another peer whose models this one runs; None: it builds its own.
    models_of: ClassVar[str | None] = None

    @classmethod
    @abstractmethod
    def build(cls, checkpoint: Path, directory: Path) -> None:
        """Make from a checkpoint (``-HF`` layout) what the peer loads, in an empty directory."""

    @abstractmethod
    def __init__(self, directory: Path, text: str | None, vision: str | None, threads: int) -> None:
        """Load the text model and the vision encoder in the variants named; None: not at all."""

    @abstractmethod
    def prefill(self, token_ids: NDArray[np.int64]) -> None:
        """Empty the cache and compute T tokens, with the logits of the last one."""

    @abstractmethod
    def decode(self, tokens: int) -> None:
        """Choose the likeliest token and compute it, ``tokens`` times."""

    @abstractmethod
    def logits(self) -> NDArray[np.float32]:
        """Return the logits of the last position, float32 [V]."""

    @abstractmethod
    def encode_tile(self, pixels: NDArray[np.float32]) -> NDArray[np.float32]:
        """Encode a normalised tile, float32 [1, 3, S, S]: -> its features, float32 [tokens, H]."""
