"""Loading any kind of model: found, opened, and its weights taken to an engine.

The one place that knows all kinds: checkpoints, what was compiled for boards, the engines of both.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from edgevl.checkpoint import Checkpoint, ModelDirectory
from edgevl.checkpoint.directory import is_directory, is_file
from edgevl.checkpoint.hub import cached, download, is_repository
from edgevl.engine import Engine, ReferenceEngine, native_missing
from edgevl.errors import BoardError, CheckpointError, DownloadError, EdgeVLError
from edgevl.options import LoadOptions, only_for

log = logging.getLogger(__name__)


def locate(model: str | Path) -> Path:
    """Return the directory of a model.

    Args:
        model: ``tiny``, the small model that comes with EdgeVL; a checkpoint directory or one
            with a model compiled for a board; or a Hub id such as ``OpenGVLab/InternVL3_5-1B``,
            which is downloaded unless it is in the cache.

    Raises:
        CheckpointError: it is none of these.
        DownloadError: it could not be fetched.
    """
    if model == "tiny":
        return _shipped(model)
    path = Path(model)
    if is_directory(path):
        return path
    name = str(model)
    if is_file(path):
        raise CheckpointError(
            f"{path}: is a file; give the directory of the checkpoint, {path.parent}"
        )
    if isinstance(model, str) and is_repository(name):
        try:
            return _cached(name) or pull(name)
        except DownloadError as error:  # a path that is mistyped may look like a Hub id
            raise DownloadError(f"{error} (nor is there a directory {name} here)") from error
    raise CheckpointError(
        f"{name!r} is no model: give `tiny` (the shipped one), a directory with config.json and "
        "model.safetensors, or a Hub id such as OpenGVLab/InternVL3_5-1B"
    )


def model_name(model: str | Path, path: Path) -> str:
    """Return what a report calls a model that is at ``path``: the Hub's caches name revisions."""
    return path.resolve().name if path == Path(model) else str(model)


def pull(repo: str, out: str | Path | None = None) -> Path:
    """Download a model from the Hub; what is there already is not fetched again.

    Args:
        repo: Hub id, such as ``OpenGVLab/InternVL3_5-1B``.
        out: directory for the files; by default the Hub's cache.

    Returns:
        The directory of the checkpoint, which has been opened once to see that it is whole.

    Raises:
        DownloadError: no network, no such repository, no access, no space; the message says what
            to do.
        CheckpointError: what was downloaded is not a checkpoint that is supported.
        BoardError: it is an incomplete model for a board.
    """
    directory = download(repo, out)
    open_model(directory).close()
    return directory


def open_model(path: Path, engine: str = "auto") -> ModelDirectory:
    """Open a checkpoint or, of a directory that holds layers compiled for a board, those.

    Args:
        path: the directory.
        engine: which is to run it. Where a checkpoint and its compiled layers lie in one
            directory, ``axera`` takes the layers and everything else the checkpoint.

    Raises:
        CheckpointError: there is no checkpoint that is supported, whole and well-formed.
        BoardError: what was compiled is incomplete or ambiguous.
    """
    if engine == "axera" or _is_compiled(path):
        from edgevl.axera.directory import BoardModel

        return BoardModel(path)
    return Checkpoint.open(path)


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a checkpoint that something is to be made of.

    Args:
        path: the directory.

    Raises:
        CheckpointError: there is no checkpoint that is supported, whole and well-formed.
        BoardError: there is what was compiled of one.
    """
    if _is_compiled(path):
        raise BoardError(
            f"{path}: is compiled for a board already; give the checkpoint that it was made of"
        )
    return Checkpoint.open(path)


def _is_compiled(path: Path) -> bool:
    if any(path.glob("*.safetensors")):
        return False
    # Imported here, as few models need it.
    from edgevl.axera.directory import holds_compiled

    return holds_compiled(path)


def load_engine(checkpoint: ModelDirectory, options: LoadOptions | None = None) -> Engine:
    """Load ``checkpoint`` into an engine.

    ``auto`` is ``axera`` for a model that was compiled for a board; otherwise ``cpu`` or, where
    that cannot run, ``reference`` with a warning.

    Args:
        checkpoint: what to load.
        options: how; see `edgevl.load`.

    Raises:
        EdgeVLError: an option is of another engine, or the engine cannot run here.
        BoardError: the engine is ``axera`` and there is no NPU that runs the model, or it is
            another and the model was compiled for a board.
    """
    options = options or LoadOptions()
    engine = options.engine
    if engine == "auto" and not isinstance(checkpoint, Checkpoint):
        engine = "axera"
    if engine == "auto":
        engine = "cpu"
        if reason := native_missing():
            log.warning("%s: answering with the slow reference engine, in float32", reason)
            engine, options = "reference", LoadOptions(max_context=options.max_context)
    return ENGINES[engine](checkpoint, options)


def _cpu(checkpoint: ModelDirectory, options: LoadOptions) -> Engine:
    weights = _weights(checkpoint, "cpu")
    if reason := native_missing():
        raise EdgeVLError(reason)
    from edgevl.engine import cpu

    return cpu.CpuEngine(weights, options)


def _reference(checkpoint: ModelDirectory, options: LoadOptions) -> Engine:
    if given := _only_for_cpu(options):
        raise EdgeVLError(
            "the reference engine computes in float32, with NumPy's threads: leave "
            f"{given} out, or use engine cpu"
        )
    return ReferenceEngine(_weights(checkpoint, "reference"), options.max_context)


def _axera(checkpoint: ModelDirectory, options: LoadOptions) -> Engine:
    from edgevl.axera.directory import BoardModel
    from edgevl.axera.engine import AxeraEngine

    if not isinstance(checkpoint, BoardModel):
        raise BoardError(
            f"{checkpoint.path}: not compiled for a board, which engine axera needs: compile it "
            "first, edgevl compile MODEL -o OUT --target ax650"
        )
    if given := _only_for_cpu(options):
        raise EdgeVLError(
            f"the axera engine runs what was compiled: leave {given} out, or compile with other "
            "options"
        )
    engine = AxeraEngine(checkpoint, options.max_context)
    if options.exact_logits and engine.top_k is not None:
        raise BoardError(
            f"{checkpoint.root}: compiled to give the {engine.top_k} likeliest tokens only, but "
            "comparing needs all logits: compile without --post-topk"
        )
    return engine


def _only_for_cpu(options: LoadOptions) -> str:
    return " and ".join(option.name for option in only_for("cpu", options))


def _weights(checkpoint: ModelDirectory, engine: str) -> Checkpoint:
    """Return a checkpoint that has weights."""
    if not isinstance(checkpoint, Checkpoint):
        raise BoardError(
            f"{checkpoint.path}: compiled for a board, which engine {engine} cannot run: use "
            "engine axera, or give the checkpoint it was compiled from"
        )
    return checkpoint


#: Engines by name, the preferred first.
ENGINES: dict[str, Callable[[ModelDirectory, LoadOptions], Engine]] = {
    "cpu": _cpu,
    "reference": _reference,
    "axera": _axera,
}


def _shipped(name: str) -> Path:
    """Return the directory of a model that comes with the package, installed or in the checkout."""
    package = Path(__file__).resolve().parent
    for directory in (package / "models" / name, package.parents[1] / "models" / name):
        if (directory / "config.json").exists():
            return directory
    raise CheckpointError(
        f"the shipped model {name!r} is not in this installation ({package / 'models' / name}); "
        "install the edgevl wheel, or run inside a full checkout"
    )


def _cached(repo: str) -> Path | None:
    """Return the directory of a checkpoint that is whole in the Hub's cache; asks no network."""
    try:
        directory = cached(repo)
        model = open_model(directory)
        model.close()
    except (BoardError, CheckpointError, OSError, ValueError):
        return None
    # Older versions of huggingface_hub do not know whether a download was interrupted.
    return directory if (model.path / "tokenizer_config.json").exists() else None
