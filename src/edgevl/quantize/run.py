"""The whole of a quantization: from a checkpoint to a quantized one with its report."""

from __future__ import annotations

import gc
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from edgevl.checkpoint import Checkpoint
from edgevl.engine.base import Floats
from edgevl.evaluate import read_questions
from edgevl.evaluate.bench import peak_rss_bytes
from edgevl.loading import locate, model_name, open_checkpoint
from edgevl.machine import this_machine
from edgevl.quantize.calibration import CalibrationSet, collect, saved
from edgevl.quantize.layers import check_sizes, packed_tensors, quantize_layers
from edgevl.quantize.measure import Cost, measure
from edgevl.quantize.output import Packed, part_bytes, write_checkpoint
from edgevl.quantize.report import write_report
from edgevl.quantize.settings import QuantizationError, QuantizationSettings, quantization_fields
from edgevl.quantize.verify import compare_accuracy, compare_answers, load, verify
from edgevl.quantize.vision import VisionQuantization, quantize_vision
from edgevl.version import __version__
from edgevl.work import Progress, WorkDirectory, check_target, identity, opened, publish

#: The finished checkpoint in the work directory, before it is moved to its place.
MADE = "checkpoint"
#: The tensors of a finished layer, and the state after it.
SETTLED = "*-*.safetensors"
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
            report: dict[str, Any] = {"model": model_name(model, path)}
            report |= _Run(checkpoint, settings, work, progress).report(vqa)
            report["settings"] = {
                name: {"value": _shown(value), "source": (origins or {}).get(name, "default")}
                for name, value in {**asdict(settings), "vqa": vqa}.items()
            }
            report["seconds"] = work.elapsed_s()
            report["peak_rss_bytes"] = peak_rss_bytes()
            write_report(report, work.path / MADE)
            publish(work.path / MADE, output)
    return report


def check(checkpoint: Checkpoint, settings: QuantizationSettings) -> None:
    """Refuse what cannot be quantized, before any work.

    Raises:
        QuantizationError: names what it is and the fix.
    """
    if settings.text == settings.vision == "none":
        raise QuantizationError("--text none and --vision none leave nothing to quantize")
    if checkpoint.config.quantization or not checkpoint.has_vision:
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
    """One quantization; each stage finds in the work directory what is done of it."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        settings: QuantizationSettings,
        work: WorkDirectory,
        progress: Progress,
    ) -> None:
        self._checkpoint = checkpoint
        self._settings = settings
        self._work = work
        self._progress = progress

    def report(self, vqa: Path | None) -> dict[str, Any]:
        """Do everything; return the parts of the report that say what came of it."""
        checkpoint, settings = self._checkpoint, self._settings
        calibration = self._calibration()
        report: dict[str, Any] = {
            "edgevl": __version__,
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "machine": {"cpu": this_machine().cpu, "threads": torch.get_num_threads()},
            "calibration": calibration.summary(),
        }
        smoothed: Mapping[str, Floats] = {}
        keep: tuple[str, ...] = ()
        packed: Packed = {}
        cost = None
        if settings.vision != "none":
            vision = self._vision(calibration)
            smoothed, keep = vision.tensors, vision.keep
            report["vision"] = {"format": settings.vision, **vision.summary()}
        if settings.text != "none":
            report["text"], cost = self._text(calibration)
            report["perplexity"], report["conversations"] = cost.perplexity, cost.conversations
            packed = packed_tensors(self._work, checkpoint.config.text.num_hidden_layers)
        made = self._write(packed, smoothed, keep)
        verify(made, packed, calibration.heldout[0], cost.logits if cost else None)
        with Checkpoint.open(made) as quantized:
            report["sizes"] = {
                "original_bytes": checkpoint.stored_bytes,
                "quantized_bytes": quantized.stored_bytes,
                **part_bytes(quantized),
            }
        path, examples = checkpoint.path, calibration.examples
        with self._progress("examples") as progress:
            report["examples"] = compare_answers(path, made, examples, progress)
        if vqa is not None:
            with self._progress("questions") as progress:
                report["vqa"] = compare_accuracy(path, made, vqa, progress)
        return report

    def _calibration(self) -> CalibrationSet:
        settings = self._settings
        if settings.method == "rtn" or settings.text == "none":
            settings = replace(settings, samples=min(settings.samples, FEW_SAMPLES))
        found = saved(self._checkpoint, settings, self._work.path)
        if found is not None:
            return found
        # In the formats that it usually runs in: what it says is its own, and comes sooner.
        model = load(self._checkpoint.path)
        with self._progress("conversations") as progress:
            calibration = collect(model, settings, self._work.path, progress)
        del model
        gc.collect()  # the engine's weights go before the layers come
        return calibration

    def _vision(self, calibration: CalibrationSet) -> VisionQuantization:
        with self._progress("vision") as progress:
            return quantize_vision(
                self._checkpoint,
                calibration.tiles,
                calibration.heldout_tiles,
                self._settings.device,
                progress,
                self._work,
            )

    def _text(self, calibration: CalibrationSet) -> tuple[dict[str, Any], Cost]:
        """Quantize the text model: -> its part of the report, and what it cost."""
        checkpoint, settings = self._checkpoint, self._settings
        heldout = calibration.heldout
        with self._progress("text") as progress, bfloat16_products():
            states, rows = quantize_layers(
                checkpoint, settings, calibration.samples, heldout, self._work, progress
            )
        device = torch.device(settings.device)
        cost = measure(checkpoint, states, heldout, device)
        worst = sorted(rows, key=lambda row: row["error"], reverse=True)[:WORST]
        part = {"format": settings.text, "method": settings.method, "layers": rows, "worst": worst}
        return part, cost

    def _write(self, packed: Packed, smoothed: Mapping[str, Floats], keep: Sequence[str]) -> Path:
        """Write the checkpoint into the work directory: -> where it is."""
        made = self._work.path / MADE
        shutil.rmtree(made, ignore_errors=True)  # of a run that was interrupted
        made.mkdir()
        fields = quantization_fields(self._settings, keep, __version__)
        with self._progress("writing") as progress:
            write_checkpoint(self._checkpoint, made, packed, smoothed, fields, progress)
        return made


def _shown(value: object) -> object:
    """Return a setting as JSON can have it."""
    if isinstance(value, tuple):
        return [str(item) for item in value]
    return value if value is None or isinstance(value, (str, int)) else str(value)
