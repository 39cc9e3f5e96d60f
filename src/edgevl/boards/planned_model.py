"""What a plan needs to know of a model, whatever form the model is in."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass, field, fields

from edgevl.axera.layout import BoardShape
from edgevl.axera.model.directory import BOARD_FILE
from edgevl.checkpoint.config import MAX_POSITIONS, ModelConfig
from edgevl.json_input import Fields
from edgevl.loading import locate, open_model
from edgevl.preprocess import Message, PromptEncoder
from edgevl.preprocess.template import ChatMLTemplate
from edgevl.synth.presets import PRESETS
from edgevl.synth.tokenizer import build_tokenizer


@dataclass(frozen=True)
class PlannedModel:
    """A model to plan.

    Attributes:
        config: its configuration.
        has_vision: whether it has a vision encoder.
        weight_bits: of its layers' linear weights as they are compiled, 4 or 8.
        template_tokens: what its chat template adds to a question without a system message.
        shape: what it was compiled for, or the default.
    """

    config: ModelConfig
    has_vision: bool
    weight_bits: int
    template_tokens: int
    shape: BoardShape = field(default_factory=BoardShape)


def planned_model(model: str) -> PlannedModel:
    """Describe a model by name; no weights are read.

    Args:
        model: a preset's name, which stands for that model with INT4 layers, or what `locate`
            takes: a checkpoint's or a board's directory, a Hub id, ``tiny``.

    Raises:
        CheckpointError: it is none of these, incomplete, or not supported.
        BoardError: it was compiled, and is incomplete or ambiguous.
        DownloadError: it could not be fetched.
    """
    if model in PRESETS:
        preset = PRESETS[model]
        thinking = preset.config.text.model_type == "qwen3"
        # Stands in for the real tokenizer, which has longer tokens, so this is at least enough.
        tokenizer = build_tokenizer(preset.base_vocabulary, thinking)
        template = ChatMLTemplate("<|im_end|>\n", preset.config.system_message)
        text = template.render([{"role": "user", "content": ""}])
        return PlannedModel(preset.config, True, 4, len(tokenizer.encode(text).ids))
    with closing(open_model(locate(model))) as opened:
        prompt = PromptEncoder(opened).encode([Message.user("x")])
        board = Fields(opened.read_json(BOARD_FILE) or {}, str(opened.path / BOARD_FILE))
    bits = max((setting.bits for setting in opened.config.quantization), default=8)
    weights = board.text("weights", f"gptq-{bits}")
    return PlannedModel(
        opened.config,
        opened.has_vision,
        4 if weights.endswith("4") else 8,
        len(prompt.token_ids) - 1,
        BoardShape(
            **{
                each.name: board.integer(each.name, 0, MAX_POSITIONS, each.default)
                for each in fields(BoardShape)
            }
        ),
    )
