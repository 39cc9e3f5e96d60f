"""All layers of the text model, one after the other, each kept on disk as soon as it is done."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgevl.checkpoint import Checkpoint, StoredTensor
from edgevl.checkpoint.gptq import pack_layer
from edgevl.machine import trim_heap
from edgevl.quantize.calibration.calibration_set import Sample
from edgevl.quantize.decoder import LINEARS, layer_name, load_layer
from edgevl.quantize.gptq import Refinements
from edgevl.quantize.settings import BITS, GROUP_SIZES, QuantizationError, QuantizationSettings
from edgevl.quantize.text import States, quantize_layer, ticks
from edgevl.work import Loop, WorkDirectory

#: What the streams of `States` are called in a file.
_STREAMS = ("original", "quantized", "heldout_original", "heldout_rtn", "heldout_quantized")


def quantize_layers(
    checkpoint: Checkpoint,
    settings: QuantizationSettings,
    samples: Sequence[Sample],
    heldout: Sequence[Sample],
    work: WorkDirectory,
    progress: Callable[[int, int], object],
) -> tuple[States, list[dict[str, Any]]]:
    """Quantize every layer that ``work`` does not have yet.

    Args:
        checkpoint: the original.
        settings: ``text`` is not "none".
        samples: to calibrate on.
        heldout: to measure on.
        work: takes each layer's tensors and errors, and the residual streams after it.
        progress: called after every sequence of every stage with what is done and what there is.

    Returns:
        The streams after the last layer, and for each linear layer ``layer``, ``name``,
        ``rtn_error`` and ``error``, as `LinearResult` defines them.

    Raises:
        QuantizationError: a layer's inputs are not finite or too few; names the layer.
        OSError: the disk is full.
    """
    config = checkpoint.config.text
    bits, device = BITS[settings.text], torch.device(settings.device)
    refinements = Refinements() if settings.method == "gptq" else None
    layers = config.num_hidden_layers
    steps = Loop(work, "text")
    if found := steps.resume(layers):
        done, tensors, _ = found
        states = _states(tensors)
    else:
        done = 0
        calibration = samples if refinements is not None else []
        states = States.begin(_embeddings(calibration), _embeddings(heldout))
    counted = ticks(len(states.original), len(heldout))
    ticked = done * counted
    progress(ticked, layers * counted)

    def tick() -> None:
        nonlocal ticked
        ticked += 1
        progress(ticked, layers * counted)

    for index in range(done, layers):
        weights = load_layer(checkpoint, index, device)
        checkpoint.release()
        try:
            results = quantize_layer(
                config,
                weights,
                states,
                bits=bits,
                group_size=settings.group_size,
                refinements=refinements,
                device=device,
                tick=tick,
            )
        except QuantizationError as error:
            raise QuantizationError(f"{checkpoint.path}: layer {index}, {error}") from None
        packed: dict[str, NDArray[Any]] = {}
        errors = []
        for name, result in results.items():
            rounded = result.rounded
            parts = pack_layer(rounded.integers.cpu().numpy(), rounded.scales.cpu().numpy(), bits)
            packed |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
            errors.append(
                {
                    "layer": index,
                    "name": name,
                    "rtn_error": result.rtn_error,
                    "error": result.error,
                }
            )
        work.save(_layer_file(index), packed)
        work.save_json(_errors_file(index), errors)
        steps.save(index + 1, _tensors(states), None)
        trim_heap()
    return states, [row for index in range(layers) for row in work.load_json(_errors_file(index))]


def packed_tensors(work: WorkDirectory, layers: int) -> dict[str, dict[str, StoredTensor]]:
    """Return the GPTQ tensors of every quantized weight, by its canonical name."""
    packed = {}
    for index in range(layers):
        file = work.open(_layer_file(index))
        for name in LINEARS:
            packed[f"{layer_name(index)}{name}.weight"] = {
                part: file[f"{name}.{part}"] for part in ("qweight", "qzeros", "scales", "g_idx")
            }
    return packed


def check_sizes(checkpoint: Checkpoint, settings: QuantizationSettings) -> None:
    """Refuse a model with weights that groups or words do not divide.

    Raises:
        QuantizationError: names the weight and the fix.
    """
    per_word = 32 // BITS[settings.text]
    for name in LINEARS:  # all layers have the same shapes
        outputs, inputs = checkpoint.shape(f"{layer_name(0)}{name}.weight")
        if inputs % settings.group_size or outputs % per_word:
            fits = [size for size in sorted(GROUP_SIZES, reverse=True) if inputs % size == 0]
            fix = f"use --group-size {fits[0]}" if fits and outputs % per_word == 0 else ""
            raise QuantizationError(
                f"{checkpoint.path}: {name} has {inputs} inputs and {outputs} outputs, which "
                f"groups of {settings.group_size} and words of {per_word} do not divide: "
                f"{fix or 'use --text none'}"
            )


def _layer_file(index: int) -> str:
    return f"layer-{index}.safetensors"


def _errors_file(index: int) -> str:
    return f"layer-{index}.json"


def _embeddings(samples: Sequence[Sample]) -> list[Tensor]:
    return [torch.from_numpy(sample.embeddings) for sample in samples]


def _tensors(states: States) -> dict[str, NDArray[np.float32]]:
    """Return the streams by names in a file."""
    streams = (states.original, states.quantized, *states.heldout)
    return {
        f"{name}.{number}": stream.numpy()
        for name, sequences in zip(_STREAMS, streams, strict=True)
        for number, stream in enumerate(sequences)
    }


def _states(tensors: Mapping[str, NDArray[np.float32]]) -> States:
    """Return what `_tensors` took apart."""
    streams: dict[str, list[Tensor]] = {name: [] for name in _STREAMS}
    for name, tensor in tensors.items():  # in the order in which they were written
        streams[name.partition(".")[0]].append(torch.from_numpy(tensor))
    original, quantized, *heldout = streams.values()
    return States(original, quantized, (heldout[0], heldout[1], heldout[2]))
