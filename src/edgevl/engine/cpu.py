"""The native engine: the model in packed weights, a step of it in one call."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgevl import _native
from edgevl.checkpoint import Checkpoint
from edgevl.checkpoint.architecture import (
    EMBEDDING,
    Component,
    Matrix,
    Vector,
    head_weight,
    text_components,
    vision_components,
    vision_layers,
)
from edgevl.engine.base import Engine, Floats, Part, Sequence, WeightBytes
from edgevl.engine.kept import Kept
from edgevl.engine.packed import (
    LAYOUT_VERSION,
    cache_directory,
    convertible,
    factor_name,
    is_cached,
    pack_in_memory,
    packed_bytes,
    packed_matrices,
    product_bytes,
)
from edgevl.engine.plan import PANEL, PackingPlan, make_plan
from edgevl.engine.reference import PROJECTOR_NORM_EPS, inverse_frequencies
from edgevl.errors import CheckpointError, EdgeVLError
from edgevl.machine import this_machine, trim_heap
from edgevl.options import MAX_THREADS, KVCacheFormat, LoadOptions

#: Positions computed at once by default.
CHUNK = 128
#: A longer prefill is cut into calls of this many positions, so that Ctrl-C is heard between them.
INTERRUPTIBLE = 1024
#: Most drafted tokens of a step: with the token before them they fill whole matrix tiles, of 12
#: tokens or of 6 or 4 as the instruction set has it. One more would begin another tile.
MAX_DRAFT = 11


class CpuSequence(Sequence):
    """A sequence of a `CpuEngine`; ``cache`` has its keys and values."""

    def __init__(self, cache: _native.Cache) -> None:
        super().__init__()
        self.cache = cache

    def rewind(self, length: int) -> None:
        """Keep the first ``length`` positions and free the memory of the others."""
        super().rewind(length)
        self.cache.truncate(length)


class CpuEngine(Engine):
    """A model in packed weights, with the threads that compute it.

    Sequences decoded together read the weights once; those that begin alike can share memory.

    The weights are packed, or mapped from the cache beside the checkpoint.

    Args:
        checkpoint: an open checkpoint; when it is closed, the files with the embedding and the
            exact head stay open here, as rows of these are read when they are used.
        options: see `edgevl.load`. With ``exact_logits`` weights are packed anew, and the cache is
            left alone.
        chunk: positions computed at once by a prefill.
        isa: instruction set; default is the environment's ``EDGEVL_ISA``, or else the best.

    Attributes:
        config: of the model.
        plan: the format of every matrix.
        instruction_set: one of `edgevl._native.instruction_sets`.

    Raises:
        EdgeVLError: the machine has less memory to spare than the weights take, or ``isa`` is none
            that it runs.
        CheckpointError: the quantization of a weight is damaged.
    """

    max_draft = MAX_DRAFT
    batched = True

    def __init__(
        self,
        checkpoint: Checkpoint,
        options: LoadOptions | None = None,
        *,
        chunk: int = CHUNK,
        isa: str = "",
    ) -> None:
        super().__init__()
        options = options or LoadOptions()
        precision = options.precision
        config = self.config = checkpoint.config
        self.instruction_set = instruction_set(isa)
        machine = this_machine()
        self.threads = options.threads or min(machine.threads, MAX_THREADS)
        limit = config.text.max_position_embeddings
        self.max_context = min(options.max_context or limit, limit)
        self.chunk = min(chunk, self.max_context)
        self.plan = make_plan(checkpoint, precision, options.exact_logits)
        needed = sum(map(packed_bytes, self.plan.matrices))
        if needed > machine.available_bytes:
            large = precision in ("int8", "bf16")
            raise EdgeVLError(
                f"{checkpoint.path}: the weights need {needed / 2**30:.1f} GiB of memory, "
                f"{machine.available_bytes / 2**30:.1f} GiB are free: close other programs, or use "
                f"{'--precision int4' if large else 'a smaller model'}"
            )
        self._pool = _native.ThreadPool(self.threads)
        tensors = stored_tensors(checkpoint, self.plan)
        # Before the weights come, so that the two do not add up: parsing a large tokenizer.json
        # leaves 100 MB of free memory behind that malloc would keep.
        checkpoint.release()
        trim_heap()
        # With exact logits a second file would not be worth its disk.
        cached = options.cache and not options.exact_logits
        if cached and options.keep_bytes and is_cached(self.plan):
            models = kept_models(checkpoint, self.plan, options.kv_cache, self.instruction_set)
            self.kept = Kept(cache_directory(checkpoint) / "kept", options.keep_bytes, models)
        if cached:
            packed = packed_matrices(checkpoint, self.plan, precision, self._pool)
        else:
            packed = pack_in_memory(checkpoint, self.plan, self._pool)
        for matrix in self.plan.matrices:
            model, _, name = matrix.name.partition(".")
            data = packed[matrix.name]
            tensors[model][name] = (matrix.format, matrix.rows, matrix.cols, matrix.group, data)
            if matrix.norm:
                divide_norm(tensors[model], matrix.norm, packed[factor_name(matrix)])
        self.decoder = _native.Decoder(
            decoder_config(checkpoint, self.max_context, self.chunk, options.kv_cache),
            tensors["text"],
            self._pool,
            self.instruction_set,
        )
        self.vision: _native.VisionEncoder | None = None
        if checkpoint.has_vision:
            self.vision = _native.VisionEncoder(
                vision_config(checkpoint), tensors["vision"], self._pool, self.instruction_set
            )
        self.notes = self.plan.notes
        self.path = checkpoint.path
        self._weight_bytes = weight_bytes(checkpoint, self.plan, options.kv_cache)

    def embed(self, token_ids: NDArray[np.int64]) -> Floats:
        """Look up token embeddings: int [T] -> float32 [T, H]."""
        return self.decoder.embed(np.ascontiguousarray(token_ids, np.int64))

    def new_sequence(self) -> CpuSequence:
        """Return a new, empty sequence."""
        return CpuSequence(self.decoder.new_cache())

    def share(self, sequence: Sequence, other: Sequence, length: int) -> None:
        """Make ``sequence`` the first ``length`` positions of ``other``; the memory is shared."""
        assert isinstance(sequence, CpuSequence)
        assert isinstance(other, CpuSequence)
        self.decoder.share(sequence.cache, other.cache, length)
        sequence.length = length

    def save(self, sequence: Sequence, length: int) -> NDArray[np.uint32]:
        """Return the first ``length`` positions of ``sequence`` as they are cached."""
        assert isinstance(sequence, CpuSequence)
        return self.decoder.save(sequence.cache, length)

    def load(self, sequence: Sequence, saved: NDArray[np.uint32], length: int) -> None:
        """Make ``sequence`` the ``length`` positions that `save` gave."""
        assert isinstance(sequence, CpuSequence)
        sequence.rewind(0)  # memory may not suffice for what comes
        self.decoder.load(sequence.cache, saved, length)
        sequence.length = length

    def weight_bytes(self) -> WeightBytes:
        """Return what the weights take; of the embedding, only used rows are read."""
        return self._weight_bytes

    def _encode(self, pixels: Floats) -> Floats:
        if self.vision is None:
            raise CheckpointError(f"{self.path}: no vision encoder, it answers text only")
        return self.vision.encode(np.ascontiguousarray(pixels, np.float32))

    def _prefill(self, sequence: CpuSequence, embeddings: Floats) -> Floats:
        return self._compute([Part(sequence, embeddings, 1)])[0]

    def _decode(self, sequences: list[CpuSequence], token_ids: list[int]) -> Floats:
        pairs = zip(sequences, token_ids, strict=True)
        return self._compute([Part(sequence, [token_id], 1) for sequence, token_id in pairs])

    def _extend(self, sequence: CpuSequence, token_ids: list[int]) -> Floats:
        return self._compute([Part(sequence, token_ids, len(token_ids))])

    def _step(self, parts: list[Part]) -> list[Floats]:
        ends = np.cumsum([part.wanted for part in parts])
        return np.split(self._compute(parts), ends[:-1])

    def _compute(self, parts: list[Part]) -> Floats:
        """Append what the parts say: -> their logits, float32 [wanted, V], one after the other."""
        first, *others = parts
        step = max(INTERRUPTIBLE // self.chunk, 1) * self.chunk
        while len(first.inputs) - step >= max(first.wanted, 1):
            self._compute([Part(first.sequence, first.inputs[:step], 0)])
            first = Part(first.sequence, first.inputs[step:], first.wanted)
        given: list[_native.Part] = []
        for part in [first, *others]:
            assert isinstance(part.sequence, CpuSequence)
            tokens = isinstance(part.inputs, list)
            inputs = np.ascontiguousarray(part.inputs, np.int64 if tokens else np.float32)
            given.append((part.sequence.cache, inputs, part.wanted))
        logits = self.decoder.step(given)
        for part in [first, *others]:
            part.sequence.length += len(part.inputs)
        return logits


def instruction_set(isa: str = "") -> str:
    """Return ``isa``, or the environment's ``EDGEVL_ISA``, or else the best there is.

    Raises:
        EdgeVLError: this processor cannot run it, or there is no such instruction set.
    """
    usable = _native.instruction_sets()
    name = isa or os.environ.get("EDGEVL_ISA", "") or usable[0]
    if name not in usable:
        raise EdgeVLError(
            f"instruction set {name!r} (EDGEVL_ISA): this processor and build run "
            f"{', '.join(usable)}"
        )
    return name


def kept_models(
    checkpoint: Checkpoint, plan: PackingPlan, kv_cache: KVCacheFormat, isa: str
) -> dict[str, str]:
    """Return what features, and cached positions, depend on beside what they are of (see `Kept`).

    That is the weights as they are rounded, the instructions, and the very libraries: sums taken
    in another order, or another layout of the cache, come with others. How weights are rounded is
    partly Python's, which `LAYOUT_VERSION` stands for.
    """
    module = Path(_native.__file__)
    code = hashlib.sha256()
    for path in [module, *sorted(module.parent.glob("libedgevl_*"))]:
        code.update(path.read_bytes())
    common = f"{LAYOUT_VERSION} {checkpoint.fingerprint()} {code.hexdigest()} {isa}"
    vision = [matrix for matrix in plan.matrices if matrix.name.startswith("vision.")]
    return {
        "features": f"{common} {vision}",
        "prefix": f"{common} {plan.matrices} {kv_cache}",
    }


def weight_bytes(checkpoint: Checkpoint, plan: PackingPlan, kv_cache: KVCacheFormat) -> WeightBytes:
    """Add up the packed matrices, the embedding as it is stored, and a position of the cache."""
    text = checkpoint.config.text
    sizes = {matrix.name: product_bytes(matrix) for matrix in plan.matrices}
    padded = -(-text.head_dim // 16) * 16
    vector = 2 * padded if kv_cache == "bf16" else padded + 4  # and a float32 scale
    return WeightBytes(
        vision=sum(size for name, size in sizes.items() if name.startswith("vision.")),
        text=sum(size for name, size in sizes.items() if name.startswith("text.")),
        embedding=convertible(checkpoint, EMBEDDING).data.nbytes,
        lower=sum(map(packed_bytes, plan.matrices)) - sum(sizes.values()),
        cache_per_token=2 * vector * text.num_key_value_heads * text.num_hidden_layers,
    )


# --- what the native models are made of ------------------------------------------------------


# Of `TextConfig`, by the same names.
_DECODER_SIZES = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "vocab_size", "rms_norm_eps",
)  # fmt: skip


def decoder_config(
    checkpoint: Checkpoint, max_context: int, chunk: int, kv_cache: KVCacheFormat
) -> dict[str, float | str]:
    """Return the settings that the native decoder asks for."""
    text = checkpoint.config.text
    own = {name: getattr(text, name) for name in _DECODER_SIZES}
    return own | {"max_context": max_context, "chunk": chunk, "kv_cache": kv_cache}


def vision_config(checkpoint: Checkpoint) -> dict[str, float | str]:
    """Return the sizes that the native vision encoder asks for."""
    config = checkpoint.config
    vision = config.vision
    return {
        "hidden_size": vision.hidden_size,
        "intermediate_size": vision.intermediate_size,
        "num_hidden_layers": vision_layers(config),
        "num_attention_heads": vision.num_attention_heads,
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
        "norm_type": vision.norm_type,
        "norm_eps": vision.layer_norm_eps,
        "downsample": config.shuffle,
        "ps_version": config.ps_version,
        "text_hidden_size": config.text.hidden_size,
        "projector_norm_eps": PROJECTOR_NORM_EPS,
    }


def stored_tensors(checkpoint: Checkpoint, plan: PackingPlan) -> dict[str, _native.Tensors]:
    """Return what is not packed by the names of the native models, under ``text``, ``vision``."""
    text = text_vectors(checkpoint)
    text["embedding"] = stored_rows(checkpoint, EMBEDDING)
    if plan.exact_head:
        text["head_exact"] = stored_rows(checkpoint, head_weight(checkpoint.config.text))
    return {"text": text, "vision": vision_vectors(checkpoint)}


def stored_rows(checkpoint: Checkpoint, name: str) -> _native.Stored | _native.InFile:
    """Return a weight for reading rows: where it lies in its file, if stored as it is needed."""
    place = checkpoint.place(name)
    if place is None or place.dtype == "F64":
        tensor = convertible(checkpoint, name)
        return tensor.dtype, tensor.data
    count, size = checkpoint.shape(name)
    return place.dtype, count, size, place.descriptor, place.offset, os.fsencode(place.path)


def text_vectors(checkpoint: Checkpoint) -> _native.Tensors:
    """Return the decoder's norms and biases."""
    text = checkpoint.config.text
    frequencies = inverse_frequencies(text)
    return {"inverse_frequencies": frequencies, **_vectors(checkpoint, text_components(text))}


def vision_vectors(checkpoint: Checkpoint) -> _native.Tensors:
    """Return the vision encoder's and the projector's norms, biases and embeddings."""
    if not checkpoint.has_vision:
        return {}
    config = checkpoint.config
    return _vectors(checkpoint, vision_components(config, vision_layers(config)))


def divide_norm(vectors: _native.Tensors, norm: str, factor: NDArray[np.floating[Any]]) -> None:
    """Divide a norm, float32 [C], and its bias, if it has one, by the factors of its reader [C]."""
    for name in (norm, norm + "_bias"):
        vector = vectors.get(name)
        if isinstance(vector, np.ndarray):
            vector /= factor


def _vectors(checkpoint: Checkpoint, components: Iterable[Component]) -> _native.Tensors:
    """Return vectors and biases as float32; copies, as a view would keep its file mapped."""
    vectors: _native.Tensors = {}
    for component in components:
        if isinstance(component, Vector):
            values = np.array(checkpoint.tensor(component.name))
            while values.ndim > 1 and len(values) == 1:
                values = values[0]
            vectors[component.native] = values
        elif component.linears[0].bias:
            vectors[component.native + "_bias"] = _bias(checkpoint, component)
    return vectors


def _bias(checkpoint: Checkpoint, matrix: Matrix) -> Floats:
    """Return the biases of a matrix, padded and placed like the rows of its weights."""
    biases = [np.array(checkpoint.tensor(linear.name + ".bias")) for linear in matrix.linears]
    if len(biases) == 1:
        return biases[0]
    panels = [np.pad(bias, (0, -len(bias) % PANEL)).reshape(-1, PANEL) for bias in biases]
    together = np.stack(panels, axis=1) if matrix.alternate else np.concatenate(panels)
    return together.reshape(-1)
