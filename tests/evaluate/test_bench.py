"""`edgevl bench`: what it measures, how that is worked out, and what it refuses."""

import contextlib
import json
import math
import sys
import types

import numpy as np
import pytest

from edgevl import cli
from edgevl.checkpoint.architecture import expected_tensors
from edgevl.engine import Sequence, WeightBytes
from edgevl.errors import CheckpointError, ContextLengthError, EdgeVLError
from edgevl.evaluate import bench
from edgevl.synth.presets import PRESETS

WEIGHTS = WeightBytes(vision=1_000_000, text=4_000_000, embedding=600 * 100, cache_per_token=500)


class Clock:
    """Time that passes only when a test says so."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(bench.time, "perf_counter", lambda: self.now)


class FakeEngine:
    """An engine whose steps take the times they are told: seconds."""

    max_context, chunk, threads, notes = 100, 16, 3, ("a note",)

    def __init__(self, clock, tile=1.0, token=0.001, decode=(0.004,)):
        self.clock, self.tile, self.token, self.decode_times = clock, tile, token, list(decode)
        self.calls = []

    def encode_images(self, pixels):
        self.calls.append("vision")
        self.clock.now += self.tile
        return np.zeros((len(pixels), 4, 8), np.float32)

    def embed(self, token_ids):
        self.clock.now += 50  # belongs to no step
        return np.zeros((len(token_ids), 8), np.float32)

    def prefill(self, sequence, embeddings):
        assert sequence.length == 0
        self.calls.append(f"prefill {len(embeddings)}")
        self.clock.now += self.token * len(embeddings)
        return np.zeros(600, np.float32)

    def decode(self, sequences, token_ids):
        self.calls.append("decode")
        self.clock.now += self.decode_times[0]
        return np.zeros((1, 600), np.float32)

    def weight_bytes(self):
        return WEIGHTS


@pytest.fixture
def fake(monkeypatch):
    """A model with a `FakeEngine`, on a machine whose bandwidth is measured as 1, 2, 3, … GB/s."""
    clock = Clock(monkeypatch)
    measured = []

    def probe():
        measured.append(float(len(measured) + 1))
        clock.now += 7  # belongs to no step
        return measured[-1], 100.0

    monkeypatch.setattr(bench, "machine_probe", lambda threads: probe)
    config = PRESETS["mini-qwen3"].config
    checkpoint = types.SimpleNamespace(path="dir", config=config, has_vision=True)
    return types.SimpleNamespace(
        checkpoint=checkpoint,
        engine=FakeEngine(clock),
        sequence=lambda: contextlib.nullcontext(Sequence()),
        measured=measured,
        clock=clock,
    )


def run(model, **options):
    options = {"prompt_tokens": (4, 8, 20), "generate": 10, "image": True, "runs": 3} | options
    return bench.run_bench(model, "m", 12.0, **options)


def test_times_are_those_of_the_steps_alone(fake):
    result = run(fake)
    assert result.vision_ms == pytest.approx(1000)
    assert [step.ms for step in result.prefill] == pytest.approx([4, 8, 20])
    assert result.prefill[2].tokens_per_s == pytest.approx(1000)
    assert result.decode.ms_per_token == pytest.approx(4)
    assert result.decode.tokens_per_s == pytest.approx(250)
    assert (result.load_ms, result.threads, result.rounds) == (12.0, 3, 3)


def test_rounds_are_interleaved_and_the_first_warms_up(fake):
    run(fake, prompt_tokens=(4, 8), generate=2, runs=2)
    once = ["vision", "prefill 4", "prefill 8", "prefill 4", "decode", "decode"]
    assert fake.engine.calls == once * 3


def test_result_is_the_median_of_the_rounds(fake):
    times = iter([9.0, 1.0, 5.0, 2.0])  # the first is the warm-up
    encode = fake.engine.encode_images

    def slower(pixels):
        fake.engine.tile = next(times)
        return encode(pixels)

    fake.engine.encode_images = slower
    assert run(fake).vision_ms == pytest.approx(2000)


def test_bytes_and_fraction_of_the_bandwidth(fake):
    decode = run(fake).decode
    # After the middle length, half-way through: 8 + 10 / 2 positions, a row of the embedding.
    assert decode.after == 8
    assert decode.bytes_per_token == 4_000_000 + 100 + 13 * 500
    assert decode.achieved_gb_s == pytest.approx(decode.bytes_per_token / 4e-3 / 1e9)
    # A probe to warm up, then one before and one behind each of three rounds.
    assert fake.measured == [1, 2, 3, 4, 5, 6, 7]
    assert decode.fraction_of_bandwidth == pytest.approx(decode.achieved_gb_s / 4.5)


def test_rates_of_the_machine_are_medians(fake):
    result = run(fake)
    assert result.notes == ("a note",)
    assert result.read_bandwidth_gb_s == 4.5
    assert result.int8_gops == 100


def test_without_a_probe_or_sizes_nothing_is_made_up(fake, monkeypatch):
    monkeypatch.setattr(bench, "machine_probe", lambda threads: None)
    fake.engine.weight_bytes = lambda: None
    values = run(fake, image=False).to_dict()
    assert values["vision"] is None
    assert values["machine"]["read_bandwidth_gb_s"] is values["machine"]["int8_gops"] is None
    for name in ("bytes_per_token", "achieved_gb_s", "fraction_of_bandwidth"):
        assert values["decode"][name] is None
    assert values["memory"]["weights_bytes"] is None


def test_peak_memory_is_taken_before_the_buffer_of_the_probe(fake, monkeypatch):
    monkeypatch.setattr(bench, "peak_rss_bytes", lambda: len(fake.measured))
    assert run(fake).peak_rss_bytes == 0


def test_peak_memory_grows_with_use():
    before = bench.peak_rss_bytes()
    np.ones(before // 8 + (8 << 20))  # float64, touched: more than all that was resident
    assert bench.peak_rss_bytes() > before


def test_too_little_context(fake):
    with pytest.raises(ContextLengthError, match=r"^101 tokens .* holds 100: lower --prompt"):
        run(fake, prompt_tokens=(91,), generate=10)
    run(fake, prompt_tokens=(90,), generate=10, runs=1)


def test_no_vision(fake):
    fake.checkpoint.has_vision = False
    with pytest.raises(CheckpointError, match="no vision weights: leave out --image"):
        run(fake)
    run(fake, image=False, runs=1)


@pytest.mark.parametrize("wrong", [{"prompt_tokens": ()}, {"generate": 0}, {"runs": 0}])
def test_counts_below_one(fake, wrong):
    with pytest.raises(EdgeVLError, match="must be at least 1"):
        run(fake, **wrong)


# --- operations and the roofline ---------------------------------------------------------------


def weights_of(config, prefix, without=()):
    """Elements of the matrices under a prefix."""
    return sum(
        math.prod(shape)
        for name, shape in expected_tensors(config).items()
        if name.startswith(prefix) and len(shape) > 1 and not any(w in name for w in without)
    )


def test_decoder_operations_by_counting(preset):
    config = PRESETS[preset].config
    text = config.text
    layers = weights_of(config, "language_model.model.layers.")
    head = text.vocab_size * text.hidden_size
    seen = sum(5 + position for position in range(1, 4))  # 3 tokens after 5 others
    attention = 2 * seen * text.num_hidden_layers * text.num_attention_heads * text.head_dim
    expected = 2 * (3 * layers + head + attention)
    assert bench.decoder_operations(config, 3, 5) == pytest.approx(expected)


def test_vision_operations_by_counting(preset):
    config = PRESETS[preset].config
    vision = config.vision
    positions = vision.num_patches + 1
    layers = weights_of(config, "vision_model.encoder.layers.")
    patch = weights_of(config, "vision_model.embeddings.patch_embedding.")
    projector = weights_of(config, "mlp1.")
    attention = 2 * positions**2 * vision.hidden_size * vision.num_hidden_layers
    macs = positions * layers + vision.num_patches * patch + config.image_tokens * projector
    assert bench.vision_operations(config) == pytest.approx(2 * (macs + attention))


def test_vision_operations_leave_out_layers_that_are_not_run():
    import dataclasses

    config = PRESETS["mini-qwen3"].config
    fewer = dataclasses.replace(config, select_layer=-2)
    two, one = map(bench.vision_operations, (config, fewer))
    per_layer = weights_of(config, "vision_model.encoder.layers.0.")
    positions = config.vision.num_patches + 1
    attention = 2 * positions**2 * config.vision.hidden_size
    assert two - one == pytest.approx(2 * (positions * per_layer + attention))


def test_published_work_of_the_1b_model():
    config = PRESETS["internvl3_5-1b"].config
    assert bench.vision_operations(config) == pytest.approx(0.73e12, rel=0.02)
    assert bench.decoder_operations(config, 1, 0) == pytest.approx(0.88e9 + 0.31e9, rel=0.02)


def test_steps_under_the_roofline(fake):
    config = fake.checkpoint.config
    steps = {step.name: step for step in bench.roofline_steps(run(fake), config, WEIGHTS)}
    assert list(steps) == ["vision", "prefill 4", "prefill 8", "prefill 20", "decode"]
    decode = steps["decode"]
    assert decode.bytes == 4_000_000 + 13 * 500
    assert decode.intensity == decode.operations / decode.bytes
    assert decode.gops == pytest.approx(decode.operations / 0.004 / 1e9)
    assert steps["vision"].gops == pytest.approx(bench.vision_operations(config) / 1e9)


def test_plot_needs_what_was_not_measured(fake, monkeypatch):
    monkeypatch.setattr(bench, "machine_probe", lambda threads: None)
    with pytest.raises(EdgeVLError, match=r"^--plot: .* use --engine cpu$"):
        bench.plot_roofline(run(fake), fake.checkpoint.config, WEIGHTS, None)


def test_plot_is_a_picture(fake, tmp_path):
    pytest.importorskip("matplotlib")
    from PIL import Image

    path = tmp_path / "roof.png"
    with path.open("wb") as file:
        bench.plot_roofline(run(fake), fake.checkpoint.config, WEIGHTS, file)
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        assert len(picture.convert("L").getcolors()) > 10  # lines, points, text


# --- the command -------------------------------------------------------------------------------


@pytest.fixture
def mini(mini_checkpoint):
    return str(mini_checkpoint("mini-qwen3"))


SHORT = ["--prompt-tokens", "8,4", "--generate", "3", "--runs", "1", "--engine", "reference"]


def test_json_has_the_fixed_fields(mini, capsys):
    assert cli.main(["bench", mini, *SHORT, "--image", "--json"]) == 0
    out, err = capsys.readouterr()
    values = json.loads(out)
    assert err == ""
    assert set(values["machine"]) == {"cpu", "threads", "read_bandwidth_gb_s", "int8_gops"}
    assert values["model"] == mini
    assert values["vision"]["ms_per_tile"] > 0
    assert [step["tokens"] for step in values["prefill"]] == [4, 8]
    assert set(values["prefill"][0]) == {"tokens", "ms", "tokens_per_s"}
    decode = values["decode"]
    assert (decode["after_tokens"], decode["tokens"]) == (4, 3)
    assert decode["tokens_per_s"] == pytest.approx(1000 / decode["ms_per_token"])
    assert {"bytes_per_token", "achieved_gb_s", "fraction_of_bandwidth"} <= set(decode)
    assert set(values["memory"]) == {"weights_bytes", "peak_rss_bytes"}
    assert values["memory"]["peak_rss_bytes"] > 1 << 20
    assert values["load_ms"] > 0


def test_native_engine_measures_everything(mini, capsys, monkeypatch):
    pytest.importorskip("edgevl._native", reason="the native engine is not built")
    monkeypatch.setattr(bench, "READ_BYTES", 8 << 20)
    arguments = [*SHORT, "--engine", "cpu", "--threads", "1", "--image", "--json"]
    assert cli.main(["bench", mini, *arguments]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["machine"]["threads"] == 1
    assert values["machine"]["read_bandwidth_gb_s"] > 0
    assert values["machine"]["int8_gops"] > 0
    decode = values["decode"]
    assert 0 < decode["bytes_per_token"] < values["memory"]["weights_bytes"] + 1e6
    assert decode["achieved_gb_s"] > 0
    assert decode["fraction_of_bandwidth"] > 0


def test_table_for_people(mini, capsys):
    assert cli.main(["bench", mini, *SHORT]) == 0
    out = capsys.readouterr().out
    for word in ("machine", "loaded in", "ms for 8 tokens", "ms a token after 4", "MB at most"):
        assert word in out
    assert "a tile" not in out
    assert "None" not in out


@pytest.mark.parametrize("lengths", ["", "4,", "x", "-1", "0", "1.5", "99999999999", "4;8"])
def test_lengths_that_are_none(lengths, capsys):
    assert cli.main(["bench", "m", "--prompt-tokens", lengths]) == 2
    assert "is not a number of tokens; write as 128,300,1024" in capsys.readouterr().err


def test_context_too_short_is_one_line(mini, capsys):
    assert cli.main(["bench", mini, *SHORT, "--context", "7"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert "8 tokens are asked for, but the context holds 7" in err


def test_plot_without_matplotlib_fails_before_loading(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr("edgevl.generate.load", lambda *_, **__: pytest.fail("loaded"))
    assert cli.main(["bench", "m", "--plot", str(tmp_path / "a.png")]) == 1
    assert 'pip install "edgevl[bench]"' in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_plot_needs_a_png(capsys):
    assert cli.main(["bench", "m", "--plot", "a.pdf"]) == 2
    assert "must end in .png" in capsys.readouterr().err
