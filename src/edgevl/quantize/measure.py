"""What quantizing the text cost, on sequences that it has not seen.

In float32 with the quantized weights: what an engine loses by rounding activations is not in it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from edgevl.checkpoint import Checkpoint
from edgevl.checkpoint.architecture import EMBEDDING, LM_HEAD, TEXT
from edgevl.evaluate.agreement import Comparison
from edgevl.quantize.calibration.calibration_set import Sample
from edgevl.quantize.decoder import load_tensor
from edgevl.quantize.text import States

#: Positions whose logits are in memory at once.
CHUNK = 128


@dataclass(frozen=True)
class Cost:
    """What was measured.

    Attributes:
        perplexity: that part of a report.
        conversations: likewise; None without conversations.
        logits: of the quantized model at the last position of the first sequence, float32 [V].
    """

    perplexity: dict[str, Any]
    conversations: dict[str, Any] | None
    logits: NDArray[np.float32]


def measure(
    checkpoint: Checkpoint, states: States, heldout: Sequence[Sample], device: torch.device
) -> Cost:
    """Compare the original, the model rounded to nearest, and the quantized one.

    Perplexity is that of the held-out text, or of the replies where there is no text.

    Args:
        checkpoint: the original: the head and the last norm are the same in all three.
        states: the streams of ``heldout`` after the last layer.
        heldout: what the streams are of.
        device: where to compute.
    """
    head = _Head(checkpoint, device)
    texts, replies = (Comparison(), Comparison()), (Comparison(), Comparison())
    for sample, *streams in zip(heldout, *states.heldout, strict=True):
        kind = replies if sample.reply_start else texts
        for begin, end in _chunks(sample):
            following = sample.token_ids[begin + 1 : end + 1]
            original, rtn, quantized = (head.logits(stream[begin:end]) for stream in streams)
            kind[0].add(original, rtn, following)
            kind[1].add(original, quantized, following)
    measured = texts if texts[0].tokens else replies
    perplexity = {
        "source": "held-out text" if measured is texts else "replies of held-out conversations",
        "tokens": measured[0].tokens,
        "original": measured[0].reference_perplexity,
        "rtn": measured[0].perplexity,
        "quantized": measured[1].perplexity,
    }
    conversations = None
    if replies[0].tokens:
        conversations = {
            "samples": sum(sample.reply_start > 0 for sample in heldout),
            "tokens": replies[0].tokens,
            "rtn": _agreement(replies[0]),
            "quantized": _agreement(replies[1]),
        }
    return Cost(perplexity, conversations, head.logits(states.heldout[2][0][-1:])[0])


class _Head:
    """The last norm and the output layer."""

    def __init__(self, checkpoint: Checkpoint, device: torch.device) -> None:
        text = checkpoint.config.text
        name = EMBEDDING if text.tie_word_embeddings else LM_HEAD
        self._device, self._eps = device, text.rms_norm_eps
        self._weight = load_tensor(checkpoint, name, device)
        self._norm = load_tensor(checkpoint, TEXT + "norm.weight", device)

    def logits(self, stream: Tensor) -> NDArray[np.float32]:
        """Return the logits of some positions: [T, H] -> float32 [T, V]."""
        x = stream.to(self._device)
        x = functional.rms_norm(x, (x.shape[-1],), self._norm, self._eps)
        return functional.linear(x, self._weight).cpu().numpy()


def _chunks(sample: Sample) -> Iterator[tuple[int, int]]:
    """Yield the positions of a sample whose predictions count, some at a time."""
    last = len(sample.token_ids) - 1
    for begin in range(max(sample.reply_start - 1, 0), last, CHUNK):
        yield begin, min(begin + CHUNK, last)


def _agreement(comparison: Comparison) -> dict[str, float]:
    return {
        "token_agreement": comparison.token_agreement,
        "kl_divergence": comparison.kl_divergence,
    }
