"""The text model a layer at a time: the forward pass, what is stored, and resuming."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from edgevl.checkpoint import Checkpoint  # noqa: E402
from edgevl.checkpoint.architecture import EMBEDDING, LM_HEAD  # noqa: E402
from edgevl.engine import ReferenceEngine  # noqa: E402
from edgevl.quantize import QuantizationError, QuantizationSettings  # noqa: E402
from edgevl.quantize import text as text_module  # noqa: E402
from edgevl.quantize.calibration import Sample  # noqa: E402
from edgevl.quantize.decoder import LINEARS, layer_name  # noqa: E402
from edgevl.quantize.run import SETTLED  # noqa: E402
from edgevl.quantize.text import check_sizes, measure, packed_tensors, quantize_layers  # noqa: E402
from edgevl.work import WorkDirectory, check_target, publish  # noqa: E402
from edgevl.work import opened as opened_for  # noqa: E402

CPU = torch.device("cpu")
SETTINGS = QuantizationSettings(group_size=32, samples=6)

opened = partial(opened_for, settled=SETTLED, error=QuantizationError)


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def make_samples(checkpoint, count, seed, tokens=40, reply_start=10):
    rng = np.random.default_rng(seed)
    table = checkpoint.tensor(EMBEDDING)
    samples = []
    for _ in range(count):
        ids = rng.integers(0, len(table), tokens)
        samples.append(Sample(ids, table[ids], np.zeros(tokens, np.bool_), reply_start))
    return samples


def run(checkpoint, path, settings=SETTINGS, progress=lambda done, total: None, count=6):
    path.mkdir(exist_ok=True)
    work = WorkDirectory(path)
    samples = make_samples(checkpoint, count, 0)
    heldout = make_samples(checkpoint, 3, 1)
    states, rows = quantize_layers(checkpoint, settings, samples, heldout, work, progress)
    return work, states, rows, heldout


@pytest.fixture(params=["mini-qwen3", "mini-qwen2", "mini-llama"])
def checkpoint(request, quantizable_checkpoint):
    with Checkpoint.open(quantizable_checkpoint(request.param)) as opened_checkpoint:
        yield opened_checkpoint


def test_streams_of_the_original_are_the_references(checkpoint, tmp_path):
    _, states, _, heldout = run(checkpoint, tmp_path)
    cost, _ = measure(checkpoint, states, heldout, CPU)
    reference = ReferenceEngine(checkpoint)
    loss = 0.0
    for sample in heldout:
        logits = reference.extend(reference.new_sequence(), sample.token_ids.tolist())
        logits = logits.astype(np.float64)
        logits = logits[sample.reply_start - 1 : -1]
        logits -= np.log(np.exp(logits).sum(axis=1, keepdims=True))
        following = sample.token_ids[sample.reply_start :]
        loss -= logits[np.arange(len(following)), following].sum()
    count = sum(len(s.token_ids) - s.reply_start for s in heldout)
    assert cost["perplexity"]["tokens"] == cost["conversations"]["tokens"] == count
    assert cost["perplexity"]["original"] == pytest.approx(np.exp(loss / count), rel=1e-4)


class Replaced:
    """A checkpoint with some weights replaced, for the reference engine."""

    def __init__(self, checkpoint, tensors):
        self.path, self.config = checkpoint.path, checkpoint.config
        self._checkpoint, self._tensors = checkpoint, tensors

    def names(self):
        return self._checkpoint.names()

    def shape(self, name):
        return self._checkpoint.shape(name)

    def tensor(self, name):
        return self._tensors.get(name, self._checkpoint.tensor(name))


def dequantized(packed, bits):
    tensors = {}
    for name, parts in packed.items():
        octets = parts["qweight"].data.view(np.uint32).T.copy().view(np.uint8)
        fields = octets if bits == 8 else np.stack([octets & 15, octets >> 4], -1)
        integers = fields.reshape(len(octets), -1).astype(np.float32) - (1 << (bits - 1))
        steps = parts["scales"].data.astype(np.float32).T[:, parts["g_idx"].data]
        tensors[name] = integers * steps
    return tensors


@pytest.mark.parametrize("text", ["int4", "int8"])
def test_measured_logits_are_those_of_the_stored_weights(checkpoint, tmp_path, text):
    settings = QuantizationSettings(text=text, group_size=32, samples=6)
    work, states, _, heldout = run(checkpoint, tmp_path, settings)
    packed = packed_tensors(work, checkpoint.config.text.num_hidden_layers)
    assert len(packed) == len(LINEARS) * checkpoint.config.text.num_hidden_layers
    reference = ReferenceEngine(Replaced(checkpoint, dequantized(packed, int(text[3:]))))
    expected = reference.extend(reference.new_sequence(), heldout[0].token_ids.tolist())[-1]
    _, logits = measure(checkpoint, states, heldout, CPU)
    assert np.linalg.norm(logits - expected) < 1e-4 * np.linalg.norm(expected)


def test_errors_are_those_of_outputs_and_shrink_with_bits(checkpoint, tmp_path):
    errors = {}
    for text in ("int4", "int8"):
        settings = QuantizationSettings(text=text, group_size=32, samples=6)
        rows = run(checkpoint, tmp_path / text, settings)[2]
        assert [(r["layer"], r["name"]) for r in rows[:7]] == [(0, name) for name in LINEARS]
        errors[text] = np.array([[r["rtn_error"], r["error"]] for r in rows])
    assert (errors["int4"] > 0.01).all()
    # 16 times finer steps.
    assert (errors["int8"] < errors["int4"] / 8).all()


def test_rounding_to_nearest_needs_no_samples(checkpoint, tmp_path):
    settings = QuantizationSettings(method="rtn", group_size=32)
    _, _, rows, _ = run(checkpoint, tmp_path, settings, count=0)
    assert all(row["error"] == row["rtn_error"] > 0 for row in rows)


class StoppedError(Exception):
    pass


def test_an_interrupted_run_goes_on_and_gives_the_same(checkpoint, tmp_path, monkeypatch):
    whole, _, rows, _ = run(checkpoint, tmp_path / "whole")
    real, calls = text_module.quantize_layer, []

    def stops_in_the_second_layer(*arguments, **options):
        calls.append(None)
        result = real(*arguments, **options)
        if len(calls) == 2:
            raise StoppedError
        return result

    monkeypatch.setattr(text_module, "quantize_layer", stops_in_the_second_layer)
    with pytest.raises(StoppedError):
        run(checkpoint, tmp_path / "parts")
    assert sorted(p.name for p in (tmp_path / "parts").iterdir()) == [
        "layer-0.json",
        "layer-0.safetensors",
        "text-1.json",
        "text-1.safetensors",
    ]
    seen = []
    resumed, _, resumed_rows, _ = run(
        checkpoint, tmp_path / "parts", progress=lambda *counts: seen.append(counts)
    )
    layers = checkpoint.config.text.num_hidden_layers
    assert len(calls) == layers + 1  # only the second again
    total = seen[0][1]
    assert [done for done, _ in seen] == list(range(total // layers, total + 1))
    assert resumed_rows == rows
    for index in range(layers):
        name = f"layer-{index}.safetensors"
        assert (resumed.path / name).read_bytes() == (whole.path / name).read_bytes()


def test_a_finished_run_does_nothing_again(checkpoint, tmp_path, monkeypatch):
    _, _, rows, _ = run(checkpoint, tmp_path)
    monkeypatch.setattr(text_module, "quantize_layer", None)
    assert run(checkpoint, tmp_path)[2] == rows


def test_damaged_weights_are_named(checkpoint, tmp_path):
    name = layer_name(1) + "mlp.up_proj.weight"
    weight = checkpoint.tensor(name).copy()
    weight[0, 0] = np.nan
    damaged = Replaced(checkpoint, {name: weight})
    damaged.release = checkpoint.release
    with pytest.raises(QuantizationError, match=r"layer 1, mlp.down_proj: .* not finite"):
        run(damaged, tmp_path)


def test_groups_that_do_not_fit_are_refused_with_the_one_that_does(
    quantizable_checkpoint, mini_checkpoint
):
    with Checkpoint.open(quantizable_checkpoint()) as checkpoint:
        check_sizes(checkpoint, QuantizationSettings(group_size=64))
        with pytest.raises(QuantizationError, match=r"64 inputs .* use --group-size 64$"):
            check_sizes(checkpoint, QuantizationSettings(group_size=128))
    with (
        Checkpoint.open(mini_checkpoint()) as checkpoint,
        pytest.raises(QuantizationError, match="use --text none"),
    ):
        check_sizes(checkpoint, QuantizationSettings(group_size=32))


# --- the work directory ----------------------------------------------------------------------


def test_work_is_kept_when_it_fails_and_gone_when_it_is_done(tmp_path):
    output, asked = tmp_path / "out", {"samples": "8"}
    with pytest.raises(StoppedError):
        begin(output, asked, "a.safetensors")
    with opened(output, asked) as work:
        assert work.open("a.safetensors")["x"].data.tolist() == [0, 1, 2]
        assert work.elapsed_s() > 0
    assert not list(tmp_path.iterdir())


def begin(output, asked, *files):
    """Begin a run that is interrupted when it has written ``files``."""
    with opened(output, asked) as work:
        for name in files:
            (work.path / name).parent.mkdir(parents=True, exist_ok=True)
            work.save(name, {"x": np.arange(3, dtype=np.int32)})
        raise StoppedError


@pytest.mark.parametrize(
    "done", ["making/text/layer-0.safetensors", "done/vision/vision-decide-1.safetensors"]
)
def test_once_a_layer_is_done_other_settings_are_refused(tmp_path, done):
    output = tmp_path / "out"
    with pytest.raises(StoppedError):
        begin(output, {"samples": "8"}, "done/calibration-0123")
    with pytest.raises(StoppedError):
        begin(output, {"samples": "16"}, done)
    with pytest.raises(QuantizationError, match=r"another samples \(16, now 8\).*remove it"):
        begin(output, {"samples": "8"})
    with pytest.raises(StoppedError):
        begin(output, {"samples": "16"})


def test_nothing_stays_where_nothing_was_done(tmp_path):
    with pytest.raises(StoppedError):
        begin(tmp_path / "out", {})
    assert not list(tmp_path.iterdir())


def test_two_processes_at_once_are_refused(tmp_path):
    with (
        opened(tmp_path / "out", {}),
        pytest.raises(QuantizationError, match="another process"),
        opened(tmp_path / "out", {}),
    ):
        pass


def test_a_full_disk_keeps_what_is_done(tmp_path, monkeypatch):
    output = tmp_path / "out"

    def full(*arguments):
        raise OSError(28, "No space left on device")

    def fail():
        with opened(output, {}) as work:
            work.save("a.safetensors", {"x": np.arange(3, dtype=np.int32)})
            monkeypatch.setattr("edgevl.work.write_file", full)
            work.save("b.safetensors", {"x": np.arange(3, dtype=np.int32)})

    with pytest.raises(QuantizationError, match=r"No space left on device; mend it, and the same"):
        fail()
    names = {path.name for path in (tmp_path / "out.partial").iterdir()}
    assert "a.safetensors" in names
    assert "b.safetensors" not in names


@pytest.mark.parametrize("taken", ["file", "directory"])
def test_a_target_in_use_is_refused(tmp_path, taken):
    output = tmp_path / "out"
    if taken == "file":
        output.write_text("mine")
    else:
        output.mkdir()
        (output / "mine").write_text("mine")
    with pytest.raises(QuantizationError, match="exists"), opened(output, {}):
        pass
    assert list(tmp_path.iterdir()) == [output]


def test_a_mount_point_is_refused_before_the_work(tmp_path, monkeypatch):
    """It can be empty, but not replaced."""
    output = tmp_path / "out"
    output.mkdir()
    monkeypatch.setattr(Path, "is_mount", lambda path: path == output)
    with pytest.raises(QuantizationError, match="mount point; name a directory in it"):
        check_target(output, QuantizationError)


def test_a_link_to_an_empty_directory_is_a_target(tmp_path):
    (tmp_path / "real").mkdir()
    output = tmp_path / "out"
    output.symlink_to("real")
    with opened(output, {}) as work:
        work.save("a.safetensors", {"x": np.arange(3, dtype=np.int32)})
        made = work.path / "made"
        made.mkdir()
        (made / "mine").write_text("mine")
        publish(made, output)
    assert (tmp_path / "real" / "mine").read_text() == "mine"
    assert output.is_symlink()


def test_heads_of_both_kinds_are_measured(quantizable_checkpoint):
    """So that the comparisons above mean something for both."""
    heads = {}
    for preset in ("mini-qwen3", "mini-qwen2"):
        with Checkpoint.open(quantizable_checkpoint(preset)) as checkpoint:
            heads[preset] = LM_HEAD in checkpoint.names()
    assert heads == {"mini-qwen3": True, "mini-qwen2": False}
