"""What the shape groups of compiled layers are for, told by their shapes: decoding or prefill."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from edgevl.axera.layout import LAYER_INPUTS, LAYER_OUTPUTS
from edgevl.axera.npu.base import FLOATS, Group, TensorInfo
from edgevl.checkpoint.config import TextConfig
from edgevl.errors import BoardError

#: Most positions of a cache that is believed.
MAX_POSITIONS = 1 << 20


@dataclass(frozen=True)
class StepGroup:
    """A group that computes ``tokens`` positions after up to ``history`` cached ones.

    Attributes:
        index: its number in the model.
        tokens: 1 for decoding.
        history: positions of the cache that it reads; fewer can be masked.
    """

    index: int
    tokens: int
    history: int


@dataclass(frozen=True)
class LayerShapes:
    """What all layers of a model are compiled for.

    Attributes:
        decode: groups for one token, the shortest history first.
        prefill: groups for a chunk, the shortest history first; may be empty.
        groups: all groups as the model has them.
    """

    decode: tuple[StepGroup, ...]
    prefill: tuple[StepGroup, ...]
    groups: tuple[Group, ...]

    @property
    def context(self) -> int:
        """Longest history that a token can be decoded after."""
        return self.decode[-1].history

    @property
    def chunk(self) -> int:
        """Positions that a prefill computes at once."""
        return self.prefill[0].tokens if self.prefill else 1

    def step(self, kind: tuple[StepGroup, ...], history: int) -> StepGroup | None:
        """Return the group of a kind that reads the least and yet all of a history, or None."""
        return next((group for group in kind if group.history >= history), None)


def layer_shapes(path: Path, groups: Sequence[Group], text: TextConfig) -> LayerShapes:
    """Tell the groups of a layer apart.

    Raises:
        BoardError: tensors are missing, their shapes contradict each other or ``text``, or no group
            decodes.
    """
    kinds = {tuple((t.name, t.dtype) for t in (*g.inputs, *g.outputs)) for g in groups}
    if len(kinds) > 1:
        raise BoardError(f"{path}: its shape groups have different tensors: compile it again")
    hidden, width = text.hidden_size, text.num_key_value_heads * text.head_dim
    steps = [_step(path, number, group, hidden, width) for number, group in enumerate(groups)]
    decode = tuple(sorted((s for s in steps if s.tokens == 1), key=lambda s: s.history))
    prefill = tuple(sorted((s for s in steps if s.tokens > 1), key=lambda s: s.history))
    if not decode:
        raise BoardError(f"{path}: no shape group takes a single token, so nothing can be decoded")
    chunks = sorted({step.tokens for step in prefill})
    if len(chunks) > 1:
        raise BoardError(
            f"{path}: prefill groups of {', '.join(map(str, chunks))} tokens: one is supported"
        )
    return LayerShapes(decode, prefill, tuple(groups))


def by_name(path: Path, tensors: Sequence[TensorInfo], names: Sequence[str]) -> Mapping[str, int]:
    """Return the numbers of tensors that must be there, by name.

    Raises:
        BoardError: one is missing, or there are others.
    """
    numbers = {tensor.name: number for number, tensor in enumerate(tensors)}
    if set(numbers) != set(names):
        raise BoardError(
            f"{path}: has the tensors {', '.join(sorted(numbers))}; expected {', '.join(names)}: "
            "compile it with edgevl compile or pulsar2 llm_build"
        )
    return numbers


def _step(path: Path, number: int, group: Group, hidden: int, width: int) -> StepGroup:
    inputs = {
        name: group.inputs[i] for name, i in by_name(path, group.inputs, LAYER_INPUTS).items()
    }
    outputs = {
        name: group.outputs[i] for name, i in by_name(path, group.outputs, LAYER_OUTPUTS).items()
    }

    def wrong(tensor: TensorInfo, expected: str) -> BoardError:
        return BoardError(
            f"{path}: group {number}: {tensor.name} is {tensor.dtype} {list(tensor.shape)}, "
            f"expected {expected}: the model and config.json do not belong together"
        )

    entering, mask = inputs["input"], inputs["mask"]
    tokens = entering.shape[-2] if len(entering.shape) == 3 else 0
    if entering.shape != (1, tokens, hidden) or entering.dtype not in FLOATS:
        raise wrong(entering, f"[1, tokens, {hidden}]")
    leaving = outputs["output"]
    if (leaving.shape, leaving.dtype) != (entering.shape, entering.dtype):
        raise wrong(leaving, f"{entering.dtype} {list(entering.shape)} like the input")
    columns = mask.shape[-1] if mask.shape else 0
    history = columns - tokens
    if mask.shape != (1, tokens, columns) or not 0 <= history <= MAX_POSITIONS:
        raise wrong(mask, f"[1, {tokens}, history + {tokens}]")
    if mask.dtype not in FLOATS:
        raise wrong(mask, " or ".join(FLOATS))
    indices = inputs["indices"]
    if indices.shape != (1, tokens) or indices.dtype not in ("I32", "U32"):
        raise wrong(indices, f"I32 or U32 [1, {tokens}]")
    formats = {inputs[f"{kind}_cache"].dtype for kind in "KV"}
    formats |= {outputs[f"{kind}_cache_out"].dtype for kind in "KV"}
    for kind in "KV":
        cache, new = inputs[f"{kind}_cache"], outputs[f"{kind}_cache_out"]
        # Without a history the cache is not looked at, and compilers give it any shape.
        if history and cache.shape != (1, history, width):
            raise wrong(cache, f"[1, {history}, {width}]")
        if new.shape != (1, tokens, width):
            raise wrong(new, f"[1, {tokens}, {width}]")
        if len(formats) > 1 or new.dtype not in FLOATS:
            raise wrong(new, f"one format for all keys and values, of {' or '.join(FLOATS)}")
    return StepGroup(number, tokens, history)
