"""The quantized checkpoint: the original's files and layout, with other tensors in them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgevl.checkpoint import Checkpoint, StoredTensor
from edgevl.checkpoint.architecture import EMBEDDING, LM_HEAD, PROJECTOR, VISION, transformers_name
from edgevl.checkpoint.directory import copy_side_files
from edgevl.checkpoint.writer import TensorSpec, encode, raw, running_total, write_safetensors

#: Tensors that take the place of weights: canonical name -> what their names end in -> tensor.
Packed = Mapping[str, Mapping[str, StoredTensor]]


def write_checkpoint(
    checkpoint: Checkpoint,
    directory: Path,
    packed: Packed,
    changed: Mapping[str, NDArray[np.float32]],
    config: Mapping[str, Any],
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> None:
    """Write weights, configuration and side files.

    Args:
        checkpoint: the original.
        directory: where to; it exists and is empty.
        packed: the GPTQ tensors of weights.
        changed: tensors with other values, by canonical name; stored in the original's type.
        config: fields of ``config.json`` that are added or replaced.
        progress: called after each write with the bytes written and those there are.

    Raises:
        OSError: the disk is full, or a file cannot be read.
    """
    sources: dict[str, Callable[[], bytes | memoryview]] = {}
    specs = []
    for name in checkpoint.names():
        for stored, tensor, produce in _tensors(checkpoint, name, packed, changed):
            written = transformers_name(stored) if checkpoint.layout == "internvl" else stored
            specs.append(TensorSpec(written, tensor.dtype, tensor.shape))
            sources[written] = produce

    def pieces(shard: Sequence[TensorSpec]) -> Iterable[bytes | memoryview]:
        for spec in shard:
            yield sources[spec.name]()
            checkpoint.release()

    write_safetensors(directory, specs, pieces, progress=running_total(specs, progress))
    copy_side_files(checkpoint.path, directory)
    fields = {**(checkpoint.read_json("config.json") or {}), **config}
    text = json.dumps(fields, indent=2)
    (directory / "config.json").write_text(text + "\n", encoding="utf-8")


def part_bytes(checkpoint: Checkpoint) -> dict[str, int]:
    """Return what the parts take on disk, in bytes.

    Returns:
        ``text_bytes``, ``vision_bytes`` (with the projector), ``embedding_bytes`` (with the head).
    """
    sizes = {"text_bytes": 0, "vision_bytes": 0, "embedding_bytes": 0}
    for name in checkpoint.names():
        gptq = checkpoint.gptq(name)
        if gptq is not None:
            parts = [gptq.qweight, gptq.qzeros, gptq.scales, gptq.g_idx]
        else:
            parts = list(checkpoint.parts(name).values())
        part = "vision" if name.startswith((VISION, PROJECTOR)) else "text"
        part = "embedding" if name in (EMBEDDING, LM_HEAD) else part
        sizes[f"{part}_bytes"] += sum(each.data.nbytes for each in parts if each is not None)
    return sizes


def _tensors(
    checkpoint: Checkpoint,
    name: str,
    packed: Packed,
    changed: Mapping[str, NDArray[np.float32]],
) -> Iterator[tuple[str, StoredTensor, Callable[[], bytes | memoryview]]]:
    """Yield stored name, type and shape, and what makes the bytes, of all parts of a tensor."""
    parts = checkpoint.parts(name)
    if replacement := packed.get(name):
        base = next(iter(parts)).removesuffix("weight")
        for suffix, tensor in replacement.items():
            yield base + suffix, tensor, _bytes_of(tensor)
        return
    row = 0
    for stored, tensor in parts.items():
        if name not in changed:
            yield stored, tensor, _bytes_of(tensor)
            continue
        rows = slice(row, row + tensor.shape[0])
        row = rows.stop
        yield stored, tensor, _encoded(changed, name, rows, tensor.dtype)


def _bytes_of(tensor: StoredTensor) -> Callable[[], memoryview]:
    return lambda: raw(tensor.data)


def _encoded(
    changed: Mapping[str, NDArray[np.float32]], name: str, rows: slice, dtype: str
) -> Callable[[], bytes]:
    # Looked up when it is written: all at once, in float32, they would be twice the vision part.
    return lambda: encode(changed[name][rows], dtype)
