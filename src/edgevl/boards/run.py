"""The whole of a compilation: from a checkpoint to a directory that a board runs."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from datetime import datetime, timezone
from math import prod
from pathlib import Path
from typing import Any

from edgevl.axera.integrity import FILES, Content
from edgevl.axera.layout import BOARD_FILE, NOT_BUILT, check_shape
from edgevl.boards.build_script import BUILD, MODEL, NOT_BUILT_TEXT, build_script
from edgevl.boards.estimates import plan_memory
from edgevl.boards.pulsar2 import find
from edgevl.boards.settings import DEFAULT_WEIGHT_TYPE, CompileSettings
from edgevl.boards.steps import ASKED, CALIBRATION, LAYERS, ONNX, BoardStep, Compilation
from edgevl.boards.text_checkpoint import check_weights, text_bytes
from edgevl.checkpoint import Checkpoint, GPTQConfig
from edgevl.checkpoint.directory import copy_side_files
from edgevl.errors import BoardError
from edgevl.loading import locate, model_name, open_checkpoint
from edgevl.version import __version__
from edgevl.work import DONE, Progress, check_disk, check_target, identity, opened, publish

#: The finished directory in the work directory, before it is moved to its place.
MADE = "model"
#: Tiles that a picture is cut into on a board, which has room for few image tokens.
MAX_TILES = 1
#: Most bytes of weights in an ONNX file: that is one protobuf message, which ends at 2 GiB, and the
#: graph itself takes under 1 MiB.
MAX_ONNX_BYTES = (2 << 30) - (1 << 20)
#: Room for tokenizer, calibration pictures and logs, bytes.
_SIDE_BYTES = 256 << 20
#: What may differ when a compilation is resumed.
_FREE = {"parallel"}


def compile_model(
    model: str | Path,
    output: str | Path,
    settings: CompileSettings,
    *,
    progress: Progress = lambda name: nullcontext(lambda done, total: None),
) -> dict[str, Any]:
    """Compile a checkpoint for a board.

    What is done lies in ``output`` + ".partial" until all is; the same call resumes there.

    Args:
        model: ``tiny``, a checkpoint directory, or a Hub id.
        output: directory to write; it does not exist, or is empty.
        settings: how to compile.
        progress: told of every stretch of work.

    Returns:
        What ``board.json`` says: ``edgevl``, ``model``, ``created``, ``seconds``, ``target``,
        ``chip``, ``npu_mode``, ``context``, ``chunk``, ``max_prefill``, ``max_tiles``,
        ``uint8_input``, ``weights`` ("gptq-4", "gptq-8", "s4", "s8" or "bf16"), ``post_topk``,
        ``compiler`` ("emulator", or "pulsar2" and its version), ``llm_build``, ``cosines`` (None,
        or of ``vision_onnx`` and ``layers`` to the same in floats), ``warnings`` and ``files``
        (``bytes`` and ``sha256`` by name; after a dry run, only of what is there already).

    Raises:
        CheckpointError: ``model`` is missing, malformed, or not supported.
        BoardError: it cannot be compiled so, Pulsar2 is missing or fails, or ``output`` cannot be
            written.
    """
    output = Path(output)
    check_target(output, BoardError)
    program = None if settings.dry_run or settings.emulate else find(settings.pulsar2)
    path = locate(model)
    with open_checkpoint(path) as checkpoint:
        quantization = _check(checkpoint, settings, output)
        begun = {"edgevl": __version__, "checkpoint": checkpoint.fingerprint()} | {
            name: identity(value) for name, value in asdict(settings).items() if name not in _FREE
        }
        with opened(output, begun, settled=f"{DONE}/*", error=BoardError) as work:
            compilation = Compilation(checkpoint, settings, quantization, work, progress)
            asked = compilation.ask(program)
            steps = [*compilation.steps(program, asked["llm_build"])]
            if program is not None and not work.is_done(ASKED):
                with work.making(ASKED) as made:
                    made.write_text(json.dumps(asked), "utf-8")
            found = {
                step.product: work.do(step, progress)
                for step in steps
                if not (settings.dry_run and step.arguments)
            }
            board = {"model": model_name(model, path)} | _board(compilation, asked, found)
            board["seconds"] = round(work.elapsed_s(), 1)
            publish(_assemble(compilation, steps, board), output)
    return board


def _board(
    compilation: Compilation, asked: Mapping[str, Any], found: Mapping[str, Any]
) -> dict[str, Any]:
    """Return what ``board.json`` says, but for the files.

    Of Pulsar2 it is told what that was ``asked``, of the steps what they ``found``, by product.
    """
    settings, quantization = compilation.settings, compilation.quantization
    weights = settings.weight_type or DEFAULT_WEIGHT_TYPE
    compiler, cosines = "pulsar2", None
    layers = found.get(LAYERS) or {"cosines": None, "warnings": []}
    warnings = []
    if (pictures := found.get(CALIBRATION)) is not None and pictures < settings.samples:
        warnings.append(
            f"{settings.calibration_images}: {pictures} different pictures to calibrate on, "
            f"--samples {settings.samples} were asked for: add some"
        )
    if settings.emulate:
        weights, compiler = "bf16", "emulator"
    else:
        weights = f"gptq-{quantization.bits}" if quantization is not None else weights
        compiler += f" {asked['version']}" if asked["version"] is not None else ""
        cosines = {"vision_onnx": found.get(ONNX), "layers": layers["cosines"]}
    return {
        "edgevl": __version__,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "target": settings.target,
        "chip": settings.chip.chip,
        "npu_mode": settings.cores,
        **asdict(settings.shape),
        "max_tiles": MAX_TILES,
        "uint8_input": settings.uint8_input,
        "weights": weights,
        "post_topk": settings.post_topk,
        "compiler": compiler,
        "llm_build": asked["llm_build"],
        "cosines": cosines,
        "warnings": [*warnings, *layers["warnings"]],
    }


def _assemble(compilation: Compilation, steps: Sequence[BoardStep], board: dict[str, Any]) -> Path:
    """Put the finished directory together, and ``files`` into ``board``: -> where it is."""
    work, settings = compilation.work, compilation.settings
    made = work.path / MADE
    shutil.rmtree(made, ignore_errors=True)  # of a run that was interrupted
    # Of a dry run nothing lies where a board's program would look for it.
    model = made / BUILD / MODEL if settings.dry_run else made
    model.mkdir(parents=True)
    copy_side_files(compilation.checkpoint.path, model)
    names: list[str] = []
    for step in steps:
        if work.is_done(step.product):
            for name in step.files:
                _link(work.product(step.product) / name, model / name)
            names += step.files
    board[FILES] = {}
    with compilation.progress("checksums") as tell:
        for name in names:
            board[FILES][name] = Content.of(model / name).to_dict()
            tell(len(board[FILES]), len(names))
    where = made / BUILD if settings.dry_run else made
    text = json.dumps(board, indent=1, ensure_ascii=False) + "\n"
    (where / BOARD_FILE).write_text(text, "utf-8")
    if settings.dry_run:
        for step in steps:
            if not step.files:
                _link(work.product(step.product), made / BUILD / DONE / step.product)
        (made / NOT_BUILT).write_text(NOT_BUILT_TEXT, "utf-8")
        script = made / "build.sh"
        script.write_text(build_script(steps, settings.pulsar2), "utf-8")
        script.chmod(0o755)
    elif not settings.emulate:
        shutil.copytree(work.path / "logs", made / "logs")
    return made


def _link(source: Path, place: Path) -> None:
    """Put a file, or a directory of files, at ``place`` without copying what can be shared."""
    if source.is_dir():
        for path in source.iterdir():
            _link(path, place / path.name)
        return
    place.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, place)
    except OSError:  # a file system without links
        shutil.copyfile(source, place)


def _check(checkpoint: Checkpoint, settings: CompileSettings, output: Path) -> GPTQConfig | None:
    """Refuse what cannot be compiled so, or would not fit the board or the disk of ``output``.

    Return how the text is quantized, if it is and Pulsar2 is to compile it.
    """
    config, path, chip = checkpoint.config, checkpoint.path, settings.chip
    check_shape(settings.shape, config.text)
    if settings.post_topk > config.text.vocab_size:
        raise BoardError(
            f"--post-topk {settings.post_topk}: must be from 0 to {config.text.vocab_size}"
        )
    quantization = None if settings.emulate else check_weights(checkpoint)
    if quantization is not None and settings.weight_type is not None:
        raise BoardError(
            f"--weight-type {settings.weight_type}: the text of {path} is in {quantization.bits}-"
            "bit GPTQ; leave it out, or compile the original checkpoint"
        )
    weights = (checkpoint.gptq(name) for name in checkpoint.names())
    bits = max((weight.config.bits for weight in weights if weight is not None), default=8)
    plan = plan_memory(
        config,
        settings.shape,
        weight_bits=4 if settings.weight_type == "s4" else bits,
        vision=checkpoint.has_vision,
    )
    onnx = 2 * plan.vision  # a weight takes 4 bytes in it, 2 on the board
    if not settings.emulate and onnx > MAX_ONNX_BYTES:
        raise BoardError(
            f"{path}: its vision encoder takes {_gb(onnx)} in float32, but an ONNX file ends at 2 "
            "GB: use a model with InternViT-300M"
        )
    if plan.npu > chip.memory_bytes:
        raise BoardError(
            f"{path}: takes about {_gb(plan.npu)} of NPU memory (layers {_gb(plan.text_layers)}, "
            f"head {_gb(plan.post)}, vision {_gb(plan.vision)}, context {_gb(plan.kv_cache)}), "
            f"{chip.name} boards have {_gb(chip.memory_bytes)}: compile a smaller model, one "
            "quantized to int4, or a shorter --context"
        )
    # The embedding is written in bfloat16, and twice in float32.
    needed = 5 * plan.embeddings + _SIDE_BYTES
    if settings.emulate:  # everything in bfloat16
        needed += 2 * sum(prod(checkpoint.shape(name)) for name in checkpoint.names())
    else:  # what Pulsar2 is given, and about as much that it makes of it
        needed += 2 * text_bytes(checkpoint) + 2 * onnx
    begun = output.resolve().with_name(output.resolve().name + ".partial").rglob("*")
    written = sum(file.stat().st_size for file in begun if file.is_file())
    check_disk(output, needed - written, BoardError)
    return quantization


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB"
