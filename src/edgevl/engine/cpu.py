"""The native engine: the model in packed weights, a step of it in one call.

`CpuModel` has the weights; each `CpuEngine` is a sequence with a cache of its own, and several can
be decoded together.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace

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
from edgevl.engine.base import (
    KV_CACHE_FORMATS,
    BatchedEngine,
    EngineTimings,
    Floats,
    KVCacheFormat,
    WeightBytes,
)
from edgevl.engine.packed import convertible, pack_in_memory, packed_bytes, packed_matrices
from edgevl.engine.plan import PANEL, PackingPlan, Precision, make_plan
from edgevl.engine.reference import PROJECTOR_NORM_EPS, inverse_frequencies
from edgevl.errors import CheckpointError, EdgeVLError
from edgevl.machine import this_machine, trim_heap

#: Positions computed at once by default.
CHUNK = 128
#: A longer prefill is cut into calls of this many positions, so that Ctrl-C is heard between them.
INTERRUPTIBLE = 1024
#: Most drafted tokens of a step: with the token before them they fill whole matrix tiles, of 12
#: tokens or of 6 or 4 as the instruction set has it. One more would begin another tile.
MAX_DRAFT = 11


class CpuModel:
    """The weights of a model, packed, with the threads that compute it.

    One call at a time: who shares a model among threads lets them take turns. Logits are views
    that the model's next call overwrites.

    Attributes:
        config: of the model.
        plan: the format of every matrix.
        max_context: most positions of one sequence.
        chunk: positions computed at once by a prefill.
        threads: how many compute.
        instruction_set: one of `edgevl._native.instruction_sets`.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        max_context: int | None = None,
        chunk: int = CHUNK,
        *,
        precision: Precision = "auto",
        threads: int | None = None,
        kv_cache: KVCacheFormat = "bf16",
        exact_logits: bool = False,
        cache: bool = True,
        isa: str = "",
    ) -> None:
        """Pack the weights of ``checkpoint``, or map them from its cache.

        Args:
            checkpoint: an open checkpoint; when it is closed, the files with the embedding and
                the exact head stay open here, as rows of these are read when they are used.
            max_context: most positions of one sequence; default and limit is what the model was
                trained for. Memory follows use.
            chunk: positions computed at once by a prefill.
            precision: see `make_plan`.
            threads: how many compute; default is one for each physical core that may be used.
            kv_cache: how keys and values are stored. ``int8`` takes half the memory of ``bf16``,
                and a long context is read in less time.
            exact_logits: compute the logits of all tokens as well as those of the best, slower and
                with more memory: see `make_plan`. Weights are packed anew, the cache is left alone.
            cache: map the weights from the file beside the checkpoint, or leave it there; without,
                they are packed in memory.
            isa: instruction set; default is the environment's ``EDGEVL_ISA``, or else the best.

        Raises:
            EdgeVLError: the machine has less memory to spare than the weights take, or an argument
                is not one of its choices.
            CheckpointError: the quantization of a weight is damaged.
        """
        config = self.config = checkpoint.config
        self.instruction_set = instruction_set(isa)
        machine = this_machine()
        self.threads = machine.threads if threads is None else threads
        if not 1 <= self.threads <= MAX_THREADS:
            raise EdgeVLError(f"threads is {threads}: it must be from 1 to {MAX_THREADS}")
        if kv_cache not in KV_CACHE_FORMATS:
            raise EdgeVLError(
                f"kv_cache {kv_cache!r} is unknown: choose {', '.join(KV_CACHE_FORMATS)}"
            )
        limit = config.text.max_position_embeddings
        self.max_context = min(max_context or limit, limit)
        self.chunk = min(chunk, self.max_context)
        self.plan = make_plan(checkpoint, precision, exact_logits)
        check_memory(checkpoint, self.plan, precision, machine.available_bytes)
        self._team = _native.Team(self.threads)
        tensors = stored_tensors(checkpoint, self.plan)
        # Before the weights come, so that the two do not add up: parsing a large tokenizer.json
        # leaves 100 MB of free memory behind that malloc would keep.
        checkpoint.release()
        trim_heap()
        if cache and not exact_logits:  # a second file would not be worth its disk
            packed = packed_matrices(checkpoint, self.plan, precision, self._team)
        else:
            packed = pack_in_memory(checkpoint, self.plan, self._team)
        for matrix in self.plan.matrices:
            model, _, name = matrix.name.partition(".")
            data = packed[matrix.name]
            tensors[model][name] = (matrix.format, matrix.rows, matrix.cols, matrix.group, data)
        self.decoder = _native.Decoder(
            decoder_config(checkpoint, self.max_context, self.chunk, kv_cache),
            tensors["text"],
            self._team,
            self.instruction_set,
        )
        self.vision: _native.VisionEncoder | None = None
        if checkpoint.has_vision:
            self.vision = _native.VisionEncoder(
                vision_config(checkpoint), tensors["vision"], self._team, self.instruction_set
            )
        self.path = checkpoint.path
        self._weight_bytes = weight_bytes(checkpoint, self.plan, kv_cache)

    def engine(self) -> CpuEngine:
        """Return a new sequence."""
        return CpuEngine(self)

    def decode(self, engines: Sequence[CpuEngine], token_ids: Sequence[int]) -> Floats:
        """Append one token to each of B different sequences: -> logits float32 [B, V].

        The weights are read once for all of them.

        Raises:
            ValueError: a sequence is of another model, occurs twice or is full, or there is no
                such token.
        """
        start = time.perf_counter()
        logits = self.decoder.decode([engine.cache for engine in engines], list(token_ids))
        elapsed_ms = (time.perf_counter() - start) * 1000
        for engine in engines:
            engine.count(decode_ms=elapsed_ms / len(engines), decode_tokens=1)
        return logits

    def weight_bytes(self) -> WeightBytes:
        """Return what the weights take; of the embedding, only used rows are read."""
        return self._weight_bytes


class CpuEngine(BatchedEngine):
    """One sequence of a `CpuModel`."""

    max_draft = MAX_DRAFT

    def __init__(self, model: CpuModel) -> None:
        """Start an empty sequence."""
        self.model = model
        self.config = model.config
        self.max_context = model.max_context
        self.chunk = model.chunk
        self.threads = model.threads
        self.notes = model.plan.notes
        self.length = 0
        self.cache = model.decoder.new_cache()
        self._timings = EngineTimings()

    def encode_images(self, pixels: Floats) -> Floats:
        """Encode tiles one by one: float32 [B, 3, tile, tile] -> [B, image_tokens, H]."""
        vision = self.model.vision
        if vision is None:
            raise CheckpointError(f"{self.model.path}: no vision encoder, it answers text only")
        start = time.perf_counter()
        pixels = np.ascontiguousarray(pixels, np.float32)
        features = np.concatenate([vision.encode(tile[None]) for tile in pixels])
        self.count(vision_ms=(time.perf_counter() - start) * 1000, tiles=len(pixels))
        return features

    def embed(self, token_ids: NDArray[np.int64]) -> Floats:
        """Look up token embeddings: int [T] -> float32 [T, H]."""
        return self.model.decoder.embed(np.ascontiguousarray(token_ids, np.int64))

    def prefill(self, embeddings: Floats, at: int) -> Floats:
        """Append T embeddings at position ``at``: [T, H] -> last logits [V]."""
        if at != self.length or len(embeddings) == 0:
            raise ValueError(f"prefill of {len(embeddings)} at {at}, but {self.length} are cached")
        self._check_room(len(embeddings))
        start = time.perf_counter()
        embeddings = np.ascontiguousarray(embeddings, np.float32)
        step = max(INTERRUPTIBLE // self.chunk, 1) * self.chunk
        for begin in range(0, len(embeddings), step):
            logits = self.model.decoder.prefill(self.cache, embeddings[begin : begin + step])
            self.length = self.cache.length
        elapsed_ms = (time.perf_counter() - start) * 1000
        self.count(prefill_ms=elapsed_ms, prefill_tokens=len(embeddings))
        return logits

    def decode(self, token_id: int) -> Floats:
        """Append one token: -> its logits float32 [V]."""
        self._check_room(1)
        return self.model.decode([self], [token_id])[0]

    def extend(self, token_ids: Sequence[int]) -> Floats:
        """Append T tokens: -> the logits after each, float32 [T, V]."""
        self._check_room(len(token_ids))
        start = time.perf_counter()
        logits = self.model.decoder.extend(self.cache, np.array(token_ids, np.int64))
        elapsed_ms = (time.perf_counter() - start) * 1000
        self.count(decode_ms=elapsed_ms, decode_tokens=len(token_ids))
        return logits

    def new_sequence(self) -> CpuEngine:
        """Return a new, empty sequence of the same model."""
        return CpuEngine(self.model)

    def share(self, other: BatchedEngine, length: int) -> None:
        """Become the first ``length`` positions of ``other``; the memory is shared."""
        self.model.decoder.share(self.cache, native(other).cache, length)
        self.length = length

    def decode_batch(self, others: Sequence[BatchedEngine], token_ids: Sequence[int]) -> Floats:
        """Append one token to this and each of the other sequences: -> logits float32 [B, V]."""
        return self.model.decode([self, *map(native, others)], token_ids)

    def rewind(self, length: int) -> None:
        """Keep the first ``length`` positions of the cache."""
        if not 0 <= length <= self.length:
            raise ValueError(f"rewind to {length}, but {self.length} are cached")
        self.cache.truncate(length)
        self.length = length

    def timings(self) -> EngineTimings:
        """Return the totals so far."""
        return replace(self._timings)

    def weight_bytes(self) -> WeightBytes:
        """Return what the weights take."""
        return self.model.weight_bytes()

    def count(self, **work: float) -> None:
        """Add work that has been done for this sequence to its timings."""
        self.length = self.cache.length
        totals = vars(self._timings)
        for name, amount in work.items():
            totals[name] += amount

    def _check_room(self, tokens: int) -> None:
        if self.length + tokens > self.max_context:
            raise ValueError(f"{self.length} + {tokens} positions exceed {self.max_context}")


def native(engine: BatchedEngine) -> CpuEngine:
    """Return an engine of this kind; raise a ValueError for another."""
    if not isinstance(engine, CpuEngine):
        raise ValueError(f"the sequence is one of a {type(engine).__name__}")
    return engine


#: The most that a team takes.
MAX_THREADS = 256


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


def check_memory(checkpoint: Checkpoint, plan: PackingPlan, precision: str, available: int) -> None:
    """Raise an EdgeVLError if the packed weights exceed the memory that is free."""
    needed = sum(map(packed_bytes, plan.matrices))
    if needed > available:
        mend = "use --precision int4" if precision in ("int8", "bf16") else "use a smaller model"
        raise EdgeVLError(
            f"{checkpoint.path}: the weights need {needed / 2**30:.1f} GiB of memory, "
            f"{available / 2**30:.1f} GiB are free: close other programs, or {mend}"
        )


def weight_bytes(checkpoint: Checkpoint, plan: PackingPlan, kv_cache: KVCacheFormat) -> WeightBytes:
    """Add up the packed matrices, the embedding as it is stored, and a position of the cache."""
    text = checkpoint.config.text
    sizes = {matrix.name: packed_bytes(matrix) for matrix in plan.matrices}
    padded = -(-text.head_dim // 16) * 16
    vector = 2 * padded if kv_cache == "bf16" else padded + 4  # and a float32 scale
    return WeightBytes(
        vision=sum(size for name, size in sizes.items() if name.startswith("vision.")),
        text=sum(size for name, size in sizes.items() if name.startswith("text.")),
        embedding=convertible(checkpoint, EMBEDDING).data.nbytes,
        cache_per_token=2 * vector * text.num_key_value_heads * text.num_hidden_layers,
    )


# --- what the native models are made of ------------------------------------------------------


def decoder_config(
    checkpoint: Checkpoint, max_context: int, chunk: int, kv_cache: KVCacheFormat
) -> dict[str, float | str]:
    """Return the settings that the native decoder asks for."""
    text = checkpoint.config.text
    return {
        "hidden_size": text.hidden_size,
        "intermediate_size": text.intermediate_size,
        "num_hidden_layers": text.num_hidden_layers,
        "num_attention_heads": text.num_attention_heads,
        "num_key_value_heads": text.num_key_value_heads,
        "head_dim": text.head_dim,
        "vocab_size": text.vocab_size,
        "max_context": max_context,
        "chunk": chunk,
        "rms_norm_eps": text.rms_norm_eps,
        "kv_cache": kv_cache,
    }


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
        text["head_exact"] = stored_rows(checkpoint, head_weight(checkpoint.config))
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
    vectors = _vectors(checkpoint, text_components(text))
    return {"inverse_frequencies": inverse_frequencies(text), **vectors}


def vision_vectors(checkpoint: Checkpoint) -> _native.Tensors:
    """Return the vision encoder's and the projector's norms, biases and embeddings."""
    if not checkpoint.has_vision:
        return {}
    config = checkpoint.config
    return _vectors(checkpoint, vision_components(config, vision_layers(config)))


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
