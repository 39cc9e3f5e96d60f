"""The model's two parts as torch modules, from which other peers' exporters start."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")


def load_model(checkpoint: Path, dtype: Any) -> Any:
    """Load a checkpoint in the ``-HF`` layout as transformers' InternVL, for inference."""
    import torch
    from transformers import InternVLForConditionalGeneration

    torch.set_grad_enabled(False)
    return InternVLForConditionalGeneration.from_pretrained(
        checkpoint, dtype=dtype, attn_implementation="sdpa"
    ).eval()


def vision_module(model: Any) -> Any:
    """Return encoder, pixel shuffle and projector: pixels [1, 3, S, S] -> features [1, T, H]."""
    import torch

    config = model.config.vision_config
    side = config.image_size[0] // config.patch_size[0]

    class Vision(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.tower = model.model.vision_tower
            self.projector = model.model.multi_modal_projector

        def forward(self, pixels: Any) -> Any:
            patches = self.tower(pixels).last_hidden_state[:, 1:]
            grid = patches.reshape(1, side, side, config.hidden_size)
            shuffled = model.model.pixel_shuffle(grid, model.config.downsample_ratio)
            return self.projector(shuffled.flatten(1, 2))

    return Vision().eval()


def write_text_model(checkpoint: Path, directory: Path) -> None:
    """Write the text model alone as a checkpoint of its own, in bfloat16, with the tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM

    model = load_model(checkpoint, torch.bfloat16)
    config = model.config.text_config
    config.architectures = None
    text = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    text.model.load_state_dict(model.model.language_model.state_dict())
    text.lm_head.load_state_dict(model.lm_head.state_dict())
    text.save_pretrained(directory)
    for name in TOKENIZER_FILES:
        if (checkpoint / name).exists():
            shutil.copy(checkpoint / name, directory)
