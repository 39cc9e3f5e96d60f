"""The files of a checkpoint that are not weights: configuration, tokenizer, chat template."""

from __future__ import annotations

import shutil
from collections.abc import Collection
from pathlib import Path

#: Files that hold weights, or a table of them: they are written anew or left behind.
WEIGHT_SUFFIXES = (
    ".safetensors",
    ".safetensors.index.json",
    ".bin",
    ".bin.index.json",
    ".pt",
    ".pth",
    ".ckpt",
    ".gguf",
    ".onnx",
    ".h5",
    ".msgpack",
)
#: Larger files are not part of what describes a model.
MAX_SIDE_FILE_BYTES = 64 << 20

#: What a text model is given and asked with.
TOKENIZER_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
)


def copy_side_files(source: Path, directory: Path, only: Collection[str] | None = None) -> None:
    """Copy everything that is not weights: tokenizer, chat template, code of other libraries.

    Args:
        source: a checkpoint's directory.
        directory: where to; it exists.
        only: the names of files to copy; default: all.

    Raises:
        OSError: the disk is full, or a file cannot be read.
    """
    for path in sorted(source.iterdir()):
        hidden = path.name.startswith(".")
        if hidden or path.name.endswith(WEIGHT_SUFFIXES) or not path.is_file():
            continue
        if only is not None and path.name not in only:
            continue
        if path.stat().st_size <= MAX_SIDE_FILE_BYTES:
            shutil.copyfile(path, directory / path.name)  # the file that a link points to
