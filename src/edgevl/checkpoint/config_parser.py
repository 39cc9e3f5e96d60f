"""``config.json`` of either layout, parsed and checked.

Fields that change nothing here are not looked at: the files carry hundreds of defaults of the
library that wrote them. Missing fields take the defaults of transformers' configuration classes
where there are such, and are errors otherwise. Every size has a bound, so that nothing computed
from a configuration (the table of expected tensors, the cache) can explode.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from edgevl.checkpoint.architecture import vision_linears
from edgevl.checkpoint.config import (
    FLASH_REFUSED,
    IMAGE_MEAN,
    IMAGE_STD,
    INTERNVIT_300M,
    MAX_HEADS,
    MAX_HIDDEN_SIZE,
    MAX_IMAGE_SIZE,
    MAX_INTERMEDIATE_SIZE,
    MAX_LAYERS,
    MAX_POSITIONS,
    MAX_TILES,
    MAX_VOCAB_SIZE,
    SYSTEM_MESSAGE,
    TEXT_MODELS,
    GPTQConfig,
    GPTQFormat,
    ModelConfig,
    TextConfig,
    VisionConfig,
)
from edgevl.errors import CheckpointError, PromptError
from edgevl.json_input import Fields, shown
from edgevl.options import OPTIONS


def parse_config(
    config: Mapping[str, Any],
    where: str,
    *,
    preprocessor: Mapping[str, Any] | None = None,
    generation: Mapping[str, Any] | None = None,
    quantize: Mapping[str, Any] | None = None,
    vision: bool = True,
) -> tuple[str, ModelConfig]:
    """Parse ``config.json`` and the files beside it.

    Args:
        config: content of ``config.json``.
        where: its path, for errors.
        preprocessor: content of ``preprocessor_config.json`` or ``processor_config.json``.
        generation: content of ``generation_config.json``.
        quantize: content of ``quantize_config.json``.
        vision: whether there is a vision encoder; what is said of one that is not there is not
            looked at.

    Returns:
        The layout that the file describes ("internvl_chat", "internvl", or "gptq_text" for the
        configuration of a text model alone) and the configuration.

    Raises:
        CheckpointError: a field is missing, has the wrong type, is out of bounds, or asks for
            something that is not supported.
    """
    top = Fields(config, where)
    model_type = top.text("model_type", "")
    _refuse_flash(top, model_type)
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
    if text is top and not quantization:
        raise CheckpointError(
            f"{where}: model_type {shown(model_type)} is a text model alone, not an InternVL; only "
            "a GPTQ one (with quantization_config) is expected like this"
        )
    pictures: dict[str, Any] = {"vision": INTERNVIT_300M}
    if vision:
        pictures = _parse_pictures(top, Fields(preprocessor or {}, f"{where}: image processor"))
    # The HF layout says it at the top, the others with the text model. A checkpoint that stores
    # a head uses it whatever these say, so the more permissive of the two is taken.
    tied = top.flag("tie_word_embeddings", model_type == "internvl")
    sampling, ignored = parse_sampling(generation or {})
    parsed = ModelConfig(
        text=_parse_text(text, tied),
        template=_text_or(top, "template", "internvl2_5"),
        system_message=_text_or(top, "system_message", SYSTEM_MESSAGE),
        eos_token_ids=_parse_eos(top, text, Fields(generation or {}, "generation_config.json")),
        quantization=quantization,
        sampling=sampling,
        ignored=ignored,
        **pictures,
    )
    if vision:
        parsed = replace(parsed, vision_keep=_parse_vision_keep(top, parsed))
    return ("gptq_text" if text is top else model_type), parsed


def _refuse_flash(top: Fields, model_type: str) -> None:
    """Refuse InternVL3.5-Flash, whose router leaves some tiles a quarter of their tokens.

    Its ``modeling_internvl_chat.py`` looks at ``flash_mode``; conversions to the HF layout have a
    name of their own.
    """
    name = top.first("flash_mode", "flash_relative_threshold", "flash_absolute_threshold")
    value = top.values.get(name)
    if model_type.startswith("internvl_flash"):
        raise top.error("model_type", f"is {shown(model_type)}: {FLASH_REFUSED}")
    if value is not None and value is not False:
        raise top.error(name, f"is {shown(value)}: {FLASH_REFUSED}")


def _text_or(fields: Fields, name: str, default: str) -> str:
    """Return a text of which whoever uses it looks whether it is one."""
    try:
        return fields.text(name, default)
    except CheckpointError:
        return default


def _parse_pictures(top: Fields, processor: Fields) -> dict[str, Any]:
    """Return what ``ModelConfig`` has of vision encoder, projector and tiles."""
    model_type = top.text("model_type", "")
    hf = model_type == "internvl"
    fields = top.fields("vision_config", {})
    vision = INTERNVIT_300M
    if model_type in _VISION_DEFAULTS:
        vision = _parse_vision(fields, _VISION_DEFAULTS[model_type])
    if hf:
        top.choice("vision_feature_select_strategy", ("default",), "default")
        top.choice("projector_hidden_act", ("gelu",), "gelu")
        # Without mean pooling transformers adds a LayerNorm after the encoder, as no InternVL has.
        for name in ("use_absolute_position_embeddings", "use_mean_pooling"):
            if not fields.flag(name, True):
                raise fields.error(name, "is false, which is not supported")
    elif top.values.get("force_image_size"):
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
    versions: tuple[Literal["v1", "v2"], ...] = ("v1", "v2")
    return {
        "vision": vision,
        "downsample_ratio": 1 / shuffle,
        # transformers' InternVL has but v2.
        "ps_version": "v2" if hf else top.choice("ps_version", versions, "v1"),
        "select_layer": top.integer(
            "vision_feature_layer" if hf else "select_layer", -layers - 1, layers, -1
        ),
        **_parse_tiles(top, processor, vision.image_size if hf else None),
    }


#: Defaults of ``InternVisionConfig`` (internvl_chat), which are InternViT-6B's, and of
#: transformers' ``InternVLVisionConfig``, whose sizes are those of InternViT-300M.
_VISION_DEFAULTS: dict[str, dict[str, Any]] = {
    "internvl_chat": {
        "hidden_size": 3200,
        "intermediate_size": 12800,
        "num_hidden_layers": 48,
        "num_attention_heads": 25,
        "image_size": 224,
        "norm_type": "rms_norm",
        "use_qk_norm": True,
    },
    "internvl": vars(INTERNVIT_300M),
}


def _parse_vision(fields: Fields, default: Mapping[str, Any]) -> VisionConfig:
    """Parse ``vision_config``."""

    def size(name: str, most: int) -> int:
        return fields.integer(name, 1, most, default[name])

    fields.choice("hidden_act", ("gelu",), "gelu")
    vision = VisionConfig(
        hidden_size=size("hidden_size", MAX_HIDDEN_SIZE),
        intermediate_size=size("intermediate_size", MAX_INTERMEDIATE_SIZE),
        num_hidden_layers=size("num_hidden_layers", MAX_LAYERS),
        num_attention_heads=size("num_attention_heads", MAX_HEADS),
        image_size=fields.square("image_size", 1, MAX_IMAGE_SIZE, default["image_size"]),
        patch_size=fields.square("patch_size", 1, MAX_IMAGE_SIZE, 14),
        norm_type=fields.choice("norm_type", ("layer_norm", "rms_norm"), default["norm_type"]),
        layer_norm_eps=fields.number("layer_norm_eps", 0, 1, 1e-6),
        # The layouts differ in two names.
        qkv_bias=fields.flag(fields.first("qkv_bias", "attention_bias"), False),
        use_qk_norm=fields.flag(
            fields.first("qk_normalization", "use_qk_norm"), default["use_qk_norm"]
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
    fields.choice("hidden_act", ("silu", "swish"), "silu")  # the same in transformers
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
    positions = fields.integer(
        "max_position_embeddings", 1, MAX_POSITIONS, 2048 if llama else 32768
    )
    if not llama:
        _refuse_sliding_window(fields, layers, positions)
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


def _refuse_sliding_window(fields: Fields, layers: int, positions: int) -> None:
    """Refuse attention windows; Qwen configurations name them without using them."""
    types = fields.values.get("layer_types")
    if types is not None:
        if not isinstance(types, list) or any(kind != "full_attention" for kind in types[:layers]):
            raise fields.error("layer_types", "has layers other than full_attention: not supported")
    elif (
        fields.flag("use_sliding_window", False)
        and fields.has("sliding_window")
        and fields.number("sliding_window", 0, math.inf) < positions
        and fields.integer("max_window_layers", 0, MAX_POSITIONS, 28) < layers
    ):
        raise fields.error("use_sliding_window", "is true, which is not supported")


def _parse_rope(fields: Fields, positions: int) -> tuple[float, dict[str, Any] | None]:
    """Return theta and scaling, from ``rope_parameters`` (transformers 5) or the older fields."""
    rope = fields.fields(fields.first("rope_scaling", "rope_parameters"), {})
    theta = (rope if rope.has("rope_theta") else fields).number("rope_theta", 1, 1e12, 10_000.0)
    if rope.number("partial_rotary_factor", 0, 1, 1.0) != 1.0:
        raise rope.error("partial_rotary_factor", "is not 1, which is not supported")
    kinds = ("default", "linear", "llama3", "dynamic")
    kind = rope.choice(rope.first("rope_type", "type"), kinds, "default")
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
) -> tuple[GPTQConfig, ...]:
    """Return how weights are quantized, from whichever place says so."""
    if top.has("quantization_config"):
        fields = top.fields("quantization_config")
    elif text.has("quantization_config"):
        fields = text.fields("quantization_config")
    elif quantize is not None:
        fields = Fields(quantize, "quantize_config.json")
    else:
        return ()
    method = fields.text("quant_method", "gptq").lower()
    if method in ("auto-round", "auto_round", "intel/auto-round"):
        # What AutoRound calls auto_gptq stores zero points minus one, the others do not.
        kinds: dict[str, GPTQFormat] = {
            "auto_round:auto_gptq": "gptq",
            "auto_round": "gptq_v2",
            "auto_round:gptqmodel": "gptq_v2",
        }
        stored = kinds[fields.choice("packing_format", tuple(kinds))]
    elif method == "gptq":
        # GPTQModel also writes `format`, the newer name of the field.
        formats: tuple[GPTQFormat, ...] = ("gptq", "gptq_v2")
        stored = fields.choice(fields.first("checkpoint_format", "format"), formats, "gptq")
    else:
        raise fields.error(
            "quant_method",
            f"is {shown(method)}; supported: gptq, auto-round in GPTQ's format (or take the "
            "checkpoint that is not quantized, and make INT4 of it with `edgevl quantize`)",
        )
    for name in ("rotation", "rotation_config"):
        if fields.values.get(name):  # activations would be rotated too, as nothing stored tells
            raise fields.error(name, f"is {shown(fields.values[name])}: not supported")
    return _named_settings(fields, stored)


def _named_settings(fields: Fields, stored: GPTQFormat) -> tuple[GPTQConfig, ...]:
    """Return the settings for all layers, then those that GPTQModel or AutoRound have for some.

    Which layers, they say with regular expressions. Those are not evaluated: they come with the
    file, Python's have no limit of time, and what they chose shows in the tensors' shapes. So a
    setting is looked at where there is a layer that has it.
    """

    def setting(values: Fields, bits: int, group_size: int) -> GPTQConfig:
        return GPTQConfig(
            values.integer("bits", 1, 32, bits),
            values.integer("group_size", -1, MAX_INTERMEDIATE_SIZE, group_size),
            stored,
        )

    top = setting(fields, 4, 128)  # the defaults of GPTQModel
    named = {top: None}
    for name in ("dynamic", "extra_config"):
        rules = fields.values.get(name)
        for rule in rules.values() if isinstance(rules, dict) else ():
            if isinstance(rule, dict):
                with contextlib.suppress(CheckpointError):
                    named[setting(Fields(rule, ""), top.bits, top.group_size)] = None
    return tuple(named)


def _parse_vision_keep(top: Fields, config: ModelConfig) -> tuple[str, ...] | None:
    """Return what ``edgevl_quantization``, written by `edgevl quantize`, keeps in bfloat16.

    That is None where it says nothing of vision.
    """
    quantization = top.fields("edgevl_quantization", {})
    if not quantization.has("vision"):
        return None
    fields = quantization.fields("vision")
    fields.choice("format", ("int8",), "int8")
    if not fields.has("keep"):
        return ()
    names, known = fields.values["keep"], set(vision_linears(config))
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


def _parse_tiles(top: Fields, processor: Fields, processed_size: int | None) -> dict[str, Any]:
    """Return the image settings of ``ModelConfig``.

    ``config.json`` of the internvl_chat layout has them; the HF layout keeps them with the image
    processor, in transformers 5 inside ``image_processor``. That one has to scale tiles to
    ``processed_size``; None where what it says of that is not used.
    """
    if processor.has("image_processor"):
        processor = processor.fields("image_processor")

    # `crop_to_patches` is not looked at: transformers' InternVLProcessor sets it whatever the
    # file says, and the published files say false.
    def tiles(name: str, processor_name: str, default: int) -> int:
        if top.has(name):
            return top.integer(name, 1, MAX_TILES)
        return processor.integer(processor_name, 1, MAX_TILES, default)

    minimum = tiles("min_dynamic_patch", "min_patches", 1)
    maximum = tiles("max_dynamic_patch", "max_patches", 12)
    if minimum > maximum:
        raise top.error("min_dynamic_patch", f"is {minimum}, more than the maximum {maximum}")
    size = processor.values.get("size")
    if processed_size is not None and isinstance(size, dict) and "height" in size:
        sizes = processor.fields("size")
        for side in ("height", "width"):
            value = sizes.integer(side, 1, MAX_IMAGE_SIZE)
            if value != processed_size:
                raise sizes.error(
                    side, f"is {value} but vision_config has image_size {processed_size}"
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


def parse_sampling(
    generation: Mapping[str, Any],
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Read the defaults of sampling from ``generation_config.json``.

    As in transformers, a model is greedy whatever the temperature, unless ``do_sample`` is true;
    then the temperature is 1 where there is none. But what transformers adds to a file that does
    not say it (``top_k`` 50) is left out, as vLLM does.

    Returns:
        Values by the names of `SamplingOptions`, and what is wrong with others. These are as if
        they were not there: no answer is lost for them, and each question may have its own.
    """
    values = {name: generation.get(name) for name, each in OPTIONS.items() if each.from_checkpoint}
    if generation.get("do_sample") not in (True, 1):
        values["temperature"] = None
    elif values["temperature"] is None:
        values["temperature"] = 1.0
    sampling: dict[str, Any] = {}
    ignored: list[str] = []
    for name, value in values.items():
        if value is None:
            continue
        if isinstance(value, float) and value.is_integer():
            value = int(value)  # "top_k": 50.0
        try:
            sampling[name] = OPTIONS[name].check(value)
        except PromptError as error:
            ignored.append(f"generation_config.json: {error}; it is ignored")
    return sampling, tuple(ignored)


def _parse_eos(top: Fields, text: Fields, generation: Fields) -> tuple[int, ...]:
    """Return every ``eos_token_id`` of the three places, in order, each once.

    Those that no token can have, such as -1, mean none.
    """
    found: list[int] = []
    for fields in (generation, top, text):
        value = fields.values.get("eos_token_id")
        values = value if isinstance(value, list) else [] if value is None else [value]
        if len(values) > 256:
            raise fields.error("eos_token_id", f"lists {len(values)} ids, expected at most 256")
        for item in values:
            token = Fields({"eos_token_id": item}, fields.where)
            found.append(token.integer("eos_token_id", -math.inf, math.inf))
    return tuple(dict.fromkeys(item for item in found if 0 <= item < MAX_VOCAB_SIZE))
