"""The JSON files of a checkpoint, written from a ``ModelConfig`` in the manner of either layout."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer

from edgevl.checkpoint.config import ModelConfig, TextConfig
from edgevl.checkpoint.text_json import text_json

#: Torch's names of the stored dtypes.
TORCH_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}

#: Chat template of the published checkpoints: ChatML with a marker where an image goes.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{'<|im_start|>' + message['role'] + '\\n'}}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}{{ '<IMG_CONTEXT>\\n' }}"
    "{% elif content['type'] == 'video' %}{{ '<video>\\n' }}"
    "{% elif content['type'] == 'text' %}{{ content['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{{'<|im_end|>\\n'}}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{'<|im_start|>assistant\\n' }}{% endif %}"
)


def internvl_chat_files(
    config: ModelConfig, tokenizer: Tokenizer, dtype: str
) -> dict[str, dict[str, Any]]:
    """Return the JSON files of the ``internvl_chat`` layout by file name.

    The fields and their values are those of OpenGVLab/InternVL3_5-1B. ``auto_map`` is kept for the
    tools that look at it; the Python files it names are not written.
    """
    vision, size = config.vision, config.vision.image_size
    remote = "modeling_internvl_chat.InternVLChatModel"
    end, pad = tokenizer.token_to_id("<|im_end|>"), tokenizer.token_to_id("<|endoftext|>")
    return {
        "config.json": {
            "architectures": ["InternVLChatModel"],
            "auto_map": {
                "AutoConfig": "configuration_internvl_chat.InternVLChatConfig",
                "AutoModel": remote,
                "AutoModelForCausalLM": remote,
            },
            "downsample_ratio": config.downsample_ratio,
            "dynamic_image_size": config.dynamic_tiling,
            "force_image_size": size,
            "hidden_size": config.text.hidden_size,
            "image_fold": None,
            "llm_config": _text_json(config.text, tokenizer, dtype),
            "max_dynamic_patch": config.max_tiles,
            "min_dynamic_patch": config.min_tiles,
            "model_type": "internvl_chat",
            "output_attentions": False,
            "pad2square": False,
            "pad_token_id": pad,
            "ps_version": config.ps_version,
            "select_layer": config.select_layer,
            "system_message": None,
            "template": config.template,
            "tie_word_embeddings": config.text.tie_word_embeddings,
            "torch_dtype": TORCH_DTYPES[dtype],
            "transformers_version": None,
            "use_backbone_lora": 0,
            "use_llm_lora": 0,
            "use_thumbnail": config.use_thumbnail,
            "vision_config": {
                "architectures": ["InternVisionModel"],
                "attention_dropout": 0.0,
                "auto_map": {
                    "AutoConfig": "configuration_intern_vit.InternVisionConfig",
                    "AutoModel": "modeling_intern_vit.InternVisionModel",
                },
                "drop_path_rate": 0.0,
                "dropout": 0.0,
                "hidden_act": "gelu",
                "hidden_size": vision.hidden_size,
                "image_size": size,
                "initializer_factor": 0.1,
                "initializer_range": 1e-10,
                "intermediate_size": vision.intermediate_size,
                "layer_norm_eps": vision.layer_norm_eps,
                "model_type": "intern_vit_6b",
                "norm_type": vision.norm_type,
                "num_attention_heads": vision.num_attention_heads,
                "num_channels": 3,
                "num_hidden_layers": vision.num_hidden_layers,
                "patch_size": vision.patch_size,
                "qk_normalization": vision.use_qk_norm,
                "qkv_bias": vision.qkv_bias,
                "torch_dtype": TORCH_DTYPES[dtype],
                "use_bfloat16": dtype == "bf16",
                "use_flash_attn": False,
            },
        },
        "generation_config.json": {"_from_model_config": True, "eos_token_id": [end, pad]},
        "preprocessor_config.json": {
            "crop_size": size,
            "do_center_crop": True,
            "do_normalize": True,
            "do_resize": True,
            "feature_extractor_type": "CLIPFeatureExtractor",
            "image_mean": list(config.image_mean),
            "image_std": list(config.image_std),
            "resample": 3,
            "size": size,
        },
        "tokenizer_config.json": _tokenizer_json(tokenizer),
    }


def hf_files(config: ModelConfig, tokenizer: Tokenizer, dtype: str) -> dict[str, dict[str, Any]]:
    """Return the JSON files of the ``internvl`` layout (transformers' own) by file name."""
    vision = config.vision
    size = {"height": vision.image_size, "width": vision.image_size}
    end, pad = tokenizer.token_to_id("<|im_end|>"), tokenizer.token_to_id("<|endoftext|>")
    # Placeholders that the processor looks for. `<video>` is never encoded: frames replace it.
    named = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>" if tokenizer.token_to_id("<video>") else "<|video_pad|>",
    }
    images = {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(config.image_mean),
        "image_std": list(config.image_std),
        "processor_class": "InternVLProcessor",
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": size,
    }
    return {
        "config.json": {
            "architectures": ["InternVLForConditionalGeneration"],
            "downsample_ratio": config.downsample_ratio,
            "image_seq_length": config.image_tokens,
            "image_token_id": tokenizer.token_to_id("<IMG_CONTEXT>"),
            "model_type": "internvl",
            "projector_hidden_act": "gelu",
            "text_config": _text_json(config.text, tokenizer, dtype),
            "tie_word_embeddings": config.text.tie_word_embeddings,
            "torch_dtype": TORCH_DTYPES[dtype],
            "transformers_version": "4.56.0",
            "vision_config": {
                "architectures": ["InternVLVisionModel"],
                "attention_bias": vision.qkv_bias,
                "attention_dropout": 0.0,
                "hidden_act": "gelu",
                "hidden_dropout_prob": 0.0,
                "hidden_size": vision.hidden_size,
                "image_size": [vision.image_size, vision.image_size],
                "initializer_range": 1e-10,
                "intermediate_size": vision.intermediate_size,
                "layer_norm_eps": vision.layer_norm_eps,
                "layer_scale_init_value": 0.1,
                "model_type": "internvl_vision",
                "norm_type": vision.norm_type,
                "num_attention_heads": vision.num_attention_heads,
                "num_channels": 3,
                "num_hidden_layers": vision.num_hidden_layers,
                "patch_size": [vision.patch_size, vision.patch_size],
                "projection_dropout": 0.0,
                "torch_dtype": TORCH_DTYPES[dtype],
                "use_absolute_position_embeddings": True,
                "use_mask_token": False,
                "use_mean_pooling": True,
                "use_qk_norm": vision.use_qk_norm,
            },
            "vision_feature_layer": config.select_layer,
            "vision_feature_select_strategy": "default",
        },
        "generation_config.json": {"_from_model_config": True, "eos_token_id": [end, pad]},
        "preprocessor_config.json": images
        | {
            "crop_to_patches": False,
            "image_processor_type": "GotOcr2ImageProcessorFast",
            "max_patches": config.max_tiles,
            "min_patches": config.min_tiles,
        },
        "video_preprocessor_config.json": images
        | {"video_processor_type": "InternVLVideoProcessor"},
        "processor_config.json": {
            "image_seq_length": config.image_tokens,
            "processor_class": "InternVLProcessor",
        },
        "tokenizer_config.json": _tokenizer_json(tokenizer)
        | named
        | {"extra_special_tokens": named, "processor_class": "InternVLProcessor"},
    }


def _text_json(text: TextConfig, tokenizer: Tokenizer, dtype: str) -> dict[str, Any]:
    """Return ``llm_config`` or ``text_config``."""
    tokens = {
        "bos_token_id": tokenizer.token_to_id("<|endoftext|>"),
        "eos_token_id": tokenizer.token_to_id("<|im_end|>"),
    }
    return text_json(text, TORCH_DTYPES[dtype]) | tokens


def _tokenizer_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return ``tokenizer_config.json``."""
    added = sorted(tokenizer.get_added_tokens_decoder().items())
    return {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": {
            str(number): {
                "content": token.content,
                "lstrip": token.lstrip,
                "normalized": token.normalized,
                "rstrip": token.rstrip,
                "single_word": token.single_word,
                "special": token.special,
            }
            for number, token in added
        },
        "additional_special_tokens": [
            token.content
            for _, token in added
            if token.special and token.content != "<|endoftext|>"
        ],
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 14588,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
