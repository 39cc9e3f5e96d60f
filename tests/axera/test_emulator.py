"""The NPU emulator with whole models: files, libraries and numbers, against the reference engine.

Numbers must agree within what rounding to bfloat16 implies. It is off by up to 2**-8 of a value, at
the lower end of a binade: over all values 0.74 of that over sqrt(3) in root mean square. Errors of
different roundings are independent; softmax and gates amplify what they are given by a factor that
is taken to be 3 at most (see test_cpu_engine, also for which values the native engine rounds).
Beside these, a layer's input and output are rounded, and the logits.
"""

import importlib.util
import math
import os
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest

from edgevl.axera.layout import EMULATED_MAGIC, MASKED, BoardShape
from edgevl.checkpoint import Checkpoint, GPTQConfig
from edgevl.checkpoint.config import IMAGE_MEAN, IMAGE_STD
from edgevl.checkpoint.writer import to_bfloat16
from edgevl.engine import ReferenceEngine
from edgevl.errors import BoardError
from edgevl.loading import locate

pytest.importorskip("edgevl._native", reason="the native engine is not built")

from edgevl.axera.npu.libraries import emulator_directory
from edgevl.boards.emulate import write_emulated
from edgevl.boards.estimates import group_times_ms
from edgevl.checkpoint.architecture import vision_layers

try:
    emulator_directory()
except BoardError as error:
    pytest.skip(str(error), allow_module_level=True)

from emulated_board import Board, BoardModel, Memory
from one_sequence import OneSequence
from random_inputs import off, random_ids, random_tiles
from stored_gptq import gptq_checkpoint

SHAPE = BoardShape(context=127, chunk=16, max_prefill=32)
VISION_6B = "internvl_vit_model_1x3x48x48.axmodel"
BAD_MODEL = 0x8006000F  # native/emulator/problem.h
BF16_MASKED = to_bfloat16(np.array([MASKED], np.float32))[0]


@pytest.fixture
def board(monkeypatch):
    monkeypatch.setenv("EDGEVL_EMULATOR_THREADS", "2")
    return Board()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The shipped model, and its files for the emulator."""
    directory = tmp_path_factory.mktemp("tiny")
    with Checkpoint.open(locate("tiny")) as checkpoint:
        written = []
        write_emulated(checkpoint, directory, SHAPE, progress=written.append)
        assert sorted(written) == sorted(directory.iterdir())
        yield checkpoint, directory


def floats(bits):
    return (bits.astype(np.uint32) << 16).view(np.float32)


class Text:
    """A text model whose caches stay in the board's memory.

    New keys and values are written in place where the rows of the cache are aligned.
    """

    def __init__(self, board, directory, config, shape):
        self.shape, self.hidden = shape, config.hidden_size
        self.width = config.num_key_value_heads * config.head_dim
        prefix = f"{config.model_type}_p{shape.chunk}"
        self.layers = [
            BoardModel(board, directory / f"{prefix}_l{layer}_together.axmodel")
            for layer in range(config.num_hidden_layers)
        ]
        self.post = BoardModel(board, directory / f"{config.model_type}_post.axmodel")
        rows = shape.context + shape.chunk
        self.caches = [
            [Memory(board, (rows, self.width), np.uint16) for _ in "kv"] for _ in self.layers
        ]
        chunk = shape.chunk
        self.new = [Memory(board, (chunk, self.width), np.uint16) for _ in "kv"]
        # What the first chunk is given as a cache: as much as the model says.
        unread = [
            shape for name, _, shape in self.layers[0].groups[1][0] if name.endswith("_cache")
        ]
        self.unread = [Memory(board, shape, np.uint16) for shape in unread]
        self.states = [Memory(board, (chunk, self.hidden), np.uint16) for _ in range(2)]
        self.indices = Memory(board, (chunk,), np.uint32)
        self.mask = Memory(board, (chunk * (shape.max_prefill + shape.context + chunk),), np.uint16)
        self.last = Memory(board, (self.hidden,), np.uint16)
        self.logits = Memory(board, self.post.groups[0][1][0][2], np.uint16)
        self.length = 0

    def append(self, embeddings, group, history):
        """Append up to a chunk of embeddings: -> logits after the last one."""
        tokens = 1 if group == 0 else self.shape.chunk
        count = len(embeddings)
        states, after = self.states
        states.array[:count] = to_bfloat16(embeddings)
        states.array[count:tokens] = 0
        self.indices.array[:tokens] = self.length + np.arange(tokens)
        mask = self.mask.array[: tokens * (history + tokens)].reshape(tokens, -1)
        mask[...] = BF16_MASKED
        mask[:, : self.length] = 0
        mask[:, history:][np.tri(tokens, dtype=bool)] = 0
        for memory in (states, self.indices, self.mask):
            memory.flush()
        row_bytes = 2 * self.width
        in_place = row_bytes % 128 == 0
        for layer, caches in zip(self.layers, self.caches, strict=True):
            out = [
                cache(tokens * row_bytes, self.length * row_bytes)
                if in_place
                else new(tokens * row_bytes)
                for cache, new in zip(caches, self.new, strict=True)
            ]
            layer.run(
                group,
                [
                    *(cache(history * row_bytes) for cache in caches if history),
                    *(cache(cache.size) for cache in self.unread if not history),
                    self.indices(4 * tokens),
                    states(2 * tokens * self.hidden),
                    self.mask(mask.nbytes),
                ],
                [*out, after(2 * tokens * self.hidden)],
            )
            for cache, new in zip(caches, self.new, strict=True):
                if not in_place:
                    cache.array[self.length :][:tokens] = new.invalidate()[:tokens]
                    cache.flush()
            states, after = after, states
        self.last.array[...] = states.invalidate()[count - 1]
        self.last.flush()
        self.post.run(0, [self.last(2 * self.hidden)], [self.logits(self.logits.size)])
        after.invalidate()
        self.length += count
        return floats(self.logits.invalidate()).reshape(-1)


def bound(roundings):
    return 3 * 0.74 * 2**-8 * math.sqrt(roundings / 3)


def text_bound(config):
    return bound(11 * config.text.num_hidden_layers + 3)


def check_text(board, checkpoint, directory, shape, lengths):
    """Chunks of the prompt, then tokens one by one, each against the reference."""
    reference = OneSequence(ReferenceEngine(checkpoint))
    text = Text(board, directory, checkpoint.config.text, shape)
    ids = random_ids(checkpoint, sum(lengths) + 4)
    embeddings = reference.embed(ids)
    for group, length in enumerate(lengths, start=1):
        piece = embeddings[text.length : text.length + length]
        expected = reference.prefill(piece)
        logits = text.append(piece, group, (group - 1) * shape.chunk)
        assert off(logits, expected) < text_bound(checkpoint.config)
    for token in ids[sum(lengths) :]:
        expected = reference.decode(int(token))
        logits = text.append(reference.embed(np.array([token])), 0, shape.context)
        assert off(logits, expected) < text_bound(checkpoint.config)
    return text


def test_prefill_and_decode_of_tiny(board, tiny):
    checkpoint, directory = tiny
    board.reset_counters()
    check_text(board, checkpoint, directory, SHAPE, [16, 16, 9])
    layers = checkpoint.config.text.num_hidden_layers
    counters = board.counters()
    assert counters["runs"] == 7 * (layers + 1)
    assert counters["problems"] == 0
    assert counters["flushes"] == 4 * 7
    assert counters["invalidates"] == 3 * 7
    assert counters["emulator_ns"] > 0
    times = group_times_ms(checkpoint.config.text, SHAPE)
    assert counters["npu_ns"] >= 1e6 * layers * (sum(times[1:]) + 4 * times[0]) * 0.999


def test_every_kind_of_text_model(board, mini_checkpoint, preset, tmp_path):
    shape = BoardShape(context=31, chunk=8, max_prefill=8)
    with Checkpoint.open(mini_checkpoint(preset)) as checkpoint:
        write_emulated(checkpoint, tmp_path, shape)
        check_text(board, checkpoint, tmp_path, shape, [8, 5])


def test_gptq_weights_of_a_text_model_alone(board, tmp_path):
    shape = BoardShape(context=31, chunk=8, max_prefill=8)
    config = GPTQConfig(bits=4, group_size=32, checkpoint_format="gptq")
    with gptq_checkpoint(tmp_path / "gptq", config) as checkpoint:
        directory = tmp_path / "emulated"
        directory.mkdir()
        write_emulated(checkpoint, directory, shape)
        assert not list(directory.glob("*vit*"))
        check_text(board, checkpoint, directory, shape, [8, 5])


@pytest.mark.parametrize("preset", ["mini-qwen3", "mini-qwen2"])
def test_shapes_are_those_of_a_compiled_model(board, mini_checkpoint, preset, tmp_path):
    with Checkpoint.open(mini_checkpoint(preset)) as checkpoint:
        text = checkpoint.config.text
        write_emulated(checkpoint, tmp_path, SHAPE)
    layer = BoardModel(board, tmp_path / f"{text.model_type}_p16_l0_together.axmodel")
    hidden, width = text.hidden_size, text.num_key_value_heads * text.head_dim
    assert (hidden < width) == (preset == "mini-qwen3")  # and more than it in the other
    assert len(layer.groups) == 4
    for group, (tokens, cache, columns) in enumerate(
        [
            (1, (127, width), 128),
            (16, (1, hidden), 16),  # not used, and of this width in the vendor's models
            (16, (16, width), 32),
            (16, (32, width), 48),
        ]
    ):
        inputs, outputs = layer.groups[group]
        assert inputs == [
            ("K_cache", np.uint16, (1, *cache)),
            ("V_cache", np.uint16, (1, *cache)),
            ("indices", np.uint32, (1, tokens)),
            ("input", np.uint16, (1, tokens, hidden)),
            ("mask", np.uint16, (1, tokens, columns)),
        ]
        assert outputs == [
            ("K_cache_out", np.uint16, (1, tokens, width)),
            ("V_cache_out", np.uint16, (1, tokens, width)),
            ("output", np.uint16, (1, tokens, hidden)),
        ]
    layer.close()


def test_symbols_are_those_of_an_ax650(board):
    assert b"EdgeVL emulator" in board.engine.AX_ENGINE_GetVersion()
    assert hasattr(board.engine, "AX_ENGINE_SetAffinity")
    assert not hasattr(board.engine, "AX_ENGINE_GetTotalOps")


@pytest.mark.parametrize("uint8_input", [False, True])
def test_vision(board, mini_checkpoint, preset, uint8_input, tmp_path):
    with Checkpoint.open(mini_checkpoint(preset)) as checkpoint:
        config, reference = checkpoint.config, ReferenceEngine(checkpoint)
        write_emulated(checkpoint, tmp_path, BoardShape(7, 2, 0), uint8_input)
        pixels = random_tiles(checkpoint, 1)
        image = pixels
        if uint8_input:
            image = np.random.default_rng(0).integers(0, 256, (1, *pixels.shape[2:], 3), np.uint8)
            scaled = (image / np.float32(255) - np.float32(IMAGE_MEAN)) / np.float32(IMAGE_STD)
            pixels = np.ascontiguousarray(scaled.transpose(0, 3, 1, 2), np.float32)
        size = config.vision.image_size
        model = BoardModel(board, tmp_path / f"internvl_vit_model_1x3x{size}x{size}.axmodel")
        (features,) = model.run_arrays(0, [image])
        expected = reference.encode_images(pixels)
        assert features.shape == expected.shape
        assert off(features, expected) < bound(8 * vision_layers(config) + 2)
        model.close()


def test_logits_and_the_best_of_them(board, mini_checkpoint, tmp_path):
    with Checkpoint.open(mini_checkpoint("mini-qwen2")) as checkpoint:
        states = np.random.default_rng(0).standard_normal(
            (1, 1, checkpoint.config.text.hidden_size)
        )
        states = to_bfloat16(states.astype(np.float32))
        results = []
        for options in ({"logits": "F32"}, {}, {"post_topk": 5}):
            write_emulated(checkpoint, tmp_path, BoardShape(7, 2, 0), **options)
            model = BoardModel(board, tmp_path / "qwen2_post.axmodel")
            results.append(model.run_arrays(0, [states]))
            model.close()
    [logits], [rounded], [indices, probabilities] = results
    logits = logits.reshape(-1)
    assert logits.dtype == np.float32
    np.testing.assert_array_equal(rounded.reshape(-1), to_bfloat16(logits))
    best = np.argsort(-logits, kind="stable")[:5]
    np.testing.assert_array_equal(indices.reshape(-1), best)
    weights = np.exp(logits.astype(np.float64) - logits.max())
    np.testing.assert_allclose(probabilities.reshape(-1), weights[best] / weights.sum(), rtol=1e-6)


def test_an_interrupted_file_is_not_there(tiny, tmp_path, monkeypatch):
    checkpoint, _ = tiny
    done = []

    def stop(path):
        done.append(path)
        monkeypatch.setattr("edgevl.engine.packed.pack_matrix", interrupt)

    def interrupt(*arguments):
        # Nor would it be after a kill, which nothing can be done about.
        assert list(tmp_path.glob("qwen3*")) == done
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_emulated(checkpoint, tmp_path, SHAPE, progress=stop)
    assert list(tmp_path.iterdir()) == done
    assert len(done) == 1


@pytest.mark.parametrize(
    ("filename", "change"),
    [
        ("qwen2_post.axmodel", lambda data: data[: len(data) // 2]),
        ("qwen2_post.axmodel", lambda data: data.replace(EMULATED_MAGIC, b"ELF", 1)),
        ("qwen2_post.axmodel", lambda data: data.replace(b"kind post", b"kind toast", 1)),
        ("qwen2_p2_l1_together.axmodel", lambda data: data.replace(b" qkv ", b" vkq ", 1)),
        ("qwen2_p2_l1_together.axmodel", lambda data: data.replace(b"mask bf16", b"mask f32", 1)),
        (VISION_6B, lambda data: data.replace(b" layers.0.k_norm ", b" layers.0.d_norm ", 1)),
        (VISION_6B, lambda data: data.replace(b"number std ", b"number sdt ", 1)),
    ],
)
def test_a_damaged_file_is_refused(board, mini_checkpoint, tmp_path, filename, change):
    with Checkpoint.open(mini_checkpoint("mini-6b")) as checkpoint:
        write_emulated(checkpoint, tmp_path, BoardShape(7, 2, 0))
    path = tmp_path / filename
    whole = path.read_bytes()
    BoardModel(board, path).close()
    path.write_bytes(change(whole))
    assert path.read_bytes() != whole
    with pytest.raises(AssertionError, match=f"{BAD_MODEL:#x}"):
        BoardModel(board, path)


def test_a_run_takes_the_time_of_the_board(mini_checkpoint, monkeypatch, tmp_path):
    monkeypatch.setattr("edgevl.boards.estimates.post_time_ms", lambda text, target: 3.0)
    with Checkpoint.open(mini_checkpoint("mini-llama")) as checkpoint:
        write_emulated(checkpoint, tmp_path, BoardShape(7, 2, 0))
    monkeypatch.setenv("EDGEVL_EMULATOR_TIMING", "1")
    board = Board()
    model = BoardModel(board, tmp_path / "llama_post.axmodel")
    memory = [Memory(board, shape, dtype) for part in model.groups[0] for _, dtype, shape in part]
    board.reset_counters()
    took_ms = []
    for _ in range(20):
        start = time.perf_counter()
        model.run(0, *([place(place.size)] for place in memory))
        took_ms.append(1000 * (time.perf_counter() - start))
    assert 3.0 <= min(took_ms) < 4.0
    assert board.counters()["npu_ns"] == 20 * 3_000_000


def test_without_compute_runs_only_check(tiny, monkeypatch):
    _, directory = tiny
    monkeypatch.setenv("EDGEVL_EMULATOR_COMPUTE", "0")
    monkeypatch.setenv("EDGEVL_EMULATOR_CHECK", "0")
    board = Board()
    model = BoardModel(board, directory / "qwen3_post.axmodel")
    states, logits = (
        Memory(board, shape, dtype) for part in model.groups[0] for _, dtype, shape in part
    )
    states.array[...] = 1  # not flushed: the NPU shares the processor's view
    logits.array[...] = 7
    model.run(0, [states(states.size)], [logits(logits.size)])
    assert (logits.invalidate() == 7).all()
    assert model.status(0, [states(states.size)], [states(states.size)]) != 0  # too small
    model.close()


@pytest.mark.parametrize("provider", ["AxEngineExecutionProvider", "AXCLRTExecutionProvider"])
@pytest.mark.skipif(
    importlib.util.find_spec("axengine") is None, reason="the vendor's Python binding is not there"
)
def test_the_vendors_binding(board, tiny, provider, tmp_path):
    """A decode step of a layer through axengine, unchanged, and the same here."""
    _, directory = tiny
    path = directory / "qwen3_p16_l0_together.axmodel"
    model = BoardModel(board, path)
    inputs = model.groups[2][0]
    random = np.random.default_rng(0)
    arrays = {
        name: to_bfloat16(random.standard_normal(shape).astype(np.float32))
        for name, _, shape in inputs
    }
    arrays["indices"] = 16 + np.arange(16, dtype=np.uint32)[None]
    mask = np.where(np.tri(16, 32, 16, dtype=bool), 0, BF16_MASKED)[None]
    arrays["mask"] = mask.astype(np.uint16)
    expected = model.run_arrays(2, [arrays[name] for name, _, _ in inputs])
    model.close()
    np.savez(tmp_path / "in.npz", **arrays)
    program = f"""
        import ml_dtypes, numpy as np
        from axengine import InferenceSession
        session = InferenceSession({str(path)!r}, providers=[{provider!r}])
        arrays = dict(np.load({str(tmp_path / "in.npz")!r}))
        for name in arrays:
            if name != "indices":
                arrays[name] = arrays[name].view(ml_dtypes.bfloat16)
        outputs = session.run(None, arrays, shape_group=2)
        names = [output.name for output in session.get_outputs(2)]
        views = {{name: array.view(np.uint16) for name, array in zip(names, outputs)}}
        np.savez({str(tmp_path / "out.npz")!r}, **views)
    """
    environment = {**os.environ, "LD_LIBRARY_PATH": str(emulator_directory())}
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "EdgeVL emulator" in result.stdout + result.stderr
    found = np.load(tmp_path / "out.npz")
    for (name, _, shape), values in zip(model.groups[2][1], expected, strict=True):
        assert found[name].shape == shape
        np.testing.assert_array_equal(found[name], values)
        assert math.isfinite(floats(values).sum())
