"""The engine of NPUs through the C libraries: those of the emulator."""

import ctypes
import gc
import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

import edgevl
from edgevl.axera import layout
from edgevl.axera.npu import open_runtime
from edgevl.axera.npu.libraries import emulator_directory
from edgevl.checkpoint import Checkpoint
from edgevl.cli import main
from edgevl.engine import ReferenceEngine, native_missing
from edgevl.errors import BoardError
from edgevl.loading import locate
from edgevl.preprocess import prepare_picture
from edgevl.synth.presets import PRESETS
from edgevl.synth.writer import write_checkpoint

pytest.importorskip("cffi")
if native_missing() is not None:
    pytest.skip("the native engine is not built", allow_module_level=True)
emulate = pytest.importorskip("edgevl.boards.emulate")

try:
    emulator_directory()
except BoardError as missing:
    pytest.skip(str(missing), allow_module_level=True)

from edgevl.boards.text_checkpoint import write_embeddings  # noqa: E402
from emulated_board import Counters, Session  # noqa: E402
from emulated_directory import write  # noqa: E402
from one_sequence import OneSequence  # noqa: E402
from repository import EXAMPLES  # noqa: E402


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write(tmp_path_factory.mktemp("emulated") / "tiny", locate("tiny"), layout.BoardShape())


@pytest.fixture
def reference():
    return edgevl.load("tiny", engine="reference")


@pytest.fixture(params=["ax", "axcl"])
def npu(request, monkeypatch):
    monkeypatch.setenv("EDGEVL_NPU", request.param)
    return request.param


def error(logits, reference):
    return np.linalg.norm(logits - reference, axis=-1) / np.linalg.norm(reference, axis=-1)


def test_answers_are_those_of_the_reference(npu, tiny, reference):
    model = edgevl.load(tiny)
    assert "emulated" in model.engine.notes[0]
    pictures = [EXAMPLES / f"{name}.png" for name in ("meter", "word", "label")]
    for question, images in [
        ("What number is on the display?", pictures[:1]),
        ("What is written here?", pictures),
    ]:
        answer = model.ask(question, images, max_tokens=24)
        expected = reference.ask(question, images, max_tokens=24, max_tiles=1)
        assert answer.token_ids == expected.token_ids
        assert answer.usage == expected.usage
    chats = model.chat(), reference.chat(max_tiles=1)
    for question, images in [
        ("What number is on the display?", pictures[:1]),
        ("And what does this say?", pictures[1:2]),
        ("What number was on the display?", []),
    ]:
        answer, expected = (chat.ask(question, images, max_tokens=24) for chat in chats)
        assert answer.token_ids == expected.token_ids
        assert answer.usage == expected.usage
    assert answer.usage.cached_tokens > 0


@pytest.mark.parametrize("length", [1, 127, 128, 129, 1152, 1153])
def test_prompts_and_what_follows_them(npu, tiny, reference, length):
    tokens = np.random.default_rng(3).integers(0, 900, length + 12)
    logits = []
    for engine in map(OneSequence, (edgevl.load(tiny).engine, reference.engine)):
        first = np.array(engine.prefill(engine.embed(tokens[:length])))
        # Five more in a chunk, and one alone.
        more = engine.extend(tokens[length : length + 5].tolist())
        logits.append(np.stack([first, *more, engine.decode(int(tokens[length + 5]))]))
    # Tolerance: bfloat16 in each of four layers moves hidden states, keys and values by up to
    # 2^-9 of them, and sharp attention passes on more of that than the mean.
    assert np.median(error(*logits)) < 0.02
    assert error(*logits).max() < 0.1


def counters():
    """What the emulator's board has counted."""
    counters = Counters()
    # By its name: of the file that is loaded already, also where a runtime brought it along.
    ctypes.CDLL("libax_sys.so").EDGEVL_EMULATOR_Counters(ctypes.byref(counters))
    return {name: getattr(counters, name) for name, _ in Counters._fields_}


def test_a_step_copies_little_and_nothing_is_wrong(tiny, monkeypatch):
    monkeypatch.setenv("EDGEVL_NPU", "ax")
    engine = OneSequence(edgevl.load(tiny).engine)
    before = counters()
    engine.prefill(engine.embed(np.arange(300)))
    engine.decode(1)
    start = counters()
    for token in range(10):
        engine.decode(token)
    end = counters()
    step = {name: (end[name] - start[name]) / 10 for name in end}
    text = engine.config.text
    assert end["problems"] == before["problems"]
    assert step["allocations"] == step["memcpys"] == 0
    assert step["runs"] == text.num_hidden_layers + 1
    # A row of the embedding, a line of the mask and one of positions go in, logits come out.
    assert step["flushed_bytes"] == 2 * text.hidden_size + 2 * 64
    assert step["invalidated_bytes"] == -(-2 * text.vocab_size // 64) * 64


def test_a_damaged_model_is_an_error_with_its_status(npu, tiny, tmp_path):
    damaged = tmp_path / "damaged"
    shutil.copytree(tiny, damaged)
    path = damaged / layout.layer_file("qwen3", 128, 1)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(BoardError, match=r"l1_together\.axmodel: loading failed with status 0x"):
        edgevl.load(damaged)


def test_a_model_of_more_bytes_than_the_library_counts(tiny, monkeypatch):
    monkeypatch.setenv("EDGEVL_NPU", "ax")
    monkeypatch.setattr("edgevl.axera.npu.ax.MAX_BYTES", 1000)
    with pytest.raises(BoardError, match="bytes; the NPU's library takes 1000 at most"):
        edgevl.load(tiny)


class Interrupted:
    """A library during whose calls something happens that gives back what the NPU lends."""

    def __init__(self, library, happens):
        self._library, self._happens = library, happens

    def __getattr__(self, name):
        call = getattr(self._library, name)
        if not name.endswith(("MemFree", "rtFree", "DestroyHandle", "EngineUnload")):
            return call

        def interrupted(*arguments):
            status = call(*arguments)
            self._happens()
            return status

        return interrupted


LIBRARIES = {"ax": ("system", "engine"), "axcl": ("library",)}


def prepare_interrupted(runtime, npu, monkeypatch, tiny, happens):
    """What the emulator has counted, and memory and a model whose closing something interrupts."""
    before = counters()
    for name in LIBRARIES[npu]:
        monkeypatch.setattr(runtime, name, Interrupted(getattr(runtime, name), happens))
    things = [runtime.allocate(4096), runtime.load(tiny / layout.layer_file("qwen3", 128, 0))]
    return before, things


def test_a_signal_while_something_is_given_back(npu, tiny, monkeypatch):
    def happens():
        raise KeyboardInterrupt  # as a signal does right after the call

    before, things = prepare_interrupted(open_runtime(True), npu, monkeypatch, tiny, happens)
    for thing in things:
        with pytest.raises(KeyboardInterrupt):
            thing.close()
        thing.close()  # as the end of the process does once more
    assert counters()["models"] == before["models"]
    assert counters()["problems"] == before["problems"]


def test_two_threads_give_back_the_same(npu, tiny, monkeypatch):
    before, things = prepare_interrupted(
        open_runtime(True), npu, monkeypatch, tiny, lambda: time.sleep(0.05)
    )
    with ThreadPoolExecutor(2) as threads:
        for thing in things:
            for closed in [threads.submit(thing.close) for _ in range(2)]:
                closed.result()
    assert counters()["models"] == before["models"]
    assert counters()["problems"] == before["problems"]


def test_memory_is_given_back(npu, tiny):
    open_runtime(emulated=True)
    gc.collect()
    before = counters()
    model = edgevl.load(tiny)
    assert counters()["cmm_bytes"] > before["cmm_bytes"]
    assert counters()["weight_bytes"] > before["weight_bytes"]
    del model
    gc.collect()
    assert counters()["cmm_bytes"] == before["cmm_bytes"]
    assert counters()["weight_bytes"] == before["weight_bytes"]


def test_any_thread_may_call(npu, tiny):
    engine = OneSequence(edgevl.load(tiny).engine)
    tokens = np.arange(20)
    here = np.array(engine.prefill(engine.embed(tokens)))
    engine.rewind(0)
    with ThreadPoolExecutor(1) as pool:
        there = pool.submit(lambda: engine.prefill(engine.embed(tokens))).result()
    np.testing.assert_array_equal(here, there)


def test_an_engine_outlives_another(npu, tiny):
    kept, other = (OneSequence(edgevl.load(tiny).engine) for _ in range(2))
    tokens = np.arange(140)
    kept.prefill(kept.embed(tokens))
    expected = np.array(kept.decode(5))
    kept.rewind(140)
    other.prefill(other.embed(tokens[::-1].copy()))
    del other
    gc.collect()
    np.testing.assert_array_equal(kept.decode(5), expected)


def test_too_little_memory_is_one_line(npu, tiny):
    done = subprocess.run(
        [sys.executable, "-m", "edgevl", "chat", str(tiny), "-q", "x"],
        env={
            **os.environ,
            "EDGEVL_EMULATOR_CMM": "4",
            "PYTHONPATH": str(Path(edgevl.__file__).parents[1]),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("edgevl: error: ")
    assert "memory" in last


def text_model(model_type, hidden, heads, kv_heads, head_dim, layers=2):
    """A configuration with the sizes that matter to the NPU's memory, and little else."""
    config = PRESETS["mini-qwen3" if model_type == "qwen3" else "mini-qwen2"].config
    text = replace(
        config.text,
        vocab_size=600,
        hidden_size=hidden,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
    )
    return replace(config, text=text)


#: The width of keys and values beside the hidden size, which the cache of the first chunk has in
#: compiled models: smaller in nearly all InternVL, equal in InternVL3.5-1B, and larger.
WIDTHS = {
    "as InternVL3-1B: 896 and 128": text_model("qwen2", 896, 14, 2, 64),
    "as InternVL3.5-2B: 2048 and 1024": text_model("qwen3", 2048, 16, 8, 128, layers=1),
    "equal": text_model("qwen3", 256, 4, 2, 128),
    "hidden 128 and 256": text_model("qwen3", 128, 4, 2, 128),
    "hidden 56 and 64, no rows aligned": PRESETS["mini-qwen3"].config,
    "hidden 72 and 24, no rows aligned": PRESETS["mini-qwen2"].config,
}


@pytest.fixture(scope="module")
def widths(tmp_path_factory):
    """A function: name in `WIDTHS` -> checkpoint's and board's directory, both written once."""
    written = {}

    def make(name):
        if name not in written:
            directory = tmp_path_factory.mktemp("widths")
            source = write_checkpoint(
                WIDTHS[name], directory / "checkpoint", base_vocabulary=560, seed=0
            )
            board = write(directory / "board", source, WIDTH_SHAPE)
            with Checkpoint.open(source) as checkpoint:
                write_embeddings(checkpoint, board)
            written[name] = source, board
        return written[name]

    return make


WIDTH_SHAPE = layout.BoardShape(context=127, chunk=16, max_prefill=32)


@pytest.mark.parametrize("name", WIDTHS)
def test_the_unused_cache_has_the_width_that_the_model_says(npu, widths, name):
    source, board = widths(name)
    engine = OneSequence(edgevl.load(board).engine)
    problems = counters()["problems"]
    tokens = np.random.default_rng(6).integers(0, 500, 64)
    with Checkpoint.open(source) as checkpoint:
        expected = OneSequence(ReferenceEngine(checkpoint)).extend(tokens.tolist())
    for length in (1, 16, 17, 45):
        engine.rewind(0)
        logits = engine.prefill(engine.embed(tokens[:length]))
        assert error(logits, expected[length - 1]) < 0.02
        assert error(engine.decode(int(tokens[length])), expected[length]) < 0.02
    assert counters()["problems"] == problems


@pytest.mark.parametrize("name", WIDTHS)
def test_the_loop_of_the_vendors_demo(widths, name, monkeypatch):
    """It runs what we compile, and answers as our engine does; its first caches are of zeros."""
    pytest.importorskip("ml_dtypes")
    monkeypatch.setenv("EDGEVL_NPU", "ax")
    monkeypatch.syspath_prepend(str(EXAMPLES.parent / "benchmarks"))
    binding = ModuleType("axengine")
    binding.InferenceSession = Session
    monkeypatch.setitem(sys.modules, "axengine", binding)
    from axengine_loop import AxengineLoop

    _, board = widths(name)
    engine = OneSequence(edgevl.load(board).engine)
    loop = AxengineLoop(board, engine.config.text, WIDTH_SHAPE)
    for length in (3, 16, 40):
        prompt = np.random.default_rng(length).integers(0, 500, length)
        engine.rewind(0)
        ours = [int(engine.prefill(engine.embed(prompt)).argmax())]
        theirs = [loop.prefill(prompt)]
        for _ in range(5):
            ours.append(int(engine.decode(ours[-1]).argmax()))
            theirs.append(loop.decode(theirs[-1]))
        assert theirs == ours


@pytest.mark.parametrize("preset", ["mini-qwen2", "mini-llama"])
def test_rows_that_are_not_aligned(npu, mini_checkpoint, tmp_path, preset):
    source = mini_checkpoint(preset)
    shape = layout.BoardShape(context=191, chunk=32, max_prefill=64)
    engine = OneSequence(edgevl.load(write(tmp_path / "board", source, shape)).engine)
    assert (engine.max_context, engine.chunk) == (192, 32)
    tokens = np.random.default_rng(4).integers(0, 500, 192)
    with Checkpoint.open(source) as checkpoint:
        expected = OneSequence(ReferenceEngine(checkpoint)).extend(tokens.tolist())
    for length in (1, 33, 100, 40):
        engine.rewind(0)
        logits = engine.prefill(engine.embed(tokens[:length]))
        assert error(logits, expected[length - 1]) < 0.02
        assert error(engine.decode(int(tokens[length])), expected[length]) < 0.02
    rest = engine.extend(tokens[41:].tolist())
    assert error(rest, expected[41:]).max() < 0.02


def test_bytes_as_pictures_and_the_likeliest_tokens(npu, tmp_path, reference):
    shape = layout.BoardShape(context=255, max_prefill=128)
    board = write(tmp_path / "board", locate("tiny"), shape, uint8_input=True, post_topk=8)
    model = edgevl.load(board)
    picture = EXAMPLES / "meter.png"
    config = model.checkpoint.config
    tiles = prepare_picture(picture, config, 1).pixels
    features = [engine.encode_images(tiles) for engine in (model.engine, reference.engine)]
    assert error(*features).max() < 0.02
    question = "What number is on the display?"
    answer = model.ask(question, [picture], max_tokens=24)
    assert answer.token_ids == reference.ask(question, [picture], max_tokens=24).token_ids
    with model.sequence() as sequence:
        assert np.isfinite(model.engine.decode([sequence], [5])).sum() == 8
    drawn = model.ask(question, [picture], max_tokens=8, temperature=1.0, top_p=0.9, seed=1)
    assert drawn.text


@pytest.mark.parametrize(
    ("locale", "said"),
    [("C.UTF-8", "emulated NPU: no board computes"), ("zh_CN.UTF-8", "模拟的 NPU：没有板子在计算")],
)
def test_an_answer_says_that_no_board_computes(tiny, monkeypatch, capsys, locale, said):
    monkeypatch.setenv("LC_ALL", locale)
    assert main(["chat", str(tiny), "-q", "Hello", "--max-tokens", "1"]) == 0
    assert capsys.readouterr().err.splitlines() == [said]


def test_measurements_say_that_no_board_computes(tiny, capsys):
    options = ["--prompt-tokens", "8", "--generate", "1", "--runs", "1"]
    assert main(["bench", str(tiny), *options]) == 0
    assert capsys.readouterr().out.splitlines()[-1].strip() == "emulated NPU: no board computes"
    assert main(["bench", str(tiny), *options, "--json"]) == 0
    notes = json.loads(capsys.readouterr().out)["notes"]
    assert notes == ["emulated NPU: no board computes"]
