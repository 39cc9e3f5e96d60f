"""The checkpoint as GGUF files: the text model, and the vision encoder with its projector."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from edgevl.checkpoint import Checkpoint

#: Part of a canonical name -> GGUF's.
TEXT_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
VISION_LAYER = {
    "norm1": "ln1",
    "norm2": "ln2",
    "attn.proj": "attn_out",
    "mlp.fc1": "ffn_up",
    "mlp.fc2": "ffn_down",
}


def write_text(checkpoint: Checkpoint, path: Path) -> None:
    """Write the decoder (Qwen3) with its tokenizer, in bfloat16, vectors in float32."""
    import gguf

    text = checkpoint.config.text
    writer = gguf.GGUFWriter(path, "qwen3")
    writer.add_block_count(text.num_hidden_layers)
    writer.add_context_length(text.max_position_embeddings)
    writer.add_embedding_length(text.hidden_size)
    writer.add_feed_forward_length(text.intermediate_size)
    writer.add_head_count(text.num_attention_heads)
    writer.add_head_count_kv(text.num_key_value_heads)
    writer.add_key_length(text.head_dim)
    writer.add_value_length(text.head_dim)
    writer.add_layer_norm_rms_eps(text.rms_norm_eps)
    writer.add_rope_freq_base(text.rope_theta)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    _add_tokenizer(writer, checkpoint, text.vocab_size)
    prefix = "language_model.model."
    names = {
        prefix + "embed_tokens.weight": "token_embd.weight",
        prefix + "norm.weight": "output_norm.weight",
        "language_model.lm_head.weight": "output.weight",
    }
    for layer in range(text.num_hidden_layers):
        for ours, theirs in TEXT_LAYER.items():
            name = f"{prefix}layers.{layer}.{ours}.weight"
            names[name] = f"blk.{layer}.{theirs}.weight"
    _write(writer, checkpoint, names, gguf.GGMLQuantizationType.BF16)


def write_vision(checkpoint: Checkpoint, path: Path, quantization: str) -> None:
    """Write encoder and projector; linear layers in "f16" or "q8_0"."""
    import gguf

    config, vision = checkpoint.config, checkpoint.config.vision
    kind = {
        "f16": gguf.GGMLQuantizationType.F16,
        "q8_0": gguf.GGMLQuantizationType.Q8_0,
    }[quantization]
    writer = gguf.GGUFWriter(path, "clip")
    writer.add_type(gguf.GGUFType.MMPROJ)
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type(gguf.VisionProjectorType.INTERNVL)
    writer.add_vision_projection_dim(config.text.hidden_size)
    writer.add_vision_image_size(vision.image_size)
    writer.add_vision_patch_size(vision.patch_size)
    writer.add_vision_embedding_length(vision.hidden_size)
    writer.add_vision_feed_forward_length(vision.intermediate_size)
    writer.add_vision_block_count(vision.num_hidden_layers)
    writer.add_vision_head_count(vision.num_attention_heads)
    writer.add_vision_attention_layernorm_eps(vision.layer_norm_eps)
    writer.add_vision_image_mean(list(config.image_mean))
    writer.add_vision_image_std(list(config.image_std))
    writer.add_vision_use_gelu(True)
    writer.add_vision_projector_scale_factor(round(1 / config.downsample_ratio))
    writer.add_uint32("clip.vision.preproc_min_tiles", 1)
    writer.add_uint32("clip.vision.preproc_max_tiles", 1)
    embeddings = "vision_model.embeddings."
    names = {
        embeddings + "patch_embedding.weight": "v.patch_embd.weight",
        embeddings + "patch_embedding.bias": "v.patch_embd.bias",
        embeddings + "class_embedding": "v.class_embd",
        embeddings + "position_embedding": "v.position_embd.weight",
    }
    for part in ("weight", "bias"):
        for number in (0, 1, 3):
            names[f"mlp1.{number}.{part}"] = f"mm.model.mlp.{number}.{part}"
    for layer in range(vision.num_hidden_layers):
        prefix, block = f"vision_model.encoder.layers.{layer}.", f"v.blk.{layer}."
        names[prefix + "ls1"] = block + "ls1.weight"
        names[prefix + "ls2"] = block + "ls2.weight"
        for part in ("weight", "bias"):
            names[f"{prefix}attn.qkv.{part}"] = f"{block}attn_{{}}.{part}"
            for ours, theirs in VISION_LAYER.items():
                names[f"{prefix}{ours}.{part}"] = f"{block}{theirs}.{part}"
    _write(writer, checkpoint, names, kind)


def _write(writer: Any, checkpoint: Checkpoint, names: dict[str, str], kind: Any) -> None:
    """Write tensors: matrices as ``kind``, vectors and what is not multiplied in float32."""
    for name, stored in names.items():
        data = checkpoint.tensor(name)
        if name.endswith("class_embedding"):
            data = data.reshape(-1)
        elif name.endswith("position_embedding"):
            # mtmd puts the class token behind the patches and adds the positions in that order.
            data = np.roll(data.reshape(-1, data.shape[-1]), -1, axis=0)
        if "{}" in stored:  # query, key and value apart, as llama.cpp's converter writes them
            for part, letter in zip(np.split(data, 3), "qkv", strict=True):
                _add(writer, stored.format(letter), part, kind)
        else:
            _add(writer, stored, data, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add(writer: Any, name: str, data: NDArray[Any], kind: Any) -> None:
    import gguf

    if data.ndim == 2 and "position" not in name:
        writer.add_tensor(name, gguf.quants.quantize(data, kind), raw_dtype=kind)
    else:
        writer.add_tensor(name, np.ascontiguousarray(data, np.float32))


def _add_tokenizer(writer: Any, checkpoint: Checkpoint, vocabulary: int) -> None:
    import gguf

    tokenizer = json.loads(checkpoint.read_text("tokenizer.json") or "{}")
    tokens = [f"[PAD{number}]" for number in range(vocabulary)]
    kinds = [gguf.TokenType.UNUSED] * vocabulary
    for token, number in tokenizer["model"]["vocab"].items():
        tokens[number], kinds[number] = token, gguf.TokenType.NORMAL
    for added in tokenizer["added_tokens"]:
        tokens[added["id"]], kinds[added["id"]] = added["content"], gguf.TokenType.CONTROL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["model"]["merges"]])
    writer.add_eos_token_id(tokens.index("<|im_end|>"))
    writer.add_add_bos_token(False)
