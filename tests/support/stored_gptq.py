"""GPTQ layers with all that a file may have: any bits, zero points, order of groups."""

import dataclasses

import numpy as np

from edgevl.checkpoint import Checkpoint, expected_tensors
from edgevl.synth.presets import PRESETS
from storage import TEXT, random_tensors, write_directory


def pack(fields, bits, minus_one=False):
    """Pack [R, C] along C as GPTQModel does: one 32-bit word from so many fields, lowest first."""
    per_word = 32 // bits
    ones = sum(1 << (bits * k) for k in range(per_word)) if minus_one else 0
    rows = []
    for row in fields:
        words = []
        for start in range(0, len(row), per_word):
            word = 0
            for k in range(per_word):
                word |= int(row[start + k]) << (bits * k)
            words.append((word - ones) % (1 << 32))
        rows.append(words)
    return np.array(rows, np.uint32).view(np.int32)


def quantized(outputs, inputs, config, seed=0, sym=True, desc_act=False):
    """Random stored tensors of one layer, and the weight float32 [O, I] they stand for."""
    rng = np.random.default_rng(seed)
    group = inputs if config.group_size == -1 else config.group_size
    groups = -(-inputs // group)
    top = 1 << config.bits
    integers = rng.integers(0, top, (inputs, outputs))
    # Zero points of 0 occur: stored minus one they borrow from the field above.
    zeros = np.full((groups, outputs), top // 2) if sym else rng.integers(0, top, (groups, outputs))
    scales = rng.uniform(0.01, 0.1, (groups, outputs)).astype(np.float16).astype(np.float32)
    g_idx = np.arange(inputs) // group
    if desc_act:
        g_idx = rng.permutation(g_idx)
    weight = np.empty((outputs, inputs), np.float32)
    for o in range(outputs):
        for i in range(inputs):
            g = g_idx[i]
            weight[o, i] = np.float32(integers[i, o] - zeros[g, o]) * scales[g, o]
    stored = {
        "qweight": pack(integers.T, config.bits).T.copy(),
        "qzeros": pack(zeros, config.bits, config.checkpoint_format == "gptq"),
        "scales": scales,
        "g_idx": g_idx.astype(np.int32),
    }
    return stored, weight


def gptq_tensors(config, quantization, prefix, **how):
    """A text model whose layers' linear weights are quantized: stored tensors, and their values.

    All as `quantization`, or each as what that returns for its name, None for not at all.
    """
    values = random_tensors(expected_tensors(config, vision=False))
    stored, expected = {}, {}
    for number, (name, value) in enumerate(values.items()):
        place = name.replace("language_model.model.", prefix + "model.").replace(
            "language_model.lm_head", prefix + "lm_head"
        )
        setting = quantization(name) if callable(quantization) else quantization
        if "_proj.weight" in name and setting is not None:
            parts, expected[name] = quantized(*value.shape, setting, seed=number, **how)
            stored.update({place.removesuffix("weight") + part: a for part, a in parts.items()})
        else:
            stored[place] = expected[name] = value
    return stored, expected


def gptq_checkpoint(directory, config, desc_act=False, dynamic=None, rule=None, **changes):
    """Write and open a text model alone, with GPTQ weights as `config`, or as `rule` has a name."""
    text = {**TEXT, **changes}
    shapes = dataclasses.replace(
        PRESETS["mini-qwen3"].config,
        text=dataclasses.replace(
            PRESETS["mini-qwen3"].config.text,
            vocab_size=text["vocab_size"],
            hidden_size=text["hidden_size"],
            intermediate_size=text["intermediate_size"],
            num_hidden_layers=text["num_hidden_layers"],
            num_attention_heads=text["num_attention_heads"],
            num_key_value_heads=text["num_key_value_heads"],
            head_dim=text["head_dim"],
        ),
    )
    stored, _ = gptq_tensors(shapes, rule or config, "", desc_act=desc_act)
    settings = {
        "quant_method": "gptq",
        "bits": config.bits,
        "group_size": config.group_size,
        "desc_act": desc_act,
        "checkpoint_format": config.checkpoint_format,
        "dynamic": dynamic,
    }
    directory = write_directory(directory, {**text, "quantization_config": settings}, stored, "F16")
    return Checkpoint.open(directory)
