"""Shapes for synthetic checkpoints: of published InternVL models, and a miniature of each kind."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgevl.checkpoint.config import INTERNVIT_300M, ModelConfig, TextConfig, VisionConfig
from edgevl.synth.tokenizer import QWEN_BASE_VOCABULARY

#: The models' fields, and those that a kind of text model, and the vision encoders of miniatures,
#: have in common. Sizes of the full models are from the config.json of OpenGVLab's repositories and
#: of the Qwen models in them. Of the others, those with InternLM2, a mixture of experts or
#: InternViT-6B (38 B parameters and more) are left out.
_SHAPES = json.loads(Path(__file__).with_name("presets.json").read_text("utf-8"))


@dataclass(frozen=True)
class Preset:
    """A model to synthesize.

    Attributes:
        config: Its shape.
        base_vocabulary: Entries of the tokenizer before the added tokens.
    """

    config: ModelConfig
    base_vocabulary: int = QWEN_BASE_VOCABULARY


def _preset(model: Mapping[str, Any]) -> Preset:
    text = TextConfig(**_SHAPES["text"][model["text"]["model_type"]] | model["text"])
    vision = INTERNVIT_300M
    if "vision" in model:
        vision = VisionConfig(**_SHAPES["vision"] | model["vision"])
    return Preset(ModelConfig(vision, text), model.get("base_vocabulary", QWEN_BASE_VOCABULARY))


PRESETS = {name: _preset(model) for name, model in _SHAPES["models"].items()}
