"""The roofline of a machine (Williams et al. 2009) and where a model's steps lie under it.

Intensity counts what a step cannot avoid: the multiply-adds of its products, and reading each
weight and each cached position once. It comes from the shapes alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import IO, Any

from edgevl.checkpoint import ModelConfig
from edgevl.engine.base import WeightBytes
from edgevl.errors import EdgeVLError
from edgevl.evaluate.bench import BenchResult


@dataclass(frozen=True)
class Step:
    """A measured step: operations (a multiply-add counts two), bytes read at least, duration."""

    name: str
    operations: float
    bytes: float
    ms: float

    @property
    def intensity(self) -> float:
        """Operations a byte."""
        return self.operations / self.bytes

    @property
    def gops(self) -> float:
        """Rate reached, in 1e9 operations a second."""
        return self.operations / self.ms / 1e6


def decoder_operations(config: ModelConfig, tokens: int, cached: int) -> float:
    """Return the operations of the decoder for ``tokens`` positions after ``cached`` others.

    Linear layers, attention to what each position can see, and the head for the last position.
    """
    text = config.text
    query = text.num_attention_heads * text.head_dim
    key_value = text.num_key_value_heads * text.head_dim
    projections = text.hidden_size * (2 * query + 2 * key_value + 3 * text.intermediate_size)
    seen = tokens * cached + tokens * (tokens + 1) / 2
    layer = tokens * projections + 2 * seen * query
    return 2 * (text.num_hidden_layers * layer + text.hidden_size * text.vocab_size)


def vision_operations(config: ModelConfig) -> float:
    """Return the operations of the encoder and the projector for one tile."""
    vision = config.vision
    hidden, positions = vision.hidden_size, vision.num_patches + 1
    linear = hidden * (4 * hidden + 2 * vision.intermediate_size)
    layer = positions * linear + 2 * positions**2 * hidden
    layers = range(vision.num_hidden_layers + 1)[config.select_layer]  # those that are run
    patches = vision.num_patches * 3 * vision.patch_size**2 * hidden
    text_hidden = config.text.hidden_size
    shuffled = hidden / config.downsample_ratio**2
    projector = config.image_tokens * (shuffled * text_hidden + text_hidden**2)
    return 2 * (layers * layer + patches + projector)


def roofline_steps(result: BenchResult, config: ModelConfig, weights: WeightBytes) -> list[Step]:
    """Return the measured steps with their operations and bytes."""
    steps = []
    if result.vision_ms is not None:
        steps.append(Step("vision", vision_operations(config), weights.vision, result.vision_ms))
    for prefill in result.prefill:
        operations = decoder_operations(config, prefill.tokens, 0)
        steps.append(Step(f"prefill {prefill.tokens}", operations, weights.text, prefill.ms))
    decode = result.decode
    context = decode.after + decode.tokens // 2
    operations = decoder_operations(config, 1, context)
    read = weights.text + context * weights.cache_per_token
    steps.append(Step("decode", operations, read, decode.ms_per_token))
    return steps


def plot_roofline(
    result: BenchResult, config: ModelConfig, weights: WeightBytes | None, file: IO[bytes]
) -> None:
    """Draw the roofline with the measured steps as PNG into ``file``.

    Raises:
        EdgeVLError: matplotlib is missing, or the engine or the machine was not measured.
    """
    bandwidth, int8_gops = result.read_bandwidth_gb_s, result.int8_gops
    if weights is None or bandwidth is None or int8_gops is None:
        raise EdgeVLError(
            "--plot: this engine does not say what its weights take, or the machine's rates could "
            "not be measured: use --engine cpu"
        )
    require_matplotlib()
    from matplotlib.figure import Figure

    steps = roofline_steps(result, config, weights)
    ridge = int8_gops / bandwidth
    low = min(ridge, *(step.intensity for step in steps)) / 2
    high = max(ridge, *(step.intensity for step in steps)) * 2
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.set_axisbelow(True)
    axes.loglog([low, ridge, high], [low * bandwidth, int8_gops, int8_gops], color="0.3")
    middle = math.sqrt(low * ridge)
    axes.annotate(
        f"{bandwidth:.1f} GB/s", (middle, middle * bandwidth), (-8, 4), ha="right", **_OFFSET
    )
    axes.annotate(f"{int8_gops:.0f} int8 GOPS", (ridge, int8_gops), (6, 5), **_OFFSET)
    for step in steps:
        attainable = min(int8_gops, step.intensity * bandwidth)
        axes.plot(step.intensity, step.gops, "o")
        label = f"{step.name}\n{step.gops / attainable:.0%}"
        # Beside the line; above the prefills, which lie side by side; below.
        offset = {"decode": (28, -20), "vision": (0, 8)}.get(step.name, (0, -24))
        axes.annotate(label, (step.intensity, step.gops), offset, ha="center", **_OFFSET)
    axes.set_xlabel("operations per byte read")
    axes.set_ylabel("1e9 operations per second")
    axes.set_title(f"{result.model} on {result.cpu}, {result.threads} threads", fontsize=10)
    axes.grid(which="both", color="0.9")
    axes.margins(y=0.2)
    figure.savefig(file, format="png", dpi=150)


#: Labels lie some points beside what they name.
_OFFSET: dict[str, Any] = {"textcoords": "offset points", "fontsize": 8}


def require_matplotlib() -> None:
    """Raise an EdgeVLError that says what to install, if matplotlib is missing."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise EdgeVLError(
            '--plot needs matplotlib, which is missing: pip install "edgevl[bench]"'
        ) from None
