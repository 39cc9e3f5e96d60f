"""Writes `data/gptqmodel`: small checkpoints by GPTQModel, with the weights it has them stand for.

    python tests/support/gptqmodel_reference.py

Needs gptqmodel; the stored files are of version 7.7.0, with transformers 5.23.0 and PyTorch 2.13.0.
"""

import json
import shutil
import tempfile
from pathlib import Path

import numpy as np

from repository import DATA as REPOSITORY_DATA

DATA = REPOSITORY_DATA / "gptqmodel"
#: Fields of `QuantizeConfig`, by the name of the directory.
VARIANTS = {
    "int4": {"bits": 4, "sym": True, "desc_act": False},
    "int4-ordered": {"bits": 4, "sym": False, "desc_act": True},
}
VOCABULARY = 32
#: Layers whose weights are stored.
LAYERS = ("q_proj", "down_proj")


def write_model(directory):
    """Write a Qwen3 of one layer with random weights."""
    import torch
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        dtype="float16",
        bos_token_id=0,
        eos_token_id=1,
    )
    Qwen3ForCausalLM(config).half().save_pretrained(directory)
    words = models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w2")
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(words), bos_token="w0", eos_token="w1", pad_token="w1"
    ).save_pretrained(directory)


def quantize(source, directory, fields):
    """Let GPTQModel quantize a model, and read from its own layers what it made of it."""
    import torch
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

    config = QuantizeConfig(group_size=32, **fields)
    model = GPTQModel.load(str(source), config, device="cpu", dtype=torch.float16)
    rows = np.random.default_rng(0).integers(2, VOCABULARY, (16, 64)).tolist()
    model.quantize([{"input_ids": row, "attention_mask": [1] * 64} for row in rows], batch_size=1)
    model.save(str(directory))
    loaded = GPTQModel.load(
        str(directory), device="cpu", dtype=torch.float16, backend=BACKEND.TORCH
    )
    return {
        name + ".weight": layer.dequantize_weight().T.numpy()
        for name, layer in loaded.model.named_modules()
        if name.endswith(LAYERS)
    }


def main():
    shutil.rmtree(DATA, ignore_errors=True)
    with tempfile.TemporaryDirectory() as work:
        write_model(Path(work, "model"))
        for name, fields in VARIANTS.items():
            weights = quantize(Path(work, "model"), Path(work, name), fields)
            (DATA / name).mkdir(parents=True)
            config = json.loads(Path(work, name, "config.json").read_text())
            del config["quantization_config"]["meta"]  # has the path of a temporary directory
            (DATA / name / "config.json").write_text(json.dumps(config, indent=1) + "\n")
            shutil.copy(Path(work, name, "model.safetensors"), DATA / name)
            np.savez_compressed(DATA / name / "dequantized.npz", **weights)


if __name__ == "__main__":
    main()
