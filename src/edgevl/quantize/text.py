"""Quantizing the text model, a layer at a time and in true sequence.

Every sequence is carried through the layers as its residual stream, once as the original computes
it and once as the quantized model does. A stage's linear layers see what everything quantized
before them has done to their input.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from edgevl.checkpoint import TextConfig
from edgevl.quantize.decoder import STAGES, DecoderLayer, Weights
from edgevl.quantize.gptq import Refinements, Rounded, Statistics, quantize, rounded_to_nearest
from edgevl.quantize.settings import QuantizationError


@dataclass
class States:
    """Residual streams before a layer: float32 [T, H] for each sequence, on the CPU.

    Attributes:
        original: calibration sequences in the original.
        quantized: the same in the quantized model.
        heldout: sequences that are only measured on, in the original, in the model rounded to
            nearest, and in the quantized one.
    """

    original: list[Tensor]
    quantized: list[Tensor]
    heldout: tuple[list[Tensor], list[Tensor], list[Tensor]]

    @classmethod
    def begin(cls, calibration: Sequence[Tensor], heldout: Sequence[Tensor]) -> States:
        """Start with embeddings, which all models share."""
        return cls(
            list(calibration),
            list(calibration),
            (list(heldout), list(heldout), list(heldout)),
        )


@dataclass(frozen=True)
class LinearResult:
    """A quantized linear layer.

    Attributes:
        rounded: its weight.
        rtn_error: relative error of its output on the held-out sequences, in the model rounded to
            nearest: ‖y - ŷ‖ / ‖y‖, where y is the output in the original.
        error: the same in the quantized model.
    """

    rounded: Rounded
    rtn_error: float
    error: float


def quantize_layer(
    config: TextConfig,
    weights: Weights,
    states: States,
    *,
    bits: int,
    group_size: int,
    refinements: Refinements | None,
    device: torch.device,
    tick: Callable[[], object] = lambda: None,
) -> dict[str, LinearResult]:
    """Quantize one layer and take ``states`` through it.

    Args:
        config: shape of the decoder.
        weights: of the layer, on ``device``.
        states: before the layer; after it on return.
        bits: of an integer.
        group_size: inputs that share a scale.
        refinements: of GPTQ; None rounds to nearest.
        device: where to compute.
        tick: called after every sequence of every stage, for progress.

    Returns:
        What was made of each linear layer, by its name in the layer.

    Raises:
        QuantizationError: the inputs of a linear layer are not finite, or too few.
    """
    models = [DecoderLayer(config, dict(weights)) for _ in range(3)]
    original, rtn, quantized = models
    results: dict[str, LinearResult] = {}
    for stage, names in enumerate(STAGES):
        rounded = _quantize_stage(
            stage, original, quantized, states, bits, group_size, refinements, device, tick
        )
        for name in names:
            weight = weights[name + ".weight"]
            nearest = rounded_to_nearest(weight, group_size, bits)
            rtn.weights[name + ".weight"] = nearest.weight()
            quantized.weights[name + ".weight"] = rounded[name].weight()
        errors = _output_errors(stage, models, states.heldout, device, tick)
        for index, name in enumerate(names):
            results[name] = LinearResult(rounded[name], errors[0][index], errors[1][index])
        if stage in (1, 3):
            for model, streams in zip(models, states.heldout, strict=True):
                _advance(model, stage, streams, device, tick)
            if refinements is not None:
                _advance(original, stage, states.original, device, tick)
                _advance(quantized, stage, states.quantized, device, tick)
    return results


def ticks(samples: int, heldout: int) -> int:
    """Return how often `quantize_layer` calls ``tick`` for so many sequences of either kind."""
    return samples * (len(STAGES) + 2 * 2) + heldout * (len(STAGES) + 2 * 3)


def _quantize_stage(
    stage: int,
    original: DecoderLayer,
    quantized: DecoderLayer,
    states: States,
    bits: int,
    group_size: int,
    refinements: Refinements | None,
    device: torch.device,
    tick: Callable[[], object],
) -> dict[str, Rounded]:
    """Quantize the linear layers of a stage together: they share their input."""
    weights = {name: original.weights[name + ".weight"] for name in STAGES[stage]}
    if refinements is None:
        return {n: rounded_to_nearest(w, group_size, bits) for n, w in weights.items()}
    joined = torch.cat(list(weights.values()))
    statistics = Statistics(joined.shape[1], device)
    for x, y in zip(states.original, states.quantized, strict=True):
        statistics.add(original.inputs(stage, x.to(device)), quantized.inputs(stage, y.to(device)))
        tick()
    try:
        rounded = quantize(joined, statistics, group_size, bits, refinements)
    except QuantizationError as error:
        raise QuantizationError(f"{STAGES[stage][0]}: {error}") from None
    rows = [len(weight) for weight in weights.values()]
    parts = zip(rounded.integers.split(rows), rounded.scales.split(rows), strict=True)
    return {
        name: Rounded(integers.clone(), scales.clone())
        for name, (integers, scales) in zip(weights, parts, strict=True)
    }


def _advance(
    layer: DecoderLayer,
    stage: int,
    streams: list[Tensor],
    device: torch.device,
    tick: Callable[[], object],
) -> None:
    """Take streams past the output of stage 1 or 3."""
    for index, x in enumerate(streams):
        streams[index] = layer.advance(stage, x.to(device)).cpu()
        tick()


def _output_errors(
    stage: int,
    models: Sequence[DecoderLayer],
    heldout: Sequence[Sequence[Tensor]],
    device: torch.device,
    tick: Callable[[], object],
) -> tuple[list[float], list[float]]:
    """Return the relative output errors of a stage's linear layers: rounded, quantized."""
    count = len(STAGES[stage])
    squares = torch.zeros(3, count, dtype=torch.float64)
    for streams in zip(*heldout, strict=True):
        outputs = [
            model.outputs(stage, x.to(device)) for model, x in zip(models, streams, strict=True)
        ]
        for index in range(count):
            exact = outputs[0][index]
            squares[0, index] += exact.double().square().sum().cpu()
            for row in (1, 2):
                difference = (outputs[row][index] - exact).double()
                squares[row, index] += difference.square().sum().cpu()
        tick()
    relative = (squares[1:] / squares[0].clamp(min=1e-300)).sqrt()
    return relative[0].tolist(), relative[1].tolist()
