"""What each format of a trained checkpoint costs, on English, on Chinese and on code.

    python benchmarks/real_weights.py CHECKPOINT --work DIR

CHECKPOINT is unquantized. Texts come from Debian's packages, and what is calibrated on is of other
packages or files than what is measured on. The text model is quantized by GPTQ on them alone, as
pictures mean nothing to a checkpoint whose projector is not trained. All formats go over the same
windows together, beside the checkpoint in bfloat16. What has been made is kept in DIR.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

import edgevl
from edgevl.checkpoint import Checkpoint
from edgevl.checkpoint.architecture import EMBEDDING
from edgevl.evaluate import Comparison, text_windows

sys.path.insert(0, str(Path(__file__).resolve().parent / "quantizers"))

from corpus import make_corpus

#: Packages, and the files inside them: what is calibrated on and what is measured on.
TEXTS: Mapping[str, Mapping[str, Mapping[str, str]]] = {
    "English": {
        "calibration": {"debian-reference-en": "usr/share/debian-reference/ch*.en.html"},
        "heldout": {"debian-handbook": "usr/share/doc/debian-handbook/html/en-US/*.html"},
    },
    "Chinese": {
        "calibration": {"debian-reference-zh-cn": "usr/share/debian-reference/ch*.zh-cn.html"},
        "heldout": {"debian-handbook": "usr/share/doc/debian-handbook/html/zh-CN/*.html"},
    },
    "code": {
        "calibration": {"libpython3.11-stdlib": "usr/lib/python3.11/*.py"},
        "heldout": {"libpython3.11-stdlib": "usr/lib/python3.11/asyncio/*.py"},
    },
}
#: Tokens of a sequence to calibrate on, and of a window to measure on.
SEQUENCE, WINDOW = 512, 2048
#: Positions whose logits are held at once, of every model.
CHUNK = 64


@dataclass(frozen=True)
class Row:
    """A format, and the one that it is compared with.

    Attributes:
        name: in the table.
        model: which checkpoint.
        options: of `edgevl.load`.
        reference: name of the row that this is compared with.
    """

    name: str
    model: Path
    options: Mapping[str, Any]
    reference: str = "bf16"


def main() -> None:
    """Collect, quantize, measure, and print a table of each text."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT")
    parser.add_argument("--work", type=Path, required=True, metavar="DIR")
    parser.add_argument("--windows", type=int, default=2, help=f"of {WINDOW} tokens, of each text")
    parser.add_argument("--sequences", type=int, default=48, help="to calibrate on, of all texts")
    parser.add_argument("--only", help="rows to measure, such as 'auto;int8'")
    parser.add_argument("--gptq", type=Path, help="another GPTQ checkpoint, instead of our own")
    parser.add_argument("--collect-only", action="store_true", help="write the texts' tokens alone")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    texts = collect(arguments.work)
    tokens = calibration(arguments.checkpoint, texts, arguments.sequences)
    np.save(arguments.work / "calibration.npy", tokens)
    if arguments.collect_only:
        return
    quantized = arguments.gptq or arguments.work / f"gptq-{len(tokens)}"
    chosen = rows(arguments.checkpoint, quantized, arguments.only)
    if any(row.model == quantized for row in chosen) and not quantized.exists():
        quantize(arguments.checkpoint, tokens, quantized)
    models = {
        row.name: edgevl.load(row.model, **{"exact_logits": True, **row.options}) for row in chosen
    }
    for name in TEXTS:
        windows = text_windows(models["bf16"], texts[f"heldout-{name}"], WINDOW, arguments.windows)
        print(f"\n{name}, {sum(len(window) - 1 for window in windows)} tokens\n")
        print("| | perplexity | beside | same next token | KL divergence | total variation |")
        print("|---|---|---|---|---|---|")
        for line in lines(chosen, measure(models, chosen, windows)):
            print(line, flush=True)


def collect(work: Path) -> dict[str, str]:
    """Return the texts of each part; of the Chinese, which is not all translated, what is."""
    parts = {f"{part}-{name}": each[part] for name, each in TEXTS.items() for part in each}
    texts = {part: path.read_text() for part, path in make_corpus(work, parts).items()}
    for part in ("calibration-Chinese", "heldout-Chinese"):
        paragraphs = texts[part].split("\n\n")
        texts[part] = "\n\n".join(each for each in paragraphs if is_chinese(each))
    return texts


def is_chinese(paragraph: str) -> bool:
    """Tell whether three of ten characters are Chinese; names and commands are among them."""
    return sum("\u4e00" <= letter <= "\u9fff" for letter in paragraph) >= 0.3 * len(paragraph)


def calibration(checkpoint: Path, texts: Mapping[str, str], count: int) -> NDArray[np.int32]:
    """Return sequences to calibrate on, as many of each text: int32 [N, T]."""
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    each = count // len(TEXTS)
    parts = []
    for name in TEXTS:
        ids = tokenizer.encode(texts[f"calibration-{name}"]).ids
        parts.append(np.array(ids[: each * SEQUENCE], np.int32).reshape(each, SEQUENCE))
    return np.concatenate(parts)


def quantize(checkpoint: Path, tokens: NDArray[np.int32], output: Path) -> None:
    """Write the checkpoint with its text model in GPTQ INT4."""
    from edgevl.quantize import QuantizationSettings
    from edgevl.quantize.calibration import Sample
    from quantize_text import quantize_text

    work, partial = output.with_suffix(".layers"), output.with_suffix(".partial")
    work.mkdir(exist_ok=True)  # a run that was stopped goes on
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    with Checkpoint.open(checkpoint) as opened:
        table, pictures = opened.tensor(EMBEDDING), np.zeros(tokens.shape[1], np.bool_)
        samples = [Sample(row.astype(np.int64), table[row], pictures, 0) for row in tokens]
        quantize_text(opened, QuantizationSettings(), samples, work, partial)
    partial.rename(output)
    shutil.rmtree(work)


def rows(checkpoint: Path, quantized: Path, only: str | None) -> list[Row]:
    """Return what is measured, each after what it is compared with."""
    int8 = {"kv_cache": "int8"}
    chat = {"exact_logits": False}
    found = [
        Row("bf16", checkpoint, {"precision": "bf16"}),
        Row("auto", checkpoint, {}),
        Row("int8", checkpoint, {"precision": "int8"}),
        Row("int4, rounded to nearest", checkpoint, {"precision": "int4"}),
        Row("GPTQ INT4", quantized, {}),
        Row("GPTQ INT4, in bfloat16", quantized, {"precision": "bf16"}),
        Row("bf16, INT8 cache", checkpoint, {"precision": "bf16", **int8}),
        Row("auto, INT4 head", checkpoint, chat, "auto"),
        Row("GPTQ INT4, INT4 head", quantized, chat, "GPTQ INT4"),
    ]
    if only is None:
        return found
    names = {"bf16", *only.split(";")}
    names |= {row.reference for row in found if row.name in names}
    if unknown := names - {row.name for row in found}:
        raise SystemExit(f"{unknown} unknown; there are {[row.name for row in found]}")
    return [row for row in found if row.name in names]


def measure(
    models: Mapping[str, edgevl.Model], chosen: list[Row], windows: list[NDArray[np.int64]]
) -> dict[str, tuple[Comparison, float]]:
    """Run all models over the windows: -> by row, the comparison and mean total variation."""
    comparisons = {row.name: Comparison(row.reference, row.name) for row in chosen}
    variations = dict.fromkeys(comparisons, 0.0)
    sequences = {name: model.engine.new_sequence() for name, model in models.items()}
    for window in windows:
        for sequence in sequences.values():
            sequence.rewind(0)
        for begin in range(0, len(window) - 1, CHUNK):
            next_ids = window[begin + 1 : begin + 1 + CHUNK]
            block = window[begin : begin + len(next_ids)].tolist()
            logits = {
                name: model.engine.extend(sequences[name], block).copy()
                for name, model in models.items()
            }
            for row in chosen:
                pair = logits[row.reference], logits[row.name]
                comparisons[row.name].add(*pair, next_ids)
                variations[row.name] += total_variation(*pair)
    return {
        name: (comparison, variations[name] / comparison.model.tokens)
        for name, comparison in comparisons.items()
    }


def total_variation(one: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    """Return the sum, over positions [T, V], of half the L1 distance of two distributions."""
    first, second = (np.exp(logits - logits.max(axis=1, keepdims=True)) for logits in (one, other))
    first /= first.sum(axis=1, keepdims=True)
    second /= second.sum(axis=1, keepdims=True)
    return float(np.abs(first - second).sum(dtype=np.float64) / 2)


def lines(chosen: list[Row], measured: Mapping[str, tuple[Comparison, float]]) -> Iterator[str]:
    """Yield a line of the table for each row."""
    for row in chosen:
        comparison, variation = measured[row.name]
        perplexity = comparison.model.perplexity
        if row.reference == row.name:
            yield f"| {row.name} | {perplexity:.3f} | | | | |"
            continue
        change = perplexity / comparison.reference.perplexity - 1
        yield (
            f"| {row.name} | {perplexity:.3f} | {row.reference} {change:+.1%} "
            f"| {comparison.token_agreement:.1%} | {comparison.kl_divergence:.4f} "
            f"| {variation:.3f} |"
        )


if __name__ == "__main__":
    main()
