"""Running a compiled model through the vendor's Python package, in the manner of the vendor's demo.

Keys and values are NumPy arrays, one a layer, that go whole into `axengine.InferenceSession.run`
for every token; what a call returns is put into them, and the hidden states into the next call.
"""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgevl.axera.layout import EMBEDDING_NPY, MASKED, BoardShape, layer_file, post_file
from edgevl.checkpoint.config import TextConfig

HOW_TO_INSTALL = (
    "axengine is missing: pip install cffi ml_dtypes, then clone github.com/AXERA-TECH/pyaxengine "
    "and pip install the clone"
)


class AxengineLoop:
    """One model and the cache of one sequence.

    Attributes:
        copied_in: bytes of the arrays given to sessions since `reset_counts`; each is copied.
        copied_out: bytes of the arrays that sessions returned, which are copies.
        length: positions in the cache.
    """

    def __init__(self, directory: Path, text: TextConfig, shape: BoardShape) -> None:
        """Load all layers, the head and the embedding of ``directory``."""
        axengine = _import_axengine()

        def session(name: str) -> Any:
            with contextlib.redirect_stdout(sys.stderr):
                return axengine.InferenceSession(str(directory / name))

        self._shape = shape
        self._layers = [
            session(layer_file(text.model_type, shape.chunk, layer))
            for layer in range(text.num_hidden_layers)
        ]
        self._post = session(post_file(text.model_type))
        self._embedding = np.load(directory / EMBEDDING_NPY, mmap_mode="r")
        self._bfloat16 = self._post.get_inputs()[0].dtype
        width = text.num_key_value_heads * text.head_dim
        caches = (text.num_hidden_layers, 1, shape.context, width)
        self._keys = np.zeros(caches, self._bfloat16)
        self._values = np.zeros(caches, self._bfloat16)
        self._decode_mask = np.full((1, 1, shape.context + 1), MASKED, self._bfloat16)
        # Of the first chunk; it is not read, and as large as the demo makes it.
        self._no_cache = np.zeros((1, 1, text.hidden_size), self._bfloat16)
        self.reset_counts()
        self.rewind(0)

    def reset_counts(self) -> None:
        """Set the counts of bytes to 0."""
        self.copied_in = self.copied_out = 0

    def rewind(self, length: int) -> None:
        """Forget what follows position ``length``."""
        self.length = length
        self._decode_mask[...] = MASKED
        self._decode_mask[..., :length] = 0
        self._decode_mask[..., -1] = 0

    def prefill(self, token_ids: NDArray[np.int64]) -> int:
        """Start a sequence with ``token_ids`` [T]: -> the likeliest next token."""
        self.rewind(0)
        chunk = self._shape.chunk
        for start in range(0, len(token_ids), chunk):
            part = token_ids[start : start + chunk]
            data = np.zeros((1, chunk, self._embedding.shape[1]), self._bfloat16)
            data[0, : len(part)] = self._embedding[part]
            indices = np.zeros((1, chunk), np.uint32)
            indices[0, : len(part)] = np.arange(start, start + len(part))
            # All see what came before, and themselves up to their own position.
            mask = np.zeros((1, chunk, start + chunk), np.float32)
            mask[0, :, start:] = np.triu(np.full((chunk, chunk), MASKED, np.float32), 1)
            bias = mask.astype(self._bfloat16)
            for layer, session in enumerate(self._layers):
                keys, values, data = self._run(
                    session,
                    1 + start // chunk,
                    K_cache=self._keys[layer, :, :start] if start else self._no_cache,
                    V_cache=self._values[layer, :, :start] if start else self._no_cache,
                    indices=indices,
                    input=data,
                    mask=bias,
                )
                end = start + len(part)
                self._keys[layer, :, start:end] = keys[:, : len(part)]
                self._values[layer, :, start:end] = values[:, : len(part)]
        self.rewind(len(token_ids))
        return self._best(data[:, len(part) - 1 : len(part)])

    def decode(self, token_id: int) -> int:
        """Append a token: -> the likeliest next one."""
        position = self.length
        indices = np.array([[position]], np.uint32)
        data = self._embedding[token_id].reshape(1, 1, -1).astype(self._bfloat16)
        for layer, session in enumerate(self._layers):
            keys, values, data = self._run(
                session,
                0,
                K_cache=self._keys[layer],
                V_cache=self._values[layer],
                indices=indices,
                input=data,
                mask=self._decode_mask,
            )
            self._keys[layer, :, position] = keys[:, 0]
            self._values[layer, :, position] = values[:, 0]
        self._decode_mask[..., position] = 0
        self.length += 1
        return self._best(data)

    def _best(self, hidden: NDArray[Any]) -> int:
        (logits,) = self._run(self._post, 0, input=np.ascontiguousarray(hidden))
        return int(logits.astype(np.float32).argmax())

    def _run(self, session: Any, group: int, **inputs: NDArray[Any]) -> list[NDArray[Any]]:
        outputs: list[NDArray[Any]] = session.run(None, inputs, shape_group=group)
        self.copied_in += sum(array.nbytes for array in inputs.values())
        self.copied_out += sum(array.nbytes for array in outputs)
        return outputs


def _import_axengine() -> ModuleType:
    """Import the vendor's package, which prints and starts the NPU."""
    try:
        with contextlib.redirect_stdout(sys.stderr):
            import axengine
    except ImportError as error:
        raise SystemExit(f"{HOW_TO_INSTALL} ({error})") from None
    return axengine
