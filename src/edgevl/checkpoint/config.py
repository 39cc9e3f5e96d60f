"""Model configuration: what a checkpoint says about itself, the same for all layouts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

#: Bounds of sizes in a configuration. The largest InternVL (InternViT-6B with a 72 B text model)
#: is far inside.
MAX_HIDDEN_SIZE = 1 << 17
MAX_INTERMEDIATE_SIZE = 1 << 19
MAX_LAYERS = 512
MAX_HEADS = 1 << 10
MAX_VOCAB_SIZE = 1 << 22
MAX_POSITIONS = 1 << 24
MAX_IMAGE_SIZE = 4096
MAX_TILES = 256

#: ImageNet statistics, used by every InternVL.
IMAGE_MEAN = (0.485, 0.456, 0.406)
IMAGE_STD = (0.229, 0.224, 0.225)

#: System message of the template ``internvl2_5``.
SYSTEM_MESSAGE = (
    "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的"
    "多模态大语言模型。"
)

#: Why InternVL3.5-Flash is refused, and the fix.
FLASH_REFUSED = (
    "InternVL3.5-Flash is not supported yet; take the model of the same size without Flash, such "
    "as OpenGVLab/InternVL3_5-1B"
)

NormType = Literal["layer_norm", "rms_norm"]
TextModelType = Literal["qwen3", "qwen2", "llama"]
GPTQFormat = Literal["gptq", "gptq_v2"]
#: The text models there are, each with the class of transformers that runs it.
TEXT_MODELS: dict[TextModelType, str] = {
    "qwen3": "Qwen3ForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "llama": "LlamaForCausalLM",
}


@dataclass(frozen=True)
class VisionConfig:
    """Shape of the InternViT encoder."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    image_size: int
    patch_size: int
    norm_type: NormType
    layer_norm_eps: float
    qkv_bias: bool
    use_qk_norm: bool

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def num_patches(self) -> int:
        """Patches of one tile, without the class token."""
        return (self.image_size // self.patch_size) ** 2


#: InternViT-300M-448px, the encoder of every InternVL up to 14 B: stands in where a text-only
#: ``config.json`` says nothing of vision.
INTERNVIT_300M = VisionConfig(
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=24,
    num_attention_heads=16,
    image_size=448,
    patch_size=14,
    norm_type="layer_norm",
    layer_norm_eps=1e-6,
    qkv_bias=True,
    use_qk_norm=False,
)


@dataclass(frozen=True)
class TextConfig:
    """Shape of the decoder.

    ``attention_bias`` speaks of the query, key and value projections, ``attention_output_bias`` of
    the output projection. ``rope_scaling`` is None, or has ``rope_type`` "linear" (``factor``) or
    "llama3" (``factor``, ``low_freq_factor``, ``high_freq_factor``,
    ``original_max_position_embeddings``). Positions beyond ``max_position_embeddings`` are not
    to be used: the dynamic scaling of some configurations, which begins there, is not kept.
    """

    model_type: TextModelType
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: dict[str, Any] | None
    max_position_embeddings: int
    tie_word_embeddings: bool
    attention_bias: bool
    attention_output_bias: bool
    mlp_bias: bool
    use_qk_norm: bool


@dataclass(frozen=True)
class GPTQConfig:
    """How a linear layer of a GPTQ checkpoint is stored.

    ``group_size`` is -1 for one group over all input channels. ``checkpoint_format`` "gptq" stores
    zero points minus one, "gptq_v2" stores them as they are. Whether zero points are all the same,
    and groups follow each other, is told by the tensors.
    """

    bits: int
    group_size: int
    checkpoint_format: GPTQFormat


@dataclass(frozen=True)
class ModelConfig:
    """Everything a checkpoint says about itself, the same for all layouts.

    ``quantization`` are the ways in which the files say that GPTQ weights are stored, the one for
    all layers first, then those for some; it is empty where nothing is quantized. ``vision_keep``
    are the linear weights of the vision encoder and the projector, by canonical name, that `edgevl
    quantize` found to lose too much in INT8; None where it has not prepared these for INT8.
    ``sampling`` are defaults of `SamplingOptions` by name; ``ignored`` says what else was asked for
    and cannot be, a line each.
    """

    vision: VisionConfig
    text: TextConfig
    downsample_ratio: float = 0.5
    ps_version: Literal["v1", "v2"] = "v2"
    select_layer: int = -1
    min_tiles: int = 1
    max_tiles: int = 12
    use_thumbnail: bool = True
    dynamic_tiling: bool = True
    image_mean: tuple[float, float, float] = IMAGE_MEAN
    image_std: tuple[float, float, float] = IMAGE_STD
    template: str = "internvl2_5"
    system_message: str = SYSTEM_MESSAGE
    eos_token_ids: tuple[int, ...] = ()
    quantization: tuple[GPTQConfig, ...] = ()
    vision_keep: tuple[str, ...] | None = None
    sampling: Mapping[str, Any] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()

    @property
    def shuffle(self) -> int:
        """Patches that the pixel shuffle merges along each axis."""
        return round(1 / self.downsample_ratio)

    @property
    def image_tokens(self) -> int:
        """Tokens of one tile after the pixel shuffle."""
        return self.vision.num_patches // self.shuffle**2


def text_json(text: TextConfig, torch_dtype: str) -> dict[str, Any]:
    """Return ``config.json`` of a text model alone, or that of a larger model's text part.

    Special tokens are not in it.

    Args:
        text: the model's shape.
        torch_dtype: PyTorch's name of the type that weights are stored in, such as "bfloat16".
    """
    fields = {
        **vars(text),
        "architectures": [TEXT_MODELS[text.model_type]],
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "torch_dtype": torch_dtype,
        "use_cache": True,
    }
    del fields["attention_output_bias"], fields["use_qk_norm"]  # as the kind of model has it
    if text.model_type != "llama":
        del fields["mlp_bias"]
        fields["max_window_layers"] = text.num_hidden_layers
        fields |= {"sliding_window": None, "use_sliding_window": False}
    if text.model_type == "qwen2":
        del fields["attention_bias"]
    return fields
