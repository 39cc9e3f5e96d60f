"""Which weights become which packed matrix, in which format: the plan of a model in memory.

The native engine multiplies with packed matrices (``native/kernels/layout.h``): panels of 16 rows,
INT4 with a scale for each row and group of columns, INT8 with a scale for each row, or bfloat16;
the head's 4 bits are in two parts. Integers multiply with activations rounded to int8, with a scale
for each token and group.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from edgevl.checkpoint import Checkpoint, GPTQWeight, ModelConfig
from edgevl.checkpoint.architecture import (
    Matrix,
    Vector,
    matrices,
    text_components,
    vision_components,
    vision_layers,
)
from edgevl.checkpoint.gptq import group_length
from edgevl.engine.smoothing import producer
from edgevl.options import Precision

Format = Literal["int4", "int8", "bf16", "split"]

#: Rows of a panel.
PANEL = 16
#: Columns that share a scale, where nothing else is asked for.
GROUP = 128


@dataclass(frozen=True)
class Part:
    """A stored weight in a packed matrix: its panel p is panel ``first_panel + p * panel_step``."""

    weight: str
    rows: int
    first_panel: int = 0
    panel_step: int = 1


@dataclass(frozen=True)
class MatrixPlan:
    """One packed matrix.

    Attributes:
        name: what the native model calls it, after ``text.`` or ``vision.``.
        format: how its numbers are stored.
        rows: output features, those that pad the parts included.
        cols: input features, not padded.
        group: columns that share a scale of the activations and, in 4 bits, of the weights.
        parts: the weights that it is made of.
        gptq: whether the parts' GPTQ integers are taken as they are.
        norm: what the native model calls the norm that is divided by the factors with which the
            weight's columns are multiplied (`edgevl.engine.smoothing`); empty where none are.
    """

    name: str
    format: Format
    rows: int
    cols: int
    group: int
    parts: tuple[Part, ...]
    gptq: bool = False
    norm: str = ""


@dataclass(frozen=True)
class PackingPlan:
    """All packed matrices of a model.

    Attributes:
        matrices: in the order in which a forward pass reads them.
        exact_head: whether the best candidates of the head are scored again with stored weights.
        notes: what a user should know of the choices, a line each.
    """

    matrices: tuple[MatrixPlan, ...]
    exact_head: bool
    notes: tuple[str, ...]


def make_plan(
    checkpoint: Checkpoint, precision: Precision = "auto", exact_logits: bool = False
) -> PackingPlan:
    """Decide the format of every matrix.

    ``auto`` keeps 4-bit GPTQ as it is, where the format can hold it, and takes everything else to
    INT8; ``int4`` also rounds unquantized text weights to INT4. With both the head is INT4, of
    which the best candidates are scored again with the stored weights: the head is read whole for
    every token, so its size is speed, and only the candidates' order is what its precision is for.
    Where layers are INT4, its 4 bits are in two parts, of which only the upper one is read whole.
    The likely tokens' order is the same; unlikely ones' probabilities, which are 2 bits' then, are
    not more wrong than such layers make them.
    ``exact_logits`` has it in bfloat16 instead, for who needs the logits of all tokens.
    """
    plans: list[MatrixPlan] = []
    rounded, exact_head = 0, False
    for matrix in matrices(text_components(checkpoint.config.text)):
        plan, is_rounded = _text_matrix(checkpoint, matrix, precision)
        rounded += is_rounded
        if matrix.native == "head" and precision in ("auto", "int4"):
            [part] = plan.parts
            if checkpoint.gptq(part.weight) is None:
                exact_head = not exact_logits
                plan = replace(plan, format="bf16" if exact_logits else "int4")
                if not exact_logits and any(layer.format == "int4" for layer in plans):
                    group = min(GROUP, _padded(plan.cols, 16))
                    plan = replace(plan, format="split", group=group)
        plans.append(plan)
    notes: tuple[str, ...] = ()
    if rounded:
        notes = (
            f"{rounded} GPTQ matrices are not symmetric 4-bit in groups that follow each other: "
            f"they are rounded to {'INT8' if precision == 'auto' else 'INT4'}",
        )
    if checkpoint.has_vision:
        plans += vision_matrices(checkpoint.config, precision)
    return PackingPlan(tuple(plans), exact_head, notes)


def _text_matrix(
    checkpoint: Checkpoint, matrix: Matrix, precision: Precision
) -> tuple[MatrixPlan, bool]:
    """Plan a matrix of the decoder: -> plan, whether GPTQ integers have to be rounded for it."""
    parts, rows = _placed(matrix)
    cols = matrix.linears[0].inputs
    kind: Format = "int8" if precision == "auto" else precision
    group, exact, rounded = default_group(cols), False, False
    if precision in ("auto", "int4"):
        gptq = [checkpoint.gptq(part.weight) for part in parts]
        groups = {exact_group(packed) if packed else None for packed in gptq}
        shared = groups.pop()
        if shared is not None and not groups:
            kind, group, exact = "int4", shared, True
        else:
            rounded = any(gptq)
    return MatrixPlan("text." + matrix.native, kind, rows, cols, group, parts, exact), rounded


def exact_group(packed: GPTQWeight) -> int | None:
    """Return the group with which a GPTQ weight is an INT4 matrix exactly, or None if it is none.

    It must have 4 bits, zero points of 8, groups that follow each other, and scales that float16
    holds. Groups longer than `GROUP` are cut: the parts have the same scale, and activations are
    rounded in the finer groups.
    """
    config = packed.config
    inputs = packed.qweight.shape[0] * 32 // config.bits
    length = group_length(inputs, config)
    if config.bits != 4 or not packed.is_symmetric() or not packed.is_in_order():
        return None
    if packed.scales.dtype != "F16":
        scales = packed.scales.to_float32()
        with np.errstate(over="ignore"):
            if (scales.astype(np.float16) != scales).any():
                return None
    if length >= inputs or length % GROUP == 0:
        return default_group(inputs)
    return length if length % 8 == 0 else None


def default_group(cols: int) -> int:
    """Return `GROUP`, or all columns where there are fewer, padded to a whole line."""
    return min(GROUP, _padded(cols, 8))


def vision_matrices(config: ModelConfig, precision: Precision) -> Iterator[MatrixPlan]:
    """Plan the vision encoder and the projector: INT8 but for ``vision_keep``, or all bfloat16.

    A token has one scale, except before ``fc2`` and ``projector.fc2``: what comes out of a GELU
    has few large values, which would take the precision from all others. What reads a norm is
    smoothed, unless `edgevl quantize` has done so already.
    """
    components = vision_components(config, vision_layers(config))
    vectors = {each.name: each.native for each in components if isinstance(each, Vector)}
    for matrix in matrices(components):
        [linear] = matrix.linears
        cols = linear.inputs
        # The patch embedding is small, and first: not worth an error.
        keep = config.vision_keep
        kept = precision == "bf16" or linear.weight in (keep or ()) or bool(linear.kernel)
        kind: Format = "bf16" if kept else "int8"
        group = default_group(cols) if matrix.native.endswith("fc2") else _padded(cols, 8)
        parts, rows = _placed(matrix)
        smoothed = kind == "int8" and keep is None
        norm = vectors.get(f"{producer(linear.weight)}.weight", "") if smoothed else ""
        yield MatrixPlan("vision." + matrix.native, kind, rows, cols, group, parts, norm=norm)


def _placed(matrix: Matrix) -> tuple[tuple[Part, ...], int]:
    """Return where the weights of a matrix lie in its panels, and its rows, which pad each of them.

    A matrix of one weight keeps its number of rows.
    """
    sizes = [_padded(linear.outputs, PANEL) // PANEL for linear in matrix.linears]
    step = len(sizes) if matrix.alternate else 1
    parts = tuple(
        Part(linear.weight, linear.outputs, place if matrix.alternate else sum(sizes[:place]), step)
        for place, linear in enumerate(matrix.linears)
    )
    return parts, parts[0].rows if len(parts) == 1 else sum(sizes) * PANEL


def _padded(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
