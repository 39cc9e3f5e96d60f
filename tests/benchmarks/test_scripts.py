"""The scripts of benchmarks/ and docs/, each run as the documentation says, but in miniature."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from edgevl.engine import native_missing
from repository import ROOT, SUPPORT, TINY

#: Scripts that are not run here, and what tests them. Of the quantizers' only functions are: they
#: need packages of their own. Calibrating takes a minute with the fewest samples there may be.
ELSEWHERE = {
    "benchmarks/calibration.py": "",
    "benchmarks/compare.py": "test_benchmarks.py",
    "benchmarks/same_answers.py": "test_same_answers.py",
    "benchmarks/serving.py": "test_benchmark_serving.py",
    "benchmarks/speculation.py": "test_benchmark_speculation.py",
    "benchmarks/versions.py": "test_versions.py",
    "benchmarks/worker.py": "test_benchmarks.py",
    "benchmarks/quantizers/compare_quantizers.py": "test_benchmark_quantizers.py",
    "benchmarks/quantizers/corpus.py": "test_benchmark_quantizers.py",
    "benchmarks/quantizers/perplexity.py": "test_benchmark_quantizers.py",
    "benchmarks/quantizers/quantize.py": "test_benchmark_quantizers.py",
    "benchmarks/real_weights.py": "test_real_weights.py",
}

needs_native = pytest.mark.skipif(
    native_missing() is not None, reason="the native engine is not built"
)


def run(script, *arguments, python_path=()):
    """Run a script of the checkout: -> what it printed."""
    path = os.pathsep.join([*map(str, python_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, ROOT / script, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_script_is_run():
    scripts = {
        path.relative_to(ROOT).as_posix()
        for folder in ("benchmarks", "docs")
        for path in (ROOT / folder).rglob("*.py")
        if '__name__ == "__main__"' in path.read_text()
    }
    here = Path(__file__).read_text()
    assert scripts >= set(ELSEWHERE)
    assert not {script for script in scripts - set(ELSEWHERE) if f'run("{script}"' not in here}


@pytest.fixture(scope="module")
def board(tmp_path_factory):
    """The shipped model, compiled for the emulator."""
    pytest.importorskip("cffi")
    pytest.importorskip("onnxruntime")
    if native_missing() is not None:
        pytest.skip("the native engine is not built")
    directory = tmp_path_factory.mktemp("compiled") / "board"
    options = ["--target", "ax650", "--emulate", "-o", directory]
    subprocess.run([sys.executable, "-m", "edgevl", "compile", "tiny", *options], check=True)
    return directory


def test_board_agreement(board):
    lines = run("benchmarks/board_agreement.py", "tiny", board, "--max-tokens", 2).splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines[2:]]
    turns = [f"three turns, turn {number}" for number in (1, 2, 3)]
    assert [row[0] for row in rows] == ["one picture, turn 1", "three pictures, turn 1", *turns]
    assert all(0 < int(row[3]) <= 2 for row in rows)
    assert all(0 <= float(row[5]) <= float(row[6]) < 1 for row in rows)


def test_axera_host(board, tmp_path):
    # In the place of the vendor's package, one that calls the emulator.
    pytest.importorskip("ml_dtypes")
    (tmp_path / "axengine.py").write_text(
        "from emulated_board import Session as InferenceSession\n"
    )
    options = ["--prompt-tokens", 140, "--generate", 2, "--rounds", 1, "--json"]
    printed = run("benchmarks/axera_host.py", board, *options, python_path=[tmp_path, SUPPORT])
    steps = json.loads(printed)["steps"]
    assert len(steps) == 4
    assert all(step["host_ms"] > 0 < step["copied_bytes"] for step in steps.values())


def test_still_frames(tmp_path):
    pytest.importorskip("av")
    from clips import write_clip

    clip = write_clip(tmp_path / "clip.mp4")
    lines = run("benchmarks/still_frames.py", clip, "--frames", 10).splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines[2:]]
    assert len(rows) == 3 * 3 + 3
    assert all(row[2].startswith("2 of ") for row in rows[:9])  # the display counts once
    assert all(row[4] == "0 of 10" for row in rows[:9])
    assert {row[0] for row in rows[9:]} == {"clip"}


def test_constraint():
    pytest.importorskip("llguidance")
    vocabulary = json.loads((TINY / "config.json").read_text())["llm_config"]["vocab_size"]
    options = [TINY / "tokenizer.json", "--vocabulary", vocabulary]
    report = json.loads(run("benchmarks/constraint.py", *options))
    assert report["schema"]["token_ms"] > 0


@needs_native
def test_vision_int8(tmp_path):
    for module in ("torch", "onnx_ir", "onnxslim", "onnxruntime", "sympy"):
        pytest.importorskip(module)
    from edgevl.checkpoint import Checkpoint

    picture = ROOT / "examples" / "meter.png"
    options = ["--work", tmp_path, "--tiles", 1, "--calibration", 2]
    printed = run("benchmarks/vision_int8.py", TINY, picture, *options, "--harder", 64)
    header, _, *rows = (line for line in printed.splitlines() if line.startswith("|"))
    stacks = header.strip("| ").split(" | ")[1:]
    assert stacks[:3] == ["EdgeVL", "EdgeVL, quantized", "ONNX Runtime"]
    assert rows[-1].startswith("| features | ")
    features = [float(cell.rstrip("% ")) for cell in rows[-1].strip("|").split("|")[1:]]
    # Smoothing undoes what makes it harder, and ONNX Runtime has none.
    assert max(features[:2]) < features[2] / 2
    with Checkpoint.open(TINY) as before, Checkpoint.open(tmp_path / "harder") as after:
        name = "vision_model.encoder.layers.0.norm1.weight"
        ratio = after.tensor(name) / before.tensor(name)
        assert set(ratio.tolist()) == {1, 64}


def test_smollm2_and_its_text_model(tmp_path, mini_checkpoint):
    gguf = pytest.importorskip("gguf", exc_type=ImportError)
    from edgevl.checkpoint import Checkpoint

    source = mini_checkpoint("mini-llama", dtype="fp16")
    write_gguf(gguf, source, tmp_path / "model.gguf")
    run("benchmarks/smollm2.py", tmp_path / "model.gguf", tmp_path / "checkpoint")
    run("benchmarks/quantizers/text_model.py", tmp_path / "checkpoint", tmp_path / "text")
    assert (tmp_path / "text" / "model.safetensors").exists()
    name = "language_model.model.layers.1.self_attn.q_proj.weight"
    with Checkpoint.open(source) as before, Checkpoint.open(tmp_path / "checkpoint") as after:
        np.testing.assert_array_equal(before.tensor(name), after.tensor(name))


def write_gguf(gguf, source, path):
    """Write the text model of a Llama as llama.cpp's converter does."""
    from edgevl.checkpoint import Checkpoint

    sys.path.insert(0, str(ROOT / "benchmarks"))
    from smollm2 import NAMES, TEXT

    with Checkpoint.open(source) as checkpoint:
        text = checkpoint.config.text
        tokenizer = json.loads(checkpoint.read_text("tokenizer.json"))
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_vocab_size(text.vocab_size)
        writer.add_block_count(text.num_hidden_layers)
        writer.add_context_length(text.max_position_embeddings)
        writer.add_embedding_length(text.hidden_size)
        writer.add_feed_forward_length(text.intermediate_size)
        writer.add_head_count(text.num_attention_heads)
        writer.add_head_count_kv(text.num_key_value_heads)
        writer.add_layer_norm_rms_eps(text.rms_norm_eps)
        writer.add_rope_freq_base(text.rope_theta)
        tokens = [f"[PAD{number}]" for number in range(text.vocab_size)]
        kinds = [gguf.TokenType.UNUSED] * text.vocab_size
        for token, number in tokenizer["model"]["vocab"].items():
            tokens[number], kinds[number] = token, gguf.TokenType.NORMAL
        for added in tokenizer["added_tokens"]:
            tokens[added["id"]], kinds[added["id"]] = added["content"], gguf.TokenType.CONTROL
        writer.add_token_list(tokens)
        writer.add_token_types(kinds)
        writer.add_token_merges([" ".join(pair) for pair in tokenizer["model"]["merges"]])
        writer.add_chat_template(checkpoint.read_text("chat_template.jinja"))
        for name in checkpoint.names():
            if not name.startswith(TEXT):
                continue
            stored = name.removeprefix(TEXT)
            stored = "output_norm.weight" if stored == "norm.weight" else stored
            for ours, theirs in NAMES.items():
                stored = stored.replace(ours, theirs)
            values = checkpoint.tensor(name)
            heads = {"attn_q": text.num_attention_heads, "attn_k": text.num_key_value_heads}
            if count := heads.get(stored.split(".")[-2]):
                halves = values.reshape(count, 2, -1, values.shape[1])
                values = halves.swapaxes(1, 2).reshape(values.shape)
            writer.add_tensor(stored, np.ascontiguousarray(values, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@needs_native
def test_the_demo(tmp_path):
    run("docs/make_demo_svg.py", tmp_path)
    svg = (tmp_path / "demo.svg").read_text()
    assert ">7305</text>" in svg
    assert svg.count("data:image/png;base64,") == 2


@needs_native
def test_screenshots(tmp_path):
    pytest.importorskip("gradio")
    pytest.importorskip("playwright")
    if shutil.which("chromium") is None:
        pytest.skip("no Chromium here")
    run("docs/make_screenshots.py", tmp_path)
    assert len(list(tmp_path.glob("page-*.png"))) == 3
