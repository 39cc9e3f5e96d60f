"""Names of tensors: the canonical ones, and what each layout calls them on disk.

Canonical are the names of the ``internvl_chat`` layout. Linear weights are [out, in].
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from edgevl.checkpoint.config import ModelConfig, TextConfig, VisionConfig

VISION = "vision_model."
PROJECTOR = "mlp1."
TEXT = "language_model.model."
EMBEDDING = TEXT + "embed_tokens.weight"
LM_HEAD = "language_model.lm_head.weight"

_T = TypeVar("_T")
_D = TypeVar("_D")


def expected_tensors(config: ModelConfig, vision: bool = True) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of a model, by canonical name.

    Args:
        config: the model's configuration.
        vision: whether to list the vision encoder and the projector too.
    """
    tensors: dict[str, tuple[int, ...]] = {}
    if vision:
        tensors.update(_vision_tensors(config.vision))
        tensors.update(_projector_tensors(config))
    tensors.update(_text_tensors(config.text))
    return tensors


def vision_linears(layers: int) -> list[str]:
    """Return the weights of the linear layers of vision encoder and projector, in order.

    The patch embedding, a convolution, is not among them.
    """
    parts = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    encoder = [
        f"{VISION}encoder.layers.{layer}.{part}.weight" for layer in range(layers) for part in parts
    ]
    return [*encoder, PROJECTOR + "1.weight", PROJECTOR + "3.weight"]


def _linear(
    name: str, outputs: int, inputs: int, bias: bool
) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield name + ".weight", (outputs, inputs)
    if bias:
        yield name + ".bias", (outputs,)


def _vision_tensors(vision: VisionConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, patch = vision.hidden_size, vision.patch_size
    embeddings = VISION + "embeddings."
    yield embeddings + "class_embedding", (1, 1, hidden)
    yield embeddings + "patch_embedding.weight", (hidden, 3, patch, patch)
    yield embeddings + "patch_embedding.bias", (hidden,)
    yield embeddings + "position_embedding", (1, 1 + vision.num_patches, hidden)
    for index in range(vision.num_hidden_layers):
        layer = f"{VISION}encoder.layers.{index}."
        for norm in ("norm1", "norm2"):
            yield f"{layer}{norm}.weight", (hidden,)
            if vision.norm_type == "layer_norm":
                yield f"{layer}{norm}.bias", (hidden,)
        yield from _linear(layer + "attn.qkv", 3 * hidden, hidden, vision.qkv_bias)
        if vision.use_qk_norm:
            # Over all heads at once, not per head as in Qwen3.
            yield layer + "attn.q_norm.weight", (hidden,)
            yield layer + "attn.k_norm.weight", (hidden,)
        yield from _linear(layer + "attn.proj", hidden, hidden, True)
        yield from _linear(layer + "mlp.fc1", vision.intermediate_size, hidden, True)
        yield from _linear(layer + "mlp.fc2", hidden, vision.intermediate_size, True)
        yield layer + "ls1", (hidden,)
        yield layer + "ls2", (hidden,)


def _projector_tensors(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    merged, hidden = config.vision.hidden_size * config.shuffle**2, config.text.hidden_size
    yield PROJECTOR + "0.weight", (merged,)
    yield PROJECTOR + "0.bias", (merged,)
    yield from _linear(PROJECTOR + "1", hidden, merged, True)
    yield from _linear(PROJECTOR + "3", hidden, hidden, True)


def _text_tensors(text: TextConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, head_dim = text.hidden_size, text.head_dim
    queries, keys = text.num_attention_heads * head_dim, text.num_key_value_heads * head_dim
    yield EMBEDDING, (text.vocab_size, hidden)
    for index in range(text.num_hidden_layers):
        layer = f"{TEXT}layers.{index}."
        yield layer + "input_layernorm.weight", (hidden,)
        attention = layer + "self_attn."
        yield from _linear(attention + "q_proj", queries, hidden, text.attention_bias)
        yield from _linear(attention + "k_proj", keys, hidden, text.attention_bias)
        yield from _linear(attention + "v_proj", keys, hidden, text.attention_bias)
        if text.use_qk_norm:
            yield attention + "q_norm.weight", (head_dim,)
            yield attention + "k_norm.weight", (head_dim,)
        yield from _linear(attention + "o_proj", hidden, queries, text.attention_output_bias)
        yield layer + "post_attention_layernorm.weight", (hidden,)
        yield from _linear(layer + "mlp.gate_proj", text.intermediate_size, hidden, text.mlp_bias)
        yield from _linear(layer + "mlp.up_proj", text.intermediate_size, hidden, text.mlp_bias)
        yield from _linear(layer + "mlp.down_proj", hidden, text.intermediate_size, text.mlp_bias)
    yield TEXT + "norm.weight", (hidden,)
    if not text.tie_word_embeddings:
        yield LM_HEAD, (text.vocab_size, hidden)


#: Where the text model's tensors may be, most specific first: internvl_chat and older HF files;
#: transformers 5; a text model alone.
_TEXT_PREFIXES = (
    TEXT,
    "model.language_model.model.",
    "model.language_model.",
    "language_model.",
    "model.",
)
_LM_HEADS = (
    LM_HEAD,
    "lm_head.weight",
    "model.language_model.lm_head.weight",
    "model.lm_head.weight",
)

#: Canonical parts of vision and projector names, and what the HF layout calls them.
_HF_NAMES = (
    ("embeddings.class_embedding", "embeddings.cls_token"),
    ("embeddings.patch_embedding.", "embeddings.patch_embeddings.projection."),
    ("embeddings.position_embedding", "embeddings.position_embeddings"),
    ("encoder.layers.", "encoder.layer."),
    (".attn.proj.", ".attention.projection_layer."),
    (".attn.", ".attention."),
    (".norm1.", ".layernorm_before."),
    (".norm2.", ".layernorm_after."),
    (".ls1", ".lambda_1"),
    (".ls2", ".lambda_2"),
    ("mlp1.0.", "layer_norm."),
    ("mlp1.1.", "linear_1."),
    ("mlp1.3.", "linear_2."),
)


#: Beginnings of names in HF files, and what transformers 5 has instead.
_TRANSFORMERS_PREFIXES = (
    ("language_model.model.", "model.language_model."),
    ("language_model.lm_head.", "lm_head."),
    ("vision_tower.", "model.vision_tower."),
    ("multi_modal_projector.", "model.multi_modal_projector."),
)


def hf_names(name: str) -> tuple[str, ...]:
    """Return what the HF layout calls a canonical tensor: three names for a fused q, k, v."""
    if name == LM_HEAD or name.startswith(TEXT):
        return (name,)
    for canonical, stored in _HF_NAMES:
        name = name.replace(canonical, stored)
    if name.startswith(VISION):
        name = f"vision_tower.{name[len(VISION) :]}"
    else:
        name = f"multi_modal_projector.{name}"
    if ".attention.qkv." in name:
        return tuple(name.replace("qkv", f"{part}_proj") for part in "qkv")
    return (name,)


def transformers_name(name: str) -> str:
    """Return what transformers 5 itself calls a tensor of the HF layout, whose files are older.

    transformers reads both; GPTQModel reads quantized weights by this name only.
    """
    for old, new in _TRANSFORMERS_PREFIXES:
        if name.startswith(old):
            return new + name[len(old) :]
    return name


class StoredNames:
    """Finds out how a checkpoint names its tensors, and translates canonical names to that.

    Each of the text model, the vision encoder and the projector is looked for where any of the
    layouts puts it, whatever the configuration calls itself: conversion tools mix them.

    Args:
        stored: the names of all tensors on disk.
    """

    def __init__(self, stored: Collection[str]) -> None:
        def there(weight: str) -> bool:  # plain, or the integers of GPTQ
            return weight in stored or weight.removesuffix("weight") + "qweight" in stored

        self._text = _first(
            _TEXT_PREFIXES, lambda prefix: there(prefix + "embed_tokens.weight"), TEXT
        )
        self._head = _first(_LM_HEADS, there, "")
        #: Whether the output projection is stored, and so not tied to the embedding.
        self.has_head = bool(self._head)
        chat = _first(
            ("", "model."), lambda lead: f"{lead}{VISION}embeddings.class_embedding" in stored, None
        )
        hf = _first(
            ("", "model."), lambda lead: f"{lead}vision_tower.embeddings.cls_token" in stored, None
        )
        #: Whether the vision encoder is stored.
        self.has_vision = chat is not None or hf is not None
        #: Whether it is named as in the HF layout.
        self.hf_vision = hf is not None and chat is None
        self._lead = (hf if self.hf_vision else chat) or ""

    def __call__(self, name: str) -> tuple[str, ...]:
        """Return what ``name`` is called on disk: three names where q, k and v are stored apart."""
        if name == LM_HEAD:
            return (self._head or LM_HEAD,)
        if name.startswith(TEXT):
            return (self._text + name[len(TEXT) :],)
        if not self.hf_vision:
            return (self._lead + name,)
        return tuple(self._lead + stored for stored in hf_names(name))


def _first(candidates: Iterable[_T], matches: Callable[[_T], bool], default: _T | _D) -> _T | _D:
    """Return the first candidate that matches."""
    return next((candidate for candidate in candidates if matches(candidate)), default)
