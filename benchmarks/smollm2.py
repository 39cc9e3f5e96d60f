"""SmolLM2-135M-Instruct, a small trained text model, from GGUF to a checkpoint of EdgeVL.

    python benchmarks/smollm2.py SmolLM2-135M-Instruct.Q4_1.gguf DIRECTORY

For `speculation.py`, which asks about text only: the vision encoder is a tiny random one. Needs the
package ``gguf``. Any Llama in GGUF with SmolLM2's tokenizer will do.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader, TokenType, dequantize
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from edgevl.checkpoint import ModelConfig
from edgevl.checkpoint.architecture import TEXT, expected_tensors
from edgevl.checkpoint.writer import TensorSpec, encode, write_safetensors
from edgevl.synth.presets import PRESETS
from edgevl.synth.writer import config_files, random_values

#: Parts of our names and what GGUF has instead, applied in this order.
NAMES = {
    "embed_tokens": "token_embd",
    "layers.": "blk.",
    "post_attention_layernorm": "ffn_norm",
    "input_layernorm": "attn_norm",
    "self_attn.o_proj": "attn_output",
    "self_attn.": "attn_",
    "mlp.": "ffn_",
    "_proj": "",
}
#: Special tokens that no chat has become those of pictures.
RENAMED = {"<repo_name>": "<img>", "<gh_stars>": "</img>", "<issue_start>": "<IMG_CONTEXT>"}


def main() -> None:
    """Convert."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("gguf", type=Path, metavar="GGUF")
    parser.add_argument("directory", type=Path, metavar="DIRECTORY")
    arguments = parser.parse_args()
    reader = GGUFReader(arguments.gguf)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    stored = {tensor.name: tensor for tensor in reader.tensors}
    config = model_config(fields)
    directory: Path = arguments.directory
    directory.mkdir(parents=True)
    tokenizer = make_tokenizer(fields)
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "chat_template.jinja").write_text(fields["tokenizer.chat_template"])
    files = config_files("internvl_chat", config, tokenizer, "fp16")
    for name in ("config.json", "generation_config.json"):
        (directory / name).write_text(json.dumps(files[name], indent=2) + "\n")
    write_safetensors(
        directory,
        [TensorSpec(name, "F16", shape) for name, shape in expected_tensors(config).items()],
        lambda specs: (encode(values(spec, stored, config), "F16") for spec in specs),
    )


def model_config(fields: Mapping[str, Any]) -> ModelConfig:
    """Return the configuration that GGUF's fields describe, with a miniature's vision encoder."""
    mini = PRESETS["mini-llama"].config
    heads, hidden = fields["llama.attention.head_count"], fields["llama.embedding_length"]
    text = replace(
        mini.text,
        vocab_size=fields["llama.vocab_size"],
        hidden_size=hidden,
        intermediate_size=fields["llama.feed_forward_length"],
        num_hidden_layers=fields["llama.block_count"],
        num_attention_heads=heads,
        num_key_value_heads=fields["llama.attention.head_count_kv"],
        head_dim=hidden // heads,
        rms_norm_eps=fields["llama.attention.layer_norm_rms_epsilon"],
        rope_theta=fields["llama.rope.freq_base"],
        rope_scaling=None,
        max_position_embeddings=fields["llama.context_length"],
        tie_word_embeddings=True,
    )
    return replace(mini, text=text)


def make_tokenizer(fields: Mapping[str, Any]) -> Tokenizer:
    """Return the byte-level BPE tokenizer of GGUF's vocabulary, split as SmolLM2's."""
    tokens = [RENAMED.get(token, token) for token in fields["tokenizer.ggml.tokens"]]
    merges = [tuple(pair.split(" ")) for pair in fields["tokenizer.ggml.merges"]]
    vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = fields["tokenizer.ggml.token_type"]
    tokenizer.add_special_tokens(
        [
            AddedToken(token, normalized=False, special=True)
            for token, kind in zip(tokens, kinds, strict=True)
            if kind == TokenType.CONTROL
        ]
    )
    return tokenizer


def values(spec: TensorSpec, stored: Mapping[str, Any], config: ModelConfig) -> np.ndarray:
    """Return a tensor: float32, GGUF's or, outside of the text model, random."""
    if not spec.name.startswith(TEXT):
        return random_values(spec.name, spec.shape, 0)
    name = spec.name.removeprefix(TEXT)
    if name == "norm.weight":
        name = "output_norm.weight"
    for ours, theirs in NAMES.items():
        name = name.replace(ours, theirs)
    tensor = dequantize(stored[name].data, stored[name].tensor_type).reshape(spec.shape)
    heads = {
        "attn_q": config.text.num_attention_heads,
        "attn_k": config.text.num_key_value_heads,
    }.get(name.split(".")[-2])
    if heads is not None:  # llama.cpp interleaves the two halves that the rotary embedding turns
        tensor = tensor.reshape(heads, -1, 2, spec.shape[1]).swapaxes(1, 2).reshape(spec.shape)
    return tensor.astype(np.float32)


if __name__ == "__main__":
    main()
