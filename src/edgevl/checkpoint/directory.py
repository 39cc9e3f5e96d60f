"""What a model's directory has beside weights: configuration, tokenizer, chat template."""

from __future__ import annotations

import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

from edgevl.checkpoint.config import ModelConfig
from edgevl.checkpoint.config_parser import parse_config
from edgevl.errors import CheckpointError
from edgevl.files import read_text
from edgevl.json_input import parse_object

#: Largest configuration file, other JSON file and text that is read, in bytes (`tokenizer.json` of
#: InternVL3.5 has 11 MB).
MAX_CONFIG_BYTES = 2 << 20
MAX_JSON_BYTES = 16 << 20
MAX_TEXT_BYTES = 64 << 20
#: Files that hold weights, or a table of them: they are written anew or left behind.
WEIGHT_SUFFIXES = (
    ".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth", ".ckpt",
    ".gguf", ".onnx", ".h5", ".msgpack",
)  # fmt: skip
#: What a text model is given and asked with.
TOKENIZER_FILES = (
    "added_tokens.json", "chat_template.jinja", "chat_template.json", "generation_config.json",
    "merges.txt", "special_tokens_map.json", "tokenizer.json", "tokenizer.model",
    "tokenizer_config.json", "vocab.json",
)  # fmt: skip


class ModelDirectory:
    """What every model has on disk, whatever its weights are stored for.

    Attributes:
        path: the directory with ``config.json`` and the tokenizer.
        config: what the model says about itself.
        has_vision: False where there is no vision encoder.
    """

    def __init__(self, path: Path, config: ModelConfig, has_vision: bool) -> None:
        self.path = path
        self.config = config
        self.has_vision = has_vision

    def close(self) -> None:
        """Close what files are open."""

    def read_text(self, filename: str) -> str | None:
        """Return the text of a small file of the directory, or None if it is not there.

        Raises:
            CheckpointError: it cannot be read, is not UTF-8, or is larger than 64 MiB.
        """
        return _read_text(self.path, filename, MAX_TEXT_BYTES)

    def read_json(self, filename: str) -> dict[str, Any] | None:
        """Return the JSON object in a file of the directory, or None if it is not there.

        Raises:
            CheckpointError: it cannot be read, is larger than 16 MiB, or is not a JSON object.
        """
        return _read_json(self.path, filename, MAX_JSON_BYTES)


def read_config(path: Path, vision: bool = True) -> tuple[str, ModelConfig]:
    """Parse ``config.json`` of a directory and, of the files beside it, those that are needed.

    Args:
        path: the directory.
        vision: see `parse_config`.

    Raises:
        CheckpointError: it is malformed, or describes a model that is not supported.
    """

    def read(name: str) -> dict[str, Any] | None:
        return _read_json(path, name, MAX_CONFIG_BYTES)

    config = read("config.json") or {}
    parts = [config, *(config.get(name) for name in ("llm_config", "text_config"))]
    quantized = any(isinstance(part, dict) and part.get("quantization_config") for part in parts)
    return parse_config(
        config,
        str(path / "config.json"),
        preprocessor=read("preprocessor_config.json") or read("processor_config.json"),
        generation=read("generation_config.json"),
        quantize=None if quantized else read("quantize_config.json"),
        vision=vision,
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
        if path.stat().st_size <= MAX_TEXT_BYTES:
            shutil.copyfile(path, directory / path.name)  # the file that a link points to


def is_directory(path: Path) -> bool:
    """Whether ``path`` is a directory; False for what the system refuses as a path."""
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


def is_file(path: Path) -> bool:
    """Whether ``path`` is a file; False for what the system refuses as a path."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def _read_text(directory: Path, filename: str, max_bytes: int) -> str | None:
    if Path(filename).name != filename:
        raise CheckpointError(f"{filename!r} is not the plain name of a file in {directory}")
    path = directory / filename
    return read_text(path, max_bytes, CheckpointError) if path.exists() else None


def _read_json(directory: Path, filename: str, max_bytes: int) -> dict[str, Any] | None:
    text = _read_text(directory, filename, max_bytes)
    return None if text is None else parse_object(text, str(directory / filename))
