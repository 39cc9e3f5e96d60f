"""Model configuration: ``config.json`` of either layout, parsed and checked.

Unknown fields are ignored: the files carry hundreds of defaults of the library that wrote them.
Missing fields take the defaults of transformers' configuration classes where there are such, and
are errors otherwise. Every size has a bound, so that nothing computed from a configuration (the
table of expected tensors, the cache) can explode.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from edgevl.checkpoint.jsonfile import Fields, shown
from edgevl.checkpoint.layouts import vision_linears
from edgevl.errors import CheckpointError

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

NormType = Literal["layer_norm", "rms_norm"]
TextModelType = Literal["qwen3", "qwen2", "llama"]
GPTQFormat = Literal["gptq", "gptq_v2"]
TEXT_MODELS: tuple[TextModelType, ...] = ("qwen3", "qwen2", "llama")


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
    """How the linear layers of a GPTQ checkpoint are stored.

    ``group_size`` is -1 for one group over all input channels. ``checkpoint_format`` "gptq" stores
    zero points minus one, "gptq_v2" stores them as they are.
    """

    bits: Literal[4, 8]
    group_size: int
    sym: bool
    desc_act: bool
    checkpoint_format: GPTQFormat


@dataclass(frozen=True)
class ModelConfig:
    """Everything a checkpoint says about itself, the same for all layouts.

    ``quantization`` is how weights are stored; ``vision_keep`` are the linear weights of the vision
    encoder and the projector, by canonical name, that `edgevl quantize` found to lose too much in
    INT8.
    """

    vision: VisionConfig
    text: TextConfig
    downsample_ratio: float = 0.5
    ps_version: Literal["v1", "v2"] = "v2"
    select_layer: int = -1
    projector_act: Literal["gelu"] = "gelu"
    min_tiles: int = 1
    max_tiles: int = 12
    use_thumbnail: bool = True
    dynamic_tiling: bool = True
    image_mean: tuple[float, float, float] = IMAGE_MEAN
    image_std: tuple[float, float, float] = IMAGE_STD
    template: str = "internvl2_5"
    system_message: str = SYSTEM_MESSAGE
    eos_token_ids: tuple[int, ...] = ()
    quantization: GPTQConfig | None = None
    vision_keep: tuple[str, ...] = ()

    @property
    def shuffle(self) -> int:
        """Patches that the pixel shuffle merges along each axis."""
        return round(1 / self.downsample_ratio)

    @property
    def image_tokens(self) -> int:
        """Tokens of one tile after the pixel shuffle."""
        return self.vision.num_patches // self.shuffle**2


def parse_config(
    config: Mapping[str, Any],
    where: str,
    *,
    preprocessor: Mapping[str, Any] | None = None,
    generation: Mapping[str, Any] | None = None,
    quantize: Mapping[str, Any] | None = None,
) -> tuple[str, ModelConfig]:
    """Parse ``config.json`` and the files beside it.

    Args:
        config: content of ``config.json``.
        where: its path, for errors.
        preprocessor: content of ``preprocessor_config.json`` or ``processor_config.json``.
        generation: content of ``generation_config.json``.
        quantize: content of ``quantize_config.json``.

    Returns:
        The layout that the file describes ("internvl_chat", "internvl", or "gptq_text" for the
        configuration of a text model alone) and the configuration.

    Raises:
        CheckpointError: a field is missing, has the wrong type, is out of bounds, or asks for
            something that is not supported.
    """
    top = Fields(config, where)
    model_type = top.text("model_type", "")
    if model_type == "internvl_chat":
        text = top.fields("llm_config")
    elif model_type == "internvl":
        text = top.fields("text_config")
    elif _text_model_type(top) in TEXT_MODELS:
        text = top
    else:
        raise CheckpointError(
            f"{where}: model_type is {shown(model_type)}; supported: internvl_chat, internvl, and "
            "a GPTQ text model (qwen3, qwen2, llama)"
        )
    quantization = _parse_quantization(top, text, quantize)
    if text is top and quantization is None:
        raise CheckpointError(
            f"{where}: model_type {shown(model_type)} is a text model alone, not an InternVL; only "
            "a GPTQ one (with quantization_config) is expected like this"
        )

    if text is top:
        vision = INTERNVIT_300M
    else:
        defaults = _CHAT_VISION if model_type == "internvl_chat" else _HF_VISION
        vision = _parse_vision(top.fields("vision_config"), defaults)
    if top.has("force_image_size"):
        forced = top.square("force_image_size", 1, MAX_IMAGE_SIZE)
        if forced != vision.image_size:
            raise top.error(
                "force_image_size",
                f"is {forced} but vision_config has image_size {vision.image_size}; resizing the "
                "position embedding is not supported",
            )
    ratio = top.number("downsample_ratio", 1 / 64, 1, 0.5)
    shuffle = round(1 / ratio)
    grid = vision.image_size // vision.patch_size
    if abs(shuffle * ratio - 1) > 1e-6 or grid % shuffle:
        raise top.error(
            "downsample_ratio",
            f"is {ratio:g}; it must be 1/n where n divides the {grid} patches along a side",
        )
    layers = vision.num_hidden_layers
    layer_field = "vision_feature_layer" if model_type == "internvl" else "select_layer"
    # The HF layout says it at the top, the others with the text model. A checkpoint that stores
    # a head uses it whatever these say, so the more permissive of the two is taken.
    tied = top.flag("tie_word_embeddings", model_type == "internvl")
    tiles = _parse_tiles(top, Fields(preprocessor or {}, f"{where}: image processor"), vision)
    if model_type == "internvl":
        top.choice("vision_feature_select_strategy", ("default",), "default")
    parsed = ModelConfig(
        vision=vision,
        text=_parse_text(text, tied),
        downsample_ratio=1 / shuffle,
        ps_version=_parse_pixel_shuffle(top) if model_type == "internvl_chat" else "v2",
        select_layer=top.integer(layer_field, -layers - 1, layers, -1),
        projector_act=top.choice("projector_hidden_act", ("gelu",), "gelu"),
        template=top.text("template", "internvl2_5"),
        system_message=top.text("system_message", SYSTEM_MESSAGE),
        eos_token_ids=_parse_eos(top, text, Fields(generation or {}, "generation_config.json")),
        quantization=quantization,
        vision_keep=_parse_vision_keep(top, layers),
        **tiles,
    )
    return ("gptq_text" if text is top else model_type), parsed


def _parse_pixel_shuffle(top: Fields) -> Literal["v1", "v2"]:
    """Return the version of the pixel shuffle; transformers' InternVL has but v2."""
    versions: tuple[Literal["v1", "v2"], ...] = ("v1", "v2")
    return top.choice("ps_version", versions, "v1")


#: Defaults of ``InternVisionConfig`` (internvl_chat), which are InternViT-6B's.
_CHAT_VISION: dict[str, Any] = {
    "hidden_size": 3200,
    "intermediate_size": 12800,
    "num_hidden_layers": 48,
    "num_attention_heads": 25,
    "image_size": 224,
    "norm_type": "rms_norm",
    "use_qk_norm": True,
}
#: Defaults of transformers' ``InternVLVisionConfig`` (HF layout).
_HF_VISION: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 448,
    "norm_type": "layer_norm",
    "use_qk_norm": False,
}


def _parse_vision(fields: Fields, default: Mapping[str, Any]) -> VisionConfig:
    """Parse ``vision_config``."""
    fields.choice("hidden_act", ("gelu",), "gelu")
    if fields.integer("num_channels", 1, 64, 3) != 3:
        raise fields.error("num_channels", f"is {fields.values['num_channels']}, expected 3")
    if not fields.flag("use_absolute_position_embeddings", True):
        raise fields.error("use_absolute_position_embeddings", "is false, which is not supported")
    if not fields.flag("use_mean_pooling", True):
        # transformers then adds a LayerNorm after the encoder, which no InternVL has.
        raise fields.error("use_mean_pooling", "is false, which is not supported")
    vision = VisionConfig(
        hidden_size=fields.integer("hidden_size", 1, MAX_HIDDEN_SIZE, default["hidden_size"]),
        intermediate_size=fields.integer(
            "intermediate_size", 1, MAX_INTERMEDIATE_SIZE, default["intermediate_size"]
        ),
        num_hidden_layers=fields.integer(
            "num_hidden_layers", 1, MAX_LAYERS, default["num_hidden_layers"]
        ),
        num_attention_heads=fields.integer(
            "num_attention_heads", 1, MAX_HEADS, default["num_attention_heads"]
        ),
        image_size=fields.square("image_size", 1, MAX_IMAGE_SIZE, default["image_size"]),
        patch_size=fields.square("patch_size", 1, MAX_IMAGE_SIZE, 14),
        norm_type=fields.choice("norm_type", ("layer_norm", "rms_norm"), default["norm_type"]),
        layer_norm_eps=fields.number("layer_norm_eps", 0, 1, 1e-6),
        # The layouts differ in two names.
        qkv_bias=fields.flag("qkv_bias", fields.flag("attention_bias", False)),
        use_qk_norm=fields.flag(
            "qk_normalization", fields.flag("use_qk_norm", default["use_qk_norm"])
        ),
    )
    if vision.hidden_size % vision.num_attention_heads:
        raise fields.error(
            "num_attention_heads",
            f"is {vision.num_attention_heads}, which does not divide hidden_size "
            f"{vision.hidden_size}",
        )
    if vision.image_size % vision.patch_size:
        raise fields.error(
            "patch_size",
            f"is {vision.patch_size}, which does not divide image_size {vision.image_size}",
        )
    return vision


def _text_model_type(fields: Fields) -> str:
    """Return ``model_type``, or what the first of ``architectures`` says (Qwen3ForCausalLM)."""
    if fields.has("model_type"):
        return fields.text("model_type")
    names = fields.values.get("architectures")
    if isinstance(names, list) and names and isinstance(names[0], str):
        return names[0].removesuffix("ForCausalLM").lower()
    return ""


def _parse_text(fields: Fields, tied: bool) -> TextConfig:
    """Parse ``llm_config``, ``text_config``, or the configuration of a text model alone."""
    name = _text_model_type(fields)
    model_type = next((known for known in TEXT_MODELS if known == name), None)
    if model_type is None:
        raise fields.error(
            "model_type",
            f"is {shown(name)}; supported text models: {', '.join(TEXT_MODELS)} (no mixture of "
            "experts, no InternLM2)",
        )
    fields.choice("hidden_act", ("silu",), "silu")
    llama = model_type == "llama"
    # Defaults are those of transformers' configuration classes, which agree in most.
    hidden_size = fields.integer("hidden_size", 1, MAX_HIDDEN_SIZE, 4096)
    layers = fields.integer("num_hidden_layers", 1, MAX_LAYERS, 32)
    heads = fields.integer("num_attention_heads", 1, MAX_HEADS, 32)
    kv_default = heads if llama or "num_key_value_heads" in fields.values else 32
    kv_heads = fields.integer("num_key_value_heads", 1, MAX_HEADS, kv_default)
    if heads % kv_heads:
        raise fields.error("num_key_value_heads", f"is {kv_heads}, which does not divide {heads}")
    if not fields.has("head_dim") and model_type != "qwen3" and hidden_size % heads:
        raise fields.error(
            "num_attention_heads", f"is {heads}, which does not divide hidden_size {hidden_size}"
        )
    # transformers: 128 for Qwen3 whatever the hidden size, otherwise the quotient.
    head_dim = fields.integer(
        "head_dim", 2, MAX_HIDDEN_SIZE, 128 if model_type == "qwen3" else hidden_size // heads
    )
    if head_dim % 2:
        raise fields.error("head_dim", f"is {head_dim}; rotary embeddings need an even number")
    if heads * head_dim > MAX_HIDDEN_SIZE:
        raise fields.error("head_dim", f"is {head_dim}, with {heads} heads too large")
    _refuse_sliding_window(fields, layers)
    positions = fields.integer(
        "max_position_embeddings", 1, MAX_POSITIONS, 2048 if llama else 32768
    )
    rope_theta, rope_scaling = _parse_rope(fields, positions)
    bias = False if model_type == "qwen2" else fields.flag("attention_bias", False)
    return TextConfig(
        model_type=model_type,
        vocab_size=fields.integer("vocab_size", 1, MAX_VOCAB_SIZE, 32000 if llama else 151936),
        hidden_size=hidden_size,
        intermediate_size=fields.integer(
            "intermediate_size", 1, MAX_INTERMEDIATE_SIZE, 11008 if llama else 22016
        ),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=fields.number("rms_norm_eps", 0, 1, 1e-6),
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        max_position_embeddings=positions,
        tie_word_embeddings=fields.flag("tie_word_embeddings", False) or tied,
        attention_bias=bias or model_type == "qwen2",
        attention_output_bias=bias,
        mlp_bias=llama and fields.flag("mlp_bias", False),
        use_qk_norm=model_type == "qwen3",
    )


def _refuse_sliding_window(fields: Fields, layers: int) -> None:
    """Refuse attention windows; Qwen configurations name them without using them."""
    types = fields.values.get("layer_types")
    if types is not None:
        if not isinstance(types, list) or any(kind != "full_attention" for kind in types):
            raise fields.error("layer_types", "has layers other than full_attention: not supported")
    elif (
        fields.flag("use_sliding_window", False)
        and fields.has("sliding_window")
        and fields.integer("max_window_layers", 0, MAX_POSITIONS, 28) < layers
    ):
        raise fields.error("use_sliding_window", "is true, which is not supported")


def _parse_rope(fields: Fields, positions: int) -> tuple[float, dict[str, Any] | None]:
    """Return theta and scaling, from ``rope_parameters`` (transformers 5) or the older fields."""
    name = "rope_scaling" if fields.has("rope_scaling") else "rope_parameters"
    rope = fields.fields(name, {})
    theta = rope.number("rope_theta", 1, 1e12, fields.number("rope_theta", 1, 1e12, 10_000.0))
    if rope.number("partial_rotary_factor", 0, 1, 1.0) != 1.0:
        raise rope.error("partial_rotary_factor", "is not 1, which is not supported")
    kind = rope.choice(
        "rope_type", ("default", "linear", "llama3", "dynamic"), rope.text("type", "default")
    )
    if kind == "linear":
        return theta, {"rope_type": kind, "factor": rope.number("factor", 1, 1e6)}
    if kind == "llama3":
        low = rope.number("low_freq_factor", 1e-6, 1e6)
        high = rope.number("high_freq_factor", 1e-6, 1e6)
        if low >= high:
            raise rope.error("low_freq_factor", f"is {low}, expected less than {high}")
        return theta, {
            "rope_type": kind,
            "factor": rope.number("factor", 1, 1e6),
            "low_freq_factor": low,
            "high_freq_factor": high,
            "original_max_position_embeddings": rope.integer(
                "original_max_position_embeddings", 1, MAX_POSITIONS, positions
            ),
        }
    # "dynamic" (InternVL3 on Qwen2) changes theta only beyond max_position_embeddings, which
    # bounds our contexts: up to there it is the default.
    return theta, None


def _parse_quantization(
    top: Fields, text: Fields, quantize: Mapping[str, Any] | None
) -> GPTQConfig | None:
    """Return how weights are quantized, from whichever place says so."""
    if top.has("quantization_config"):
        fields = top.fields("quantization_config")
    elif text.has("quantization_config"):
        fields = text.fields("quantization_config")
    elif quantize is not None:
        fields = Fields(quantize, "quantize_config.json")
    else:
        return None
    method = fields.text("quant_method", "gptq")
    if method != "gptq":
        raise fields.error(
            "quant_method",
            f"is {shown(method)}; supported: gptq (or take the checkpoint that is not quantized)",
        )
    bits = fields.integer("bits", 1, 32)
    if bits not in (4, 8):
        raise fields.error("bits", f"is {bits}; supported: 4, 8")
    group_size = fields.integer("group_size", -1, MAX_INTERMEDIATE_SIZE)
    if group_size == 0:
        raise fields.error("group_size", "is 0, expected -1 or a positive number")
    # GPTQModel also writes `format`, the newer name of the field.
    formats: tuple[GPTQFormat, ...] = ("gptq", "gptq_v2")
    stored = fields.choice("checkpoint_format", formats, fields.text("format", "gptq"))
    fields.choice("pack_dtype", ("int32",), "int32")
    return GPTQConfig(
        bits=4 if bits == 4 else 8,
        group_size=group_size,
        sym=fields.flag("sym", True),
        desc_act=fields.flag("desc_act", False),
        checkpoint_format=stored,
    )


def _parse_vision_keep(top: Fields, layers: int) -> tuple[str, ...]:
    """Return what ``edgevl_quantization``, written by `edgevl quantize`, keeps in bfloat16."""
    fields = top.fields("edgevl_quantization", {}).fields("vision", {})
    fields.choice("format", ("int8",), "int8")
    if not fields.has("keep"):
        return ()
    names, known = fields.values["keep"], set(vision_linears(layers))
    if not isinstance(names, list) or len(names) > len(known):
        raise fields.error(
            "keep", f"is {shown(names)}, expected a list of at most {len(known)} names"
        )
    for name in names:
        if not isinstance(name, str) or name not in known:
            raise fields.error(
                "keep",
                f"has {shown(name)}, which is no linear weight of the vision encoder or the "
                "projector, such as 'vision_model.encoder.layers.0.attn.qkv.weight'",
            )
    return tuple(names)


def _parse_tiles(top: Fields, processor: Fields, vision: VisionConfig) -> dict[str, Any]:
    """Return the image settings of ``ModelConfig``.

    ``config.json`` of the internvl_chat layout has them; the HF layout keeps them with the image
    processor, in transformers 5 inside ``image_processor``.
    """
    if processor.has("image_processor"):
        processor = processor.fields("image_processor")
    # `crop_to_patches` is not looked at: transformers' InternVLProcessor sets it whatever the
    # file says, and the published files say false.
    minimum = top.integer(
        "min_dynamic_patch", 1, MAX_TILES, processor.integer("min_patches", 1, MAX_TILES, 1)
    )
    maximum = top.integer(
        "max_dynamic_patch", 1, MAX_TILES, processor.integer("max_patches", 1, MAX_TILES, 12)
    )
    if minimum > maximum:
        raise top.error("min_dynamic_patch", f"is {minimum}, more than the maximum {maximum}")
    size = processor.values.get("size")
    if isinstance(size, dict) and "height" in size:
        sizes = processor.fields("size")
        for side in ("height", "width"):
            value = sizes.integer(side, 1, MAX_IMAGE_SIZE)
            if value != vision.image_size:
                raise sizes.error(
                    side, f"is {value} but vision_config has image_size {vision.image_size}"
                )
    return {
        "min_tiles": minimum,
        "max_tiles": maximum,
        "use_thumbnail": top.flag("use_thumbnail", True),
        "dynamic_tiling": top.flag("dynamic_image_size", True),
        "image_mean": _parse_statistics(processor, "image_mean", IMAGE_MEAN, -1e3),
        "image_std": _parse_statistics(processor, "image_std", IMAGE_STD, 1e-6),
    }


def _parse_statistics(
    fields: Fields, name: str, default: tuple[float, float, float], low: float
) -> tuple[float, float, float]:
    """Return three numbers, one a channel."""
    if not fields.has(name):
        return default
    values = fields.values[name]
    if not isinstance(values, list) or len(values) != 3:
        raise fields.error(name, f"is {shown(values)}, expected three numbers")
    red, green, blue = (
        Fields({name: value}, fields.where).number(name, low, 1e3) for value in values
    )
    return red, green, blue


def _parse_eos(top: Fields, text: Fields, generation: Fields) -> tuple[int, ...]:
    """Return every ``eos_token_id`` of the three places, in order, each once."""
    found: list[int] = []
    for fields in (generation, top, text):
        value = fields.values.get("eos_token_id")
        values = value if isinstance(value, list) else [] if value is None else [value]
        if len(values) > 256:
            raise fields.error("eos_token_id", f"lists {len(values)} ids, expected at most 256")
        for item in values:
            token = Fields({"eos_token_id": item}, fields.where)
            found.append(token.integer("eos_token_id", 0, MAX_VOCAB_SIZE))
    return tuple(dict.fromkeys(found))
