"""Checkpoints that GPTQModel wrote mean here what they mean there."""

import numpy as np
import pytest

from edgevl.checkpoint import Checkpoint
from gptqmodel_reference import DATA, LAYERS, VARIANTS


@pytest.mark.parametrize("variant", VARIANTS)
def test_weights_are_those_of_gptqmodel(variant):
    with np.load(DATA / variant / "dequantized.npz") as expected:
        weights = {f"language_model.{name}": values for name, values in expected.items()}
    assert len(weights) == len(LAYERS)
    with Checkpoint.open(DATA / variant) as checkpoint:
        assert checkpoint.layout == "gptq_text"
        for name, values in weights.items():
            packed = checkpoint.gptq(name)
            assert packed.is_in_order() == (not VARIANTS[variant]["desc_act"])
            assert packed.is_symmetric() == VARIANTS[variant]["sym"]
            # GPTQModel rounds the product of integer and scale to float16.
            np.testing.assert_array_equal(packed.dequantize().astype(np.float16), values)
