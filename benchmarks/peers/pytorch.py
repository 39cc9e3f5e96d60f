"""PyTorch with transformers, the original implementation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from peers.base import Peer


class PyTorch(Peer):
    """transformers' own InternVL in eager mode; the variant, one for both parts, is the dtype."""

    name = "pytorch"
    requirements = ("torch==2.13.0", "transformers==5.23.0", "pillow==13.0.0")

    @classmethod
    def build(cls, checkpoint: Path, directory: Path) -> None:
        """Point at the checkpoint: transformers reads it as it is."""
        (directory / "checkpoint").symlink_to(checkpoint)

    def __init__(self, directory: Path, text: str | None, vision: str | None, threads: int) -> None:
        """Load the checkpoint in one dtype and keep the parts that are asked for."""
        import torch

        from peers.transformers_model import load_model, vision_module

        torch.set_num_threads(threads)
        self._torch = torch
        self._dtype = torch.bfloat16 if "bf16" in (text, vision) else torch.float32
        model = load_model((directory / "checkpoint").resolve(), self._dtype)
        if vision:
            self._vision = vision_module(model)
        if text:
            self._text, self._head = model.model.language_model, model.lm_head
        self._logits = torch.empty(0)

    def prefill(self, token_ids: NDArray[np.int64]) -> None:
        """Prefill a new cache."""
        self._cache: Any = None
        self._step(self._torch.from_numpy(token_ids)[None])

    def decode(self, tokens: int) -> None:
        """Decode greedily."""
        for _ in range(tokens):
            self._step(self._logits.argmax().reshape(1, 1))

    def _step(self, token_ids: Any) -> None:
        out = self._text(input_ids=token_ids, past_key_values=self._cache, use_cache=True)
        self._cache = out.past_key_values
        self._logits = self._head(out.last_hidden_state[0, -1])

    def logits(self) -> NDArray[np.float32]:
        """Return them in float32."""
        return self._logits.float().numpy()

    def encode_tile(self, pixels: NDArray[np.float32]) -> NDArray[np.float32]:
        """Encode a tile."""
        features = self._vision(self._torch.from_numpy(pixels).to(self._dtype))
        return features[0].float().numpy()
