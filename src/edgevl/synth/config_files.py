"""The files of a checkpoint beside its weights and its tokenizer, in the manner of either layout.

``internvl_chat.json.jinja`` is filled in to the JSON files of the ``internvl_chat`` layout, each by
its name: fields and values are those of OpenGVLab/InternVL3_5-1B. ``auto_map`` is kept for the
tools that look at it; the Python files it names are not written. ``internvl.json.jinja`` is the
same for the layout of transformers' own.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from tokenizers import Tokenizer

from edgevl.checkpoint.config import ModelConfig
from edgevl.checkpoint.text_json import text_json

#: Torch's names of the stored dtypes.
TORCH_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}

_HERE = Path(__file__).parent
#: Chat template of the published checkpoints: ChatML with a marker where an image goes.
CHAT_TEMPLATE = (_HERE / "chat_template.jinja").read_text("utf-8")


def config_files(
    layout: str, config: ModelConfig, tokenizer: Tokenizer, dtype: str
) -> dict[str, dict[str, Any]]:
    """Return the JSON files of a layout by file name.

    Args:
        layout: "internvl_chat" or "internvl".
        config: The model's shape.
        tokenizer: Its tokenizer.
        dtype: One of `TORCH_DTYPES`.
    """
    token_id = tokenizer.token_to_id
    end, pad = token_id("<|im_end|>"), token_id("<|endoftext|>")
    text = text_json(config.text, TORCH_DTYPES[dtype])
    environment = Environment(loader=FileSystemLoader(_HERE), undefined=StrictUndefined)
    filled = environment.get_template(f"{layout}.json.jinja").render(
        config=config,
        vision=config.vision,
        torch_dtype=TORCH_DTYPES[dtype],
        text=text | {"bos_token_id": pad, "eos_token_id": end},
        end=end,
        pad=pad,
        image_token_id=token_id("<IMG_CONTEXT>"),
        tokenizer=_tokenizer_json(tokenizer),
        # Placeholders that the processor looks for. `<video>` is never encoded: frames replace it.
        named={
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>" if token_id("<video>") else "<|video_pad|>",
        },
    )
    return json.loads(filled)


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
