"""The quantized checkpoint: the original's files and layout, with other tensors in them.

It is then opened as a user would open it, run, and compared with the original.
"""

from __future__ import annotations

import base64
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from edgevl import generate
from edgevl.checkpoint import Checkpoint, StoredTensor
from edgevl.checkpoint.architecture import EMBEDDING, LM_HEAD, PROJECTOR, VISION, transformers_name
from edgevl.checkpoint.directory import copy_side_files
from edgevl.checkpoint.writer import TensorSpec, encode, raw, running_total, write_safetensors
from edgevl.engine.base import Floats
from edgevl.errors import EdgeVLError
from edgevl.evaluate import Outcome, evaluate_vqa, read_questions
from edgevl.generate import Model
from edgevl.loading import load_engine
from edgevl.options import GREEDY, LoadOptions, Precision
from edgevl.quantize.calibration import Example, Sample
from edgevl.quantize.settings import BITS, QuantizationError, QuantizationSettings
from edgevl.work import Tell

#: Answers in the report, and their tokens.
EXAMPLES, EXAMPLE_TOKENS = 8, 96

#: What the engine may be off by from what was computed with the same weights, as a share of the
#: logits: rounding activations to INT8 costs some per cent, reading a wrong weight costs all.
TOLERANCE = 0.5

#: Tensors that take the place of weights: canonical name -> what their names end in -> tensor.
Packed = Mapping[str, Mapping[str, StoredTensor]]
T = TypeVar("T")


def write_checkpoint(
    checkpoint: Checkpoint,
    directory: Path,
    packed: Packed,
    changed: Mapping[str, Floats],
    config: Mapping[str, Any],
    progress: Tell = lambda done, total: None,
) -> None:
    """Write weights, configuration and side files.

    Args:
        checkpoint: the original.
        directory: where to; it exists and is empty.
        packed: the GPTQ tensors of weights.
        changed: tensors with other values, by canonical name; stored in the original's type.
        config: fields of ``config.json`` that are added or replaced.
        progress: called after each write with the bytes written and those there are.

    Raises:
        OSError: the disk is full, or a file cannot be read.
    """
    sources: dict[str, Callable[[], bytes | memoryview]] = {}
    specs = []
    for name in checkpoint.names():
        for stored, tensor, produce in _tensors(checkpoint, name, packed, changed):
            written = transformers_name(stored) if checkpoint.layout == "internvl" else stored
            specs.append(TensorSpec(written, tensor.dtype, tensor.shape))
            sources[written] = produce

    def pieces(shard: Sequence[TensorSpec]) -> Iterable[bytes | memoryview]:
        for spec in shard:
            yield sources[spec.name]()
            checkpoint.release()

    write_safetensors(directory, specs, pieces, progress=running_total(specs, progress))
    copy_side_files(checkpoint.path, directory)
    fields = {**(checkpoint.read_json("config.json") or {}), **config}
    text = json.dumps(fields, indent=2)
    (directory / "config.json").write_text(text + "\n", encoding="utf-8")


def part_bytes(checkpoint: Checkpoint) -> dict[str, int]:
    """Return what the parts take on disk, in bytes.

    Returns:
        ``text_bytes``, ``vision_bytes`` (with the projector), ``embedding_bytes`` (with the head).
    """
    sizes = {"text_bytes": 0, "vision_bytes": 0, "embedding_bytes": 0}
    for name in checkpoint.names():
        gptq = checkpoint.gptq(name)
        if gptq is not None:
            parts = [gptq.qweight, gptq.qzeros, gptq.scales, gptq.g_idx]
        else:
            parts = list(checkpoint.parts(name).values())
        part = "vision" if name.startswith((VISION, PROJECTOR)) else "text"
        part = "embedding" if name in (EMBEDDING, LM_HEAD) else part
        sizes[f"{part}_bytes"] += sum(each.data.nbytes for each in parts if each is not None)
    return sizes


def _tensors(
    checkpoint: Checkpoint, name: str, packed: Packed, changed: Mapping[str, Floats]
) -> Iterator[tuple[str, StoredTensor, Callable[[], bytes | memoryview]]]:
    """Yield stored name, type and shape, and what makes the bytes, of all parts of a tensor."""
    parts = checkpoint.parts(name)
    if name in packed:
        base = next(iter(parts)).removesuffix("weight")
        parts = {base + suffix: tensor for suffix, tensor in packed[name].items()}
    row = 0
    for stored, tensor in parts.items():
        if name in changed:
            rows = slice(row, row + tensor.shape[0])
            row = rows.stop
            yield stored, tensor, partial(_encoded, changed, name, rows, tensor.dtype)
        else:
            yield stored, tensor, partial(raw, tensor.data)


def _encoded(changed: Mapping[str, Floats], name: str, rows: slice, dtype: str) -> bytes:
    # Looked up when it is written: all at once, in float32, they would be twice the vision part.
    return encode(changed[name][rows], dtype)


def quantization_fields(
    settings: QuantizationSettings, keep: Sequence[str], version: str
) -> dict[str, Any]:
    """Return the fields that are added to ``config.json``.

    ``quantization_config`` is the one of GPTQModel and transformers. ``edgevl_quantization`` tells
    our own engines how the vision part is to run; other libraries run it in floats, as stored.

    Args:
        settings: how the model was quantized.
        keep: vision weights that are to run in bfloat16.
        version: of EdgeVL.
    """
    fields: dict[str, Any] = {}
    if settings.vision == "int8":
        fields["edgevl_quantization"] = {"vision": {"format": "int8", "keep": list(keep)}}
    if settings.text != "none":
        fields["quantization_config"] = {
            "quant_method": "gptq",
            "bits": BITS[settings.text],
            "group_size": settings.group_size,
            "sym": True,
            "desc_act": False,
            "checkpoint_format": "gptq",
            "pack_dtype": "int32",
            "lm_head": False,
            "meta": {"quantizer": [f"edgevl:{version}"], "method": settings.method},
        }
    return fields


def verify(
    made: Path,
    packed: Packed,
    sample: Sample,
    expected: Floats | None,
) -> None:
    """Load a checkpoint, compare its quantized weights with those meant, and run it.

    Args:
        made: the checkpoint.
        packed: the GPTQ tensors that it should have, by canonical name of the weight.
        sample: a sequence to run.
        expected: its logits at the last position, float32 [V], or None if they are not known.

    Raises:
        CheckpointError: it cannot be opened.
        QuantizationError: a weight differs, or what it computes.
    """
    with Checkpoint.open(made) as checkpoint:
        for name, tensors in packed.items():
            stored = checkpoint.gptq(name)
            for part, tensor in tensors.items():
                read = getattr(stored, part, None)
                if read is None or not np.array_equal(read.data, tensor.data):
                    raise QuantizationError(
                        f"{made}: {part} of {name} is not what was written; is the disk damaged?"
                    )
        checkpoint.release()
        engine = load_engine(checkpoint, LoadOptions(cache=False))
        logits = engine.prefill(engine.new_sequence(), sample.embeddings)
    if not np.isfinite(logits).all():
        raise QuantizationError(f"{made}: its logits are not finite numbers")
    if expected is not None:
        error = np.linalg.norm(logits - expected) / np.linalg.norm(expected)
        if error > TOLERANCE:
            raise QuantizationError(
                f"{made}: the engine's logits differ by {error:.0%} from what was quantized"
            )


def compare_answers(
    original: Path, made: Path, examples: Sequence[Example | None], progress: Tell
) -> list[dict[str, Any]]:
    """Ask both models about the first held-out pictures: -> ``examples`` of a report.

    ``progress`` is called after every answer with how many there are and will be.
    """
    asked = [example for example in examples if example is not None][:EXAMPLES]
    done = itertools.count(1)

    def ask(model: Model) -> list[str]:
        texts = []
        for example in asked:
            question, pictures = example.questions[0], list(example.pictures)
            options = {"max_tokens": EXAMPLE_TOKENS, "max_tiles": 1, **GREEDY}
            texts.append(model.ask(question, pictures, **options).text)
            progress(next(done), 2 * len(asked))
        return texts

    return [
        {
            "picture": next(map(_data_url, example.pictures), None),
            "question": example.questions[0],
            "original": before,
            "quantized": after,
        }
        for example, before, after in zip(asked, *_both(original, made, ask), strict=True)
    ]


def compare_accuracy(original: Path, made: Path, file: Path, progress: Tell) -> dict[str, Any]:
    """Ask both models the questions of a file: -> ``vqa`` of a report.

    ``progress`` is called after every answer with how many there are and will be.

    Raises:
        QuestionFileError: the file cannot be used.
    """
    questions = read_questions(file)
    done = itertools.count(1)

    def ask(model: Model) -> dict[str, Any]:
        def count(outcome: Outcome) -> None:
            progress(next(done), 2 * len(questions))

        return evaluate_vqa(model, questions, count).to_dict()

    before, after = _both(original, made, ask)
    return {
        "file": file.name,
        "questions": len(questions),
        "original": before["accuracy"],
        "quantized": after["accuracy"],
        "families": {
            name: {"original": accuracy, "quantized": after["families"][name]}
            for name, accuracy in before["families"].items()
        },
    }


def load(path: Path, precision: Precision = "auto") -> Model:
    """Load a model that is needed once: no packed weights are left beside it.

    Where the memory does not suffice for ``precision``, it is "auto".
    """
    try:
        return generate.load(path, precision=precision, cache=False)
    except EdgeVLError:
        if precision == "auto":
            raise
        return generate.load(path, cache=False)


def _both(original: Path, made: Path, ask: Callable[[Model], T]) -> tuple[T, T]:
    """Have the original asked, in bfloat16, and then the result: never both in memory."""
    return ask(load(original, "bf16")), ask(load(made))


def _data_url(jpeg: bytes) -> str:
    return "data:image/jpeg;base64," + base64.b64encode(jpeg).decode()
