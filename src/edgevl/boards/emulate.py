"""Models for the NPU emulator (``native/emulator``): the files that a board's compiler would make.

They have the names, shape groups, tensors and types of compiled models. The weights are in bfloat16
and packed for this machine's processors, and beside each group stands the time that it would take
on a board, published or estimated (`edgevl.boards.estimates`). The format is that of
``native/emulator/model_file.h``: lines of words, then data.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from edgevl.axera.layout import (
    EMULATED_MAGIC,
    LAYER_INPUTS,
    LAYER_OUTPUTS,
    BoardShape,
    group_shapes,
    layer_file,
    post_file,
    vision_file,
)
from edgevl.axera.npu.base import Group, TensorInfo
from edgevl.boards import estimates
from edgevl.checkpoint import Checkpoint, TextConfig
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

#: What a file says of the text model.
_TEXT_NUMBERS = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "rms_norm_eps",
)

Numbers = Mapping[str, float | tuple[float, ...]]
Vectors = Mapping[str, NDArray[np.float32]]
Matrices = Mapping[str, MatrixPlan]
#: Shape groups, with the milliseconds that each takes on the board, 0 where that is unknown.
TimedGroups = Sequence[tuple[float, Group]]


def write_emulated(
    checkpoint: Checkpoint,
    directory: Path,
    shape: BoardShape,
    uint8_input: bool = False,
    progress: Callable[[Path], object] = lambda path: None,
    *,
    target: str = "ax650",
    post_topk: int = 0,
    logits: Literal["BF16", "F32"] = "BF16",
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
        post_topk: instead of logits, the head gives so many of the best tokens, best first:
            ``indices``, and ``probabilities`` among all tokens.
        logits: the type of what it gives otherwise.

    Raises:
        CheckpointError: the quantization of a weight is damaged.
        OSError: a file cannot be written; it is not there then.
    """
    directory.mkdir(exist_ok=True)
    text = checkpoint.config.text
    hidden, vocabulary = text.hidden_size, text.vocab_size
    plans = {matrix.name: matrix for matrix in make_plan(checkpoint, "bf16").matrices}
    vectors = _arrays(cpu.text_vectors(checkpoint))
    times = estimates.group_times_ms(text, shape, target=target)
    sizes = [(1, shape.context), *((shape.chunk, history) for history in shape.histories())]
    groups = [(ms, _layer_group(text, *size)) for ms, size in zip(times, sizes, strict=True)]
    pool = _native.ThreadPool(this_machine().threads)

    def write(
        name: str,
        kind: str,
        numbers: Numbers,
        groups: TimedGroups,
        weights: Matrices,
        floats: Vectors,
    ) -> None:
        with replacing(directory / name) as file:
            file.write(_header(kind, numbers, groups, weights, floats))
            for matrix in weights.values():
                data = packed.aligned_zeros(packed.packed_bytes(matrix))
                packed.pack_matrix(checkpoint, matrix, data, pool)
                file.write(data.data)
            for vector in floats.values():
                file.write(vector.tobytes().ljust(_padded(vector.nbytes), b"\0"))
        progress(directory / name)

    numbers: Numbers = {name: getattr(text, name) for name in _TEXT_NUMBERS}
    for layer in range(text.num_hidden_layers):
        floats = _under(vectors, f"layers.{layer}.")
        floats["inverse_frequencies"] = vectors["inverse_frequencies"]
        matrices = _under(plans, f"text.layers.{layer}.")
        name = layer_file(text.model_type, shape.chunk, layer)
        write(name, "layer", numbers, groups, matrices, floats)
    outputs = [TensorInfo("output", logits, (1, 1, vocabulary))]
    if post_topk:
        best = (1, 1, post_topk)
        outputs = [TensorInfo("indices", "U32", best), TensorInfo("probabilities", "F32", best)]
    head = Group((TensorInfo("input", "BF16", (1, 1, hidden)),), tuple(outputs))
    ms = estimates.post_time_ms(text, target=target)
    matrices, floats = {"head": plans["text.head"]}, {"norm": vectors["norm"]}
    write(post_file(text.model_type), "post", numbers, [(ms, head)], matrices, floats)
    if checkpoint.has_vision:
        config, size = checkpoint.config, checkpoint.config.vision.image_size
        image = TensorInfo("image", "F32", (1, 3, size, size))
        if uint8_input:
            image = TensorInfo("image", "U8", (1, size, size, 3))
        features = TensorInfo("output", "F32", (1, config.image_tokens, hidden))
        ms = estimates.vision_time_ms(config.vision, target=target) or 0.0
        vision = [(ms, Group((image,), (features,)))]
        matrices, floats = _under(plans, "vision."), _arrays(cpu.vision_vectors(checkpoint))
        write(vision_file(size), "vision", _vision_numbers(checkpoint), vision, matrices, floats)


def _arrays(tensors: _native.Tensors) -> dict[str, NDArray[np.float32]]:
    return {name: value for name, value in tensors.items() if isinstance(value, np.ndarray)}


def _under(named: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Return what is named ``prefix`` and more, by the rest of its name."""
    return {
        name.removeprefix(prefix): value for name, value in named.items() if name.startswith(prefix)
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


def _header(
    kind: str, numbers: Numbers, groups: TimedGroups, matrices: Matrices, vectors: Vectors
) -> bytes:
    """Return what a file begins with, padded to `ALIGNMENT`.

    The data of each weight follows, padded likewise: matrices packed in bfloat16, which need no
    padding, and vectors in float32.
    """
    lines = [f"kind {kind}"]
    for name, value in numbers.items():
        values = value if isinstance(value, tuple) else (value,)
        lines.append(" ".join(["number", name, *map(repr, values)]))
    for ms, group in groups:
        lines.append(f"group {ms!r}")
        for side, tensors in (("input", group.inputs), ("output", group.outputs)):
            for tensor in tensors:
                words = [side, tensor.name, tensor.dtype.lower(), *map(str, tensor.shape)]
                lines.append(" ".join(words))
    weights = [
        (f"matrix {name} {matrix.rows} {matrix.cols}", packed.packed_bytes(matrix))
        for name, matrix in matrices.items()
    ]
    weights += [(f"vector {name} {each.size}", each.nbytes) for name, each in vectors.items()]

    def encode(begin: int) -> bytes:
        places, offset = [], begin
        for weight, nbytes in weights:
            places.append(f"{weight} {offset:015d}")
            offset += _padded(nbytes)
        text = EMULATED_MAGIC + "\n".join([*lines, *places, "end\n"]).encode("ascii")
        return text.ljust(_padded(len(text)), b"\0")

    # With all digits of the offsets, its length does not depend on them.
    return encode(len(encode(0)))


def _padded(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def _layer_group(text: TextConfig, tokens: int, history: int) -> Group:
    tensors = {
        name: TensorInfo(name, "U32" if name == "indices" else "BF16", shape)
        for name, shape in group_shapes(text, tokens, history).items()
    }
    return Group(*(tuple(map(tensors.__getitem__, side)) for side in (LAYER_INPUTS, LAYER_OUTPUTS)))
