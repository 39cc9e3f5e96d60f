"""Perplexity of a model's weights in float32, whatever they are stored as.

    python benchmarks/quantizers/perplexity.py MODEL TOKENS [--original DIRECTORY]

MODEL is a plain model or, with ``--original``, a GPTQ model or a checkpoint of EdgeVL with a GPTQ
text model. TOKENS is a ``.npy`` file of windows, int [N, T]. The weights are dequantized and run
by the same PyTorch code, that of the plain model. Prints a JSON list: the mean negative log
likelihood of each window, in nats, of all its tokens but the first.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from edgevl.checkpoint import Checkpoint
from edgevl.checkpoint.architecture import expected_tensors
from text_model import plain_name

#: Positions whose logits are held at once.
CHUNK = 256


def load(model: Path, original: Path | None) -> torch.nn.Module:
    """Return the model in float32."""
    loaded = AutoModelForCausalLM.from_pretrained(original or model, dtype=torch.float32)
    if original is not None:
        with Checkpoint.open(model) as checkpoint:
            weights = {
                plain_name(name): torch.tensor(checkpoint.tensor(name))
                for name in expected_tensors(checkpoint.config, vision=False)
            }
        # A head that is tied to the embedding is not stored.
        missing, unexpected = loaded.load_state_dict(weights, strict=False)
        if set(missing) - {"lm_head.weight"} or unexpected:
            raise ValueError(f"{model}: tensors missing: {missing}, too many: {unexpected}")
        loaded.tie_weights()
    return loaded.eval()


def window_loss(model: torch.nn.Module, window: torch.Tensor) -> float:
    """Return the mean negative log likelihood of a window's tokens, int64 [T]."""
    hidden = model.model(window[None], use_cache=False).last_hidden_state[0, :-1]
    targets = window[1:]
    total = 0.0
    for begin in range(0, len(targets), CHUNK):
        end = begin + CHUNK
        logits = model.lm_head(hidden[begin:end])
        total += float(
            torch.nn.functional.cross_entropy(logits, targets[begin:end], reduction="sum")
        )
    return total / len(targets)


def main() -> None:
    """Evaluate."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, metavar="MODEL")
    parser.add_argument("tokens", type=Path, metavar="TOKENS")
    parser.add_argument("--original", type=Path, metavar="DIRECTORY")
    arguments = parser.parse_args()
    model = load(arguments.model, arguments.original)
    windows = torch.from_numpy(np.load(arguments.tokens).astype(np.int64))
    with torch.inference_mode():
        print(json.dumps([window_loss(model, window) for window in windows]))


if __name__ == "__main__":
    main()
