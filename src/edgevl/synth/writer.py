"""Synthetic checkpoints: real shapes and files, seeded random weights.

For measuring speed and memory where the real weights cannot be had, and for tests. Every tensor is
made of blocks that have a random generator of their own, seeded by the checkpoint's seed, the
tensor's canonical name and the block's number: so both layouts, and any number of threads, give
the same model, and memory stays at a few blocks whatever the size of the model.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer

from edgevl.checkpoint.architecture import expected_tensors, hf_names
from edgevl.checkpoint.config import ModelConfig, text_json
from edgevl.checkpoint.writer import (
    DEFAULT_SHARD_BYTES,
    TensorSpec,
    encode,
    write_safetensors,
)
from edgevl.errors import CheckpointError
from edgevl.synth.tokenizer import (
    QWEN_BASE_VOCABULARY,
    build_tokenizer,
    special_tokens,
)
from edgevl.work import check_disk, check_target, publish

#: Layouts that can be written: OpenGVLab's own, and that of the "-HF" repositories.
LAYOUTS = ("internvl_chat", "hf")
#: Stored dtypes by the name users give them.
DTYPES = {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}
#: Torch's names of the stored dtypes.
TORCH_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}

_HERE = Path(__file__).parent
#: Chat template of the published checkpoints: ChatML with a marker where an image goes.
CHAT_TEMPLATE = (_HERE / "chat_template.jinja").read_text("utf-8")

#: Elements that one random generator makes.
_BLOCK = 1 << 20
#: Room for everything but the weights, bytes.
_SIDE_FILES_BYTES = 64 << 20


@dataclass(frozen=True)
class _Source:
    """Where the elements of a stored tensor come from: a stretch of a canonical one."""

    name: str
    shape: tuple[int, ...]
    begin: int = 0


def write_checkpoint(
    config: ModelConfig,
    directory: str | Path,
    *,
    layout: str = "internvl_chat",
    seed: int = 0,
    dtype: str = "bf16",
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    base_vocabulary: int | None = None,
    threads: int | None = None,
    progress: Callable[[int], object] | None = None,
) -> Path:
    """Write a checkpoint with random weights.

    Everything is written to ``directory`` + ".partial", which is renamed at the end and removed
    if anything goes wrong.

    Args:
        config: The model's shape.
        directory: Where to; it does not exist or is empty.
        layout: One of ``LAYOUTS``.
        seed: The same seed and NumPy version give the same weights in every layout; dtypes differ
            by rounding.
        dtype: One of ``DTYPES``.
        shard_bytes: Most bytes of weights in one file.
        base_vocabulary: Entries of the tokenizer before the added tokens; default: Qwen's
            151643, or as many as the model's vocabulary has room for.
        threads: Threads that make numbers; default: one a processor, at most four.
        progress: Called with the number of bytes of weights after each write.

    Returns:
        ``directory``.

    Raises:
        CheckpointError: ``directory`` is in use or not writable, the disk is too small, or the
            vocabulary has no room for the special tokens.
        ValueError: an argument is not one of its choices.
    """
    if layout not in LAYOUTS or dtype not in DTYPES:
        raise ValueError(f"layout {layout!r}, dtype {dtype!r}: see LAYOUTS and DTYPES")
    directory = Path(directory)
    sources = _stored_tensors(config, layout, DTYPES[dtype])
    check_target(directory, CheckpointError)
    weights = sum(tensor.nbytes for tensor in sources)
    check_disk(directory, weights + _SIDE_FILES_BYTES, CheckpointError)
    tokenizer = _tokenizer(config, layout, base_vocabulary)

    def produce(tensors: Sequence[TensorSpec]) -> Iterator[bytes]:
        return _blocks([(tensor, sources[tensor]) for tensor in tensors], seed, threads)

    target = directory.resolve()
    partial = target.with_name(target.name + ".partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{target.parent}: cannot be made ({error.strerror})") from None
    try:
        partial.mkdir()
    except FileExistsError:
        raise CheckpointError(
            f"{partial}: exists; another run is writing it, or was killed: then remove it"
        ) from None
    except OSError as error:
        raise CheckpointError(f"{partial}: cannot be made ({error.strerror})") from None
    try:
        _write_side_files(config, partial, layout, dtype, tokenizer)
        write_safetensors(partial, list(sources), produce, shard_bytes, progress)
        publish(partial, directory)
    except BaseException as error:  # Ctrl-C too: nothing half-written stays behind
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError):
            raise CheckpointError(f"{directory}: cannot be written ({error.strerror})") from None
        raise
    return directory


def stored_bytes(config: ModelConfig, dtype: str = "bf16") -> int:
    """Return the bytes of a checkpoint's weights on disk."""
    return sum(tensor.nbytes for tensor in _stored_tensors(config, LAYOUTS[0], DTYPES[dtype]))


def random_values(
    name: str, shape: Sequence[int], seed: int, begin: int = 0, end: int | None = None
) -> NDArray[np.float32]:
    """Return the elements ``begin … end`` of a canonical tensor, flat, before any rounding.

    Linear layers have the variance 1 / inputs, so that activations neither fade nor grow.
    """
    size = math.prod(shape)
    end = size if end is None else end
    mean, deviation = _distribution(name, shape)
    pieces = []
    for number in range(begin // _BLOCK, -(-end // _BLOCK)):
        start = number * _BLOCK
        digest = hashlib.sha256(f"{seed}/{name}/{number}".encode()).digest()
        generator = np.random.Generator(np.random.SFC64(int.from_bytes(digest, "little")))
        values = generator.standard_normal(min(_BLOCK, size - start), dtype=np.float32)
        pieces.append(values[max(begin - start, 0) : end - start])
    values = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
    values *= np.float32(deviation)
    values += np.float32(mean)
    return values


def _distribution(name: str, shape: Sequence[int]) -> tuple[float, float]:
    """Return mean and standard deviation of a tensor's elements."""
    if name.endswith((".ls1", ".ls2")):
        return 0.1, 0.02
    if name.endswith(".bias"):
        return 0.0, 0.05
    if name.endswith(("class_embedding", "position_embedding")):
        return 0.0, 0.1
    if len(shape) == 1:  # of a norm
        return 1.0, 0.1
    return 0.0, 1 / math.sqrt(math.prod(shape[1:]))


def _stored_tensors(config: ModelConfig, layout: str, dtype: str) -> dict[TensorSpec, _Source]:
    """Return what is stored, in order, and the canonical tensors that it is taken from."""
    stored: dict[TensorSpec, _Source] = {}
    for name, shape in expected_tensors(config).items():
        parts = hf_names(name) if layout == "hf" else (name,)
        part_shape = (shape[0] // len(parts), *shape[1:])
        for index, part in enumerate(parts):
            source = _Source(name, shape, index * math.prod(part_shape))
            stored[TensorSpec(part, dtype, part_shape)] = source
    return stored


def _blocks(
    tensors: Sequence[tuple[TensorSpec, _Source]], seed: int, threads: int | None
) -> Iterator[bytes]:
    """Yield the data of tensors in order, made some blocks ahead by several threads."""

    def make(source: _Source, begin: int, end: int, dtype: str) -> bytes:
        return encode(random_values(source.name, source.shape, seed, begin, end), dtype)

    threads = threads or min(os.cpu_count() or 1, 4)
    waiting: deque[Future[bytes]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for tensor, source in tensors:
                last = source.begin + math.prod(tensor.shape)
                begin = source.begin
                while begin < last:
                    # Up to the next boundary of blocks, so that none is made twice.
                    end = min(last, (begin // _BLOCK + 1) * _BLOCK)
                    waiting.append(pool.submit(make, source, begin, end, tensor.dtype))
                    begin = end
                    if len(waiting) > 2 * threads:
                        yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def _tokenizer(config: ModelConfig, layout: str, base_vocabulary: int | None) -> Tokenizer:
    vocabulary, thinking = config.text.vocab_size, config.text.model_type == "qwen3"
    room = vocabulary - len(special_tokens(thinking))
    base = min(QWEN_BASE_VOCABULARY, room) if base_vocabulary is None else base_vocabulary
    if not 256 <= base <= room:
        raise CheckpointError(
            f"vocab_size is {vocabulary}; {base} tokens and the special ones do not fit, and 256 "
            "are needed at least"
        )
    tokenizer = build_tokenizer(base, thinking)
    if layout == "hf" and tokenizer.get_vocab_size() < vocabulary:
        tokenizer.add_tokens([AddedToken("<video>", normalized=False, special=True)])
    return tokenizer


def _write_side_files(
    config: ModelConfig, directory: Path, layout: str, dtype: str, tokenizer: Tokenizer
) -> None:
    """Write everything but the weights."""
    described = "internvl" if layout == "hf" else layout
    for name, content in config_files(described, config, tokenizer, dtype).items():
        text = json.dumps(content, indent=2, ensure_ascii=False, sort_keys=True)
        (directory / name).write_text(text + "\n", encoding="utf-8")
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    tokenizer.save(str(directory / "tokenizer.json"))
    if layout == "internvl_chat":  # the slow tokenizer's files lie there too
        tokenizer.model.save(str(directory))


def config_files(
    layout: str, config: ModelConfig, tokenizer: Tokenizer, dtype: str
) -> dict[str, dict[str, Any]]:
    """Return the JSON files of a layout by file name, from a template for each layout.

    Fields and values are those of OpenGVLab/InternVL3_5-1B. Its ``auto_map`` is kept for the tools
    that look at it; the Python files it names are not written.

    Args:
        layout: "internvl_chat", or "internvl" for that of transformers.
        config: The model's shape.
        tokenizer: Its tokenizer.
        dtype: One of `TORCH_DTYPES`.
    """
    token_id = tokenizer.token_to_id
    end, pad = token_id("<|im_end|>"), token_id("<|endoftext|>")
    text = text_json(config.text, TORCH_DTYPES[dtype])
    environment = Environment(loader=FileSystemLoader(_HERE), undefined=StrictUndefined)
    filled = environment.get_template(f"{layout}.json.jinja").render(
        config=config,
        vision=config.vision,
        torch_dtype=TORCH_DTYPES[dtype],
        text=text | {"bos_token_id": pad, "eos_token_id": end},
        end=end,
        pad=pad,
        image_token_id=token_id("<IMG_CONTEXT>"),
        tokenizer=_tokenizer_json(tokenizer),
        # Placeholders that the processor looks for. `<video>` is never encoded: frames replace it.
        named={
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>" if token_id("<video>") else "<|video_pad|>",
        },
    )
    return json.loads(filled)


def _tokenizer_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return ``tokenizer_config.json``."""
    added = sorted(tokenizer.get_added_tokens_decoder().items())
    fields = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    return {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": {
            str(number): {name: getattr(token, name) for name in fields} for number, token in added
        },
        "additional_special_tokens": [
            token.content
            for _, token in added
            if token.special and token.content != "<|endoftext|>"
        ],
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 14588,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
