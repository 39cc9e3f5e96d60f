"""What `transformers` computes for a set of cases: the numbers that the reference engine must give.

``python tests/support/transformers_reference.py`` writes them to ``tests/data/transformers.npz``,
so that they can be compared where PyTorch and transformers are not installed. Run it after a change
of the cases or of the tiny model's weights.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from edgevl.checkpoint import Checkpoint
from edgevl.loading import locate
from edgevl.preprocess import Message, PromptEncoder, prepare_picture
from repository import DATA

RESULTS = DATA / "transformers.npz"

MINIS = ("mini-qwen3", "mini-qwen2", "mini-llama", "mini-6b")
MODELS = (*MINIS, "tiny")
#: Sizes that make one tile, and several with a thumbnail.
PICTURES = {"one": (50, 50), "several": (230, 100)}
CASES = [(model, picture) for model in MODELS for picture in PICTURES]
GREEDY_TOKENS = 64


def draw_picture(size: tuple[int, int]) -> Image.Image:
    """Draw a number and shapes on a gradient: anything that is not flat."""
    width, height = size
    ramp = np.linspace(0, 255, width * height * 3).reshape(height, width, 3).astype(np.uint8)
    image = Image.fromarray(ramp)
    draw = ImageDraw.Draw(image)
    draw.ellipse((5, 5, height // 2, height // 2), fill=(200, 30, 30))
    draw.rectangle((width // 2, height // 3, width - 4, height - 9), fill=(20, 60, 220))
    draw.text((width // 4, height // 2), "4207", fill=(250, 250, 90), font_size=height // 3)
    return image


def model_inputs(checkpoint: Checkpoint, picture: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the case's pixels float32 [B, 3, S, S] and prompt ids int64 [T]."""
    prepared = prepare_picture(draw_picture(PICTURES[picture]), checkpoint.config, max_tiles=4)
    message = Message.user("What number is on the display? 是多少？", [prepared])
    prompt = PromptEncoder(checkpoint).encode([message])
    return prepared.pixels, prompt.token_ids


def write_hf_twin(checkpoint: Checkpoint, directory: Path) -> Path:
    """Write the same model in transformers' layout, float32."""
    from edgevl.synth.writer import config_files
    from storage import hf_names, write_tensors

    directory.mkdir()
    tokenizer = PromptEncoder(checkpoint).tokenizer
    for filename, content in config_files("internvl", checkpoint.config, tokenizer, "fp32").items():
        (directory / filename).write_text(json.dumps(content))
    for filename in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(checkpoint.path / filename, directory)
    tensors = {name: checkpoint.tensor(name) for name in checkpoint.names()}
    write_tensors(directory / "model.safetensors", hf_names(tensors))
    return directory


def load_transformers(directory: Path) -> Any:
    """Load a directory in transformers' layout into its own InternVL, float32."""
    import torch
    from transformers import InternVLForConditionalGeneration

    model = InternVLForConditionalGeneration.from_pretrained(str(directory), dtype=torch.float32)
    return model.eval()


def compute(checkpoint: Checkpoint, picture: str) -> dict[str, np.ndarray]:
    """Let transformers compute one case of a checkpoint in its layout.

    Returns:
        ``prompt`` ids [T], ``features`` [B, image tokens, H], ``logits`` of the last position of
        the prompt [V], ``greedy`` the ids that follow.
    """
    import torch

    pixels, prompt = model_inputs(checkpoint, picture)
    model = load_transformers(checkpoint.path)
    inputs = {"input_ids": torch.tensor(prompt)[None], "pixel_values": torch.tensor(pixels)}
    with torch.inference_mode():
        features = model.get_image_features(pixel_values=inputs["pixel_values"]).pooler_output
        logits = model(**inputs).logits[0, -1]
        greedy = model.generate(
            **inputs, max_new_tokens=GREEDY_TOKENS, min_new_tokens=GREEDY_TOKENS, do_sample=False,
            eos_token_id=None,
        )  # fmt: skip
    return {
        "prompt": prompt,
        "features": features.numpy(),
        "logits": logits.numpy(),
        "greedy": greedy[0, len(prompt) :].numpy(),
    }


def main() -> None:
    """Compute every case and store the results."""
    from edgevl.synth.presets import PRESETS
    from edgevl.synth.writer import write_checkpoint

    stored: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for model in MODELS:
            directory = Path(scratch) / model
            if model in MINIS:
                preset = PRESETS[model]
                vocabulary = preset.base_vocabulary
                write_checkpoint(preset.config, directory, layout="hf", base_vocabulary=vocabulary)
            else:
                with Checkpoint.open(locate(model)) as original:
                    write_hf_twin(original, directory)
            with Checkpoint.open(directory) as checkpoint:
                for picture in PICTURES:
                    for key, value in compute(checkpoint, picture).items():
                        stored[f"{model}/{picture}/{key}"] = value
            print(f"{model}: done", file=sys.stderr)
    RESULTS.parent.mkdir(exist_ok=True)
    np.savez_compressed(RESULTS, **stored)


if __name__ == "__main__":
    main()
