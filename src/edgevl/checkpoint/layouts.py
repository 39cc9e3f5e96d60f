"""What each layout calls tensors on disk; the canonical names are in `architecture`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import TypeVar

from edgevl.checkpoint.architecture import LM_HEAD, TEXT, VISION

_T = TypeVar("_T")
_D = TypeVar("_D")

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
