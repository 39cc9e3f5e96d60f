"""A text model's configuration as transformers writes it."""

from __future__ import annotations

from typing import Any

from edgevl.checkpoint.config import TEXT_MODELS, TextConfig


def text_json(text: TextConfig, torch_dtype: str) -> dict[str, Any]:
    """Return ``config.json`` of a text model alone, or that of a larger model's text part.

    Special tokens are not in it.

    Args:
        text: the model's shape.
        torch_dtype: PyTorch's name of the type that weights are stored in, such as "bfloat16".
    """
    fields: dict[str, Any] = {
        "architectures": [TEXT_MODELS[text.model_type]],
        "attention_dropout": 0.0,
        "head_dim": text.head_dim,
        "hidden_act": "silu",
        "hidden_size": text.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": text.intermediate_size,
        "max_position_embeddings": text.max_position_embeddings,
        "model_type": text.model_type,
        "num_attention_heads": text.num_attention_heads,
        "num_hidden_layers": text.num_hidden_layers,
        "num_key_value_heads": text.num_key_value_heads,
        "rms_norm_eps": text.rms_norm_eps,
        "rope_scaling": text.rope_scaling,
        "rope_theta": text.rope_theta,
        "tie_word_embeddings": text.tie_word_embeddings,
        "torch_dtype": torch_dtype,
        "use_cache": True,
        "vocab_size": text.vocab_size,
    }
    if text.model_type == "llama":
        return fields | {"attention_bias": text.attention_bias, "mlp_bias": text.mlp_bias}
    fields |= {
        "max_window_layers": text.num_hidden_layers,
        "sliding_window": None,
        "use_sliding_window": False,
    }
    if text.model_type == "qwen2":
        return fields
    return fields | {"attention_bias": text.attention_bias}
