"""Fixtures that all tests share: small checkpoints with random weights."""

import pytest

from edgevl.checkpoint.presets import PRESETS
from edgevl.checkpoint.synth import write_checkpoint

# One for each kind of text model and of vision encoder.
MINI_PRESETS = [name for name in PRESETS if name.startswith("mini-")]


@pytest.fixture(scope="session")
def mini_checkpoint(tmp_path_factory):
    """Return a function (preset, layout="internvl_chat", dtype="bf16", seed=0) -> directory.

    Directories are written once a session and shared: do not change their files.
    """
    written = {}

    def make(preset="mini-qwen3", layout="internvl_chat", dtype="bf16", seed=0):
        key = (preset, layout, dtype, seed)
        if key not in written:
            written[key] = write_checkpoint(
                PRESETS[preset].config,
                tmp_path_factory.mktemp("mini") / preset,
                layout=layout,
                dtype=dtype,
                seed=seed,
                base_vocabulary=PRESETS[preset].base_vocabulary,
            )
        return written[key]

    return make


@pytest.fixture(params=MINI_PRESETS)
def preset(request):
    """Every mini preset's name in turn."""
    return request.param
