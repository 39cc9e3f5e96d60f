"""What a model is made of, and what files call it.

One table for each of decoder, vision encoder and projector lists linear layers and vectors in the
order of their tensors, each with its canonical name, its sizes, and what the native engine calls
it. What a file has to contain, the packed matrices and the vectors beside them, and the layers that
are quantized are read off these tables.

Canonical names are those of the ``internvl_chat`` layout; `StoredNames` knows those of the others.
Linear weights are [out, in].
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

from edgevl.checkpoint.config import ModelConfig, TextConfig, VisionConfig

VISION = "vision_model."
PROJECTOR = "mlp1."
TEXT = "language_model.model."
EMBEDDING = TEXT + "embed_tokens.weight"
LM_HEAD = "language_model.lm_head.weight"

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Linear:
    """A linear layer.

    Attributes:
        name: canonical, without ``.weight``.
        outputs: rows of its weight.
        inputs: columns of its weight.
        bias: whether it has one.
        kernel: of a convolution, how its columns are stored: channels, height, width.
    """

    name: str
    outputs: int
    inputs: int
    bias: bool = False
    kernel: Shape = ()

    @property
    def weight(self) -> str:
        """The name of its weight."""
        return self.name + ".weight"

    def tensors(self) -> Iterator[tuple[str, Shape]]:
        """Yield name and shape of its weight and its bias."""
        yield self.weight, (self.outputs, *(self.kernel or (self.inputs,)))
        if self.bias:
            yield self.name + ".bias", (self.outputs,)


@dataclass(frozen=True)
class Matrix:
    """Linear layers with the same input, which the native engine multiplies with at once.

    Attributes:
        native: what it is called there; its bias has ``_bias`` after it.
        linears: all with a bias or none.
        alternate: whether the layers' rows alternate, panel by panel, instead of one layer's
            coming after the other's.
    """

    native: str
    linears: tuple[Linear, ...]
    alternate: bool = False

    def tensors(self) -> Iterator[tuple[str, Shape]]:
        """Yield name and shape of every tensor."""
        for linear in self.linears:
            yield from linear.tensors()


@dataclass(frozen=True)
class Vector:
    """A norm, a scale or an embedding of places, used as it is stored."""

    native: str
    name: str
    shape: Shape

    def tensors(self) -> Iterator[tuple[str, Shape]]:
        """Yield its name and shape."""
        yield self.name, self.shape


Component = Matrix | Vector


def expected_tensors(config: ModelConfig, vision: bool = True) -> dict[str, Shape]:
    """Return the shape of every tensor of a model, by canonical name.

    Args:
        config: the model's configuration.
        vision: whether to list the vision encoder and the projector too.
    """
    components = vision_components(config) if vision else []
    tensors = dict(tensor for component in components for tensor in component.tensors())
    tensors[EMBEDDING] = (config.text.vocab_size, config.text.hidden_size)
    for component in text_components(config.text):
        tensors.update(component.tensors())
    return tensors


def matrices(components: Iterable[Component]) -> Iterator[Matrix]:
    """Yield the matrices among them."""
    return (component for component in components if isinstance(component, Matrix))


def vision_linears(config: ModelConfig, layers: int | None = None) -> list[str]:
    """Return the weights of the linear layers of vision encoder and projector, in order.

    The patch embedding, a convolution, is not among them.

    Args:
        config: the model's configuration.
        layers: how many layers of the encoder to list, by default all.
    """
    linears = (m.linears[0] for m in matrices(vision_components(config, layers)))
    return [linear.weight for linear in linears if not linear.kernel]


def vision_layers(config: ModelConfig) -> int:
    """Return how many layers of the vision encoder run: those up to ``select_layer``."""
    return range(config.vision.num_hidden_layers + 1)[config.select_layer]


def head_weight(text: TextConfig) -> str:
    """Return the name of the output layer's weight: that of the embedding where they are tied."""
    return EMBEDDING if text.tie_word_embeddings else LM_HEAD


def vision_components(config: ModelConfig, layers: int | None = None) -> list[Component]:
    """Return the table of the vision encoder, with all or so many layers, and the projector."""
    vision, text_hidden = config.vision, config.text.hidden_size
    hidden, patch, places = vision.hidden_size, vision.patch_size, 1 + vision.num_patches
    embeddings, kernel = VISION + "embeddings.", (3, patch, patch)
    patches = Linear(embeddings + "patch_embedding", hidden, 3 * patch**2, True, kernel)
    components: list[Component] = [
        Vector("class_embedding", embeddings + "class_embedding", (1, 1, hidden)),
        Matrix("patch", (patches,)),
        Vector("position_embedding", embeddings + "position_embedding", (1, places, hidden)),
    ]
    for index in range(vision.num_hidden_layers if layers is None else layers):
        components += _vision_layer(vision, f"{VISION}encoder.layers.{index}.", f"layers.{index}.")
    merged = hidden * config.shuffle**2
    return [
        *components,
        Vector("projector.norm", PROJECTOR + "0.weight", (merged,)),
        Vector("projector.norm_bias", PROJECTOR + "0.bias", (merged,)),
        Matrix("projector.fc1", (Linear(PROJECTOR + "1", text_hidden, merged, True),)),
        Matrix("projector.fc2", (Linear(PROJECTOR + "3", text_hidden, text_hidden, True),)),
    ]


def _vision_layer(vision: VisionConfig, name: str, native: str) -> Iterator[Component]:
    hidden, intermediate = vision.hidden_size, vision.intermediate_size

    def linear(part: str, outputs: int, inputs: int, bias: bool = True) -> Matrix:
        return Matrix(
            native + part.rpartition(".")[2], (Linear(name + part, outputs, inputs, bias),)
        )

    def vector(called: str, part: str) -> Vector:
        return Vector(native + called, name + part, (hidden,))

    for norm in ("norm1", "norm2"):
        yield vector(norm, norm + ".weight")
        if vision.norm_type == "layer_norm":
            yield vector(norm + "_bias", norm + ".bias")
    yield linear("attn.qkv", 3 * hidden, hidden, vision.qkv_bias)
    if vision.use_qk_norm:
        # Over all heads at once, not per head as in Qwen3.
        yield vector("q_norm", "attn.q_norm.weight")
        yield vector("k_norm", "attn.k_norm.weight")
    yield linear("attn.proj", hidden, hidden)
    yield linear("mlp.fc1", intermediate, hidden)
    yield linear("mlp.fc2", hidden, intermediate)
    yield vector("ls1", "ls1")
    yield vector("ls2", "ls2")


def text_components(text: TextConfig) -> list[Component]:
    """Return the table of the decoder: its layers, the last norm and the output layer."""
    components: list[Component] = []
    for index in range(text.num_hidden_layers):
        components += text_layer(text, f"{TEXT}layers.{index}.", f"layers.{index}.")
    head = head_weight(text).removesuffix(".weight")
    return [
        *components,
        Vector("norm", TEXT + "norm.weight", (text.hidden_size,)),
        Matrix("head", (Linear(head, text.vocab_size, text.hidden_size),)),
    ]


def text_layer(text: TextConfig, name: str = "", native: str = "") -> list[Component]:
    """Return the table of a decoder layer, whose names begin with ``name`` and ``native``."""
    hidden, intermediate, head_dim = text.hidden_size, text.intermediate_size, text.head_dim
    queries, keys = text.num_attention_heads * head_dim, text.num_key_value_heads * head_dim
    attention, mlp = name + "self_attn.", name + "mlp."
    qkv = tuple(
        Linear(f"{attention}{part}_proj", outputs, hidden, text.attention_bias)
        for part, outputs in (("q", queries), ("k", keys), ("v", keys))
    )
    gate_up = tuple(
        Linear(f"{mlp}{part}_proj", intermediate, hidden, text.mlp_bias) for part in ("gate", "up")
    )
    output = Linear(attention + "o_proj", hidden, queries, text.attention_output_bias)
    down = Linear(mlp + "down_proj", hidden, intermediate, text.mlp_bias)
    norms = [
        Vector(f"{native}{part}_norm", f"{attention}{part}_norm.weight", (head_dim,))
        for part in ("q", "k")
        if text.use_qk_norm
    ]
    return [
        Vector(native + "input_norm", name + "input_layernorm.weight", (hidden,)),
        Matrix(native + "qkv", qkv),
        *norms,
        Matrix(native + "o", (output,)),
        Vector(native + "post_norm", name + "post_attention_layernorm.weight", (hidden,)),
        Matrix(native + "gate_up", gate_up, alternate=True),
        Matrix(native + "down", (down,)),
    ]


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

        texts = (name for name in _TEXT_PREFIXES if there(name + "embed_tokens.weight"))
        self._text = next(texts, TEXT)
        self._head = next(filter(there, _LM_HEADS), "")
        #: Whether the output projection is stored, and so not tied to the embedding.
        self.has_head = bool(self._head)
        firsts = (VISION + "embeddings.class_embedding", "vision_tower.embeddings.cls_token")
        visions = [
            (lead, first) for first in firsts for lead in ("", "model.") if lead + first in stored
        ]
        #: Whether the vision encoder is stored.
        self.has_vision = bool(visions)
        self._lead, first = visions[0] if visions else ("", firsts[0])
        #: Whether it is named as in the HF layout.
        self.hf_vision = first == firsts[1]

    def __call__(self, name: str) -> tuple[str, ...]:
        """Return what ``name`` is called on disk: three names where q, k and v are stored apart."""
        if name == LM_HEAD:
            return (self._head or LM_HEAD,)
        if name.startswith(TEXT):
            return (self._text + name[len(TEXT) :],)
        if not self.hf_vision:
            return (self._lead + name,)
        return tuple(self._lead + stored for stored in hf_names(name))
