"""The whole of a quantization: from a checkpoint to a quantized one with its report."""

from __future__ import annotations

import gc
import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from datetime import datetime, timezone
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from edgevl.checkpoint import Checkpoint
from edgevl.engine.base import Floats
from edgevl.evaluate import read_questions
from edgevl.evaluate.bench import peak_rss_bytes
from edgevl.loading import locate, model_name, open_checkpoint
from edgevl.machine import this_machine
from edgevl.quantize.calibration import (
    CalibrationSet,
    collect,
    collection_key,
    load_set,
    save_set,
)
from edgevl.quantize.output import (
    Packed,
    compare_accuracy,
    compare_answers,
    load,
    part_bytes,
    quantization_fields,
    verify,
    write_checkpoint,
)
from edgevl.quantize.report import write_report
from edgevl.quantize.settings import QuantizationError, QuantizationSettings
from edgevl.quantize.text import check_sizes, measure, packed_tensors, quantize_layers
from edgevl.quantize.vision import SmoothedTensors, quantize_vision
from edgevl.version import __version__
from edgevl.work import (
    Progress,
    Step,
    Tell,
    WorkDirectory,
    check_target,
    identity,
    opened,
    publish,
)

#: Products of the steps, besides those whose names say what they were made from.
VISION, TEXT, MADE, EXAMPLES = "vision", "text", "checkpoint", "examples"
#: In the products of vision and of text.
FACTORS, KEEP, LOGITS = "factors.safetensors", "keep.json", "logits.safetensors"
#: The tensors of a finished layer, and the state after it.
SETTLED = "*/*/*-*.safetensors"
#: Sequences that are enough where only vision is calibrated, and everything measured.
FEW_SAMPLES = 16
#: Linear layers that the report calls the worst.
WORST = 10


def quantize_checkpoint(
    model: str | Path,
    output: str | Path,
    settings: QuantizationSettings | None = None,
    *,
    origins: Mapping[str, str] | None = None,
    vqa: Path | None = None,
    progress: Progress = lambda name: nullcontext(lambda done, total: None),
) -> dict[str, Any]:
    """Quantize a checkpoint, measure what it cost, and write both.

    What is done lies in ``output`` + ".partial" until all is; the same call resumes there.

    Args:
        model: ``tiny``, a checkpoint directory, or a Hub id.
        output: directory to write; it does not exist, or is empty.
        settings: how to quantize.
        origins: where settings come from, for the report; the others are defaults.
        vqa: a file of questions on which the original and the result are compared.
        progress: told of every stretch of work.

    Returns:
        The report, as ``report.json`` has it.

    Raises:
        CheckpointError: ``model`` is missing, malformed, or not supported.
        QuantizationError: it cannot be quantized so, or ``output`` cannot be written.
        BoardError: ``model`` is compiled for a board.
        EdgeVLError: pictures, texts or questions cannot be read, or the memory does not suffice.
    """
    settings = settings or QuantizationSettings()
    output = Path(output)
    check_target(output, QuantizationError)
    if vqa is not None:
        read_questions(vqa)  # a mistake in it is told before the work
    path = locate(model)
    with open_checkpoint(path) as checkpoint, torch.no_grad():
        check(checkpoint, settings)
        begun = {"edgevl": __version__, "checkpoint": checkpoint.fingerprint()}
        begun |= {name: identity(value) for name, value in asdict(settings).items()}
        with opened(output, begun, settled=SETTLED, error=QuantizationError) as work:
            report: dict[str, Any] = {
                "model": model_name(model, path),
                "edgevl": __version__,
                "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
                "machine": {"cpu": this_machine().cpu, "threads": torch.get_num_threads()},
            }
            for step in _Run(checkpoint, settings, work).steps(vqa):
                report |= work.do(step, progress)
            report["settings"] = {
                name: {"value": value, "source": (origins or {}).get(name, "default")}
                for name, value in {**asdict(settings), "vqa": vqa}.items()
            }
            report["seconds"] = work.elapsed_s()
            report["peak_rss_bytes"] = peak_rss_bytes()
            report = write_report(report, work.product(MADE))
            publish(work.product(MADE), output)
    return report


def check(checkpoint: Checkpoint, settings: QuantizationSettings) -> None:
    """Refuse what cannot be quantized, before any work.

    Raises:
        QuantizationError: names what it is and the fix.
    """
    if settings.text == settings.vision == "none":
        raise QuantizationError("--text none and --vision none leave nothing to quantize")
    if checkpoint.config.quantization:
        raise QuantizationError(
            f"{checkpoint.path}: is quantized already; give the original checkpoint"
        )
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise QuantizationError("--device cuda: PyTorch finds no CUDA GPU here; use --device cpu")
    if settings.text != "none":
        check_sizes(checkpoint, settings)


@contextmanager
def bfloat16_products() -> Iterator[None]:
    """Let processors that can multiply float32 matrices as bfloat16, which takes half the time.

    Sums stay float32.
    """
    # Every length of a sequence makes primitives of its own, of a megabyte each; oneDNN would keep
    # 1,024 of them. It reads this when it is first used.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class _Run:
    """One quantization, as a list of steps.

    Each takes what it needs from the products before, and finds out a part of the report.
    """

    def __init__(
        self, checkpoint: Checkpoint, settings: QuantizationSettings, work: WorkDirectory
    ) -> None:
        self._checkpoint = checkpoint
        self._settings = settings
        self._work = work
        calibrated = settings
        if settings.method == "rtn" or settings.text == "none":
            calibrated = replace(settings, samples=min(settings.samples, FEW_SAMPLES))
        self._calibrated = calibrated
        self._samples = f"calibration-{collection_key(checkpoint, calibrated)}"

    def steps(self, vqa: Path | None) -> Iterator[Step]:
        """Yield all that is to be done; ``vqa`` is a file of questions to compare on."""
        yield Step(self._samples, self._collect, "conversations")
        if self._settings.vision != "none":
            yield Step(VISION, self._quantize_vision, "vision", goes_on=True)
        if self._settings.text != "none":
            yield Step(TEXT, self._quantize_text, "text", goes_on=True)
        yield Step(MADE, self._write, "writing")
        yield Step(EXAMPLES, self._compare_answers, "examples")
        if vqa is not None:
            digest = hashlib.sha256(vqa.read_bytes()).hexdigest()  # another run may name another
            compare = partial(self._compare_accuracy, vqa)
            yield Step(f"questions-{digest[:16]}", compare, "questions")

    @cached_property
    def _calibration(self) -> CalibrationSet:
        return load_set(self._work.product(self._samples), self._checkpoint)

    def _collect(self, path: Path, tell: Tell) -> dict[str, Any]:
        # In the formats that it usually runs in: what it says is its own, and comes sooner.
        model = load(self._checkpoint.path)
        calibration = collect(model, self._calibrated, self._work.path, tell)
        del model
        gc.collect()  # the engine's weights go before the layers come
        save_set(path, calibration)
        return {"calibration": calibration.summary()}

    def _quantize_vision(self, path: Path, tell: Tell) -> dict[str, Any]:
        work, calibration = WorkDirectory(path), self._calibration
        vision = quantize_vision(
            self._checkpoint,
            calibration.tiles,
            calibration.heldout_tiles,
            self._settings.device,
            tell,
            work,
        )
        work.save(FACTORS, vision.tensors.factors)
        work.save_json(KEEP, vision.keep)
        return {"vision": {"format": self._settings.vision, **vision.summary()}}

    def _quantize_text(self, path: Path, tell: Tell) -> dict[str, Any]:
        checkpoint, settings, heldout = self._checkpoint, self._settings, self._calibration.heldout
        work = WorkDirectory(path)
        with bfloat16_products():
            states, rows = quantize_layers(
                checkpoint, settings, self._calibration.samples, heldout, work, tell
            )
        cost, logits = measure(checkpoint, states, heldout, torch.device(settings.device))
        work.save(LOGITS, {"logits": logits})
        worst = sorted(rows, key=lambda row: row["error"], reverse=True)[:WORST]
        return {
            "text": {
                "format": settings.text,
                "method": settings.method,
                "layers": rows,
                "worst": worst,
            },
            **cost,
        }

    def _write(self, path: Path, tell: Tell) -> dict[str, Any]:
        """Write the checkpoint, and see that it is what was meant."""
        checkpoint, settings, work = self._checkpoint, self._settings, self._work
        smoothed: Mapping[str, Floats] = {}
        keep: Sequence[str] = ()
        packed: Packed = {}
        logits = None
        if settings.vision != "none":
            vision = WorkDirectory(work.product(VISION))
            smoothed = SmoothedTensors(checkpoint, vision.load(FACTORS))
            keep = vision.load_json(KEEP)
        if settings.text != "none":
            text = WorkDirectory(work.product(TEXT))
            packed = packed_tensors(text, checkpoint.config.text.num_hidden_layers)
            logits = text.load(LOGITS)["logits"]
        path.mkdir()
        fields = quantization_fields(settings, keep, __version__)
        write_checkpoint(checkpoint, path, packed, smoothed, fields, tell)
        verify(path, packed, self._calibration.heldout[0], logits)
        with Checkpoint.open(path) as quantized:
            sizes = {
                "original_bytes": checkpoint.stored_bytes,
                "quantized_bytes": quantized.stored_bytes,
                **part_bytes(quantized),
            }
        return {"sizes": sizes}

    def _compare_answers(self, path: Path, tell: Tell) -> dict[str, Any]:
        path.touch()  # what is found out is all there is
        made = self._work.product(MADE)
        examples = self._calibration.examples
        return {"examples": compare_answers(self._checkpoint.path, made, examples, tell)}

    def _compare_accuracy(self, vqa: Path, path: Path, tell: Tell) -> dict[str, Any]:
        path.touch()
        made = self._work.product(MADE)
        return {"vqa": compare_accuracy(self._checkpoint.path, made, vqa, tell)}
