"""A model compiled for a board, on disk: layers, vision encoder, embedding, tokenizer.

Files are found where `edgevl compile` puts them (all in one directory), where the vendor's programs
have them (compiled layers, vision encoder and tokenizer in directories beside each other), and as
such models are published.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from edgevl.axera.ends import EMBEDDING_FILES, EmbeddingFile
from edgevl.axera.integrity import check_contents, check_sizes, listed_files
from edgevl.axera.layout import BOARD_FILE, EMULATED_MAGIC, NOT_BUILT, layer_file, post_file
from edgevl.checkpoint.config import MAX_TILES, TextConfig
from edgevl.checkpoint.directory import MAX_JSON_BYTES, ModelDirectory, is_directory, read_config
from edgevl.errors import BoardError
from edgevl.files import reading
from edgevl.json_input import Fields

#: Directories below the given one in which files are looked for.
MAX_DEPTH = 2
#: Most entries that are looked at.
MAX_ENTRIES = 20_000
#: One of these makes the tokenizer.
TOKENIZER_FILES = ("tokenizer.json", "vocab.json")

_LAYER = re.compile(r"(?P<prefix>.+)_p(?P<chunk>\d{1,6})_l(?P<layer>\d{1,4})_together\.axmodel")


class BoardModel(ModelDirectory):
    """The files of a compiled model: all are there, what they hold has not been looked at.

    Where ``board.json`` lists them, they have the right sizes.

    Attributes:
        root: the directory that was given; ``path`` is the one of config and tokenizer.
        layers: the decoder's layers, in order.
        post: final norm and head.
        vision: the vision encoder, or None.
        embedding: embeddings of the tokens.
        emulated: whether it was compiled for the emulator, not for a board.
    """

    def __init__(self, root: str | Path) -> None:
        """Find the files in a directory, up to `MAX_DEPTH` levels below.

        Raises:
            BoardError: they are incomplete, or of several models.
            CheckpointError: ``config.json`` is malformed or of a model that is not supported.
        """
        self.root = root = Path(root)
        if not is_directory(root):
            raise BoardError(f"{root}: not a directory; give the one with the *.axmodel files")
        if (root / NOT_BUILT).exists():
            raise BoardError(
                f"{root}: not built yet, see {NOT_BUILT} in it: run {root / 'build.sh'} on a "
                "machine with Pulsar2"
            )
        files = list(walk(root))
        directory, prefix, chunk, layers = _find_layers(root, files)
        source = _find_config(root, directory, files)
        config = read_config(source)[1]
        expected = config.text.num_hidden_layers
        missing = next((n for n in range(expected) if n not in layers), None)
        if missing is not None:
            raise BoardError(
                f"{directory / layer_file(prefix, chunk, missing)}: layer {missing} is missing, "
                f"{source / 'config.json'} says there are {expected}: copy or download it again"
            )
        if len(layers) > expected:
            raise BoardError(
                f"{directory}: {len(layers)} layers, but {source / 'config.json'} says there are "
                f"{expected}: the files do not belong together"
            )
        self.layers = tuple(layers[number] for number in range(expected))
        self.post = directory / post_file(prefix)
        if not self.post.is_file():
            raise BoardError(f"{self.post}: the file of the output layer is missing: copy it again")
        board_file = directory / BOARD_FILE  # which the vendor's directories have not
        board = Fields({}, str(board_file))
        if board_file.is_file():
            board = Fields.read(board_file, MAX_JSON_BYTES)
        # Every tile is a call of the vision encoder and takes its tokens from a short context.
        tiles = board.integer("max_tiles", 1, MAX_TILES, 1)
        config = replace(config, max_tiles=tiles, min_tiles=min(config.min_tiles, tiles))
        self.vision = _find_vision(root, files, config.vision.image_size)
        super().__init__(source, config, self.vision is not None)
        self.embedding = _find_embedding(root, files, config.text)
        self._listed = listed_files(board)
        self._models = [*self.layers, self.post, *([self.vision] if self.vision else [])]
        check_sizes(self._models, self._listed)
        emulated = {_is_emulated(model) for model in self._models}
        if len(emulated) > 1:
            raise BoardError(
                f"{root}: some models are a board's and some the emulator's: compile all of them "
                "again, into an empty directory"
            )
        self.emulated = emulated.pop()

    def __repr__(self) -> str:
        return f"BoardModel({str(self.root)!r})"

    def check_contents(self) -> None:
        """Compare the files with the checksums in ``board.json``: once, then it is remembered.

        Raises:
            BoardError: one is damaged, or another one's.
        """
        check_contents([*self._models, self.embedding.path], self._listed)


def holds_compiled(root: Path) -> bool:
    """Whether a directory has files of a compiled model in it or up to `MAX_DEPTH` levels below.

    One will do, also if others are missing: what is wrong with them `BoardModel` says.
    """
    try:
        names = [path.name for path in walk(root)]
    except BoardError:  # whatever this is, it is not such a directory
        return False
    return any(_LAYER.fullmatch(name) or name in EMBEDDING_FILES for name in names)


def walk(root: Path) -> Iterator[Path]:
    """Yield the files of a directory and up to `MAX_DEPTH` levels below, sorted; nothing hidden.

    Raises:
        BoardError: a directory cannot be read, or there are more than `MAX_ENTRIES` entries.
    """
    left = MAX_ENTRIES

    def visit(directory: Path, depth: int) -> Iterator[Path]:
        nonlocal left
        with reading(directory, BoardError):
            entries = sorted(directory.iterdir())
        left -= len(entries)
        if left < 0:
            raise BoardError(f"{root}: more than {MAX_ENTRIES} files: give the model's directory")
        entries = [entry for entry in entries if not entry.name.startswith(".")]
        yield from (entry for entry in entries if entry.is_file())
        if depth:
            for entry in filter(Path.is_dir, entries):
                yield from visit(entry, depth - 1)

    return visit(root, MAX_DEPTH)


def _find_embedding(root: Path, files: Sequence[Path], text: TextConfig) -> EmbeddingFile:
    """Return the embedding, in the form that takes the least space."""
    for name in EMBEDDING_FILES:
        found = [path for path in files if path.name == name]
        if len(found) > 1:
            raise BoardError(f"{root}: {_listed(found)}: keep the one that belongs to the layers")
        if found:
            return EmbeddingFile(found[0], text.vocab_size, text.hidden_size)
    raise BoardError(f"{root}: no embedding; one of these is needed: {', '.join(EMBEDDING_FILES)}")


def _find_layers(root: Path, files: Sequence[Path]) -> tuple[Path, str, int, dict[int, Path]]:
    """Return the directory of the one model, what its names begin with, its chunk, its layers."""
    models: dict[tuple[Path, str, int], dict[int, Path]] = {}
    for path in files:
        match = _LAYER.fullmatch(path.name)
        if match:
            key = (path.parent, match["prefix"], int(match["chunk"]))
            models.setdefault(key, {})[int(match["layer"])] = path
    if not models:
        raise BoardError(
            f"{root}: no layers compiled for a board (*_p128_l0_together.axmodel and so on): "
            "compile the checkpoint first, edgevl compile MODEL -o OUT --target ax650, or copy all "
            "that it has written"
        )
    if len(models) > 1:
        several = [f"{directory / prefix}_p{chunk}" for directory, prefix, chunk in models]
        raise BoardError(
            f"{root}: layers of several models ({', '.join(several[:3])}): give the directory of "
            "one of them, or move the others away"
        )
    [((directory, prefix, chunk), layers)] = models.items()
    return directory, prefix, chunk, layers


def _find_config(root: Path, layers: Path, files: Sequence[Path]) -> Path:
    """Return the directory with ``config.json`` and the tokenizer.

    Repositories of compiled models often have a ``config.json`` at the top that says nothing, so
    one without a tokenizer beside it does not count.
    """
    names: dict[Path, set[str]] = {}
    for path in files:
        names.setdefault(path.parent, set()).add(path.name)
    found = [
        directory
        for directory, here in names.items()
        if "config.json" in here and not here.isdisjoint(TOKENIZER_FILES)
    ]
    if not found:
        raise BoardError(
            f"{root}: no directory with config.json and {' or '.join(TOKENIZER_FILES)}: copy those "
            "of the original checkpoint, and the files beside them but the weights, here"
        )
    for preferred in (layers, root):
        if preferred in found:
            return preferred
    if len(found) > 1:
        raise BoardError(
            f"{root}: {_listed([directory / 'config.json' for directory in found])}: copy the one "
            f"that belongs to the layers, and the tokenizer beside it, to {root}"
        )
    return found[0]


def _find_vision(root: Path, files: Sequence[Path], image_size: int) -> Path | None:
    """Return the vision encoder, or None; among several, that of the configured size of a tile."""
    found = [
        path
        for path in files
        if path.name.endswith(".axmodel")
        and ("vit" in path.name.lower() or path.name.lower().startswith("vision"))
        and not _LAYER.fullmatch(path.name)
        and not path.name.endswith("_post.axmodel")
    ]
    if len(found) > 1:
        sized = [path for path in found if f"{image_size}x{image_size}" in path.name]
        if len(sized) != 1:
            raise BoardError(f"{root}: {_listed(found)}: keep one vision encoder")
        found = sized
    return found[0] if found else None


def _is_emulated(path: Path) -> bool:
    with reading(path, BoardError), path.open("rb") as file:
        start = file.read(len(EMULATED_MAGIC))
    if not start:
        raise BoardError(f"{path}: the file is empty: copy or download it again")
    if start.startswith(b"version https://git-lfs"):
        raise BoardError(f"{path}: a Git LFS pointer, not the model: fetch it with git lfs pull")
    if len(start) < len(EMULATED_MAGIC):
        raise BoardError(
            f"{path}: {len(start)} bytes, which is no model: copy or download it again"
        )
    return start == EMULATED_MAGIC


def _listed(paths: Sequence[Path]) -> str:
    return f"{len(paths)} files for one thing ({', '.join(str(path) for path in paths[:3])})"
