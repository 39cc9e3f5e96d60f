"""The final norm and the output layer on the NPU: a hidden state in, logits out."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from edgevl.axera.npu.base import (
    ALIGNMENT,
    FLOATS,
    STORED,
    Memory,
    NpuModel,
    Runtime,
    TensorInfo,
    from_device,
)
from edgevl.errors import BoardError


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
            model: the loaded model.
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
        self._outputs = group.outputs
        self._logits, self._tokens = self._tell_apart(group.outputs)
        self.top_k = None if self._tokens is None else math.prod(self._outputs[0].shape)
        self._results = [runtime.allocate(tensor.nbytes) for tensor in group.outputs]
        self._row_bytes = entering.nbytes
        self._hidden = hidden
        # Rows begin at multiples of their size; where these are not aligned, a copy does.
        self._copy: Memory | None = None
        if self._row_bytes % ALIGNMENT:
            self._copy = runtime.allocate(self._row_bytes)
        self._call = model.bind(
            0, [(self._copy or hidden, 0)], [(result, 0) for result in self._results]
        )

    def logits(self, row: int) -> NDArray[np.float32]:
        """Return the logits of a row of hidden states, float32 [V], a new array.

        With `top_k` they are the logarithms of probabilities, and -inf for all other tokens.

        Raises:
            BoardError: the NPU reports an error, or tokens that do not exist.
        """
        if self._copy is None:
            self._call.move_input(0, row * self._row_bytes)
        else:
            self._copy.write(0, self._hidden.read(row * self._row_bytes, self._row_bytes))
        self._call.run()
        values = self._read(self._logits)
        if self._tokens is None:
            return from_device(values, self._outputs[self._logits].dtype)
        tokens = self._read(self._tokens)
        if not 0 <= tokens.min() <= tokens.max() < self._vocab_size:
            raise BoardError(
                f"{self._path}: token {tokens.max()} is not one of {self._vocab_size}: the model "
                "and config.json do not belong together"
            )
        logits = np.full(self._vocab_size, -np.inf, np.float32)
        with np.errstate(divide="ignore"):
            logits[tokens] = np.log(from_device(values, self._outputs[self._logits].dtype))
        return logits

    def _read(self, output: int) -> NDArray[np.generic]:
        tensor = self._outputs[output]
        stored = self._results[output].read(0, tensor.nbytes)
        return stored.view(STORED[tensor.dtype])

    def _tell_apart(self, outputs: tuple[TensorInfo, ...]) -> tuple[int, int | None]:
        """Return the numbers of the output with logits or probabilities and of that with tokens."""
        sizes = [math.prod(tensor.shape) for tensor in outputs]
        floats = [i for i, tensor in enumerate(outputs) if tensor.dtype in FLOATS]
        tokens = [i for i, tensor in enumerate(outputs) if tensor.dtype in ("I32", "U32")]
        if (len(floats), len(tokens)) == (1, 0) and sizes == [self._vocab_size]:
            return floats[0], None
        if (len(floats), len(tokens)) == (1, 1) and len(set(sizes)) == 1:
            return floats[0], tokens[0]
        found = ", ".join(f"{tensor.dtype} {list(tensor.shape)}" for tensor in outputs)
        raise BoardError(
            f"{self._path}: outputs are {found}; expected logits of {self._vocab_size} tokens as "
            "config.json says, or tokens and their probabilities (--post_topk)"
        )
