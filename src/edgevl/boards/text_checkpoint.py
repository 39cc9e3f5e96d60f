"""The text model alone: as a checkpoint that ``llm_build`` reads, and the embedding beside it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from edgevl.axera.layout import EMBEDDING_BF16, EMBEDDING_F32, EMBEDDING_NPY
from edgevl.checkpoint import Checkpoint, GPTQConfig, StoredTensor
from edgevl.checkpoint.architecture import EMBEDDING, LM_HEAD, TEXT
from edgevl.checkpoint.config import text_json
from edgevl.checkpoint.directory import TOKENIZER_FILES, copy_side_files
from edgevl.checkpoint.writer import (
    DEFAULT_SHARD_BYTES,
    TensorSpec,
    encode,
    raw,
    running_total,
    write_safetensors,
)
from edgevl.errors import BoardError, CheckpointError

#: Input channels that share a scale, in the GPTQ weights that ``llm_build`` takes.
GROUP_SIZE = 128
#: Rows of the embedding that are converted at once.
_ROWS = 4096

_TORCH_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}
_MEND = "make one with `edgevl quantize --group-size 128`, or compile the original checkpoint"


def write_text_checkpoint(
    checkpoint: Checkpoint,
    directory: Path,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> None:
    """Write the text model as transformers has it: a ``Qwen3ForCausalLM`` or the like.

    Tensors keep their stored values, plain or GPTQ, and are called ``model.…`` and
    ``lm_head.weight``. A head that is tied to the embedding is not written: ``config.json`` says
    ``tie_word_embeddings``, as in the text models that ``llm_build``'s manual takes for examples.

    Args:
        checkpoint: an open checkpoint of any layout.
        directory: where to; it is empty, if it exists.
        shard_bytes: most bytes of weights in one file.
        progress: called after each write with the bytes written and those there are.

    Raises:
        OSError: the disk is full, or a file cannot be read.
    """
    directory.mkdir(exist_ok=True)
    tensors = dict(_tensors(checkpoint))
    specs = [TensorSpec(name, tensor.dtype, tensor.shape) for name, tensor in tensors.items()]

    def pieces(shard: Sequence[TensorSpec]) -> Iterable[memoryview]:
        for spec in shard:
            yield raw(tensors[spec.name].data)
            checkpoint.release()

    write_safetensors(directory, specs, pieces, shard_bytes, running_total(specs, progress))
    copy_side_files(checkpoint.path, directory, TOKENIZER_FILES)
    text = json.dumps(_config(checkpoint), indent=2)
    (directory / "config.json").write_text(text + "\n", encoding="utf-8")


def text_bytes(checkpoint: Checkpoint) -> int:
    """Return the bytes of the weights that `write_text_checkpoint` writes."""
    return sum(tensor.data.nbytes for _, tensor in _tensors(checkpoint))


def check_weights(checkpoint: Checkpoint) -> GPTQConfig | None:
    """Refuse text weights that ``llm_build`` does not take.

    It takes plain ones, and GPTQ ones in 4 or 8 bits with a scale for every 128 consecutive
    inputs, symmetric, in all linear layers.

    Returns:
        How the linear layers are quantized, or None.

    Raises:
        BoardError: names the field or the weight, and the fix.
    """
    linears = _linears(checkpoint)
    config = next(filter(None, linears.values()), None)
    if config is None:
        return None
    expected = {"group_size": GROUP_SIZE, "checkpoint_format": "gptq"}
    for field, value in expected.items():
        if (found := getattr(config, field)) != value:
            raise BoardError(
                f"{checkpoint.path}: {field} of its GPTQ weights is {json.dumps(found)}, but "
                f"Pulsar2 takes {json.dumps(value)}: {_MEND}"
            )
    for name in [*linears, EMBEDDING, *(n for n in checkpoint.names() if n == LM_HEAD)]:
        _check_weight(checkpoint, name, config if name in linears else None)
    return config


def _linears(checkpoint: Checkpoint) -> dict[str, GPTQConfig | None]:
    """Return how the weights of all linear layers of the decoder are quantized, by name."""
    found = {}
    for name in checkpoint.names():
        if name.startswith(f"{TEXT}layers.") and len(checkpoint.shape(name)) == 2:
            weight = checkpoint.gptq(name)
            found[name] = weight.config if weight else None
    return found


def _check_weight(checkpoint: Checkpoint, name: str, config: GPTQConfig | None) -> None:
    """Refuse a weight that is not quantized as the first one is, or is although it is no linear."""
    weight = checkpoint.gptq(name)
    if (weight and weight.config) != config:
        state = "is quantized"
        if config is not None:
            state = f"{state} otherwise than others" if weight else "is not quantized, others are"
        raise BoardError(f"{checkpoint.path}: {name} {state}, which Pulsar2 does not take: {_MEND}")
    if weight is None:
        return
    try:
        in_order, symmetric = weight.is_in_order(), weight.is_symmetric()
    except CheckpointError as error:
        raise BoardError(f"{checkpoint.path}: tensor {name!r}: {error}") from None
    if not (in_order and symmetric):
        state = "zero points" if in_order else "its inputs out of order"
        raise BoardError(
            f"{checkpoint.path}: {name} has {state}, which Pulsar2 does not take: {_MEND}"
        )


def _tensors(checkpoint: Checkpoint) -> Iterator[tuple[str, StoredTensor]]:
    """Yield the tensors of the text model by their names in transformers."""
    for name in checkpoint.names():
        if name != LM_HEAD and not name.startswith(TEXT):
            continue
        written = name.removeprefix("language_model.")
        packed = checkpoint.gptq(name)
        if packed is None:
            yield written, checkpoint.stored(name)
            continue
        base = written.removesuffix("weight")
        for suffix in ("qweight", "qzeros", "scales", "g_idx"):
            if (tensor := getattr(packed, suffix)) is not None:
                yield base + suffix, tensor


def _config(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return ``config.json`` of the text model."""
    text = checkpoint.config.text
    tied = LM_HEAD not in checkpoint.names()
    dtype = checkpoint.stored(TEXT + "norm.weight").dtype
    fields = text_json(replace(text, tie_word_embeddings=tied), _TORCH_DTYPES[dtype])
    original = checkpoint.read_json("config.json") or {}
    inner = original.get("llm_config") or original.get("text_config") or original
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if inner.get(name) is not None:
            fields[name] = inner[name]
    config = next(filter(None, _linears(checkpoint).values()), None)
    if config is not None:
        fields["quantization_config"] = {
            "quant_method": "gptq",
            "bits": config.bits,
            "group_size": config.group_size,
            "sym": True,  # as `check_weights` has seen
            "desc_act": False,
            "checkpoint_format": config.checkpoint_format,
            "pack_dtype": "int32",
            "lm_head": False,
        }
    return fields


def write_embeddings(checkpoint: Checkpoint, directory: Path) -> None:
    """Write the embedding [V, H] row by row: float32 as ``.npy`` and plain, and bfloat16 plain.

    bfloat16 is exact where it is what the checkpoint stores.

    Args:
        checkpoint: an open checkpoint.
        directory: where to.

    Raises:
        OSError: the disk is full.
    """
    directory.mkdir(exist_ok=True)
    with (
        (directory / EMBEDDING_NPY).open("wb") as npy,
        (directory / EMBEDDING_F32).open("wb") as f32,
        (directory / EMBEDDING_BF16).open("wb") as bf16,
    ):
        shape = checkpoint.shape(EMBEDDING)
        header = {"descr": "<f4", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(npy, header)
        for begin in range(0, shape[0], _ROWS):
            rows = checkpoint.tensor(EMBEDDING, slice(begin, begin + _ROWS))
            npy.write(raw(rows))
            f32.write(raw(rows))
            bf16.write(encode(rows, "BF16"))
            checkpoint.release()
