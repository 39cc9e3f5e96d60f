"""What the emulator's model files say: shape groups, settings, and where weights are.

The format is that of ``native/emulator/model_file.h``: lines of words, then data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from edgevl.axera.layout import EMULATED_MAGIC, LAYER_INPUTS, LAYER_OUTPUTS, BoardShape
from edgevl.checkpoint.config import TextConfig

#: Data begins at multiples of this many bytes.
ALIGNMENT = 64

Numbers = Mapping[str, float | tuple[float, ...]]


@dataclass(frozen=True)
class Tensor:
    """An input or output; ``dtype`` is "u8", "i32", "u32", "bf16" or "f32"."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        """Return the words of its line."""
        return " ".join([self.name, self.dtype, *map(str, self.shape)])


@dataclass(frozen=True)
class Group:
    """A shape group, and the milliseconds that it takes on the board, 0 where that is unknown."""

    ms: float
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]


@dataclass(frozen=True)
class Weight:
    """A matrix packed in bfloat16 (``shape`` has two sizes) or a vector in float32 (one)."""

    name: str
    shape: tuple[int, ...]
    nbytes: int


def header(
    kind: str, numbers: Numbers, groups: Sequence[Group], weights: Sequence[Weight]
) -> bytes:
    """Return what a file begins with, padded to `ALIGNMENT`.

    The data of each weight follows, padded likewise.
    """
    lines = [f"kind {kind}"]
    for name, value in numbers.items():
        values = value if isinstance(value, tuple) else (value,)
        lines.append(" ".join(["number", name, *map(repr, values)]))
    for group in groups:
        lines.append(f"group {group.ms!r}")
        lines += [f"input {tensor}" for tensor in group.inputs]
        lines += [f"output {tensor}" for tensor in group.outputs]

    def encode(begin: int) -> bytes:
        places, offset = [], begin
        for weight in weights:
            sizes = " ".join(map(str, weight.shape))
            what = "matrix" if len(weight.shape) == 2 else "vector"
            places.append(f"{what} {weight.name} {sizes} {offset:015d}")
            offset += padded(weight.nbytes)
        text = EMULATED_MAGIC + "\n".join([*lines, *places, "end\n"]).encode("ascii")
        return text.ljust(padded(len(text)), b"\0")

    # With all digits of the offsets, its length does not depend on them.
    return encode(len(encode(0)))


def padded(nbytes: int) -> int:
    """Return the next multiple of `ALIGNMENT`."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def layer_groups(text: TextConfig, shape: BoardShape, times_ms: Sequence[float]) -> list[Group]:
    """Return the groups of a decoder layer (see `edgevl.axera.layout`) with their times."""
    sizes = [(1, shape.context), *((shape.chunk, history) for history in shape.histories())]
    width, hidden = text.num_key_value_heads * text.head_dim, text.hidden_size
    groups = []
    for ms, (tokens, history) in zip(times_ms, sizes, strict=True):
        # Where there is no history Pulsar2 gives a cache all the same, of the hidden size.
        cache = (1, history, width) if history else (1, 1, hidden)
        new, states = (1, tokens, width), (1, tokens, hidden)
        inputs = (cache, cache, (1, tokens), states, (1, tokens, history + tokens))
        dtypes = ("bf16", "bf16", "u32", "bf16", "bf16")
        groups.append(
            Group(
                ms,
                tuple(map(Tensor, LAYER_INPUTS, dtypes, inputs)),
                tuple(map(Tensor, LAYER_OUTPUTS, dtypes[:2] + dtypes[3:4], (new, new, states))),
            )
        )
    return groups
