"""Quantizes a text model on given sequences, without the rest of `edgevl quantize`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from edgevl.checkpoint import Checkpoint
from edgevl.quantize import QuantizationSettings
from edgevl.quantize.calibration import Sample
from edgevl.quantize.output import quantization_fields, write_checkpoint
from edgevl.quantize.run import bfloat16_products
from edgevl.quantize.text import packed_tensors, quantize_layers
from edgevl.version import __version__
from edgevl.work import WorkDirectory


def quantize_text(
    checkpoint: Checkpoint,
    settings: QuantizationSettings,
    samples: Sequence[Sample],
    work: Path,
    output: Path,
) -> None:
    """Write ``checkpoint`` with its text model quantized on ``samples`` to ``output``.

    Args:
        checkpoint: the original.
        settings: of the text; vision stays as it is.
        samples: to calibrate on; none for rounding to nearest.
        work: a directory that exists, for the layers.
        output: a directory that exists and is empty.
    """
    settings = replace(settings, vision="none")
    layers = WorkDirectory(work)
    with torch.no_grad(), bfloat16_products():
        quantize_layers(checkpoint, settings, samples, (), layers, lambda done, total: None)
    packed = packed_tensors(layers, checkpoint.config.text.num_hidden_layers)
    fields = quantization_fields(settings, (), __version__)
    write_checkpoint(checkpoint, output, packed, {}, fields)
