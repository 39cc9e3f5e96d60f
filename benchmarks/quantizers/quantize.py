"""Quantize a model with one of the tools, in an environment that has it.

    python benchmarks/quantizers/quantize.py TOOL MODEL TOKENS DIRECTORY GROUP_SIZE [NAME=JSON ...]

TOKENS is a ``.npy`` file of sequences to calibrate on, int [N, T]. Everything is 4 bits, symmetric.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np


def round_to_nearest(model: Path, tokens: np.ndarray, directory: Path, group_size: int) -> None:
    """Round to the grid of GPTQModel, and write the result as float32: ``tokens`` is not used."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    for name, layer in loaded.model.layers.named_modules():
        if name.endswith("_proj"):
            weight = layer.weight.data
            groups = weight.view(len(weight), -1, group_size)
            scales = (groups.abs().amax(2, keepdim=True) * 2 / 15).half().float()
            scales[scales == 0] = 1  # of weights that are zero, or so small that they become it
            rounded = (groups / scales).round().clamp(-8, 7) * scales
            layer.weight.data = rounded.view_as(weight)
    loaded.save_pretrained(directory)
    AutoTokenizer.from_pretrained(model).save_pretrained(directory)


def edgevl(model: Path, tokens: np.ndarray, directory: Path, group_size: int) -> None:
    """EdgeVL's text half; MODEL is its checkpoint. `edgevl quantize` would add pictures."""
    from edgevl.checkpoint import Checkpoint
    from edgevl.checkpoint.architecture import EMBEDDING
    from edgevl.quantize import QuantizationSettings
    from edgevl.quantize.calibration import Sample

    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from quantize_text import quantize_text

    directory.mkdir()
    with Checkpoint.open(model) as checkpoint, tempfile.TemporaryDirectory() as work:
        table, words = checkpoint.tensor(EMBEDDING), np.zeros(tokens.shape[1], np.bool_)
        samples = [Sample(row.astype(np.int64), table[row], words, 0) for row in tokens]
        settings = QuantizationSettings(group_size=group_size)
        quantize_text(checkpoint, settings, samples, Path(work), directory)


def gptqmodel(
    model: Path, tokens: np.ndarray, directory: Path, group_size: int, **options: Any
) -> None:
    """GPTQModel; options are fields of its `QuantizeConfig`."""
    from gptqmodel import GPTQModel, QuantizeConfig

    config = QuantizeConfig(bits=4, group_size=group_size, sym=True, **options)
    loaded = GPTQModel.load(str(model), config, device="cpu")
    sequences = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in tokens.tolist()]
    loaded.quantize(sequences, batch_size=1)
    loaded.save(str(directory))


def llmcompressor(model: Path, tokens: np.ndarray, directory: Path, group_size: int) -> None:
    """llm-compressor's `GPTQModifier`; its packed weights are read back as float32."""
    import torch
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from transformers import AutoModelForCausalLM, AutoTokenizer, CompressedTensorsConfig

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    weights = QuantizationArgs(num_bits=4, symmetric=True, strategy="group", group_size=group_size)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    rows = tokens.tolist()
    columns = {"input_ids": rows, "attention_mask": np.ones_like(tokens).tolist()}
    oneshot(
        model=loaded,
        tokenizer=AutoTokenizer.from_pretrained(model),
        dataset=Dataset.from_dict(columns),
        recipe=GPTQModifier(config_groups={"group_0": scheme}, ignore=["lm_head"]),
        num_calibration_samples=len(rows),
        batch_size=8,
        max_seq_length=tokens.shape[1],
        pipeline="sequential",
    )
    loaded.save_pretrained(directory / "packed", save_compressed=True)
    stored = AutoModelForCausalLM.from_pretrained(
        directory / "packed",
        dtype=torch.float32,
        quantization_config=CompressedTensorsConfig(run_compressed=False),
    )
    stored.save_pretrained(directory / "float")


def auto_round(
    model: Path, tokens: np.ndarray, directory: Path, group_size: int, **options: Any
) -> None:
    """AutoRound; options are arguments of its `AutoRound`."""
    import torch
    from auto_round import AutoRound
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model)
    rounder = AutoRound(
        loaded,
        tokenizer,
        bits=4,
        group_size=group_size,
        sym=True,
        dataset=[{"input_ids": row[None]} for row in torch.from_numpy(tokens.astype(np.int64))],
        nsamples=len(tokens),
        seqlen=tokens.shape[1],
        device_map="cpu",
        **options,
    )
    rounder.quantize_and_save(str(directory / "saved"), format="auto_gptq")
    (saved,) = (directory / "saved").iterdir()  # named after the model and the settings
    for path in saved.iterdir():
        path.rename(directory / path.name)


TOOLS: dict[str, Callable[..., None]] = {
    function.__name__: function
    for function in (round_to_nearest, edgevl, gptqmodel, llmcompressor, auto_round)
}


def main() -> None:
    """Do what the command line says."""
    tool, model, tokens, directory, group_size, *options = sys.argv[1:]
    named = dict(option.split("=", 1) for option in options)
    TOOLS[tool](
        Path(model),
        np.load(tokens),
        Path(directory),
        int(group_size),
        **{name: json.loads(value) for name, value in named.items()},
    )


if __name__ == "__main__":
    main()
