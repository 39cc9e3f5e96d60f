"""The text model of EdgeVL's checkpoint as transformers has it: the same weights, in float16.

    python benchmarks/quantizers/text_model.py CHECKPOINT DIRECTORY

CHECKPOINT is unquantized, in the ``internvl_chat`` layout; DIRECTORY becomes a model for causal
language modelling with its tokenizer.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from edgevl.checkpoint import Checkpoint
from edgevl.checkpoint.architecture import TEXT, expected_tensors
from edgevl.checkpoint.writer import TensorSpec, encode, write_safetensors


def convert(source: Path, directory: Path) -> None:
    """Write the text model of a checkpoint, in an empty directory."""
    config = json.loads((source / "config.json").read_text())["llm_config"]
    (directory / "config.json").write_text(
        json.dumps({"model_type": "llama", **config}, indent=2) + "\n"
    )
    tokenizer = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|im_end|>",
        "model_max_length": config["max_position_embeddings"],
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(tokenizer, indent=2) + "\n")
    for name in ("tokenizer.json", "generation_config.json", "chat_template.jinja"):
        if (source / name).exists():
            shutil.copy(source / name, directory / name)
    with Checkpoint.open(source) as checkpoint:
        shapes = expected_tensors(checkpoint.config, vision=False)
        write_safetensors(
            directory,
            [TensorSpec(plain_name(name), "F16", shape) for name, shape in shapes.items()],
            lambda specs: (encode(checkpoint.tensor(name), "F16") for name in shapes),
        )


def plain_name(name: str) -> str:
    """Return what a text model alone calls a tensor of EdgeVL's."""
    return name.replace(TEXT, "model.").replace("language_model.", "")


if __name__ == "__main__":
    target = Path(sys.argv[2])
    target.mkdir(parents=True)
    convert(Path(sys.argv[1]), target)
