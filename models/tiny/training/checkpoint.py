"""The model's shape, and its checkpoint in the `internvl_chat` layout of OpenGVLab/InternVL3_5."""

import json
import math
import re
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import InternVLConfig, InternVLForConditionalGeneration

from prompts import TOKENS_A_TILE
from samples import MAX_TILES, TILE
from scenes import PATCHES
from tokenizer import END_OF_TURN, tokenizer_config

HIDDEN = 128
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, as InternVL uses

VISION = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "intermediate_size": 512,
    "image_size": TILE,
    "patch_size": TILE // PATCHES,
    "num_channels": 3,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
    "norm_type": "layer_norm",
    "attention_dropout": 0.0,
    "initializer_range": 0.05,
}
TEXT = {
    "model_type": "qwen3",
    "hidden_size": HIDDEN,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "intermediate_size": 384,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "initializer_range": 0.05,
}

# The chat template of InternVL3.5: ChatML, and no system message unless the user gives one.
CHAT_TEMPLATE = """\
{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n'}}\
{% if message['content'] is string %}{{ message['content'] }}\
{% else %}{% for content in message['content'] %}\
{% if content['type'] == 'image' %}{{ '<IMG_CONTEXT>\\n' }}\
{% elif content['type'] == 'video' %}{{ '<video>\\n' }}\
{% elif content['type'] == 'text' %}{{ content['text'] }}{% endif %}\
{% endfor %}{% endif %}{{'<|im_end|>\\n'}}{% endfor %}\
{% if add_generation_prompt %}{{'<|im_start|>assistant\\n' }}{% endif %}"""


def _position_waves() -> torch.Tensor:
    """Sines and cosines of row and column to start from, float32 [1, 1 + P, H]."""
    place = torch.arange(PATCHES).float()
    rates = 1 / 20 ** (torch.arange(HIDDEN // 4) / (HIDDEN // 4))
    waves = torch.cat(((place[:, None] * rates).sin(), (place[:, None] * rates).cos()), dim=1)
    rows = waves[:, None].expand(PATCHES, PATCHES, -1)
    columns = waves[None].expand(PATCHES, PATCHES, -1)
    grid = torch.cat((rows, columns), dim=2).reshape(1, PATCHES * PATCHES, HIDDEN)
    return torch.cat((torch.zeros(1, 1, HIDDEN), grid), dim=1) * 0.3


def new_model(tokenizer: Tokenizer) -> InternVLForConditionalGeneration:
    """Transformers' own InternVL at the tiny size."""
    text = TEXT | {
        "vocab_size": tokenizer.get_vocab_size(),
        "eos_token_id": tokenizer.token_to_id(END_OF_TURN),
    }
    config = InternVLConfig(
        vision_config=VISION | {"attention_bias": True, "layer_scale_init_value": 0.5},
        text_config=text,
        image_token_id=tokenizer.token_to_id("<IMG_CONTEXT>"),
        image_seq_length=TOKENS_A_TILE,
        downsample_ratio=0.5,
        tie_word_embeddings=False,
    )
    # In bfloat16 on a CPU the plain attention trains twice as fast as the fused one (torch 2.13).
    model = InternVLForConditionalGeneration._from_config(config, attn_implementation="eager")
    with torch.no_grad():
        model.model.vision_tower.embeddings.position_embeddings.copy_(_position_waves())
        # Normal with the variance of the number of inputs, except where the configuration's fits.
        for name, parameter in model.named_parameters():
            if "projector.linear" in name and parameter.ndim == 2:
                parameter.normal_(std=1 / math.sqrt(parameter.shape[1]))
    return model


# Names of transformers (left) and of the internvl_chat layout (right); q, k and v are fused there.
_NAMES = (
    (r"model\.vision_tower\.embeddings\.cls_token", "vision_model.embeddings.class_embedding"),
    (
        r"model\.vision_tower\.embeddings\.position_embeddings",
        "vision_model.embeddings.position_embedding",
    ),
    (
        r"model\.vision_tower\.embeddings\.patch_embeddings\.projection",
        "vision_model.embeddings.patch_embedding",
    ),
    (r"model\.vision_tower\.encoder\.layer\.", "vision_model.encoder.layers."),
    (r"\.attention\.projection_layer\.", ".attn.proj."),
    (r"\.attention\.([qkv])_proj\.", r".attn.\1."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.lambda_1$", ".ls1"),
    (r"\.lambda_2$", ".ls2"),
    (r"model\.multi_modal_projector\.layer_norm\.", "mlp1.0."),
    (r"model\.multi_modal_projector\.linear_1\.", "mlp1.1."),
    (r"model\.multi_modal_projector\.linear_2\.", "mlp1.3."),
    (r"^model\.language_model\.", "language_model.model."),
    (r"^lm_head\.", "language_model.lm_head."),
)


def _chat_name(name: str) -> str:
    for pattern, replacement in _NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def _chat_tensors(model: InternVLForConditionalGeneration) -> dict[str, torch.Tensor]:
    tensors = {_chat_name(name): value for name, value in model.state_dict().items()}
    for name in [n for n in tensors if ".attn.q." in n]:
        parts = [tensors.pop(name.replace(".attn.q.", f".attn.{part}.")) for part in "qkv"]
        tensors[name.replace(".attn.q.", ".attn.qkv.")] = torch.cat(parts)
    return {name: rounded(value).contiguous() for name, value in tensors.items()}


def rounded(value: torch.Tensor) -> torch.Tensor:
    """Rounds to bfloat16; of its 7 bits of fraction, matrices keep 6, ties to even.

    Compressed, as in the package, they take a twelfth less then, and answers are as often right.
    """
    value = value.to(torch.bfloat16)
    if value.ndim < 2:
        return value
    bits = value.view(torch.int16)
    return (bits + (bits >> 1 & 1) & ~1).view(torch.bfloat16)


def to_pixels(tiles: np.ndarray | torch.Tensor) -> torch.Tensor:
    """Normalised float32 [N, 3, S, S] of uint8 tiles [N, S, S, 3]."""
    pixels = torch.as_tensor(tiles).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    return (pixels - mean) / std


def _write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def save(model: InternVLForConditionalGeneration, tokenizer: Tokenizer, folder: Path) -> None:
    """Writes weights, configuration and tokenizer; the weights last, beside and then renamed."""
    folder.mkdir(parents=True, exist_ok=True)
    end = tokenizer.token_to_id(END_OF_TURN)
    pad = tokenizer.token_to_id("<|endoftext|>")
    _write_json(
        folder / "config.json",
        {
            "architectures": ["InternVLChatModel"],
            "model_type": "internvl_chat",
            "torch_dtype": "bfloat16",
            "downsample_ratio": 0.5,
            "dynamic_image_size": True,
            "force_image_size": TILE,
            "max_dynamic_patch": MAX_TILES,
            "min_dynamic_patch": 1,
            "pad2square": False,
            "ps_version": "v2",
            "select_layer": -1,
            "template": "internvl2_5",
            "tie_word_embeddings": False,
            "use_thumbnail": True,
            "vision_config": {
                "architectures": ["InternVisionModel"],
                "model_type": "intern_vit_6b",
                **VISION,
                "qkv_bias": True,
                "qk_normalization": False,
                "drop_path_rate": 0.0,
                "dropout": 0.0,
                "initializer_factor": 1.0,
                "use_flash_attn": False,
                "torch_dtype": "bfloat16",
            },
            "llm_config": {
                "architectures": ["Qwen3ForCausalLM"],
                **TEXT,
                "vocab_size": tokenizer.get_vocab_size(),
                "eos_token_id": end,
                "pad_token_id": pad,
                "rope_scaling": None,
                "use_cache": True,
                "torch_dtype": "bfloat16",
            },
        },
    )
    _write_json(
        folder / "generation_config.json",
        {
            "do_sample": False,
            "eos_token_id": [end, pad],
            "max_new_tokens": 256,
            "pad_token_id": pad,
        },
    )
    _write_json(
        folder / "preprocessor_config.json",
        {
            "crop_size": TILE,
            "do_center_crop": True,
            "do_normalize": True,
            "do_resize": True,
            "feature_extractor_type": "CLIPFeatureExtractor",
            "image_mean": MEAN,
            "image_std": STD,
            "resample": 3,
            "size": TILE,
        },
    )
    _write_json(folder / "tokenizer_config.json", tokenizer_config(tokenizer))
    _write_json(
        folder / "special_tokens_map.json", {"eos_token": END_OF_TURN, "pad_token": "<|endoftext|>"}
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    beside = folder / "model.safetensors.partial"
    save_file(_chat_tensors(model), beside, metadata={"format": "pt"})
    beside.rename(folder / "model.safetensors")


def load(folder: Path) -> tuple[InternVLForConditionalGeneration, Tokenizer]:
    """The saved checkpoint back in transformers' model, float32."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    model = new_model(tokenizer)
    stored = load_file(folder / "model.safetensors")
    for name in [n for n in stored if ".attn.qkv." in n]:
        for part, value in zip("qkv", stored.pop(name).chunk(3), strict=True):
            stored[name.replace(".attn.qkv.", f".attn.{part}.")] = value
    model.load_state_dict({name: stored[_chat_name(name)].float() for name in model.state_dict()})
    return model.eval(), tokenizer
