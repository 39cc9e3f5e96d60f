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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgevl.axera.layout import LAYER_INPUTS, LAYER_OUTPUTS, MASKED, group_shapes, prefill_group
from edgevl.axera.npu.base import (
    ALIGNMENT,
    FLOATS,
    STORED,
    Call,
    Group,
    Memory,
    NpuModel,
    Runtime,
    TensorInfo,
    to_device,
)
from edgevl.checkpoint.config import TextConfig
from edgevl.errors import BoardError

Floats = NDArray[np.float32]

#: Most positions of a cache that is believed.
MAX_POSITIONS = 1 << 20


@dataclass(frozen=True)
class StepGroup:
    """A group that computes ``tokens`` positions after up to ``history`` cached ones.

    Attributes:
        index: its number in the model.
        tokens: 1 for decoding.
        history: positions of the cache that it reads; fewer can be masked.
        tensors: inputs and outputs by name.
    """

    index: int
    tokens: int
    history: int
    tensors: Mapping[str, TensorInfo]


@dataclass(frozen=True)
class LayerShapes:
    """What all layers of a model are compiled for.

    Attributes:
        decode: groups for one token, the shortest history first.
        prefill: groups for a chunk, the shortest history first; may be empty.
    """

    decode: tuple[StepGroup, ...]
    prefill: tuple[StepGroup, ...]

    @property
    def context(self) -> int:
        """Longest history that a token can be decoded after."""
        return self.decode[-1].history

    @property
    def chunk(self) -> int:
        """Positions that a prefill computes at once."""
        return self.prefill[0].tokens if self.prefill else 1

    def step(self, cached: int, tokens: int) -> StepGroup:
        """Return the group for the next of ``tokens``, a chunk or one, after those in the cache."""
        group = prefill_group([each.history for each in self.prefill], cached, tokens)
        if group is not None:
            return self.prefill[group]
        return next(each for each in self.decode if each.history >= cached)


def layer_shapes(path: Path, groups: Sequence[Group], text: TextConfig) -> LayerShapes:
    """Tell the groups of a layer apart by their shapes.

    Raises:
        BoardError: tensors are missing, their shapes contradict each other or ``text``, or no group
            decodes.
    """
    sides = [(group.inputs, group.outputs) for group in groups]
    if len({tuple(tuple((t.name, t.dtype) for t in side) for side in both) for both in sides}) > 1:
        raise BoardError(f"{path}: its shape groups have different tensors: compile it again")
    for side, names in zip(sides[0], (LAYER_INPUTS, LAYER_OUTPUTS), strict=True):
        found = sorted(tensor.name for tensor in side)
        if found != sorted(names):
            raise BoardError(
                f"{path}: has the tensors {', '.join(found)}; expected {', '.join(names)}: compile "
                "it with edgevl compile or pulsar2 llm_build"
            )
    steps = [_step(path, number, group, text) for number, group in enumerate(groups)]
    steps.sort(key=lambda step: step.history)
    decode = tuple(step for step in steps if step.tokens == 1)
    prefill = tuple(step for step in steps if step.tokens > 1)
    if not decode:
        raise BoardError(f"{path}: no shape group takes a single token, so nothing can be decoded")
    chunks = sorted({step.tokens for step in prefill})
    if len(chunks) > 1:
        raise BoardError(
            f"{path}: prefill groups of {', '.join(map(str, chunks))} tokens: one is supported"
        )
    return LayerShapes(decode, prefill)


def _step(path: Path, number: int, group: Group, text: TextConfig) -> StepGroup:
    tensors = {tensor.name: tensor for tensor in (*group.inputs, *group.outputs)}
    entering, mask = tensors["input"], tensors["mask"]
    tokens = entering.shape[-2] if len(entering.shape) == 3 else 0
    history = min(max((mask.shape or (0,))[-1] - tokens, 0), MAX_POSITIONS)
    types: dict[str, tuple[str, ...]] = dict.fromkeys(tensors, FLOATS)
    types |= {"indices": ("I32", "U32"), "output": (entering.dtype,)}
    types |= dict.fromkeys(("K_cache", "V_cache", "V_cache_out"), (tensors["K_cache_out"].dtype,))
    # These two decide the lengths that the others must have.
    lengths = {
        "input": f"[1, tokens, {text.hidden_size}]",
        "mask": f"[1, {tokens}, history + {tokens}]",
    }
    for name, shape in group_shapes(text, tokens, history).items():
        tensor = tensors[name]
        # Without a history the cache is not looked at, and compilers give it any shape.
        unread = not history and name in ("K_cache", "V_cache")
        if (tensor.shape != shape and not unread) or tensor.dtype not in types[name]:
            raise BoardError(
                f"{path}: group {number}: {name} is {tensor.dtype} {list(tensor.shape)}, expected "
                f"{' or '.join(types[name])} {lengths.get(name, list(shape))}: the model and "
                "config.json do not belong together"
            )
    return StepGroup(number, tokens, history, tensors)


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
        tensors = steps[0].tensors  # all have the same types
        self.output = tensors["output"]
        self._position = STORED[tensors["indices"].dtype]
        names = [tensor.name for tensor in first.groups[0].outputs]
        self._new_rows = [names.index(f"{kind}_cache_out") for kind in "KV"]
        new_key = tensors["K_cache_out"]
        self._row_bytes = new_key.nbytes // new_key.shape[1]
        rows = max(step.history + step.tokens for step in steps)
        self._caches = [
            [_zeros(runtime, rows * self._row_bytes) for _ in "KV"] for _ in self._layers
        ]
        unread = [
            step.tensors[f"{kind}_cache"].nbytes
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
        self._masks = {step.index: Mask(runtime, step) for step in steps}
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
        offset = at * self._row_bytes
        for call, caches in zip(self._calls[step.index], self._caches, strict=True):
            if not self._staging:
                for number in self._new_rows:
                    call.move("Output", number, offset)
            call.run()
            for staging, cache in zip(self._staging, caches, strict=False):
                cache.write(offset, staging.read(0, tokens * self._row_bytes))

    def _bind(self, step: StepGroup, layer: int) -> Call:
        """Prepare the call of a layer."""
        keys, values = self._caches[layer]
        new_keys, new_values = self._staging or (keys, values)
        memories = {
            "K_cache": keys if step.history else self._unread,
            "V_cache": values if step.history else self._unread,
            "indices": self._indices,
            "input": self._hidden[layer % 2] if layer else self._embeddings,
            "mask": self._masks[step.index].memory,
            "K_cache_out": new_keys,
            "V_cache_out": new_values,
            "output": self._hidden[(layer + 1) % 2],
        }
        group = self._layers[layer].groups[step.index]
        inputs, outputs = (
            [(memories[tensor.name], 0) for tensor in side]
            for side in (group.inputs, group.outputs)
        )
        return self._layers[layer].bind(step.index, inputs, outputs)


class Mask:
    """The mask of one group in NPU memory.

    Attributes:
        memory: where it lies.
    """

    def __init__(self, runtime: Runtime, step: StepGroup) -> None:
        """Show no history, and of the new tokens to each those before it and itself."""
        tensor = step.tensors["mask"]
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
    memory.write(0, np.zeros(nbytes, np.uint8))
    return memory
