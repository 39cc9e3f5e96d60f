"""Models for the NPU emulator (``native/emulator``): the files that a board's compiler would make.

They have the names, shape groups, tensors and types of compiled models. The weights are in bfloat16
and packed for this machine's processors, and beside each group stands the time that it would take
on a board, published or estimated (`edgevl.boards.estimates`). The format is that of
``native/emulator/model_file.h``: lines of words, then data.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgevl.axera.layout import (
    EMULATED_MAGIC,
    LAYER_INPUTS,
    LAYER_OUTPUTS,
    BoardShape,
    layer_file,
    post_file,
    vision_file,
)
from edgevl.boards import estimates
from edgevl.checkpoint import Checkpoint, ModelConfig, TextConfig
from edgevl.checkpoint.config import IMAGE_MEAN, IMAGE_STD
from edgevl.errors import BoardError
from edgevl.files import replacing
from edgevl.machine import this_machine

try:
    from edgevl import _native
except ImportError as error:
    raise BoardError(
        "the NPU emulator needs the native engine, which this installation lacks: install edgevl "
        "where there is a C++20 compiler"
    ) from error
from edgevl.engine import cpu, packed
from edgevl.engine.plan import MatrixPlan, make_plan

#: Data begins at multiples of this many bytes.
ALIGNMENT = 64

Numbers = Mapping[str, float | tuple[float, ...]]
Vectors = Mapping[str, NDArray[np.float32]]
Matrices = Mapping[str, MatrixPlan]


@dataclass(frozen=True)
class Post:
    """What the model of the head gives.

    Attributes:
        dtype: of the logits, "bf16" or "f32".
        topk: instead of logits, so many of the best tokens, best first: ``indices``, and
            ``probabilities`` among all tokens; 0 for logits.
    """

    dtype: str = "bf16"
    topk: int = 0


def write_emulated(
    checkpoint: Checkpoint,
    directory: Path,
    shape: BoardShape,
    uint8_input: bool = False,
    progress: Callable[[Path], object] = lambda path: None,
    *,
    target: str = "ax650",
    post: Post | None = None,
) -> None:
    """Write all ``.axmodel`` files of a model for the emulator, each beside and renamed.

    Args:
        checkpoint: the model; GPTQ weights are dequantized and rounded to bfloat16.
        directory: where to.
        shape: of the text model's groups.
        uint8_input: the vision encoder takes bytes [1, S, S, 3] and normalizes them, instead of
            float32 [1, 3, S, S].
        progress: called with each file that is finished.
        target: the chip whose times the files name.
        post: what the head gives; default is logits in bfloat16.

    Raises:
        BoardError: ``post`` cannot be.
        CheckpointError: the quantization of a weight is damaged.
        OSError: a file cannot be written; it is not there then.
    """
    directory.mkdir(exist_ok=True)
    text = checkpoint.config.text
    plans = {matrix.name: matrix for matrix in make_plan(checkpoint, "bf16").matrices}
    vectors = _arrays(cpu.text_vectors(checkpoint))
    times = estimates.group_times_ms(text, shape, target=target)
    groups = layer_groups(text, shape, times)
    post_group = _post_group(text, post or Post(), estimates.post_time_ms(text, target=target))
    pool = _native.ThreadPool(this_machine().threads)

    def write(name: str, begin: bytes, matrices: Matrices, floats: Vectors) -> None:
        _write(directory / name, begin, checkpoint, matrices, floats, pool)
        progress(directory / name)

    for layer in range(text.num_hidden_layers):
        matrices = _under(plans, f"text.layers.{layer}.")
        floats = _under(vectors, f"layers.{layer}.")
        floats["inverse_frequencies"] = vectors["inverse_frequencies"]
        begin = header("layer", _text_numbers(text), groups, _weights(matrices, floats))
        write(layer_file(text.model_type, shape.chunk, layer), begin, matrices, floats)
    matrices, floats = {"head": plans["text.head"]}, {"norm": vectors["norm"]}
    begin = header("post", _text_numbers(text), [post_group], _weights(matrices, floats))
    write(post_file(text.model_type), begin, matrices, floats)
    if checkpoint.has_vision:
        vision = checkpoint.config.vision
        ms = estimates.vision_time_ms(vision, target=target) or 0.0
        group = _vision_group(checkpoint.config, uint8_input, ms)
        matrices, floats = _under(plans, "vision."), _arrays(cpu.vision_vectors(checkpoint))
        weights = _weights(matrices, floats)
        begin = header("vision", _vision_numbers(checkpoint), [group], weights)
        write(vision_file(vision.image_size), begin, matrices, floats)


def _write(
    path: Path,
    begin: bytes,
    checkpoint: Checkpoint,
    matrices: Matrices,
    vectors: Vectors,
    pool: _native.ThreadPool,
) -> None:
    """Write a file beside its place, a matrix at a time, and rename it."""
    with replacing(path) as file:
        file.write(begin)
        for matrix in matrices.values():
            data = packed.aligned_zeros(packed.packed_bytes(matrix))
            packed.pack_matrix(checkpoint, matrix, data, pool)
            file.write(data.data)
        for vector in vectors.values():
            file.write(vector.tobytes())
            file.write(bytes(-vector.nbytes % ALIGNMENT))


def _weights(matrices: Matrices, vectors: Vectors) -> list[Weight]:
    """List weights in the order in which they are written; packed matrices need no padding."""
    return [
        Weight(name, (matrix.rows, matrix.cols), packed.packed_bytes(matrix))
        for name, matrix in matrices.items()
    ] + [Weight(name, (vector.size,), vector.nbytes) for name, vector in vectors.items()]


def _arrays(tensors: _native.Tensors) -> dict[str, NDArray[np.float32]]:
    return {name: value for name, value in tensors.items() if isinstance(value, np.ndarray)}


def _under(named: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Return what is named ``prefix`` and more, by the rest of its name."""
    return {
        name.removeprefix(prefix): value for name, value in named.items() if name.startswith(prefix)
    }


# --- what the files say ------------------------------------------------------------------------


def _post_group(text: TextConfig, post: Post, ms: float) -> Group:
    if post.dtype not in ("bf16", "f32"):
        raise BoardError(f"logits in {post.dtype!r}: choose bf16 or f32")
    if not 0 <= post.topk <= text.vocab_size:
        raise BoardError(f"the best {post.topk} tokens of {text.vocab_size}: choose fewer")
    outputs: tuple[Tensor, ...] = (Tensor("output", post.dtype, (1, 1, text.vocab_size)),)
    if post.topk:
        best = (1, 1, post.topk)
        outputs = (Tensor("indices", "u32", best), Tensor("probabilities", "f32", best))
    return Group(ms, (Tensor("input", "bf16", (1, 1, text.hidden_size)),), outputs)


def _vision_group(config: ModelConfig, uint8_input: bool, ms: float) -> Group:
    size = config.vision.image_size
    image = Tensor("image", "f32", (1, 3, size, size))
    if uint8_input:
        image = Tensor("image", "u8", (1, size, size, 3))
    output = Tensor("output", "f32", (1, config.image_tokens, config.text.hidden_size))
    return Group(ms, (image,), (output,))


def _text_numbers(text: TextConfig) -> Numbers:
    return {
        "hidden_size": text.hidden_size,
        "intermediate_size": text.intermediate_size,
        "num_attention_heads": text.num_attention_heads,
        "num_key_value_heads": text.num_key_value_heads,
        "head_dim": text.head_dim,
        "vocab_size": text.vocab_size,
        "rms_norm_eps": text.rms_norm_eps,
    }


def _vision_numbers(checkpoint: Checkpoint) -> Numbers:
    settings = cpu.vision_config(checkpoint)
    return {
        **{name: value for name, value in settings.items() if not isinstance(value, str)},
        "layer_norm": int(settings["norm_type"] == "layer_norm"),
        "swapped_shuffle": int(settings["ps_version"] == "v1"),
        "mean": tuple(255 * value for value in IMAGE_MEAN),
        "std": tuple(255 * value for value in IMAGE_STD),
    }


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
