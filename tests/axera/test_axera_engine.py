"""The engine of NPUs against the reference engine, on an NPU in NumPy."""

import gc
import json
from dataclasses import replace

import numpy as np
import pytest

import edgevl
from edgevl.axera import layout
from edgevl.axera.directory import BoardModel
from edgevl.axera.engine import AxeraEngine
from edgevl.axera.layout import SINGLE_STEPS
from edgevl.axera.npu.base import Group, TensorInfo
from edgevl.boards.plan import PrefillSteps, prefill_steps
from edgevl.checkpoint import Checkpoint
from edgevl.engine import ReferenceEngine
from edgevl.errors import BoardError, CheckpointError, EdgeVLError, PromptError
from edgevl.generate import Model
from edgevl.generate.session import Turn
from edgevl.loading import load_engine, open_model
from edgevl.options import LoadOptions
from edgevl.preprocess import Message, PromptEncoder, prepare_picture
from fake_npu import Compiled, FakeRuntime, write_board
from one_sequence import OneSequence

LENGTHS = (1, 127, 128, 129, 1023, 1024, 1152, 1153)


@pytest.fixture(scope="module")
def boards(mini_checkpoint, tmp_path_factory):
    """A function (preset, compiled) -> an engine and its runtime; files are written once."""
    directories = {}

    def make(preset="mini-qwen3", compiled=None, max_context=None):
        if preset not in directories:
            path = tmp_path_factory.mktemp("board") / preset
            write_board(path, mini_checkpoint(preset))
            directories[preset] = path, Checkpoint.open(mini_checkpoint(preset))
        path, checkpoint = directories[preset]
        runtime = FakeRuntime(checkpoint, compiled)
        return OneSequence(AxeraEngine(BoardModel(path), max_context, runtime)), runtime

    yield make
    for _, checkpoint in directories.values():
        checkpoint.close()


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(5).integers(0, 500, 2200)


@pytest.fixture(scope="module")
def expected(mini_checkpoint, tokens):
    """Logits of the reference after each of 2,048 tokens, by preset."""
    known = {}

    def after(preset="mini-qwen3"):
        if preset not in known:
            with Checkpoint.open(mini_checkpoint(preset)) as checkpoint:
                engine = OneSequence(ReferenceEngine(checkpoint))
                blocks = [engine.extend(tokens[i : i + 256].tolist()) for i in range(0, 2048, 256)]
                known[preset] = np.concatenate(blocks)
        return known[preset]

    return after


def check(logits, reference, layers=3):
    """Compare logits [..., V] of a model that rounds to bfloat16 between its layers.

    Rounding moves a number by 2^-9 of it at most. That happens to the embedding, to keys and
    values and to the hidden state in each layer, and to the logits; errors add up at worst.
    """
    assert logits.dtype == np.float32
    error = np.linalg.norm(logits - reference, axis=-1) / np.linalg.norm(reference, axis=-1)
    assert error.max() < (2 + 2 * layers) * 2**-9
    assert error.max() > 0  # it did round


@pytest.mark.parametrize("length", LENGTHS)
def test_prompts_and_what_follows_them(boards, tokens, expected, length):
    engine, _ = boards()
    check(engine.prefill(engine.embed(tokens[:length])), expected()[length - 1])
    assert engine.length == length
    check(engine.decode(tokens[length]), expected()[length])
    # A second turn continues at whatever length there is.
    more = engine.embed(tokens[length + 1 : length + 141])
    check(engine.prefill(more), expected()[length + 140])


@pytest.mark.parametrize("length", LENGTHS)
def test_a_cache_continued_at_each_length(boards, tokens, expected, length):
    engine, _ = boards()
    engine.prefill(engine.embed(tokens[:length]))
    check(engine.extend(tokens[length : length + 20].tolist()), expected()[length : length + 20])
    engine.rewind(length)
    more = engine.embed(tokens[length : length + 130])
    check(engine.prefill(more), expected()[length + 129])


def test_up_to_the_whole_context_and_not_a_token_further(boards, tokens, expected):
    engine, runtime = boards()
    assert engine.max_context == 2048
    with pytest.raises(ValueError, match="exceed 2048"):
        engine.prefill(engine.embed(tokens[:2049]))
    assert runtime.runs == []
    engine.prefill(engine.embed(tokens[:2040]))
    check(engine.prefill(engine.embed(tokens[2040:2047])), expected()[2046])
    check(engine.decode(tokens[2047]), expected()[2047])
    for step in (lambda: engine.decode(1), lambda: engine.extend([1])):
        with pytest.raises(ValueError, match="exceed 2048"):
            step()


@pytest.mark.parametrize(
    ("at", "length", "groups"),
    [
        (0, 128, [1]),  # no chunk is run for nothing
        (0, 256, [1, 2]),
        (0, 129, [1, 0]),  # a token is cheaper than a chunk
        (0, 128 + SINGLE_STEPS + 1, [1, 2]),
        (0, 1152, list(range(1, 10))),
        (0, 1160, [*range(1, 10), *[0] * 8]),  # beyond what chunks were compiled for
        (100, 128, [2]),
        (128, 128, [2]),
        (129, 128, [3]),
        (1000, 200, [9, *[0] * 72]),
        (900, 4, [0] * 4),  # the longer the history, the longer a chunk takes
        (900, 5, [9]),
    ],
)
def test_which_groups_are_run(boards, tokens, at, length, groups):
    engine, runtime = boards()
    engine.sequence.length = at
    engine.prefill(engine.embed(tokens[:length]))
    first = [group for name, group in runtime.runs if "_l0_" in name]
    assert first == groups
    assert len(runtime.runs) == 3 * len(groups) + 1  # three layers, and the logits once
    chunks = tuple(group - 1 for group in groups if group)
    planned = prefill_steps(layout.BoardShape(), length, at)
    assert planned == PrefillSteps(chunks, groups.count(0))


def test_rewinding_leaves_no_trace(boards, tokens, expected):
    engine, _ = boards()
    engine.prefill(engine.embed(tokens[::-1][:700].copy()))
    for token in (9, 8, 7):
        engine.decode(token)
    engine.rewind(0)
    check(engine.prefill(engine.embed(tokens[:300])), expected()[299])
    engine.rewind(150)
    check(engine.decode(tokens[150]), expected()[150])
    engine.rewind(50)
    check(engine.prefill(engine.embed(tokens[50:100])), expected()[99])
    for wrong in (-1, 101):
        with pytest.raises(ValueError, match="rewind"):
            engine.rewind(wrong)


def test_positions_of_rows_beyond_the_prompt_exist(boards, tokens, monkeypatch):
    engine, runtime = boards(compiled=Compiled(contexts=(255,), max_prefill=128))
    engine.prefill(engine.embed(tokens[:128]))
    shown = []
    monkeypatch.setattr(runtime, "before_run", lambda c: shown.append(c.array("indices").copy()))
    engine._decoder.run(engine._decoder.shapes.prefill[1], engine.embed(tokens[:20]), 128)
    assert len(shown) == 3
    assert (shown[0][0, :20] == np.arange(128, 148)).all()
    assert (shown[0][0, 20:] == 147).all()


@pytest.mark.parametrize(
    ("compiled", "rows"),
    [
        (Compiled(contexts=(255,), max_prefill=128), 256),
        (Compiled(contexts=(255,), max_prefill=256), 384),  # as others may compile
        (Compiled(contexts=(63,), max_prefill=0, history_first=(1, 200, 64)), 128),
    ],
)
def test_a_cache_holds_what_is_written_and_no_more(boards, compiled, rows):
    engine, _ = boards(compiled=compiled)
    [caches, *_] = engine._decoder._caches
    text = engine.config.text
    assert {cache.size for cache in caches} == {rows * text.num_key_value_heads * text.head_dim * 2}


def test_several_decode_groups_the_shortest_that_fits_is_taken(boards, tokens, expected):
    compiled = Compiled(contexts=(511, 255, 1023), max_prefill=256)
    engine, runtime = boards(compiled=compiled)
    assert engine.max_context == 1024
    engine.prefill(engine.embed(tokens[:250]))
    for length in (*range(250, 260), *range(508, 515)):
        if length > engine.length:
            engine.prefill(engine.embed(tokens[engine.length : length]))
        runtime.runs.clear()
        check(engine.decode(tokens[length]), expected()[length])
        assert runtime.runs[0][1] == (1 if length <= 255 else 0 if length <= 511 else 2)


@pytest.mark.parametrize(
    "compiled",
    [
        Compiled(history_first=(1, 128, 64)),  # as wide as other caches, and as long as a chunk
        Compiled(history_first=(1, 1, 5)),
        Compiled(history_first=(3, 2048, 64)),  # more than the cache itself
        Compiled(history_first=(9,)),
        Compiled(logits="F32"),
    ],
)
def test_what_differs_between_compilers(boards, tokens, expected, compiled):
    engine, _ = boards(compiled=compiled)
    check(engine.prefill(engine.embed(tokens[:140])), expected()[139])
    check(engine.decode(tokens[140]), expected()[140])


@pytest.mark.parametrize("preset", ["mini-qwen2", "mini-llama"])
def test_rows_that_are_not_aligned_are_copied(boards, tokens, expected, preset):
    engine, _ = boards(preset)
    for length in (3, 131, 129 + 128):
        engine.rewind(0)
        check(engine.prefill(engine.embed(tokens[:length])), expected(preset)[length - 1])
        check(engine.decode(tokens[length]), expected(preset)[length])
    check(engine.extend(tokens[258:270].tolist()), expected(preset)[258:270])


def test_a_decoded_token_copies_little(boards, tokens):
    engine, runtime = boards()
    engine.prefill(engine.embed(tokens[:100]))
    engine.decode(tokens[100])
    before = sum(memory.written for memory in runtime.memories)
    engine.decode(tokens[101])
    text = engine.config.text
    # A row of the embedding, a position, an element of the mask, and an unaligned row once more.
    assert sum(memory.written for memory in runtime.memories) - before == 4 * text.hidden_size + 6


def test_top_k(boards, tokens, expected):
    engine, _ = boards(compiled=Compiled(top_k=7))
    full, _ = boards()
    logits = engine.prefill(engine.embed(tokens[:9]))
    reference = full.prefill(full.embed(tokens[:9]))
    kept = np.flatnonzero(np.isfinite(logits))
    assert len(kept) == engine.top_k == 7
    assert "7 likeliest" in engine.notes[0]
    assert full.notes == ()
    assert full.top_k is None
    best = np.argsort(-reference)[:7]
    assert set(best[:3]) <= set(kept)  # logits rounded to bfloat16 may tie further down
    probabilities = np.exp(reference - reference.max())
    probabilities /= probabilities.sum()
    np.testing.assert_allclose(np.exp(logits[kept]), probabilities[kept], rtol=0.05)


@pytest.mark.parametrize(("pixels", "channels_last"), [("F32", False), ("U8", False), ("U8", True)])
def test_pictures(boards, pixels, channels_last):
    engine, runtime = boards(compiled=Compiled(pixels=pixels, channels_last=channels_last))
    config = engine.config
    levels = np.random.default_rng(1).integers(0, 256, (2, 3, 56, 56)).astype(np.float32)
    mean, std = (np.float32(s).reshape(3, 1, 1) for s in (config.image_mean, config.image_std))
    tiles = (levels / 255 - mean) / std
    features = engine.encode_images(tiles)
    reference = ReferenceEngine(runtime.checkpoint).encode_images(tiles)
    np.testing.assert_allclose(features, reference, rtol=1e-3, atol=1e-4)
    assert engine.timings().tiles == 2


def test_interrupted_between_layers_it_goes_on(boards, tokens, expected, monkeypatch):
    engine, runtime = boards()

    def interrupt(call):
        runtime.runs.append(call)
        if len(runtime.runs) == 5:  # the second layer of the second chunk
            raise KeyboardInterrupt

    monkeypatch.setattr(runtime, "before_run", interrupt)
    with pytest.raises(KeyboardInterrupt):
        engine.prefill(engine.embed(tokens[:300]))
    assert engine.length == 128
    check(engine.prefill(engine.embed(tokens[128:300])), expected()[299])


def test_an_interrupted_mask_is_written_again(boards, tokens, expected, monkeypatch):
    engine, _ = boards()
    engine.prefill(engine.embed(tokens[:40]))
    engine.decode(tokens[40])
    mask = engine._decoder._masks[0]
    write = mask.memory.write
    monkeypatch.setattr(mask.memory, "write", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        engine.decode(tokens[41])
    monkeypatch.setattr(mask.memory, "write", write)
    check(engine.decode(tokens[41]), expected()[41])
    engine.rewind(30)
    check(engine.prefill(engine.embed(tokens[30:32])), expected()[31])


def test_there_is_memory_for_one_sequence(boards):
    text, _ = boards()
    with pytest.raises(EdgeVLError, match="memory for one sequence"):
        text.engine.new_sequence()
    engine = text.engine
    del text
    assert engine.new_sequence().length == 0


def test_a_second_turn_with_pictures(boards, mini_checkpoint):
    pictures = np.random.default_rng(2).integers(0, 256, (3, 70, 130, 3), np.uint8)
    logits, cached = [], []
    with Checkpoint.open(mini_checkpoint("mini-qwen3")) as checkpoint:
        for engine in (boards()[0].engine, ReferenceEngine(checkpoint)):
            model = Model(checkpoint, engine, PromptEncoder(checkpoint))
            chat = model.chat(max_tiles=2)
            first = [prepare_picture(pictures[0], checkpoint.config, 2)]
            told = [Message.user("What?", first), Message.assistant("A box.")]
            chat.turns.append(Turn(messages=told))
            prompt = chat.prompt("And these?", list(pictures[1:]))
            blocks = model.score(prompt, [5, 6, 7])
            logits.append(np.concatenate([np.array(block) for block in blocks]))
            cached.append(chat.ask("And these?", list(pictures[1:]), max_tokens=1).usage)
    check(*logits)
    assert cached[0] == cached[1]
    assert cached[0].cached_tokens == cached[0].prompt_tokens - 1


def test_memory_is_given_back(boards):
    engine, runtime = boards()
    memories = runtime.memories
    assert all(memory.bytes is not None for memory in memories)
    del engine
    gc.collect()
    assert all(memory.bytes is None for memory in memories)


def test_what_was_taken_is_given_back_where_loading_fails(mini_checkpoint, tmp_path):
    board = BoardModel(write_board(tmp_path / "board", mini_checkpoint("mini-qwen3")))
    compiled = Compiled(wrong={POST: lambda groups: [Group(groups[0].inputs, ())]})
    with Checkpoint.open(mini_checkpoint("mini-qwen3")) as checkpoint:
        runtime = FakeRuntime(checkpoint, compiled)
    with pytest.raises(BoardError, match="outputs are"):
        AxeraEngine(board, runtime=runtime)
    assert runtime.memories
    assert all(memory.bytes is None for memory in runtime.memories)


def changed(kind, tensor_name, **values):
    """A function that changes a tensor in every group."""

    def change(groups):
        return [
            replace(
                group,
                **{
                    kind: tuple(
                        replace(tensor, **values) if tensor.name == tensor_name else tensor
                        for tensor in getattr(group, kind)
                    )
                },
            )
            for group in groups
        ]

    return change


LAYER, POST, VISION = "qwen3_p128_l0_together.axmodel", "qwen3_post.axmodel", layout.vision_file(56)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        (LAYER, changed("inputs", "input", shape=(1, 1, 57)), r"input is BF16 \[1, 1, 57\]"),
        (LAYER, changed("inputs", "input", shape=(1, 56)), r"expected .* \[1, tokens, 56\]"),
        (LAYER, changed("inputs", "mask", shape=(1, 1, 2**21)), r"expected .*history \+ 1\]"),
        (LAYER, changed("inputs", "mask", name="attention_mask"), "has the tensors .*expected"),
        (LAYER, changed("inputs", "mask", dtype="U8"), "mask is U8"),
        (LAYER, changed("inputs", "indices", dtype="F32"), "indices is F32"),
        (LAYER, changed("inputs", "K_cache", shape=(1, 5, 64)), "K_cache is"),
        (LAYER, changed("outputs", "V_cache_out", shape=(1, 1, 32)), "V_cache_out is"),
        (LAYER, changed("outputs", "output", dtype="F32"), "output is F32"),
        (LAYER, changed("outputs", "V_cache_out", dtype="F32"), "F32 .* expected BF16"),
        (LAYER, lambda groups: groups[1:], "nothing can be decoded"),
        (LAYER, lambda groups: groups[:-1], "compiled for other shapes than qwen3_p128_l0"),
        (POST, changed("inputs", "input", shape=(1, 1, 64)), "layers give BF16"),
        (POST, changed("outputs", "output", shape=(1, 1, 599)), "expected logits of 600"),
        (VISION, changed("inputs", "image", shape=(1, 3, 448, 448)), "input is F32"),
        (VISION, changed("outputs", "output", shape=(1, 256, 56)), "output is F32"),
    ],
)
def test_models_that_do_not_belong_together(boards, file, change, message):
    with pytest.raises(BoardError, match=message) as error:
        boards(compiled=Compiled(wrong={file: change}))
    assert "\n" not in str(error.value)


def test_groups_of_two_chunk_lengths(boards):
    def add(groups):
        return [*groups, runtime.layer_group(64, 0)]

    _, runtime = boards()
    with pytest.raises(BoardError, match="prefill groups of 64, 128 tokens"):
        boards(compiled=Compiled(wrong={LAYER: add}))


def test_without_prefill_groups_all_is_decoded(boards, tokens, expected):
    names = [layout.layer_file("qwen3", 128, n) for n in range(3)]
    compiled = Compiled(wrong={name: lambda groups: groups[:1] for name in names})
    engine, _ = boards(compiled=compiled)
    assert engine.chunk == 1
    check(engine.prefill(engine.embed(tokens[:20])), expected()[19])


def test_without_a_vision_encoder(mini_checkpoint, tmp_path):
    path = write_board(tmp_path / "board", mini_checkpoint("mini-qwen3"), vision=False)
    board = BoardModel(path)
    with Checkpoint.open(mini_checkpoint("mini-qwen3")) as checkpoint:
        engine = AxeraEngine(board, runtime=FakeRuntime(checkpoint))
    with pytest.raises(CheckpointError, match="text only"):
        engine.encode_images(np.zeros((1, 3, 56, 56), np.float32))
    model = Model(board, engine, PromptEncoder(board))
    with pytest.raises(CheckpointError, match="text only"):
        model.ask("What?", images=[np.zeros((8, 8, 3), np.uint8)])
    assert len(model.ask("What?", max_tokens=2).token_ids) <= 2


def test_tiles_a_picture(mini_checkpoint, tmp_path):
    path = write_board(tmp_path / "board", mini_checkpoint("mini-qwen3"))
    assert BoardModel(path).config.max_tiles == 1
    (path / "board.json").write_text(json.dumps({"max_tiles": 4}))
    assert BoardModel(path).config.max_tiles == 4
    (path / "board.json").write_text(json.dumps({"max_tiles": 0}))
    with pytest.raises(CheckpointError, match=r"board\.json: field 'max_tiles' is 0"):
        BoardModel(path)


# --- choosing the engine -----------------------------------------------------------------------


@pytest.fixture
def npu(monkeypatch, mini_checkpoint):
    """Let engines find an NPU in NumPy."""
    checkpoint = Checkpoint.open(mini_checkpoint("mini-qwen3"))
    runtime = FakeRuntime(checkpoint)
    monkeypatch.setattr("edgevl.axera.engine.open_runtime", lambda emulated: runtime)
    yield runtime
    checkpoint.close()


def test_a_board_directory_is_loaded_by_itself(npu, mini_checkpoint, tmp_path):
    path = write_board(tmp_path / "board", mini_checkpoint("mini-qwen3"))
    for engine in ("auto", "axera"):
        model = edgevl.load(path, engine=engine)
        assert type(model.engine) is AxeraEngine
        assert model.ask("What?", max_tokens=3).usage.completion_tokens <= 3
    assert edgevl.load(path, max_context=100).engine.max_context == 100


def test_a_board_directory_is_refused_by_other_engines(mini_checkpoint, tmp_path):
    path = write_board(tmp_path / "board", mini_checkpoint("mini-qwen3"))
    for engine in ("cpu", "reference"):
        with pytest.raises(BoardError, match=f"engine {engine} cannot run: use engine axera"):
            edgevl.load(path, engine=engine)


def test_a_checkpoint_is_refused(mini_checkpoint):
    path = mini_checkpoint("mini-qwen3")
    with pytest.raises(BoardError, match="compile the checkpoint first"):
        edgevl.load(path, engine="axera")
    with Checkpoint.open(path) as checkpoint, pytest.raises(BoardError, match="edgevl compile"):
        load_engine(checkpoint, LoadOptions("axera"))


def test_a_checkpoint_with_its_layers_beside_it_is_both(mini_checkpoint, tmp_path, npu):
    path = write_board(tmp_path / "both", mini_checkpoint("mini-qwen3"))
    source = mini_checkpoint("mini-qwen3") / "model.safetensors"
    (path / "model.safetensors").write_bytes(source.read_bytes())
    assert type(open_model(path)) is Checkpoint
    assert type(open_model(path, "axera")) is BoardModel


@pytest.mark.parametrize("options", [{"precision": "int8"}, {"threads": 2}, {"kv_cache": "int8"}])
def test_options_of_other_engines(npu, mini_checkpoint, tmp_path, options):
    path = write_board(tmp_path / "board", mini_checkpoint("mini-qwen3"))
    with pytest.raises(EdgeVLError, match="runs what was compiled"):
        edgevl.load(path, **options)


def test_comparing_needs_all_logits(npu, mini_checkpoint, tmp_path):
    path = write_board(tmp_path / "board", mini_checkpoint("mini-qwen3"))
    edgevl.load(path, exact_logits=True)
    npu.compiled = Compiled(top_k=5)
    with pytest.raises(BoardError, match="5 likeliest tokens only"):
        edgevl.load(path, exact_logits=True)


def test_max_tiles_can_be_asked_for(npu, mini_checkpoint, tmp_path):
    path = write_board(tmp_path / "board", mini_checkpoint("mini-qwen3"))
    model = edgevl.load(path)
    picture = np.zeros((60, 200, 3), np.uint8)
    one = model.ask("What?", images=[picture], max_tokens=1).usage.image_tokens
    assert one == model.checkpoint.config.image_tokens
    more = model.ask("What?", images=[picture], max_tokens=1, max_tiles=3).usage.image_tokens
    assert more > one
    with pytest.raises(PromptError, match="max_tiles"):
        model.ask("What?", images=[picture], max_tiles=0)


def test_tensor_sizes():
    assert TensorInfo("x", "BF16", (1, 3, 5)).nbytes == 30
    assert TensorInfo("x", "U8", (7,)).nbytes == 7
