"""The benchmark of the host's share: the loop as the vendor's demo's, the counters, the table."""

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

import axengine_loop
import axera_host
from edgevl.axera.directory import BoardModel
from edgevl.axera.engine import AxeraEngine
from edgevl.axera.layout import EMBEDDING_NPY, BoardShape
from edgevl.axera.npu.base import from_device, to_device
from edgevl.checkpoint import Checkpoint
from fake_npu import Compiled, FakeMemory, FakeRuntime, write_board
from one_sequence import OneSequence
from repository import ROOT

SHAPE = BoardShape(context=63, chunk=16, max_prefill=32)


@dataclass
class Argument:
    name: str
    shape: list
    dtype: np.dtype


class FakeSession:
    """The vendor's session on the NPU in NumPy: bfloat16 inside, float32 for the program."""

    def __init__(self, runtime, path):
        self._model = runtime.load(Path(path))

    def get_inputs(self, shape_group=0):
        return [
            Argument(t.name, list(t.shape), np.dtype(np.uint32 if t.dtype == "U32" else np.float32))
            for t in self._model.groups[shape_group].inputs
        ]

    def run(self, output_names, input_feed, shape_group=0):
        group = self._model.groups[shape_group]
        assert output_names is None
        assert set(input_feed) == {tensor.name for tensor in group.inputs}
        places = {
            t.name: (FakeMemory(self._model.runtime, t.nbytes), 0)
            for t in (*group.inputs, *group.outputs)
        }
        for tensor in group.inputs:
            values = input_feed[tensor.name]
            assert values.shape == tensor.shape
            stored = values if tensor.dtype == "U32" else to_device(values, tensor.dtype)
            places[tensor.name][0].write(0, np.ascontiguousarray(stored))
        call = self._model.bind(
            shape_group,
            [places[tensor.name] for tensor in group.inputs],
            [places[tensor.name] for tensor in group.outputs],
        )
        call.run()
        return [from_device(call.array(t.name), t.dtype) for t in group.outputs]


@pytest.fixture
def board(tmp_path, mini_checkpoint, monkeypatch):
    """A compiled miniature, its engine, and the loop on the same NPU."""
    path = mini_checkpoint("mini-qwen3")
    directory = write_board(tmp_path / "board", path, chunk=SHAPE.chunk)
    with Checkpoint.open(path) as checkpoint:
        compiled = Compiled((SHAPE.context,), SHAPE.chunk, SHAPE.max_prefill)
        runtime = FakeRuntime(checkpoint, compiled)
        table = checkpoint.tensor("language_model.model.embed_tokens.weight")
        np.save(directory / EMBEDDING_NPY, table)
        axengine = ModuleType("axengine")
        axengine.InferenceSession = lambda path: FakeSession(runtime, path)
        monkeypatch.setitem(sys.modules, "axengine", axengine)
        engine = OneSequence(AxeraEngine(BoardModel(directory), runtime=runtime))
        yield engine, axengine_loop.AxengineLoop(directory, checkpoint.config.text, SHAPE)


@pytest.mark.parametrize("length", [3, 16, 17, 32, 48])
def test_the_loop_answers_what_the_engine_answers(board, length):
    engine, loop = board
    prompt = np.random.default_rng(length).integers(0, 500, length)
    expected = [int(engine.prefill(engine.embed(prompt)).argmax())]
    found = [loop.prefill(prompt)]
    for _ in range(5):
        expected.append(int(engine.decode(expected[-1]).argmax()))
        found.append(loop.decode(found[-1]))
    assert found == expected
    assert loop.length == engine.length == length + 5


def test_the_loop_counts_what_goes_in_and_out(board):
    _, loop = board
    loop.prefill(np.arange(20))
    loop.reset_counts()
    loop.decode(1)
    # In the fake's float32: 3 layers with keys and values of 63 rows of 64, a position, a hidden
    # state of 56 and a mask of 64; then the head.
    assert loop.copied_in == 4 * (3 * (2 * 63 * 64 + 1 + 56 + 64) + 56)
    assert loop.copied_out == 4 * (3 * (2 * 64 + 56) + 600)


def test_a_missing_package_is_explained(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "axengine", None)
    with pytest.raises(SystemExit, match="AXERA-TECH/pyaxengine"):
        axengine_loop.AxengineLoop(tmp_path, None, SHAPE)


def test_counters_are_those_of_the_emulator():
    header = (ROOT / "native" / "emulator" / "counters.h").read_text()
    declared = re.search(r"struct EDGEVL_EMULATOR_COUNTERS \{(.*?)\};", header, re.DOTALL)[1]
    assert [name for name, _ in axera_host.Counters._fields_] == re.findall(
        r"^\s*uint64_t (\w+);", declared, re.MULTILINE
    )


def test_table():
    step = {
        "host_ms": 1.5,
        "fastest_ms": 1.25,
        "slowest_ms": 2.0,
        "emulator_ms": 0.5,
        "runs": 29,
        "calls": 33,
        "copied_bytes": 310_000,
        "flushed_bytes": 240_000_000,
    }
    text = axera_host.table(
        {
            "date": "2026-11-22",
            "machine": {"cpu": "A processor", "cores": 2.0},
            "load_average": 0.25,
            "rounds": 7,
            "prompt_tokens": 300,
            "generate": 32,
            "steps": {"token: EdgeVL": step},
            "ratios": {"prefill": 10.0, "token": 21.26},
        }
    )
    assert "| token: EdgeVL | 1.50 (1.25 to 2.00) | 0.50 | 29 | 33 | 0.31 MB | 240.00 MB |" in text
    assert "prefill 10.0, token 21.3" in text
    assert "A processor, 2 cores" in text
