"""Which engine is loaded, and what happens where the native one is missing."""

import dataclasses
import inspect
import subprocess
import sys

import pytest

import edgevl
from edgevl import cli
from edgevl.checkpoint import Checkpoint
from edgevl.engine import ReferenceEngine, native_missing
from edgevl.errors import EdgeVLError
from edgevl.loading import load_engine
from edgevl.options import KV_CACHE_FORMATS, PRECISIONS, LoadOptions

needs_native = pytest.mark.skipif(
    native_missing() is not None, reason="the native engine is not built"
)


@pytest.fixture
def checkpoint(mini_checkpoint):
    with Checkpoint.open(mini_checkpoint("mini-qwen3")) as opened:
        yield opened


@pytest.fixture
def without_native(monkeypatch):
    """Make ``from edgevl import _native`` fail as it does where nothing was compiled."""
    monkeypatch.setitem(sys.modules, "edgevl._native", None)
    monkeypatch.delattr(edgevl, "_native", raising=False)


@needs_native
@pytest.mark.parametrize("engine", ["auto", "cpu"])
def test_the_native_engine_is_the_default(checkpoint, engine):
    from edgevl.engine.cpu import CpuEngine

    assert type(load_engine(checkpoint, LoadOptions(engine))) is CpuEngine


def test_the_reference_by_name(checkpoint):
    assert type(load_engine(checkpoint, LoadOptions("reference"))) is ReferenceEngine


def test_without_the_native_engine_auto_warns_and_answers(checkpoint, without_native, caplog):
    engine = load_engine(checkpoint, LoadOptions("auto", precision="int4", threads=2))
    assert type(engine) is ReferenceEngine
    [record] = caplog.records
    assert record.levelname == "WARNING"
    assert "native engine is missing" in record.getMessage()
    assert "slow reference engine" in record.getMessage()


def test_the_warning_is_one_line_on_standard_error(mini_checkpoint):
    code = (
        "import sys; sys.modules['edgevl._native'] = None\n"
        "from edgevl.cli import main\n"
        f"sys.exit(main(['chat', {str(mini_checkpoint('mini-qwen3'))!r}, '-q', 'x',"
        " '--max-tokens', '2']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("the native engine is missing (")


def test_without_the_native_engine_cpu_is_an_error(checkpoint, without_native, capsys):
    with pytest.raises(EdgeVLError, match=r"native engine is missing .*compiler"):
        load_engine(checkpoint, LoadOptions("cpu"))
    args = ["chat", str(checkpoint.path), "-q", "x", "--engine", "cpu"]
    assert cli.main(args) == 1
    assert capsys.readouterr().err.startswith("edgevl: error: the native engine is missing")


@pytest.mark.parametrize("options", [{"precision": "int8"}, {"threads": 2}, {"kv_cache": "int8"}])
def test_the_reference_has_none_of_the_native_options(checkpoint, options):
    with pytest.raises(EdgeVLError, match="computes in float32"):
        load_engine(checkpoint, LoadOptions("reference", **options))


@needs_native
@pytest.mark.parametrize("precision", PRECISIONS)
def test_precision_reaches_the_engine(checkpoint, precision):
    engine = load_engine(checkpoint, LoadOptions(precision=precision, threads=3))
    formats = {m.format for m in engine.plan.matrices if m.name.startswith("text.layers")}
    assert formats == {"int8" if precision == "auto" else precision}
    assert engine.threads == 3


@needs_native
def test_the_kv_cache_reaches_the_engine(checkpoint):
    sizes = {}
    for kv_cache in KV_CACHE_FORMATS:
        engine = load_engine(checkpoint, LoadOptions(kv_cache=kv_cache))
        sequence = engine.new_sequence()
        engine.decode([sequence], [1])
        sizes[kv_cache] = sequence.cache.bytes
    assert sizes["int8"] < 0.6 * sizes["bf16"]


def test_load_takes_every_option_with_its_default():
    taken = dict(inspect.signature(edgevl.load).parameters)
    assert taken.pop("model").default is inspect.Parameter.empty
    options = {each.name: each.default for each in dataclasses.fields(LoadOptions)}
    assert {name: each.default for name, each in taken.items()} == options
