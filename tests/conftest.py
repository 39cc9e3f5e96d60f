"""Fixtures that all tests share: small checkpoints with random weights."""

import signal
from dataclasses import replace

import pytest

from edgevl.synth.presets import PRESETS
from edgevl.synth.writer import write_checkpoint

# A shell's background job, or nohup, has them ignored, and what tests start would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

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


@pytest.fixture(scope="session")
def quantizable_checkpoint(tmp_path_factory):
    """Return a function (preset="mini-qwen3", layout=…, dtype="fp32") -> directory.

    The text model's sizes are those of the preset, rounded to multiples of 32. Directories are
    shared: do not change their files.
    """
    written = {}

    def make(preset="mini-qwen3", layout="internvl_chat", dtype="fp32"):
        key = (preset, layout, dtype)
        if key not in written:
            config = PRESETS[preset].config
            text = replace(
                config.text,
                hidden_size=64,
                intermediate_size=192,
                num_attention_heads=4,
                head_dim=32,
            )
            written[key] = write_checkpoint(
                replace(config, text=text),
                tmp_path_factory.mktemp("quantizable") / preset,
                layout=layout,
                dtype=dtype,
                base_vocabulary=PRESETS[preset].base_vocabulary,
            )
        return written[key]

    return make


@pytest.fixture(params=MINI_PRESETS)
def preset(request):
    """Every mini preset's name in turn."""
    return request.param
