"""The steps of a compilation: a run does them, resumes at them, and prints ``build.sh`` from them.

They are made in an order in which each finds there what it needs. A step of Pulsar2 is its command
line, in the work directory, and the files that it is to write.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgevl.axera.ends import EMBEDDING_FILES
from edgevl.axera.layout import layer_file, post_file, vision_file
from edgevl.boards import pulsar2
from edgevl.boards.pulsar2 import Pulsar2
from edgevl.boards.settings import DEFAULT_WEIGHT_TYPE, CompileSettings
from edgevl.boards.text_checkpoint import write_embeddings, write_text_checkpoint
from edgevl.checkpoint import Checkpoint, GPTQConfig
from edgevl.errors import BoardError
from edgevl.work import DONE, MAKING, Progress, Step, Tell, WorkDirectory

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
#: What ``--model_config`` says of models that normalise queries and keys, as Qwen3 does.
QK_NORM_CONFIG = {"use_qk_norm": True, "qk_norm_after_rope": False}


@dataclass(frozen=True)
class BoardStep(Step):
    """A step of a compilation.

    Attributes:
        files: the product's files that are part of the compiled model; without any, the product is
            something that Pulsar2 reads.
        arguments: Pulsar2's, where it makes the product.
    """

    files: Sequence[str] = ()
    arguments: Sequence[str] = ()


@dataclass(frozen=True)
class Compilation:
    """What the steps of one compilation work with, all of it checked.

    Attributes:
        checkpoint: what is compiled.
        settings: how.
        quantization: of its text, where Pulsar2 compiles it.
        work: where to.
        progress: told of every stretch of work.
    """

    checkpoint: Checkpoint
    settings: CompileSettings
    quantization: GPTQConfig | None
    work: WorkDirectory
    progress: Progress

    def ask(self, program: Pulsar2 | None) -> dict[str, Any]:
        """Return Pulsar2's ``version``, and the ``llm_build`` to use; None without Pulsar2.

        Of a Pulsar2 elsewhere nothing is known; the older command is in every one.
        """
        given = self.settings.llm_build
        if program is None:
            return {"version": None, "llm_build": None if self.settings.emulate else given or 1}
        pulsar2.stop_left_over(program, self.work)
        if self.work.is_done(ASKED):
            found: dict[str, Any] = json.loads(self.work.product(ASKED).read_text("utf-8"))
            return found
        version = pulsar2.version(program, self.work.path)
        newest = given or pulsar2.newest_llm_build(program, version, self.work.path)
        return {"version": version, "llm_build": newest}

    def steps(self, program: Pulsar2 | None, generation: int | None) -> Iterator[BoardStep]:
        """Yield all steps; nothing is done yet, but mistakes in settings are found.

        Args:
            program: does those that have arguments; None if another machine does.
            generation: which of Pulsar2's commands is for text; None without Pulsar2.

        Raises:
            BoardError: the configuration of the vision build cannot be, or Pulsar2 lacks an option.
        """
        checkpoint, settings, config = self.checkpoint, self.settings, self.checkpoint.config
        text = config.text
        layers = range(text.num_hidden_layers)
        files = [layer_file(text.model_type, settings.chunk, layer) for layer in layers]
        files.append(post_file(text.model_type))
        vision = [vision_file(config.vision.image_size)] * checkpoint.has_vision
        embeddings = BoardStep(
            EMBEDDINGS,
            _at_once(lambda path: write_embeddings(checkpoint, path)),
            "embeddings",
            files=EMBEDDING_FILES,
        )
        if generation is None:
            yield embeddings
            yield self._emulated([*files, *vision])
            return
        if vision:
            from edgevl.boards.vision import write_calibration, write_vision_onnx

            pictures, samples = settings.calibration_images, settings.samples
            calibrate = _at_once(
                lambda path: write_calibration(checkpoint, pictures, path, samples)
            )
            draw = _at_once(lambda path: write_vision_onnx(checkpoint, path, settings.uint8_input))
            yield BoardStep(CALIBRATION, calibrate, "calibration")
            yield _written(CONFIG, self._vision_config())
            yield BoardStep(ONNX, draw, "vision")
        yield embeddings
        yield BoardStep(
            TEXT, lambda path, tell: write_text_checkpoint(checkpoint, path, progress=tell), "text"
        )
        if text.use_qk_norm:
            yield _written(MODEL_CONFIG, json.dumps(QK_NORM_CONFIG, indent=1) + "\n")
        if vision:
            yield self._build(program, VISION, "vision", vision, self._vision_arguments())
        arguments = self._text_arguments(generation)
        yield self._build(program, LAYERS, "layers", files, arguments)

    def _vision_arguments(self) -> list[str]:
        """Return Pulsar2's arguments that compile the vision encoder."""
        return [
            "build",
            *("--input", f"{DONE}/{ONNX}"),
            *("--config", f"{DONE}/{CONFIG}"),
            *("--output_dir", f"{MAKING}/{VISION}"),
            *("--output_name", vision_file(self.checkpoint.config.vision.image_size)),
            *("--npu_mode", self.settings.cores),
            *("--target_hardware", self.settings.chip.chip),
        ]

    def _text_arguments(self, generation: int) -> list[str]:
        """Return Pulsar2's arguments that compile the text model, with its older or newer command.

        Raises:
            BoardError: the older command has no steps of decoding.
        """
        settings = self.settings
        command = ["llm_build" if generation == 1 else "llm_build2"]
        command += ["--input_path", f"{DONE}/{TEXT}", "--output_path", f"{MAKING}/{LAYERS}"]
        command += ["--hidden_state_type", "bf16"]
        if generation == 1:
            if settings.decode_step is not None:
                raise BoardError(
                    f"--decode-step {settings.decode_step}: llm_build has none; give --llm-build 2 "
                    "and a Pulsar2 that has llm_build2, from 6.0 on"
                )
            command += ["--prefill_len", str(settings.chunk)]
            command += ["--kv_cache_len", str(settings.context)]
            for history in settings.shape.histories()[1:]:
                command += ["--last_kv_cache_len", str(history)]
        else:
            command += ["--prefill_len", str(settings.max_prefill + settings.chunk)]
            command += ["--prefill_step_size", str(settings.chunk)]
            command += ["--max_context", str(settings.context + 1)]
        if self.quantization is None:  # GPTQ fixes the type
            command += ["--weight_type", settings.weight_type or DEFAULT_WEIGHT_TYPE]
        if generation == 2:
            command += ["--post_weight_type", "s8"]
            if settings.decode_step is not None:
                command += ["--decode_step_size", str(settings.decode_step)]
            if self.checkpoint.config.text.use_qk_norm:
                command += ["--model_config", f"{DONE}/{MODEL_CONFIG}"]
        if settings.post_topk:
            command += ["--post_topk", str(settings.post_topk)]
        # Older versions lack the option, and take all cores.
        if settings.cores != settings.chip.default_npu_mode:
            command += ["--npu_mode", settings.cores]
        command += ["--chip", settings.chip.chip, "--check_level", str(settings.check_level)]
        return [*command, "--parallel", str(settings.parallel)]

    def _vision_config(self) -> str:
        """Return the configuration of the vision build, the same as before."""
        from edgevl.boards.pulsar2_config import default_config, load_config

        settings, dataset = self.settings, f"{DONE}/{CALIBRATION}"
        if settings.pulsar2_config is None:
            config = default_config(self.checkpoint.config, settings, dataset)
        else:
            config = load_config(settings.pulsar2_config)
            for each in config.quant.input_configs:
                each.calibration_dataset = dataset
        text = config.to_json()
        made = self.work.product(CONFIG)
        if made.exists() and made.read_text("utf-8") != text:
            raise BoardError(
                f"{self.work.path}: was begun with another configuration than "
                f"{settings.pulsar2_config} has now: undo the change to resume it, or remove it"
            )
        return text

    def _emulated(self, files: Sequence[str]) -> BoardStep:
        def make(path: Path, tell: Tell) -> None:
            from edgevl.boards.emulate import write_emulated

            write_emulated(
                self.checkpoint,
                path,
                self.settings.shape,
                self.settings.uint8_input,
                lambda file: tell(_count(path, files), len(files)),
                target=self.settings.target,
                post_topk=self.settings.post_topk,
            )

        return BoardStep(LAYERS, make, "emulated model", files=files)

    def _build(
        self,
        program: Pulsar2 | None,
        product: str,
        what: str,
        files: Sequence[str],
        arguments: Sequence[str],
    ) -> BoardStep:
        level = self.settings.check_level

        def make(path: Path, tell: Tell) -> dict[str, Any]:
            """Return ``cosines`` of layers that were checked, and ``warnings``."""
            assert program is not None  # of a dry run nothing is built
            log = self.work.path / "logs" / f"{product}.log"
            path.mkdir()
            build = pulsar2.run(
                program,
                arguments,
                self.work,
                log,
                self.progress,
                name=f"Pulsar2, {what}",
                # Of a single file, the build's own bars tell more.
                written=(lambda: (_count(path, files), len(files))) if files[1:] else None,
                checks=level > 0,
            )
            usual = path / "compiled.axmodel"  # what versions without --output_name call it
            if usual.is_file() and not (path / files[0]).exists():
                usual.rename(path / files[0])
            places = [path / name for name in files]
            missing = [
                each.name for each in places if not each.is_file() or not each.stat().st_size
            ]
            if missing:
                more = f" and {len(missing) - 1} more" if missing[1:] else ""
                raise BoardError(f"Pulsar2 has ended without writing {missing[0]}{more}, see {log}")
            warnings = list(pulsar2.low_cosines(build.cosines))
            if product == LAYERS and level and not build.checked:
                warnings.append(
                    f"Pulsar2 wrote all layers, but its check of them failed: see logs/{log.name}"
                )
            cosines = {  # JSON has no NaN
                name: value if value == value else None for name, value in build.cosines.items()
            }
            return {"cosines": cosines, "warnings": warnings}

        return BoardStep(product, make, files=files, arguments=arguments)


def _at_once(make: Callable[[Path], object]) -> Callable[[Path, Tell], object]:
    """Return a step's function of one that does not tell how far it is."""

    def told(path: Path, tell: Tell) -> object:
        tell(0, 1)
        found = make(path)
        tell(1, 1)
        return found

    return told


def _written(product: str, text: str) -> BoardStep:
    """Return the step that writes a text."""
    return BoardStep(product, lambda path, tell: path.write_text(text, "utf-8"))


def _count(directory: Path, names: Sequence[str]) -> int:
    return sum((directory / name).is_file() for name in names)
