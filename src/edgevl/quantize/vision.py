"""INT8 for the vision encoder and the projector: what is moved, what is kept, what it costs.

The engine rounds when it loads; a quantized checkpoint stores floats that stand rounding better,
and the names of the linear layers that are to stay in bfloat16.

Smoothing is told in `edgevl.engine.smoothing`. Its factors are powers of two, so the stored model
computes what the original computes, to the last bit. (Only F16 has so little room below that
numbers less than 6e-5 lose bits: each is off by 3e-8 at most.) Every linear layer whose inputs can
be scaled tries `STRENGTHS` on inputs from the calibration tiles, and takes the one that brings its
outputs closest to the original's, if they are closer by `LEAST_GAIN` than they are when the engine
loads the original: less would be chance. Elsewhere the factors of loading stay, which are stored
too, for the engine takes a quantized checkpoint as it is.

Keeping: each linear layer is rounded alone, and the squared error that this brings into the hidden
states (into the features, for the projector) is its share: independent errors add in squares, and
the residual stream carries them on. A layer is sensitive if its share of all squared error is
`SENSITIVE` times its share of the multiply-adds. Sensitive layers, most error for the work first,
are candidates as long as they do no more than `MOST_WORK` of the multiply-adds, for bfloat16 is
slower; all of them are kept if, measured, the features' error falls by `LEAST_FALL`, and otherwise
none. If all layers were alike, keeping a tenth of the work would take 5 % off the error, which is
1 - sqrt(0.9); a fall by 20 % says that so little work makes a third of the squared error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edgevl.checkpoint import Checkpoint
from edgevl.engine.base import Floats
from edgevl.engine.plan import MatrixPlan
from edgevl.engine.smoothing import producer, smoothing_factor
from edgevl.quantize.settings import QuantizationError
from edgevl.quantize.vision_network import EXACT, Rounding, VisionNetwork, linear_of
from edgevl.work import Loop, Tell, WorkDirectory

STRENGTHS = (0.25, 0.4, 0.55, 0.7, 0.85)
LEAST_GAIN = 0.05
SENSITIVE = 4.0
MOST_WORK = 0.1
LEAST_FALL = 0.2
#: Tokens on which the error of one linear layer is measured, from all tiles alike.
SAMPLED_TOKENS = 1024
#: Tiles on which layers are rounded alone, and on which keeping is tried.
PROBE_TILES, TRIAL_TILES = 2, 4

#: Largest magnitude that a stored type holds.
_LARGEST = {"F16": 65504.0, "BF16": 3.3895e38, "F32": 3.4028e38, "F64": 3.4028e38}


@dataclass(frozen=True)
class VisionQuantization:
    """What was decided, and measured on the held-out tiles.

    Attributes:
        tensors: those that smoothing changes.
        keep: linear weights that are to run in bfloat16.
        layers: every linear layer in order, as a report has it: ``name``; ``plain_error``, of its
            outputs in INT8 as the engine loads the original, and ``error``, as it was decided;
            ``alpha``, the strength of smoothing that calibration found better, None where it found
            none; ``format``, what it runs in. Errors are without bias, as a share of the outputs,
            ‖ŷ - y‖ / ‖y‖, where y is computed from the same inputs with nothing rounded.
        plain_error: relative error of the features, all in INT8 as the engine loads the original.
        error: the same as it was decided.
    """

    tensors: SmoothedTensors
    keep: tuple[str, ...]
    layers: list[dict[str, Any]]
    plain_error: float
    error: float

    def summary(self) -> dict[str, Any]:
        """Return what the part ``vision`` of a report has of it."""
        return {
            "layers": self.layers,
            "plain_feature_error": self.plain_error,
            "feature_error": self.error,
        }


def quantize_vision(
    checkpoint: Checkpoint,
    tiles: Floats,
    held_out: Floats,
    device: str = "cpu",
    progress: Tell = lambda done, total: None,
    work: WorkDirectory | None = None,
) -> VisionQuantization:
    """Decide how the vision encoder and the projector of a checkpoint run in INT8.

    In memory are one layer's weights, and hidden states of all tiles.

    Args:
        checkpoint: with a vision encoder; stays open as long as the result's tensors are needed.
        tiles: to decide on, float32 [B, 3, tile, tile].
        held_out: others, to measure on.
        device: where PyTorch computes, ``cpu`` or ``cuda``.
        progress: called after every layer with the number done and the number of all.
        work: keeps what is done, layer by layer, so that another call goes on there.

    Raises:
        QuantizationError: hidden states are not finite.
    """
    network = VisionNetwork(checkpoint, device)
    stages = len(network.stages)

    def passing(number: int) -> Callable[[int], object]:
        return lambda done: progress(number * stages + done, 3 * stages)

    loaded = network.as_loaded()
    plans = loaded.matrices
    steps = Loop(work, "vision-decide")
    features, factors, strengths, squared = _calibrate(network, loaded, tiles, steps, passing(0))
    smoothed = chosen = Rounding(plans, factors)

    keep = _sensitive(squared, _work(checkpoint, plans))
    if keep:
        kept = {name: replace(plans[name], format="bf16") for name in keep}
        chosen = Rounding({**plans, **kept}, factors)
        trial, target = tiles[:TRIAL_TILES], features[:TRIAL_TILES]
        steps = Loop(work, "vision-keep")
        both, _ = _encode(network, trial, [smoothed, chosen], lambda seen: [], steps, passing(1))
        without, with_kept = (relative_error(encoded, target) for encoded in both)
        if with_kept > (1 - LEAST_FALL) * without:
            keep, chosen = (), smoothed

    def errors(seen: _Inputs) -> list[dict[str, Any]]:
        """Measure the linear layers whose inputs have been seen."""
        rows = []
        for name in seen.rows:
            weight, inputs = network.tensor(name), seen.sample(name)
            matrix, factor = chosen.matrices[name], factors.get(name)
            target = linear_of(weight)(inputs)
            plain = linear_of(weight, None, plans[name], loaded.factors.get(name))(inputs)
            decided = linear_of(weight, None, matrix, factor)(inputs)
            rows.append(
                {
                    "name": name.removesuffix(".weight"),
                    "plain_error": relative_error(plain, target),
                    "error": relative_error(decided, target),
                    "alpha": strengths.get(name),
                    "format": matrix.format,
                }
            )
        return rows

    roundings = [EXACT, loaded, chosen]
    steps = Loop(work, "vision-errors")
    encoded, layers = _encode(network, held_out, roundings, errors, steps, passing(2))
    exact, plain, final = encoded
    return VisionQuantization(
        SmoothedTensors(checkpoint, {name: each.cpu().numpy() for name, each in factors.items()}),
        keep,
        layers,
        relative_error(plain, exact),
        relative_error(final, exact),
    )


def relative_error(values: Tensor, expected: Tensor) -> float:
    """Return ‖values - expected‖ / ‖expected‖; 0 where both are zero."""
    norm = float(torch.linalg.vector_norm(expected))
    difference = float(torch.linalg.vector_norm(values - expected))
    return difference / norm if norm or difference else 0.0


class _Inputs:
    """What linear layers take in: the peak of every channel, and a sample of tokens."""

    def __init__(self, tiles: int) -> None:
        self.peaks: dict[str, Tensor] = {}
        self.rows: dict[str, list[Tensor]] = {}
        self._rows_of_a_tile = -(-SAMPLED_TOKENS // tiles)

    def __call__(self, weight: str, x: Tensor) -> None:
        """See [tokens, columns] of one tile."""
        peaks, rows = x.abs().amax(0), self.rows.setdefault(weight, [])
        self.peaks[weight] = torch.maximum(self.peaks.get(weight, peaks), peaks)
        step = max(len(x) // self._rows_of_a_tile, 1)
        rows.append(x[len(rows) % step :: step].clone())  # not a view, which would hold all of x

    def sample(self, weight: str) -> Tensor:
        """Return the sampled tokens: [tokens, columns]."""
        return torch.cat(self.rows[weight])


def _calibrate(
    network: VisionNetwork,
    loaded: Rounding,
    tiles: Floats,
    steps: Loop,
    finished: Callable[[int], object],
) -> tuple[Tensor, dict[str, Tensor], dict[str, float], dict[str, float]]:
    """Pass the calibration tiles through the original once.

    Returns:
        The features of the tiles; the factors of the linear layers that are smoothed, by weight;
        the strengths of those that are other than in ``loaded``; and for every linear layer the
        squared error of the hidden states, with only this one rounded.
    """
    plans, factors = loaded.matrices, dict(loaded.factors)
    strengths: dict[str, float] = {}
    squared_errors: dict[str, float] = {}
    if found := steps.resume(len(network.stages)):
        begin, tensors, record = found
        x, *smoothed = (torch.from_numpy(each).to(network.device) for each in tensors.values())
        strengths, squared_errors = record["strengths"], record["squared_errors"]
        factors.update(zip(strengths, smoothed, strict=True))
    else:
        begin, x = 0, network.embed(tiles)
    for stage, weights in enumerate(network.stages[begin:], begin):
        seen, probe = _Inputs(len(tiles)), x[:PROBE_TILES]
        x = network.run(stage, x, EXACT, seen)
        if not x.isfinite().all():
            raise QuantizationError(
                f"{network.path}: {weights[0].rpartition('.')[0]} or the layers after it give "
                "values that are not finite; the weights are damaged"
            )
        for name in weights:
            if producer(name) is not None:
                rows, peaks = seen.sample(name), seen.peaks[name]
                best = _smooth(network.tensor(name), rows, peaks, plans[name], factors.get(name))
                if best is not None:
                    strengths[name], factors[name] = best
            alone = Rounding({name: plans[name]}, factors)
            error = relative_error(network.run(stage, probe, alone), x[:PROBE_TILES])
            squared_errors[name] = error**2
        kept = {"x": x, **{name: factors[name] for name in strengths}}
        steps.save(
            stage + 1,
            {name: tensor.cpu().numpy() for name, tensor in kept.items()},
            {"strengths": strengths, "squared_errors": squared_errors},
        )
        finished(stage + 1)
    return x, factors, strengths, squared_errors


def _smooth(
    weight: Tensor, rows: Tensor, peaks: Tensor, matrix: MatrixPlan, loaded: Tensor | None
) -> tuple[float, Tensor] | None:
    """Return the strength and the factor with the least error, unless none is worth it.

    Args:
        weight: [out, in].
        rows: inputs [tokens, in].
        peaks: of every channel [in].
        matrix: how the weight is rounded.
        loaded: the factor [in] when the engine loads the original, if there is one.
    """
    target, plain = linear_of(weight)(rows), linear_of(weight, None, matrix, loaded)(rows)
    least, best = (1 - LEAST_GAIN) * relative_error(plain, target), None
    channels, columns = peaks.cpu().numpy(), weight.abs().amax(0).cpu().numpy()
    for strength in STRENGTHS:
        factor = torch.from_numpy(smoothing_factor(channels, columns, strength)).to(weight.device)
        error = relative_error(linear_of(weight, None, matrix, factor)(rows), target)
        if error < least:
            least, best = error, (strength, factor)
    return best


def _encode(
    network: VisionNetwork,
    tiles: Floats,
    roundings: Sequence[Rounding],
    look: Callable[[_Inputs], list[dict[str, Any]]],
    steps: Loop,
    finished: Callable[[int], object],
) -> tuple[list[Tensor], list[dict[str, Any]]]:
    """Return the features with each rounding, and what ``look`` made of the inputs of the last one.

    They go side by side, so that a stage's inputs can be forgotten when it is done.
    """
    rows: list[dict[str, Any]] = []
    if found := steps.resume(len(network.stages)):
        begin, tensors, rows = found
        states = [torch.from_numpy(tensor).to(network.device) for tensor in tensors.values()]
    else:
        begin, states = 0, [network.embed(tiles, rounding) for rounding in roundings]
    for stage in range(begin, len(network.stages)):
        seen = _Inputs(len(tiles))
        for index, rounding in enumerate(roundings):
            last = index == len(roundings) - 1
            states[index] = network.run(stage, states[index], rounding, seen if last else None)
        rows += look(seen)
        tensors = {str(index): x.cpu().numpy() for index, x in enumerate(states)}
        steps.save(stage + 1, tensors, rows)
        finished(stage + 1)
    return states, rows


def _work(checkpoint: Checkpoint, plans: Mapping[str, MatrixPlan]) -> dict[str, int]:
    """Return the multiply-adds of each linear layer for one tile."""
    config = checkpoint.config
    return {
        name: matrix.rows
        * matrix.cols
        * (config.image_tokens if "projector" in matrix.name else config.vision.num_patches + 1)
        for name, matrix in plans.items()
        if matrix.format == "int8"
    }


def _sensitive(squared_errors: Mapping[str, float], work: Mapping[str, int]) -> tuple[str, ...]:
    """Return the candidates for bfloat16, in order."""
    all_error, all_work = sum(squared_errors.values()), sum(work.values())
    density = {
        name: error / all_error / (work[name] / all_work) if all_error else 0.0
        for name, error in squared_errors.items()
    }
    keep = set()
    left = MOST_WORK * all_work
    for name in sorted(density, key=density.__getitem__, reverse=True):
        if density[name] >= SENSITIVE and work[name] <= left:
            keep.add(name)
            left -= work[name]
    return tuple(name for name in squared_errors if name in keep)


class SmoothedTensors(Mapping[str, Floats]):
    """The tensors that smoothing changes, by canonical name; each is computed when asked for.

    Args:
        checkpoint: the original, open as long as this is used.
        factors: float32 [columns] by the weight of the linear layer.
    """

    def __init__(self, checkpoint: Checkpoint, factors: Mapping[str, Floats]) -> None:
        #: As given.
        self.factors = dict(factors)
        self._checkpoint = checkpoint
        self._rows: dict[str, Floats] = {}
        known = set(checkpoint.names())
        for weight, factor in factors.items():
            for part in (".weight", ".bias"):
                name = f"{producer(weight)}{part}"
                if name in known:
                    self._rows[name] = factor

    def __getitem__(self, name: str) -> Floats:
        """Return a changed tensor as float32.

        Raises:
            KeyError: the tensor is not changed.
            QuantizationError: the type in which it is stored does not hold its values.
        """
        if name not in self:
            raise KeyError(name)
        values = np.array(self._checkpoint.tensor(name))
        if name in self.factors:
            values *= self.factors[name]
        if name in self._rows:
            factor = self._rows[name]
            rows = values[-len(factor) :]  # of qkv, the last third
            rows /= factor.reshape(-1, *[1] * (values.ndim - 1))
        stored = self._checkpoint.stored(name).dtype
        peak = np.abs(values).max()
        if not peak <= _LARGEST[stored]:
            raise QuantizationError(
                f"{self._checkpoint.path}: tensor {name!r} reaches {peak:g} when smoothed, which "
                f"{stored} does not hold: quantize a checkpoint in BF16"
            )
        return values

    def __contains__(self, name: object) -> bool:
        return name in self.factors or name in self._rows

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys([*self.factors, *self._rows]))

    def __len__(self) -> int:
        return len(self.factors.keys() | self._rows.keys())
