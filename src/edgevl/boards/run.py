"""The whole of a compilation: from a checkpoint to a directory that a board runs."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from edgevl.axera.layout import NOT_BUILT, layer_file, post_file, vision_file
from edgevl.axera.model.embedding_file import EMBEDDING_FILES
from edgevl.axera.model.integrity import FILES, Content
from edgevl.boards.build_log import BuildLog, low_cosines
from edgevl.boards.build_script import (
    BOARD,
    BUILD,
    MODEL,
    NOT_BUILT_TEXT,
    build_script,
)
from edgevl.boards.commands import QK_NORM_CONFIG, text_command, vision_command
from edgevl.boards.embeddings import write_embeddings
from edgevl.boards.limits import check, check_decode_step, disk_bytes
from edgevl.boards.pulsar2 import run, stop_left_over
from edgevl.boards.settings import DEFAULT_WEIGHT_TYPE, CompileSettings
from edgevl.boards.targets import TARGETS
from edgevl.boards.text_checkpoint import check_weights, write_text_checkpoint
from edgevl.boards.toolchain import Pulsar2, find, newest_llm_build, version
from edgevl.checkpoint import Checkpoint
from edgevl.checkpoint.side_files import copy_side_files
from edgevl.errors import BoardError
from edgevl.loading import locate, model_name, open_checkpoint
from edgevl.version import __version__
from edgevl.work import (
    DONE,
    MAKING,
    Progress,
    WorkDirectory,
    check_disk,
    check_target,
    identity,
    opened,
    publish,
)

#: The finished directory in the work directory, before it is moved to its place.
MADE = "model"
#: Tiles that a picture is cut into on a board, which has room for few image tokens.
MAX_TILES = 1
#: Products that Pulsar2 is given, and those that it makes.
ONNX, CALIBRATION, CONFIG, TEXT, MODEL_CONFIG = (
    "vision.onnx",
    "calibration.tar",
    "pulsar2-vision.json",
    "text-model",
    "model-config.json",
)
VISION, LAYERS, EMBEDDINGS = "vision", "text", "embeddings"
#: What Pulsar2 has said of itself.
ASKED = "pulsar2.json"
#: How many calibration pictures there are.
PICTURES = "pictures.json"
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
    if settings.dry_run and settings.emulate:
        raise BoardError("--dry-run and --emulate: give one of the two")
    check_target(output, BoardError)
    pulsar2 = None if settings.dry_run or settings.emulate else find(settings.pulsar2)
    path = locate(model)
    with open_checkpoint(path) as checkpoint:
        check(checkpoint, settings)
        check_disk(output, disk_bytes(checkpoint, settings) - _written(output), BoardError)
        begun: dict[str, object] = {
            "edgevl": __version__,
            "checkpoint": checkpoint.fingerprint(),
        }
        begun |= {
            name: identity(value) for name, value in asdict(settings).items() if name not in _FREE
        }
        with opened(output, begun, settled=f"{DONE}/*", error=BoardError) as work:
            compilation = _Compilation(checkpoint, settings, work, progress)
            board = {"model": model_name(model, path)} | compilation.board(pulsar2)
            board["seconds"] = round(work.elapsed_s(), 1)
            made = compilation.assemble(board)
            publish(made, output)
    return board


class _Compilation:
    """One compilation; each step finds in the work directory what is done of it."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        settings: CompileSettings,
        work: WorkDirectory,
        progress: Progress,
    ) -> None:
        self._checkpoint = checkpoint
        self._settings = settings
        self._work = work
        self._progress = progress
        self._quantization = None if settings.emulate else check_weights(checkpoint)
        text = checkpoint.config.text
        self._text_files = [
            *(
                layer_file(text.model_type, settings.shape.chunk, layer)
                for layer in range(text.num_hidden_layers)
            ),
            post_file(text.model_type),
        ]
        self._vision_file = vision_file(checkpoint.config.vision.image_size)

    def board(self, pulsar2: Pulsar2 | None) -> dict[str, Any]:
        """Do everything but the assembly; return what ``board.json`` says of it."""
        settings, target = self._settings, TARGETS[self._settings.target]
        board: dict[str, Any] = {
            "edgevl": __version__,
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "target": target.name,
            "chip": target.chip,
            "npu_mode": settings.npu_mode or target.default_npu_mode,
            **asdict(settings.shape),
            "max_tiles": MAX_TILES,
            "uint8_input": settings.uint8_input,
            "weights": self._weights(),
            "post_topk": settings.post_topk,
            "compiler": "emulator" if settings.emulate else "pulsar2",
            "llm_build": None,
            "cosines": None,
            "warnings": [],
        }
        if settings.emulate:
            self._embeddings()
            self._emulate()
            return board
        asked = self._ask(pulsar2)
        board["llm_build"] = asked["llm_build"]
        if asked["version"] is not None:
            board["compiler"] = f"pulsar2 {asked['version']}"
        board["cosines"] = {"vision_onnx": self._vision_inputs(), "layers": None}
        board["warnings"] = [*self._few_pictures()]
        if not self._done(ASKED):
            with self._work.making(ASKED) as path:
                path.write_text(json.dumps(asked), "utf-8")
        self._embeddings()
        self._text_inputs()
        if pulsar2 is None:
            return board
        if self._checkpoint.has_vision:
            self._build_vision(pulsar2)
        built = self._build_text(pulsar2, asked["llm_build"])
        board["cosines"]["layers"] = built["cosines"]
        board["warnings"] += built["warnings"]
        return board

    def assemble(self, board: dict[str, Any]) -> Path:
        """Put the finished directory together, and ``files`` into ``board``: -> where it is."""
        work, settings = self._work, self._settings
        made = work.path / MADE
        shutil.rmtree(made, ignore_errors=True)  # of a run that was interrupted
        # Of a dry run nothing lies where a board's program would look for it.
        model = made / BUILD / MODEL if settings.dry_run else made
        model.mkdir(parents=True)
        copy_side_files(self._checkpoint.path, model)
        _link(work.product(EMBEDDINGS), model)
        names = [*EMBEDDING_FILES]
        if not settings.dry_run:
            for name in self._text_files:
                _link(work.product(LAYERS) / name, made)
            names += self._text_files
            if self._checkpoint.has_vision:
                vision = work.product(LAYERS if settings.emulate else VISION)
                _link(vision / self._vision_file, made)
                names.append(self._vision_file)
        board[FILES] = {}
        with self._progress("checksums") as tell:
            for name in names:
                board[FILES][name] = Content.of(model / name).to_dict()
                tell(len(board[FILES]), len(names))
        text = json.dumps(board, indent=1, ensure_ascii=False) + "\n"
        if settings.dry_run:
            self._assemble_dry(made, text)
            return made
        if not settings.emulate:
            shutil.copytree(work.path / "logs", made / "logs")
        (made / BOARD).write_text(text, "utf-8")
        return made

    def _assemble_dry(self, made: Path, board: str) -> None:
        """Add what a machine with Pulsar2 needs."""
        build = made / BUILD / DONE
        build.mkdir()
        for name in (ONNX, CALIBRATION, CONFIG, MODEL_CONFIG):
            if self._work.product(name).exists():
                _link(self._work.product(name), build)
        (build / TEXT).mkdir()
        _link(self._work.product(TEXT), build / TEXT)
        (made / BUILD / BOARD).write_text(board, "utf-8")
        (made / NOT_BUILT).write_text(NOT_BUILT_TEXT, "utf-8")
        builds: list[tuple[str, Sequence[str], Sequence[str]]] = []
        if self._checkpoint.has_vision:
            builds.append((VISION, self._vision_command(), [self._vision_file]))
        generation = self._settings.llm_build or 1
        builds.append((LAYERS, self._text_command(generation), self._text_files))
        script = made / "build.sh"
        script.write_text(build_script(builds, self._settings.pulsar2), "utf-8")
        script.chmod(0o755)

    # --- what Pulsar2 is given ---------------------------------------------------------------

    def _embeddings(self) -> None:
        if not self._done(EMBEDDINGS):
            with self._progress("embeddings") as tell, self._work.making(EMBEDDINGS) as path:
                path.mkdir()
                tell(0, 1)
                write_embeddings(self._checkpoint, path)
                tell(1, 1)

    def _vision_inputs(self) -> float | None:
        """Write the ONNX file, its configuration and pictures: -> cosine to the reference."""
        if not self._checkpoint.has_vision:
            return None
        from edgevl.boards.calibration_archive import write_calibration
        from edgevl.boards.vision_onnx import write_vision_onnx

        checkpoint, settings, work = self._checkpoint, self._settings, self._work
        config = self._vision_config()  # a mistake in it is told before the work
        if not self._done(CALIBRATION):
            with self._progress("calibration") as tell, work.making(CALIBRATION) as path:
                tell(0, 1)
                source, wanted = settings.calibration_images, settings.samples
                work.save_json(PICTURES, write_calibration(checkpoint, source, path, wanted))
                tell(1, 1)
        if not self._done(CONFIG):
            with work.making(CONFIG) as path:
                path.write_text(config, "utf-8")
        elif work.product(CONFIG).read_text("utf-8") != config:
            raise BoardError(
                f"{work.path}: was begun with another configuration than {settings.pulsar2_config} "
                "has now: undo the change to resume it, or remove it"
            )
        if not self._done(ONNX):
            with self._progress("vision") as tell, work.making(ONNX) as path:
                tell(0, 1)
                cosine = write_vision_onnx(checkpoint, path, settings.uint8_input)
                work.save_json("vision-onnx.json", cosine)
                tell(1, 1)
        return float(work.load_json("vision-onnx.json"))

    def _few_pictures(self) -> Iterator[str]:
        """Yield a warning if vision is calibrated on fewer pictures than were asked for."""
        wanted = self._settings.samples
        found = self._work.load_json(PICTURES) if self._checkpoint.has_vision else wanted
        if found < wanted:
            yield (
                f"{self._settings.calibration_images}: {found} different pictures to calibrate "
                f"on, --samples {wanted} were asked for: add some"
            )

    def _vision_config(self) -> str:
        """Return the configuration of the vision build."""
        from edgevl.boards.pulsar2_config import default_config, load_config

        settings, target = self._settings, TARGETS[self._settings.target]
        dataset = f"{DONE}/{CALIBRATION}"
        if settings.pulsar2_config is not None:
            config = load_config(settings.pulsar2_config)
            for each in config.quant.input_configs:
                each.calibration_dataset = dataset
            return config.to_json()
        return default_config(
            self._checkpoint.config,
            dataset,
            uint8_input=settings.uint8_input,
            chip=target.chip,
            npu_mode=settings.npu_mode or target.default_npu_mode,
        ).to_json()

    def _text_inputs(self) -> None:
        if not self._done(TEXT):
            with self._progress("text") as tell, self._work.making(TEXT) as path:
                path.mkdir()
                write_text_checkpoint(self._checkpoint, path, progress=tell)
        if self._checkpoint.config.text.use_qk_norm and not self._done(MODEL_CONFIG):
            with self._work.making(MODEL_CONFIG) as path:
                path.write_text(json.dumps(QK_NORM_CONFIG, indent=1) + "\n", "utf-8")

    # --- what it makes of that ---------------------------------------------------------------

    def _emulate(self) -> None:
        if self._done(LAYERS):
            return
        from edgevl.boards.emulate import Post, write_emulated

        settings = self._settings
        files = [*self._text_files]
        if self._checkpoint.has_vision:
            files.append(self._vision_file)
        with self._progress("emulated model") as tell, self._work.making(LAYERS) as path:
            path.mkdir()
            write_emulated(
                self._checkpoint,
                path,
                settings.shape,
                settings.uint8_input,
                lambda file: tell(_count(path, files), len(files)),
                target=settings.target,
                post=Post(topk=settings.post_topk),
            )
            _check_files(path, files, "the emulator's writer")

    def _ask(self, pulsar2: Pulsar2 | None) -> dict[str, Any]:
        """Return Pulsar2's ``version`` and the ``llm_build`` to use.

        Of a Pulsar2 elsewhere nothing is known; the older command is in every one.
        """
        given = self._settings.llm_build
        if pulsar2 is None:
            return {"version": None, "llm_build": given or 1}
        stop_left_over(pulsar2, self._work)
        if self._done(ASKED):
            found: dict[str, Any] = self._work.load_json(f"{DONE}/{ASKED}")
            return found
        name = version(pulsar2, self._work.path)
        generation = given or newest_llm_build(pulsar2, name, self._work.path)
        check_decode_step(self._settings, generation)
        return {"version": name, "llm_build": generation}

    def _build_vision(self, pulsar2: Pulsar2) -> None:
        if self._done(VISION):
            return
        log = self._work.path / "logs" / "vision.log"
        with self._work.making(VISION) as path:
            path.mkdir()
            command = self._vision_command()
            run(pulsar2, command, self._work, log, self._progress, name="Pulsar2, vision")
            usual = path / "compiled.axmodel"  # what versions without --output_name call it
            if usual.is_file() and not (path / self._vision_file).exists():
                usual.rename(path / self._vision_file)
            _check_files(path, [self._vision_file], "Pulsar2", log)

    def _build_text(self, pulsar2: Pulsar2, generation: int) -> dict[str, Any]:
        """Build the layers: -> ``cosines`` of those that were checked, and ``warnings``."""
        if not self._done(LAYERS):
            log = self._work.path / "logs" / "text.log"
            with self._work.making(LAYERS) as path:
                path.mkdir()
                build = run(
                    pulsar2,
                    self._text_command(generation),
                    self._work,
                    log,
                    self._progress,
                    name="Pulsar2, layers",
                    written=lambda: (_count(path, self._text_files), len(self._text_files)),
                    is_over=lambda log: (
                        log.checked or (log.built and self._settings.check_level == 0)
                    ),
                )
                _check_files(path, self._text_files, "Pulsar2", log)
                self._work.save_json("text.json", _findings(build, self._settings.check_level))
        found: dict[str, Any] = self._work.load_json("text.json")
        return found

    def _vision_command(self) -> list[str]:
        return vision_command(
            self._settings,
            self._checkpoint.config.vision.image_size,
            f"{DONE}/{ONNX}",
            f"{DONE}/{CONFIG}",
            f"{MAKING}/{VISION}",
        )

    def _text_command(self, generation: int) -> list[str]:
        return text_command(
            self._settings,
            generation,
            f"{DONE}/{TEXT}",
            f"{MAKING}/{LAYERS}",
            quantized=self._quantization is not None,
            model_config=f"{DONE}/{MODEL_CONFIG}" if self._done(MODEL_CONFIG) else None,
        )

    def _weights(self) -> str:
        """Return what the decoder's weights are stored in."""
        if self._settings.emulate:
            return "bf16"
        if self._quantization is not None:
            return f"gptq-{self._quantization.bits}"
        return self._settings.weight_type or DEFAULT_WEIGHT_TYPE

    def _done(self, name: str) -> bool:
        return self._work.product(name).exists()


def _findings(build: BuildLog, check_level: int) -> dict[str, Any]:
    """Return what a build of the layers said of them, as JSON can have it."""
    warnings = list(low_cosines(build.cosines))
    if check_level and not build.checked:
        warnings.append("Pulsar2 wrote all layers, but its check of them failed: see logs/text.log")
    cosines = {name: value if value == value else None for name, value in build.cosines.items()}
    return {"cosines": cosines, "warnings": warnings}


def _check_files(
    directory: Path, names: Sequence[str], writer: str, log: Path | None = None
) -> None:
    """Raise a BoardError unless all files are there with something in them."""
    missing = [
        name
        for name in names
        if not (directory / name).is_file() or not (directory / name).stat().st_size
    ]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        where = f", see {log}" if log is not None else ""
        raise BoardError(f"{writer} has ended without writing {missing[0]}{more}{where}")


def _count(directory: Path, names: Sequence[str]) -> int:
    return sum((directory / name).is_file() for name in names)


def _link(source: Path, directory: Path) -> None:
    """Put a file, or the files of a directory, into another without copying what can be shared."""
    if source.is_dir():
        for path in sorted(source.iterdir()):
            _link(path, directory)
        return
    try:
        os.link(source, directory / source.name)
    except OSError:  # a file system without links
        shutil.copyfile(source, directory / source.name)


def _written(output: Path) -> int:
    """Return the bytes that an interrupted run has written."""
    partial = output.resolve().with_name(output.resolve().name + ".partial")
    return sum(path.stat().st_size for path in partial.rglob("*") if path.is_file())
