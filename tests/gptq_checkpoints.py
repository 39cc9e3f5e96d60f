"""GPTQ checkpoints for tests, rounded to nearest, without PyTorch."""

import json
from dataclasses import replace

import numpy as np

from edgevl.checkpoint import Checkpoint, StoredTensor
from edgevl.checkpoint.architecture import TEXT
from edgevl.checkpoint.gptq import pack_layer
from edgevl.quantize.output import write_checkpoint
from edgevl.synth.presets import PRESETS
from edgevl.synth.writer import write_checkpoint as write_random

QUANTIZATION = {
    "quant_method": "gptq",
    "bits": 4,
    "group_size": 128,
    "sym": True,
    "desc_act": False,
    "checkpoint_format": "gptq",
}


def write_gptq(
    directory, preset="mini-qwen3", layout="internvl_chat", bits=4, group_size=128, rule=None
):
    """Write a random checkpoint with GPTQ text; every size of its text is a multiple of 128.

    `rule` gives bits (None: not quantized) and group size of a weight by its name.
    """
    config = PRESETS[preset].config
    text = replace(
        config.text,
        hidden_size=128,
        intermediate_size=256,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
    )
    plain = write_random(
        replace(config, text=text),
        directory.with_name(directory.name + "-plain"),
        layout=layout,
        base_vocabulary=PRESETS[preset].base_vocabulary,
    )
    directory.mkdir()
    quantization = QUANTIZATION | {"bits": bits, "group_size": group_size}
    with Checkpoint.open(plain) as checkpoint:
        packed = {}
        for name in checkpoint.names():
            if name.startswith(f"{TEXT}layers.") and len(checkpoint.shape(name)) == 2:
                how = rule(name) if rule else (bits, group_size)
                if how[0] is not None:
                    packed[name] = _pack(checkpoint.tensor(name), *how)
        fields = {"quantization_config": quantization}
        write_checkpoint(checkpoint, directory, packed, {}, fields)
    return directory


def change_quantization(directory, **fields):
    """Change what config.json says of the quantization."""
    path = directory / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= fields
    path.write_text(json.dumps(config))


def _pack(weight, bits, group_size):
    groups = weight.reshape(len(weight), -1, group_size)
    scales = (np.abs(groups).max(2) / (2 ** (bits - 1) - 1)).astype(np.float16)
    scales = scales.astype(np.float32)
    integers = np.rint(groups / scales[..., None]).reshape(weight.shape).astype(np.int8)
    types = {"qweight": "I32", "qzeros": "I32", "scales": "F16", "g_idx": "I32"}
    return {
        name: StoredTensor(types[name], data)
        for name, data in pack_layer(integers, scales, bits).items()
    }
