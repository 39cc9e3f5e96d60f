"""Board directories for the emulator, from any checkpoint."""

import shutil

import pytest

from edgevl.axera import layout
from edgevl.axera.npu.base import to_device
from edgevl.checkpoint import Checkpoint

emulate = pytest.importorskip("edgevl.boards.emulate", reason="the native engine is not built")


def write(directory, source, shape, **options):
    """Write a whole board directory for the emulator."""
    directory.mkdir()
    for path in source.iterdir():
        if path.is_file() and path.suffix != ".safetensors":
            shutil.copyfile(path, directory / path.name)
    with Checkpoint.open(source) as checkpoint:
        emulate.write_emulated(checkpoint, directory, shape, **options)
        table = checkpoint.tensor("language_model.model.embed_tokens.weight")
        to_device(table, "BF16").tofile(directory / layout.EMBEDDING_BF16)
    return directory
