"""Quantizing the text model, a layer at a time and in true sequence, and what that cost.

Every sequence is carried through the layers as its residual stream, once as the original computes
it and once as the quantized model does. A stage's linear layers see what everything quantized
before them has done to their input. Each layer is kept on disk as soon as it is done.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from edgevl.checkpoint import Checkpoint, StoredTensor, TextConfig
from edgevl.checkpoint.architecture import TEXT, head_weight
from edgevl.checkpoint.gptq import PARTS, pack_layer
from edgevl.engine.base import Floats
from edgevl.evaluate.agreement import Comparison
from edgevl.machine import trim_heap
from edgevl.quantize.calibration import Sample
from edgevl.quantize.decoder import (
    LINEARS,
    STAGES,
    DecoderLayer,
    Weights,
    layer_name,
    load_layer,
    load_tensor,
)
from edgevl.quantize.gptq import (
    Refinements,
    Rounded,
    Statistics,
    quantize,
    reaching_scales,
    round_to_nearest,
)
from edgevl.quantize.settings import BITS, GROUP_SIZES, QuantizationError, QuantizationSettings
from edgevl.work import Loop, Tell, WorkDirectory

#: Positions whose logits are in memory at once.
CHUNK = 128


@dataclass
class States:
    """Residual streams before a layer: float32 [T, H] for each sequence, on the CPU.

    Attributes:
        original: calibration sequences in the original.
        quantized: the same in the quantized model.
        heldout_original: sequences that are only measured on, in the original.
        heldout_rtn: the same in the model rounded to nearest.
        heldout_quantized: the same in the quantized one.
    """

    original: list[Tensor]
    quantized: list[Tensor]
    heldout_original: list[Tensor]
    heldout_rtn: list[Tensor]
    heldout_quantized: list[Tensor]

    @property
    def heldout(self) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """The held-out streams in the original, rounded to nearest, and quantized."""
        return self.heldout_original, self.heldout_rtn, self.heldout_quantized


def quantize_layers(
    checkpoint: Checkpoint,
    settings: QuantizationSettings,
    samples: Sequence[Sample],
    heldout: Sequence[Sample],
    work: WorkDirectory,
    progress: Tell,
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
        ``rtn_error`` and ``error``, as `quantize_layer` defines them.

    Raises:
        QuantizationError: a layer's inputs are not finite or too few; names the layer.
        OSError: the disk is full.
    """
    config, device = checkpoint.config.text, torch.device(settings.device)
    layers, steps = config.num_hidden_layers, Loop(work, "text")
    done = 0
    if found := steps.resume(layers):
        done, tensors, _ = found
        streams: dict[str, list[Tensor]] = {name: [] for name in States.__annotations__}
        for name, tensor in tensors.items():  # in the order in which they were written
            streams[name.partition(".")[0]].append(torch.from_numpy(tensor))
        states = States(**streams)
    else:  # embeddings, which all models share
        calibration = samples if settings.method == "gptq" else ()
        begin = [
            [torch.from_numpy(sample.embeddings) for sample in each]
            for each in (calibration, calibration, heldout, heldout, heldout)
        ]
        states = States(*begin)
    # A sequence goes through each stage, and past two of them in every model that it is in.
    ticks = len(states.original) * (len(STAGES) + 2 * 2) + len(heldout) * (len(STAGES) + 2 * 3)
    ticked = done * ticks
    progress(ticked, layers * ticks)

    def tick() -> None:
        nonlocal ticked
        ticked += 1
        progress(ticked, layers * ticks)

    for index in range(done, layers):
        weights = load_layer(checkpoint, index, device)
        checkpoint.release()
        try:
            results = quantize_layer(config, weights, states, settings, tick)
        except QuantizationError as error:
            raise QuantizationError(f"{checkpoint.path}: layer {index}, {error}") from None
        packed: dict[str, NDArray[Any]] = {}
        for name, (rounded, _) in results.items():
            integers, scales = rounded.integers.cpu().numpy(), rounded.scales.cpu().numpy()
            parts = pack_layer(integers, scales, BITS[settings.text])
            packed |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
        work.save(_layer_file(index), packed)
        work.save_json(
            _errors_file(index),
            [{"layer": index, "name": name, **errors} for name, (_, errors) in results.items()],
        )
        kept = {
            f"{name}.{number}": stream.numpy()
            for name, sequences in vars(states).items()
            for number, stream in enumerate(sequences)
        }
        steps.save(index + 1, kept, None)
        trim_heap()
    return states, [row for index in range(layers) for row in work.load_json(_errors_file(index))]


def packed_tensors(work: WorkDirectory, layers: int) -> dict[str, dict[str, StoredTensor]]:
    """Return the GPTQ tensors of every quantized weight, by its canonical name."""
    packed = {}
    for index in range(layers):
        file = work.open(_layer_file(index))
        for name in LINEARS:
            packed[f"{layer_name(index)}{name}.weight"] = {
                part: file[f"{name}.{part}"] for part in PARTS
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


def quantize_layer(
    config: TextConfig,
    weights: Weights,
    states: States,
    settings: QuantizationSettings,
    tick: Callable[[], object],
) -> dict[str, tuple[Rounded, dict[str, float]]]:
    """Quantize one layer and take ``states`` through it.

    Args:
        config: shape of the decoder.
        weights: of the layer, on the device.
        states: before the layer; after it on return.
        settings: how to quantize, and where to compute.
        tick: called after every sequence of every stage, for progress.

    Returns:
        For each linear layer, by its name in the layer, its weight and the relative errors of its
        output on the held-out sequences, ‖y - ŷ‖ / ‖y‖ where y is the output in the original:
        ``rtn_error`` in the model rounded to nearest, ``error`` in the quantized one.

    Raises:
        QuantizationError: the inputs of a linear layer are not finite, or too few.
    """
    bits, group_size, device = BITS[settings.text], settings.group_size, settings.device
    models = [DecoderLayer(config, dict(weights)) for _ in range(3)]
    original, rtn, quantized = models

    def quantized_together(stage: int, parts: list[Tensor]) -> list[Rounded]:
        """Quantize the linear layers of a stage, which share their input."""
        statistics = Statistics(parts[0].shape[1], torch.device(device))
        for x, y in zip(states.original, states.quantized, strict=True):
            inputs = original.inputs(stage, x.to(device)), quantized.inputs(stage, y.to(device))
            statistics.add(*inputs)
            tick()
        try:
            rounded = quantize(torch.cat(parts), statistics, group_size, bits, Refinements())
        except QuantizationError as error:
            raise QuantizationError(f"{STAGES[stage][0]}: {error}") from None
        rows = [len(part) for part in parts]
        split = zip(rounded.integers.split(rows), rounded.scales.split(rows), strict=True)
        return [Rounded(integers.clone(), scales.clone()) for integers, scales in split]

    results: dict[str, tuple[Rounded, dict[str, float]]] = {}
    for stage, names in enumerate(STAGES):
        parts = [weights[name + ".weight"] for name in names]
        nearest = [round_to_nearest(w, reaching_scales(w, group_size, bits), bits) for w in parts]
        rounded = quantized_together(stage, parts) if settings.method == "gptq" else nearest
        for name, plain, chosen in zip(names, nearest, rounded, strict=True):
            rtn.weights[name + ".weight"] = plain.weight()
            quantized.weights[name + ".weight"] = chosen.weight()
        squares = torch.zeros(3, len(names), dtype=torch.float64)
        for streams in zip(*states.heldout, strict=True):
            outputs = [m.outputs(stage, x.to(device)) for m, x in zip(models, streams, strict=True)]
            for index, (exact, *others) in enumerate(zip(*outputs, strict=True)):
                values = (exact.double(), *((other - exact).double() for other in others))
                squares[:, index] += torch.stack([each.square().sum().cpu() for each in values])
            tick()
        errors = (squares[1:] / squares[0].clamp(min=1e-300)).sqrt().T.tolist()
        for name, chosen, pair in zip(names, rounded, errors, strict=True):
            results[name] = chosen, dict(zip(("rtn_error", "error"), pair, strict=True))
        if stage in (1, 3):
            calibration = ((original, states.original), (quantized, states.quantized))
            for model, sequences in (*zip(models, states.heldout, strict=True), *calibration):
                for index, x in enumerate(sequences):
                    sequences[index] = model.advance(stage, x.to(device)).cpu()
                    tick()
    return results


def measure(
    checkpoint: Checkpoint, states: States, heldout: Sequence[Sample], device: torch.device
) -> tuple[dict[str, Any], Floats]:
    """Compare the original, the model rounded to nearest, and the quantized one.

    In float32 with the quantized weights: what an engine loses by rounding activations is not in
    it. Perplexity is that of the held-out text, or of the replies where there is no text.

    Args:
        checkpoint: the original: the head and the last norm are the same in all three.
        states: the streams of ``heldout`` after the last layer.
        heldout: what the streams are of.
        device: where to compute.

    Returns:
        ``perplexity`` and ``conversations`` of a report, the latter None without conversations; and
        the quantized model's logits at the last position of the first sequence, float32 [V].
    """
    text = checkpoint.config.text
    weight = load_tensor(checkpoint, head_weight(text), device)
    norm = load_tensor(checkpoint, TEXT + "norm.weight", device)

    def logits(stream: Tensor) -> Floats:
        x = functional.rms_norm(stream.to(device), norm.shape, norm, text.rms_norm_eps)
        return functional.linear(x, weight).cpu().numpy()

    texts, replies = (Comparison(), Comparison()), (Comparison(), Comparison())
    for sample, *streams in zip(heldout, *states.heldout, strict=True):
        kind = replies if sample.reply_start else texts
        last = len(sample.token_ids) - 1
        for begin in range(max(sample.reply_start - 1, 0), last, CHUNK):
            end = min(begin + CHUNK, last)
            following = sample.token_ids[begin + 1 : end + 1]
            original, rtn, quantized = (logits(stream[begin:end]) for stream in streams)
            kind[0].add(original, rtn, following)
            kind[1].add(original, quantized, following)
    measured = texts if texts[0].model.tokens else replies
    perplexity = {
        "source": "held-out text" if measured is texts else "replies of held-out conversations",
        "tokens": measured[0].model.tokens,
        "original": measured[0].reference.perplexity,
        "rtn": measured[0].model.perplexity,
        "quantized": measured[1].model.perplexity,
    }
    conversations: dict[str, Any] | None = None
    if replies[0].model.tokens:
        conversations = {
            "samples": sum(sample.reply_start > 0 for sample in heldout),
            "tokens": replies[0].model.tokens,
        }
        for name, comparison in zip(("rtn", "quantized"), replies, strict=True):
            conversations[name] = {
                "token_agreement": comparison.token_agreement,
                "kl_divergence": comparison.kl_divergence,
            }
    found = {"perplexity": perplexity, "conversations": conversations}
    return found, logits(states.heldout_quantized[0][-1:])[0]
