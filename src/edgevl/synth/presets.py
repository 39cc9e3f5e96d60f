"""Shapes for synthetic checkpoints: of published InternVL models, and a miniature of each kind."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from edgevl.checkpoint.config import (
    INTERNVIT_300M,
    ModelConfig,
    TextConfig,
    TextModelType,
    VisionConfig,
)
from edgevl.synth.tokenizer import QWEN_BASE_VOCABULARY


@dataclass(frozen=True)
class Preset:
    """A model to synthesize.

    Attributes:
        config: Its shape.
        base_vocabulary: Entries of the tokenizer before the added tokens.
    """

    config: ModelConfig
    base_vocabulary: int = QWEN_BASE_VOCABULARY


def _text(
    model_type: TextModelType,
    hidden: int,
    intermediate: int,
    layers: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    vocabulary: int,
    positions: int,
    *,
    tied: bool = False,
    rope_theta: float = 1e6,
    rope_scaling: dict[str, Any] | None = None,
) -> TextConfig:
    return TextConfig(
        model_type=model_type,
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=1e-5 if model_type == "llama" else 1e-6,
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        max_position_embeddings=positions,
        tie_word_embeddings=tied,
        attention_bias=model_type == "qwen2",
        attention_output_bias=False,
        mlp_bias=False,
        use_qk_norm=model_type == "qwen3",
    )


def _qwen3(hidden: int, intermediate: int, layers: int, heads: int) -> Preset:
    """InternVL3.5 with a dense Qwen3: 8 key/value heads of 128, nothing tied."""
    text = _text("qwen3", hidden, intermediate, layers, heads, 8, 128, 151936, 40960)
    return Preset(ModelConfig(INTERNVIT_300M, text))


def _qwen2(
    hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, *, dynamic: bool = False
) -> Preset:
    """InternVL2.5 and 3 with Qwen2.5; the latter has dynamic scaling of rotary positions."""
    scaling = {"rope_type": "dynamic", "type": "dynamic", "factor": 2.0} if dynamic else None
    text = _text(
        "qwen2", hidden, intermediate, layers, heads, kv_heads, hidden // heads, 151674, 32768,
        rope_scaling=scaling,
    )  # fmt: skip
    return Preset(ModelConfig(INTERNVIT_300M, text))


def _mini_vision(
    hidden: int, intermediate: int, heads: int, image: int, patch: int, *, large: bool = False
) -> VisionConfig:
    """Two layers in the manner of InternViT-300M or, if ``large``, of InternViT-6B."""
    return VisionConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=2,
        num_attention_heads=heads,
        image_size=image,
        patch_size=patch,
        norm_type="rms_norm" if large else "layer_norm",
        layer_norm_eps=1e-6,
        qkv_bias=not large,
        use_qk_norm=large,
    )


# Sizes of the full models: the config.json of OpenGVLab's repositories and of the Qwen models in
# them. Of the others, those with InternLM2, a mixture of experts or InternViT-6B (38 B parameters
# and more) are left out.
PRESETS: dict[str, Preset] = {
    "internvl3_5-1b": _qwen3(1024, 3072, 28, 16),
    "internvl3_5-2b": _qwen3(2048, 6144, 28, 16),
    "internvl3_5-4b": _qwen3(2560, 9728, 36, 32),
    "internvl3_5-8b": _qwen3(4096, 12288, 36, 32),
    "internvl3-1b": _qwen2(896, 4864, 24, 14, 2, dynamic=True),
    "internvl3-2b": _qwen2(1536, 8960, 28, 12, 2, dynamic=True),
    "internvl2_5-1b": _qwen2(896, 4864, 24, 14, 2),
    "internvl2_5-4b": _qwen2(2048, 11008, 36, 16, 2),
    # heads x head_dim differs from the hidden size; rows of the vocabulary beyond the tokenizer.
    "mini-qwen3": Preset(
        ModelConfig(
            _mini_vision(48, 112, 3, image=56, patch=14),
            _text("qwen3", 56, 152, 3, 4, 2, 32, vocabulary=600, positions=4096),
        ),
        base_vocabulary=560,
    ),
    # A tokenizer that fills the vocabulary; an output layer tied to the embedding.
    "mini-qwen2": Preset(
        ModelConfig(
            _mini_vision(64, 160, 4, image=56, patch=14),
            _text("qwen2", 72, 200, 2, 6, 2, 12, 591, 4096, tied=True),
        ),
        base_vocabulary=560,
    ),
    # Few original positions, so that all three bands of llama3's scaling occur in short texts.
    "mini-llama": Preset(
        ModelConfig(
            _mini_vision(32, 96, 2, image=56, patch=14),
            _text(
                "llama",
                64,
                176,
                2,
                4,
                1,
                16,
                600,
                4096,
                rope_theta=1e4,
                rope_scaling={
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 64,
                },
            ),
        ),
        base_vocabulary=560,
    ),
    # Nine tokens a tile, odd head sizes in the vision encoder.
    "mini-6b": Preset(
        ModelConfig(
            _mini_vision(75, 130, 3, image=48, patch=8, large=True),
            _text("qwen2", 60, 132, 2, 5, 5, 12, 600, 4096),
        ),
        base_vocabulary=560,
    ),
}
