"""What each format of a trained checkpoint costs, on English, on Chinese and on code.

    python benchmarks/real_weights.py CHECKPOINT --work DIR

CHECKPOINT is unquantized. Texts come from Debian's packages, and what is calibrated on is of other
packages or files than what is measured on. The text model is quantized by GPTQ on them alone, as
pictures mean nothing to a checkpoint whose projector is not trained. All formats go over the same
windows together, beside the checkpoint in bfloat16. What has been made is kept in DIR.
"""

from __future__ import annotations

import argparse
import math
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
from edgevl.evaluate import text_windows

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
#: Tokens of a sequence to calibrate on.
SEQUENCE = 512
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
    parser.add_argument("--windows", type=int, default=2, help="to measure on, of each text")
    parser.add_argument("--window", type=int, default=2048, help="tokens of a window")
    parser.add_argument("--sequences", type=int, default=48, help="to calibrate on, of all texts")
    parser.add_argument("--only", help="rows to measure, such as 'auto;int8'")
    parser.add_argument("--gptq", type=Path, help="another GPTQ checkpoint, instead of our own")
    parser.add_argument("--collect-only", action="store_true", help="write the tokens alone")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    texts = collect(arguments.work)
    tokens = sequences(arguments.checkpoint, texts, "calibration", SEQUENCE, arguments.sequences)
    np.save(arguments.work / "calibration.npy", tokens)
    heldout = sequences(
        arguments.checkpoint, texts, "heldout", arguments.window, arguments.windows * len(TEXTS)
    )
    np.save(arguments.work / "heldout.npy", heldout)
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
        windows = text_windows(
            models["bf16"], texts[f"heldout-{name}"], arguments.window, arguments.windows
        )
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


def sequences(
    checkpoint: Path, texts: Mapping[str, str], part: str, length: int, count: int
) -> NDArray[np.int32]:
    """Return the first sequences of a part's texts, as many of each: int32 [N, T]."""
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    each = count // len(TEXTS)
    found = []
    for name in TEXTS:
        ids = tokenizer.encode(texts[f"{part}-{name}"]).ids[: each * length]
        found.append(np.array(ids, np.int32).reshape(each, length))
    return np.concatenate(found)


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


@dataclass
class Totals:
    """Sums over tokens of a row beside its reference."""

    tokens: int = 0
    loss: float = 0.0
    same: int = 0
    divergence: float = 0.0
    variation: float = 0.0

    def add(
        self, reference: NDArray[np.float32], own: NDArray[np.float32], next_ids: NDArray[np.int64]
    ) -> None:
        """Count T tokens; both are logarithms of all probabilities [T, V].

        In float32, for `edgevl.evaluate` takes a vocabulary of 150,000 to float64 for each pair.
        """
        probabilities = np.exp(reference)
        self.tokens += len(next_ids)
        self.loss -= float(own[np.arange(len(next_ids)), next_ids].sum(dtype=np.float64))
        self.same += int((reference.argmax(axis=1) == own.argmax(axis=1)).sum())
        self.divergence += float((probabilities * (reference - own)).sum(dtype=np.float64))
        self.variation += float(np.abs(probabilities - np.exp(own)).sum(dtype=np.float64)) / 2

    @property
    def perplexity(self) -> float:
        """Of the row."""
        return math.exp(self.loss / self.tokens)


def log_probabilities(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the logarithms of the probabilities: [T, V] -> [T, V]."""
    result = logits - logits.max(axis=1, keepdims=True)
    result -= np.log(np.exp(result).sum(axis=1, keepdims=True, dtype=np.float64))
    return result


def measure(
    models: Mapping[str, edgevl.Model], chosen: list[Row], windows: list[NDArray[np.int64]]
) -> dict[str, Totals]:
    """Run all models over the windows: -> what each row came to."""
    totals = {row.name: Totals() for row in chosen}
    caches = {name: model.engine.new_sequence() for name, model in models.items()}
    for window in windows:
        for cache in caches.values():
            cache.rewind(0)
        for begin in range(0, len(window) - 1, CHUNK):
            next_ids = window[begin + 1 : begin + 1 + CHUNK]
            block = window[begin : begin + len(next_ids)].tolist()
            found = {
                name: log_probabilities(model.engine.extend(caches[name], block))
                for name, model in models.items()
            }
            for row in chosen:
                totals[row.name].add(found[row.reference], found[row.name], next_ids)
    return totals


def lines(chosen: list[Row], totals: Mapping[str, Totals]) -> Iterator[str]:
    """Yield a line of the table for each row."""
    for row in chosen:
        own, reference = totals[row.name], totals[row.reference]
        if own is reference:
            yield f"| {row.name} | {own.perplexity:.3f} | | | | |"
            continue
        yield (
            f"| {row.name} | {own.perplexity:.3f} "
            f"| {row.reference} {own.perplexity / reference.perplexity - 1:+.1%} "
            f"| {own.same / own.tokens:.1%} | {own.divergence / own.tokens:.4f} "
            f"| {own.variation / own.tokens:.3f} |"
        )


if __name__ == "__main__":
    main()
