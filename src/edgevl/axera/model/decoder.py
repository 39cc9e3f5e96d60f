"""The decoder on the NPU: keys and values stay where they are, layers hand hidden states on.

Every layer has a buffer of keys and one of values, of as many rows as the longest history and what
is appended to it. A group reads them from their beginning, as many rows as it takes, and writes the
rows of new tokens where they belong: what it reads beyond the history is masked. A group without a
history has caches too, which it does not look at: it gets zeros, as many as it asks for. The hidden
states go back and forth between two buffers; one buffer of positions and, for each group, one mask
serve all layers. A call of each layer and group is prepared when it is first made, and afterwards
only its two places of new rows are moved. Embeddings have a buffer of their own, so that after the
start no memory is written by the host as well as by the NPU: that would take more care with the
host's cache.

Rows begin at multiples of their size, and the NPU asks for multiples of `ALIGNMENT` bytes. Where
the two disagree, which they do in small models only, rows go through a buffer of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgevl.axera.layout import LAYER_INPUTS, LAYER_OUTPUTS, MASKED
from edgevl.axera.model.shape_groups import StepGroup, by_name, layer_shapes
from edgevl.axera.npu.base import (
    ALIGNMENT,
    STORED,
    Call,
    Memory,
    NpuModel,
    Place,
    Runtime,
    TensorInfo,
    to_device,
)
from edgevl.checkpoint.config import TextConfig
from edgevl.errors import BoardError

Floats = NDArray[np.float32]


class NpuDecoder:
    """The layers of a decoder with the cache of one sequence.

    Attributes:
        shapes: what the layers are compiled for.
        hidden: where the last layer leaves its output, a row a token.
        output: what it leaves there.
    """

    def __init__(self, runtime: Runtime, layers: Sequence[NpuModel], text: TextConfig) -> None:
        """Take memory for the cache of ``layers``.

        Args:
            runtime: gives the memory, which it takes back when it is closed.
            layers: the loaded layers, in order.
            text: what their shapes must agree with.

        Raises:
            BoardError: the layers do not fit each other or ``text``, or memory does not suffice.
        """
        first = layers[0]
        self.shapes = layer_shapes(first.path, first.groups, text)
        for layer in layers:
            if layer.groups != first.groups:
                raise BoardError(
                    f"{layer.path}: compiled for other shapes than {first.path.name}: compile all "
                    "layers again, into an empty directory"
                )
        self._layers = layers
        chunk, steps = self.shapes.chunk, (*self.shapes.decode, *self.shapes.prefill)
        inputs, outputs = first.groups[0].inputs, first.groups[0].outputs
        self._inputs = by_name(first.path, inputs, LAYER_INPUTS)
        self._outputs = by_name(first.path, outputs, LAYER_OUTPUTS)
        self.output = outputs[self._outputs["output"]]
        self._position = STORED[inputs[self._inputs["indices"]].dtype]
        new_key = outputs[self._outputs["K_cache_out"]]
        self._row_bytes = new_key.nbytes // new_key.shape[1]
        rows = max(step.history + step.tokens for step in steps)
        self._caches = [
            [_zeros(runtime, rows * self._row_bytes) for _ in "KV"] for _ in self._layers
        ]
        unread = [
            self._tensor(step, f"{kind}_cache").nbytes
            for step in steps
            if not step.history
            for kind in "KV"
        ]
        self._unread = _zeros(runtime, max(unread, default=ALIGNMENT))
        size = chunk * text.hidden_size * STORED[self.output.dtype].itemsize
        self._embeddings = _zeros(runtime, size)
        self._hidden = [_zeros(runtime, size) for _ in range(2)]
        self.hidden = self._hidden[len(layers) % 2]
        self._indices = _zeros(runtime, chunk * self._position.itemsize)
        self._masks = {
            step.index: Mask(runtime, step, self._tensor(step, "mask")) for step in steps
        }
        self._staging: list[Memory] = []
        if self._row_bytes % ALIGNMENT:
            self._staging = [_zeros(runtime, chunk * self._row_bytes) for _ in "KV"]
        self._calls: dict[int, list[Call]] = {}

    def run(self, step: StepGroup, embeddings: Floats, at: int) -> None:
        """Compute the positions from ``at`` on, after those that are cached.

        Args:
            step: the group to use; ``at`` is at most its history.
            embeddings: float32 [T, H], with T at most the tokens of the group.
            at: positions in the cache.

        Raises:
            BoardError: the NPU reports an error.
        """
        tokens = len(embeddings)
        self._embeddings.write(0, to_device(embeddings, self.output.dtype))
        positions = np.arange(at, at + step.tokens, dtype=self._position)
        # What is computed for the rows beyond is of no use, but its positions must exist.
        np.minimum(positions, at + tokens - 1, out=positions)
        self._indices.write(0, positions)
        self._masks[step.index].show(at)
        if step.index not in self._calls:
            self._calls[step.index] = [self._bind(step, n) for n in range(len(self._layers))]
        calls = self._calls[step.index]
        offset = at * self._row_bytes
        key, value = self._outputs["K_cache_out"], self._outputs["V_cache_out"]
        if not self._staging:
            for call in calls:
                call.move_output(key, offset)
                call.move_output(value, offset)
                call.run()
            return
        for call, caches in zip(calls, self._caches, strict=True):
            call.run()
            for staging, cache in zip(self._staging, caches, strict=True):
                cache.write(offset, staging.read(0, tokens * self._row_bytes))

    def _bind(self, step: StepGroup, layer: int) -> Call:
        """Prepare the call of a layer."""
        keys, values = self._caches[layer]
        new_keys, new_values = self._staging or (keys, values)
        inputs = {
            "K_cache": keys if step.history else self._unread,
            "V_cache": values if step.history else self._unread,
            "indices": self._indices,
            "input": self._hidden[layer % 2] if layer else self._embeddings,
            "mask": self._masks[step.index].memory,
        }
        outputs = {
            "K_cache_out": new_keys,
            "V_cache_out": new_values,
            "output": self._hidden[(layer + 1) % 2],
        }
        return self._layers[layer].bind(
            step.index, _places(self._inputs, inputs), _places(self._outputs, outputs)
        )

    def _tensor(self, step: StepGroup, name: str) -> TensorInfo:
        return self.shapes.groups[step.index].inputs[self._inputs[name]]


class Mask:
    """The mask of one group in NPU memory.

    Attributes:
        memory: where it lies.
    """

    def __init__(self, runtime: Runtime, step: StepGroup, tensor: TensorInfo) -> None:
        """Show no history, and of the new tokens to each those before it and itself."""
        mask = np.zeros((step.tokens, step.history + step.tokens), np.float32)
        mask[:, : step.history] = MASKED
        later = np.triu(np.ones((step.tokens, step.tokens), np.bool_), 1)
        mask[:, step.history :][later] = MASKED
        self._mask = to_device(mask, tensor.dtype)
        self._masked = to_device(np.full(1, MASKED, np.float32), tensor.dtype)[0]
        self.memory = runtime.allocate(tensor.nbytes)
        self.memory.write(0, self._mask)
        self._shown: int | None = 0

    def show(self, history: int) -> None:
        """Let the first ``history`` columns be attended to, and no other of the cache."""
        if history == self._shown:
            return
        first, last = 0, self._mask.shape[1] - self._mask.shape[0]
        if self._shown is not None:
            first, last = sorted((history, self._shown))
        self._shown = None  # were this interrupted, all of it is written next time
        self._mask[:, first:history] = 0
        self._mask[:, history:last] = self._masked
        if len(self._mask) == 1:
            changed = self._mask[0, first:last]
            self.memory.write(first * changed.itemsize, changed)
        else:
            self.memory.write(0, self._mask)
        self._shown = history


def _zeros(runtime: Runtime, nbytes: int) -> Memory:
    """Return memory of zeros: what is masked is multiplied by 0, which leaves NaN as it is."""
    memory = runtime.allocate(nbytes)
    memory.clear()
    return memory


def _places(order: Any, memories: dict[str, Memory]) -> list[Place]:
    return [(memories[name], 0) for name in sorted(order, key=order.__getitem__)]
