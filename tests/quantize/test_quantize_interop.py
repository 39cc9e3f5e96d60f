"""What `edgevl quantize` writes, in transformers with its GPTQ kernels.

Runs where gptqmodel and optimum are installed: they need more than the other tests, and a compiler.
"""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("optimum")
pytest.importorskip("gptqmodel")

from edgevl.checkpoint import Checkpoint  # noqa: E402
from edgevl.engine import ReferenceEngine  # noqa: E402
from edgevl.quantize import QuantizationSettings, quantize_checkpoint  # noqa: E402

#: Linear layers one after the other, in each of which the kernel rounds weights to float16, by
#: 2^-11 at most: errors at most add up.
TOLERANCE = 4 * 3 * 2.0**-11


@pytest.fixture(scope="module", params=["mini-qwen3", "mini-qwen2", "mini-llama"])
def loaded(request, tmp_path_factory, quantizable_checkpoint):
    """A quantized checkpoint in the HF layout: its directory, and transformers' model."""
    output = tmp_path_factory.mktemp("interop") / "out"
    settings = QuantizationSettings(group_size=32, samples=8)
    quantize_checkpoint(quantizable_checkpoint(request.param, layout="hf"), output, settings)
    model = transformers.AutoModelForImageTextToText.from_pretrained(output, dtype=torch.float32)
    return output, model.eval()


def test_linear_layers_are_gptq_and_vision_is_not(loaded):
    _, model = loaded
    kinds = {
        part: {
            type(module).__name__
            for name, module in model.named_modules()
            if part in name and name.endswith("_proj")
        }
        for part in ("language_model", "vision_tower")
    }
    assert "Linear" not in kinds["language_model"]
    assert kinds["vision_tower"] == {"Linear"}


@pytest.mark.parametrize("picture", [False, True])
def test_logits_are_those_of_our_reference(loaded, picture):
    output, model = loaded
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 500, (1, 24), generator=generator)
    inputs = {}
    with Checkpoint.open(output) as checkpoint:
        reference = ReferenceEngine(checkpoint)
        embeddings = reference.embed(ids[0].numpy())
        if picture:
            size = checkpoint.config.vision.image_size
            pixels = torch.randn(1, 3, size, size, generator=generator)
            features = reference.encode_images(pixels.numpy())[0]
            image = torch.full((1, len(features)), model.config.image_token_id)
            ids, inputs = torch.cat([image, ids], 1), {"pixel_values": pixels}
            embeddings = np.concatenate([features, embeddings])
        expected = reference.prefill(reference.new_sequence(), embeddings)
    with torch.inference_mode():
        logits = model(input_ids=ids, **inputs).logits[0, -1].numpy()
    error = np.linalg.norm(logits - expected) / np.linalg.norm(expected)
    assert error < TOLERANCE
