"""What is before a decoder on the NPU and behind it: embedding, vision encoder, output layer."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgevl.axera.layout import EMBEDDING_BF16, EMBEDDING_F32, EMBEDDING_NPY
from edgevl.axera.npu.base import (
    ALIGNMENT,
    FLOATS,
    STORED,
    Memory,
    NpuModel,
    Runtime,
    TensorInfo,
    from_device,
    to_device,
)
from edgevl.checkpoint.config import ModelConfig
from edgevl.errors import BoardError
from edgevl.files import reading

Floats = NDArray[np.float32]

#: The forms of the embedding, the smallest first.
EMBEDDING_FILES = (EMBEDDING_BF16, EMBEDDING_NPY, EMBEDDING_F32)


class EmbeddingFile:
    """The table [V, H] beside compiled layers, mapped: rows are read as they are used.

    Attributes:
        path: the file.
    """

    def __init__(self, path: Path, vocab_size: int, hidden_size: int) -> None:
        """Map a file, one of `EMBEDDING_FILES` by its name.

        Raises:
            BoardError: it cannot be read, or is not a table of that size.
        """
        self.path = path
        shape = (vocab_size, hidden_size)
        again = "as config.json says: copy or download it again"
        with reading(path, BoardError):
            size = path.stat().st_size
            if path.suffix == ".npy":
                try:
                    self._rows = np.load(path, mmap_mode="r", allow_pickle=False)
                # Empty, no array, or cut; its text may propose to read it as a pickle, which may
                # run code.
                except (EOFError, ValueError):
                    raise BoardError(
                        f"{path}: {size} bytes, not a whole NumPy array: copy or download it again"
                    ) from None
                found, dtype = self._rows.shape, self._rows.dtype
                if (found, dtype) != (shape, np.dtype("<f4")):
                    raise BoardError(
                        f"{path}: {dtype} {list(found)}, expected float32 {list(shape)} {again}"
                    )
                return
            stored = STORED["BF16" if path.name == EMBEDDING_BF16 else "F32"]
            expected = vocab_size * hidden_size * stored.itemsize
            if size != expected:
                raise BoardError(
                    f"{path}: {size} bytes, expected {expected} for {vocab_size} tokens of "
                    f"{hidden_size} numbers {again}"
                )
            self._rows = np.memmap(path, stored, "r", shape=shape)

    def rows(self, token_ids: NDArray[np.int64]) -> Floats:
        """Return the embeddings of tokens: int [T] -> float32 [T, H].

        Raises:
            IndexError: an id is not in the vocabulary.
        """
        if len(token_ids) and not 0 <= token_ids.min() <= token_ids.max() < len(self._rows):
            raise IndexError(f"token ids must be from 0 to {len(self._rows) - 1}")
        rows = np.asarray(self._rows[token_ids])
        return from_device(rows, "BF16" if rows.dtype == np.uint16 else "F32")


class NpuVisionEncoder:
    """Encodes a tile a call. Where the model takes bytes, it normalises them itself."""

    def __init__(self, runtime: Runtime, model: NpuModel, config: ModelConfig) -> None:
        """Prepare the call.

        Raises:
            BoardError: the model does not fit ``config``.
        """
        [group, *others] = model.groups
        if others or len(group.inputs) != 1 or len(group.outputs) != 1:
            raise BoardError(f"{model.path}: a vision encoder has one input and one output")
        self._input, self._output = group.inputs[0], group.outputs[0]
        size = config.vision.image_size
        nchw, nhwc = (1, 3, size, size), (1, size, size, 3)
        fits = {"U8": (nchw, nhwc)}.get(self._input.dtype, (nchw,))
        if self._input.dtype not in (*FLOATS, "U8") or self._input.shape not in fits:
            raise BoardError(
                f"{model.path}: input is {self._input.dtype} {list(self._input.shape)}, expected "
                f"F32 {list(nchw)}, or U8 {list(nchw)} or {list(nhwc)}: the model and config.json "
                "do not belong together"
            )
        self._features = (config.image_tokens, config.text.hidden_size)
        if self._output.dtype not in FLOATS or self._output.shape not in (
            (1, *self._features),
            self._features,
        ):
            raise BoardError(
                f"{model.path}: output is {self._output.dtype} {list(self._output.shape)}, "
                f"expected F32 {[1, *self._features]} as config.json says: the files do not belong "
                "together"
            )
        self._channels_last = self._input.shape == nhwc
        statistics = (config.image_mean, config.image_std)
        self._mean, self._std = (np.array(s, np.float32).reshape(3, 1, 1) for s in statistics)
        self._tile = runtime.allocate(self._input.nbytes)
        self._result = runtime.allocate(self._output.nbytes)
        self._call = model.bind(0, [(self._tile, 0)], [(self._result, 0)])

    def encode(self, pixels: Floats) -> Floats:
        """Encode a tile: normalised float32 [3, tile, tile] -> features float32 [T, H].

        Raises:
            BoardError: the NPU reports an error.
        """
        if self._input.dtype == "U8":
            levels = np.rint((pixels * self._std + self._mean) * 255).clip(0, 255)
            levels = levels.transpose(1, 2, 0) if self._channels_last else levels
            self._tile.write(0, np.ascontiguousarray(levels, np.uint8))
        else:
            self._tile.write(0, to_device(pixels, self._input.dtype))
        self._call.run()
        features = from_device(_stored(self._result, self._output), self._output.dtype)
        return features.reshape(self._features)


class NpuOutputLayer:
    """Computes logits of one position, or the likeliest tokens where only these were compiled.

    Attributes:
        top_k: tokens that get a logit; None for all of the vocabulary.
    """

    def __init__(
        self, runtime: Runtime, model: NpuModel, hidden: Memory, row: TensorInfo, vocab_size: int
    ) -> None:
        """Prepare the call.

        Args:
            runtime: gives memory for the result.
            model: the final norm and the head, loaded.
            hidden: where the decoder leaves hidden states.
            row: what it leaves there; its last dimension is the hidden size.
            vocab_size: tokens of the vocabulary.

        Raises:
            BoardError: the model does not fit the decoder or the vocabulary.
        """
        [group, *others] = model.groups
        if others or len(group.inputs) != 1:
            raise BoardError(
                f"{model.path}: {len(model.groups)} shape groups of {len(group.inputs)} inputs: an "
                "output layer has one of one"
            )
        entering = group.inputs[0]
        if entering.dtype != row.dtype or math.prod(entering.shape) != row.shape[-1]:
            raise BoardError(
                f"{model.path}: input is {entering.dtype} {list(entering.shape)}, but layers give "
                f"{row.dtype} [1, 1, {row.shape[-1]}]: the files do not belong together"
            )
        self._path = model.path
        self._vocab_size = vocab_size
        # Logits or probabilities, and the tokens that these are of.
        floats = [tensor for tensor in group.outputs if tensor.dtype in FLOATS]
        tokens = [tensor for tensor in group.outputs if tensor.dtype in ("I32", "U32")]
        sizes = [math.prod(tensor.shape) for tensor in group.outputs]
        all_logits = (len(floats), len(tokens)) == (1, 0) and sizes == [vocab_size]
        likeliest = (len(floats), len(tokens)) == (1, 1) and len(set(sizes)) == 1
        if not (all_logits or likeliest):
            found = ", ".join(f"{tensor.dtype} {list(tensor.shape)}" for tensor in group.outputs)
            raise BoardError(
                f"{model.path}: outputs are {found}; expected logits of {vocab_size} tokens as "
                "config.json says, or tokens and their probabilities (--post_topk)"
            )
        self.top_k = sizes[0] if likeliest else None
        results = {tensor: runtime.allocate(tensor.nbytes) for tensor in group.outputs}
        self._values, *self._tokens = [(results[tensor], tensor) for tensor in (*floats, *tokens)]
        self._row_bytes = entering.nbytes
        self._hidden = hidden
        # Rows begin at multiples of their size; where these are not aligned, a copy does.
        self._copy: Memory | None = None
        if self._row_bytes % ALIGNMENT:
            self._copy = runtime.allocate(self._row_bytes)
        self._call = model.bind(
            0, [(self._copy or hidden, 0)], [(result, 0) for result in results.values()]
        )

    def logits(self, row: int) -> Floats:
        """Return the logits of a row of hidden states, float32 [V], a new array.

        With `top_k` they are the logarithms of probabilities, and -inf for all other tokens.

        Raises:
            BoardError: the NPU reports an error, or tokens that do not exist.
        """
        if self._copy is None:
            self._call.move("Input", 0, row * self._row_bytes)
        else:
            self._copy.write(0, self._hidden.read(row * self._row_bytes, self._row_bytes))
        self._call.run()
        values = from_device(_stored(*self._values), self._values[1].dtype)
        if not self._tokens:
            return values
        tokens = _stored(*self._tokens[0])
        if not 0 <= tokens.min() <= tokens.max() < self._vocab_size:
            raise BoardError(
                f"{self._path}: token {tokens.max()} is not one of {self._vocab_size}: the model "
                "and config.json do not belong together"
            )
        logits = np.full(self._vocab_size, -np.inf, np.float32)
        with np.errstate(divide="ignore"):
            logits[tokens] = np.log(values)
        return logits


def _stored(memory: Memory, tensor: TensorInfo) -> NDArray[np.generic]:
    """Return the values of a tensor at the beginning of a memory, as the NPU stores them."""
    return memory.read(0, tensor.nbytes).view(STORED[tensor.dtype])
