"""Models for the NPU emulator (``native/emulator``): the files that a board's compiler would make.

They have the names, shape groups, tensors and types of compiled models. The weights are in bfloat16
and packed for this machine's processors, and beside each group stands the time that it would take
on a board, published or estimated (`edgevl.boards.timing`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgevl.axera.layout import BoardShape, layer_file, post_file, vision_file
from edgevl.boards import timing
from edgevl.boards.emulated_file import (
    ALIGNMENT,
    Group,
    Numbers,
    Tensor,
    Weight,
    header,
    layer_groups,
)
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
        directory: where to; it exists.
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
    text = checkpoint.config.text
    plans = {matrix.name: matrix for matrix in make_plan(checkpoint, "bf16").matrices}
    vectors = _arrays(cpu.text_vectors(checkpoint))
    times = timing.group_times_ms(text, shape, target=target)
    groups = layer_groups(text, shape, times)
    post_group = _post_group(text, post or Post(), timing.post_time_ms(text, target=target))
    team = _native.Team(this_machine().threads)

    def write(name: str, begin: bytes, matrices: Matrices, floats: Vectors) -> None:
        _write(directory / name, begin, checkpoint, matrices, floats, team)
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
        ms = timing.vision_time_ms(vision, target=target) or 0.0
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
    team: _native.Team,
) -> None:
    """Write a file beside its place, a matrix at a time, and rename it."""
    with replacing(path) as file:
        file.write(begin)
        for matrix in matrices.values():
            data = packed.aligned_zeros(packed.packed_bytes(matrix))
            packed.pack_matrix(checkpoint, matrix, data, team)
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
