"""Which library drives the NPU, and what is said where there is none."""

import sys
from ctypes.util import find_library
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest

from edgevl.axera import npu as runtimes
from edgevl.axera.npu import ax, libraries, open_runtime
from edgevl.axera.npu.ax import AxRuntime
from edgevl.axera.npu.axcl import AxclRuntime
from edgevl.axera.npu.base import NpuModel, TensorInfo
from edgevl.axera.npu.vendor import VendorRuntime
from edgevl.errors import BoardError


class Session:
    """A session of a package like `axengine`: two groups, in which y is a + b."""

    def __init__(self, path):
        print("[INFO] loading")
        if Path(path).stem == "broken":
            raise RuntimeError("Failed to load model.")
        self.lengths = (2, 3)

    def nodes(self, names, group):
        length = self.lengths[group]
        return [
            SimpleNamespace(name=n, dtype=np.dtype(np.float32), shape=[1, length]) for n in names
        ]

    def get_inputs(self, group=0):
        return self.nodes("ab", group)

    def get_outputs(self, group=0):
        return self.nodes("y", group)

    def run(self, names, feed, shape_group):
        if feed["a"][0, 0] < 0:
            raise RuntimeError("Failed to run model.")
        assert feed["a"].shape == (1, self.lengths[shape_group])
        return [feed["a"] + feed["b"]]


@pytest.fixture
def axengine(monkeypatch):
    """Install a package like `axengine`."""
    module = ModuleType("axengine")
    module.__spec__ = ModuleSpec("axengine", None)
    module.InferenceSession = Session
    monkeypatch.setitem(sys.modules, "axengine", module)


@pytest.fixture(autouse=True)
def bare_machine(monkeypatch, tmp_path):
    """Nothing is installed, nothing set, and no runtime runs on after a test."""
    for name in (runtimes.VARIABLE, libraries.DIRECTORY_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(libraries.ctypes.util, "find_library", lambda name: None)
    monkeypatch.setattr(libraries, "DIRECTORIES", (str(tmp_path / "soc"),))
    monkeypatch.setattr(runtimes, "CARD_DEVICE", tmp_path / "axcl_host")
    monkeypatch.setattr(runtimes, "_started", {})
    monkeypatch.setattr(runtimes.atexit, "register", lambda function: None)


def install(directory, *names):
    directory.mkdir(exist_ok=True)
    for name in names:
        (directory / f"lib{name}.so").write_bytes(b"no library")


def test_no_npu(monkeypatch):
    monkeypatch.setitem(sys.modules, "axengine", None)
    with pytest.raises(BoardError) as error:
        open_runtime()
    for words in ("libax_engine.so", "/soc/lib", "AXCL", "package axengine", "--emulate"):
        assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_half_of_a_boards_libraries(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "axengine", None)
    install(tmp_path / "soc", "ax_sys")
    with pytest.raises(BoardError) as error:
        open_runtime()
    assert "no NPU here: libax_engine.so (of a board's system image" in str(error.value)
    assert f"not found ({tmp_path / 'soc' / 'libax_sys.so'} is there)" in str(error.value)


@pytest.mark.parametrize("name", ["ax", "axcl"])
def test_a_library_without_an_npu_is_not_a_missing_library(monkeypatch, capfd, name):
    """The emulator's libraries refuse to start; a board's do where there is no device."""
    pytest.importorskip("cffi")
    try:
        directory = libraries.emulator_directory()
    except BoardError as missing:
        pytest.skip(str(missing))
    monkeypatch.setenv(runtimes.VARIABLE, name)
    monkeypatch.setenv(libraries.DIRECTORY_VARIABLE, str(directory))
    monkeypatch.setenv("EDGEVL_EMULATOR_CMM", "none")
    with pytest.raises(BoardError) as error:
        open_runtime()
    library, function = {
        "ax": ("libax_sys.so", "AX_SYS_Init"),
        "axcl": ("libaxcl_rt.so", "axclInit"),
    }[name]
    message = str(error.value)
    assert message.startswith(
        f"{directory / library} is there, but {function} failed with status 0x80060002: "
    )
    assert "dmesg" in message
    assert "not installed" not in message
    assert "\n" not in message


@pytest.mark.parametrize(
    "error", [ImportError("No providers found."), AssertionError("no ax_sys"), OSError(2, "gone")]
)
def test_the_vendors_package_without_an_npu(monkeypatch, error):
    class Finder:
        @staticmethod
        def find_spec(name, path=None, target=None):
            return ModuleSpec(name, Finder) if name == "axengine" else None

        @staticmethod
        def create_module(spec):
            return None

        @staticmethod
        def exec_module(module):
            raise error

    monkeypatch.setattr(sys, "meta_path", [Finder, *sys.meta_path])
    with pytest.raises(BoardError, match="package axengine is there, but cannot start: ") as raised:
        open_runtime()
    assert str(error) in str(raised.value)
    monkeypatch.setattr(sys, "meta_path", sys.meta_path[1:])
    monkeypatch.setenv(runtimes.VARIABLE, "axengine")
    monkeypatch.setitem(sys.modules, "axengine", None)
    with pytest.raises(BoardError, match="package axengine is not installed"):
        open_runtime()


def test_the_emulator(monkeypatch, tmp_path):
    install(tmp_path, "ax_sys", "ax_engine", "axcl_rt")
    assert runtimes.installed_runtime(tmp_path) == "ax"
    monkeypatch.setenv(runtimes.VARIABLE, "axcl")
    assert runtimes.installed_runtime(tmp_path) == "axcl"


def test_the_order(monkeypatch, tmp_path):
    soc = tmp_path / "soc"
    install(soc, "axcl_rt")
    assert runtimes.installed_runtime(None) == "axcl"
    install(soc, "ax_engine")
    assert runtimes.installed_runtime(None) == "axcl"  # one of the two that a board needs
    install(soc, "ax_sys")
    assert runtimes.installed_runtime(None) == "ax"
    runtimes.CARD_DEVICE.touch()
    assert runtimes.installed_runtime(None) == "axcl"
    monkeypatch.setenv(runtimes.VARIABLE, "ax")
    assert runtimes.installed_runtime(None) == "ax"
    monkeypatch.setenv(runtimes.VARIABLE, "cuda")
    with pytest.raises(BoardError, match="EDGEVL_NPU=cuda: choose ax, axcl, axengine"):
        runtimes.installed_runtime(None)


def test_where_libraries_are_looked_for(monkeypatch, tmp_path):
    soc, mine = tmp_path / "soc", tmp_path / "mine"
    install(soc, "ax_sys")
    install(mine, "ax_sys")
    assert libraries.library_path("ax_sys") == str(soc / "libax_sys.so")
    monkeypatch.setattr(libraries.ctypes.util, "find_library", lambda name: f"lib{name}.so.1")
    assert libraries.library_path("ax_sys") == "libax_sys.so.1"
    assert libraries.library_path("ax_sys", mine) == str(mine / "libax_sys.so")
    monkeypatch.setenv(libraries.DIRECTORY_VARIABLE, str(mine))
    assert libraries.library_path("ax_sys") == str(mine / "libax_sys.so")
    assert libraries.library_path("ax_engine") is None
    assert libraries.library_path("ax_sys", soc) == str(soc / "libax_sys.so")  # the emulator's


def test_structures_have_the_sizes_of_the_vendors_headers():
    """128 bytes each on 64-bit machines, the table of a run (AX_ENGINE_IO_T) too."""
    cffi = pytest.importorskip("cffi")
    functions = cffi.FFI()
    functions.cdef(ax._DECLARATIONS)
    for name in ("TensorMeta", "TensorTable", "Buffer", "BufferTable"):
        assert functions.sizeof(name) == 128
    assert functions.sizeof("NpuAttributes") == 36
    assert functions.sizeof("HandleExtra") == 48


@pytest.mark.parametrize("runtime", [AxRuntime, AxclRuntime])
def test_libraries_that_cannot_be_opened(tmp_path, runtime):
    pytest.importorskip("cffi")
    with pytest.raises(BoardError, match=r"lib.*\.so is not installed"):
        runtime()
    install(tmp_path / "soc", "ax_sys", "ax_engine", "axcl_rt")
    with pytest.raises(BoardError, match=r"lib.*\.so: cannot be loaded"):
        runtime()


def test_a_library_that_lacks_a_function():
    cffi = pytest.importorskip("cffi")
    functions = cffi.FFI()
    functions.cdef("int c_absent(void); int c_GroupIO(void);")
    path = find_library("c")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(libraries, "library_path", lambda name, directory: path)
        with pytest.raises(BoardError, match="has no c_absent: update the board's image"):
            libraries.open_library(functions, "c")
        optional = cffi.FFI()
        optional.cdef("int c_GroupIO(void);")
        libraries.open_library(optional, "c")


@pytest.mark.parametrize("runtime", [AxRuntime, AxclRuntime])
def test_without_cffi(monkeypatch, runtime):
    monkeypatch.setitem(sys.modules, "cffi", None)
    with pytest.raises(BoardError, match=r"pip install 'edgevl\[board\]'"):
        runtime()


def test_a_status_is_shown_as_the_library_documents_them():
    libraries.check_status(0, "AX_SYS_Init")
    with pytest.raises(BoardError, match="AX_SYS_Init failed with status 0x8006010A: reboot"):
        libraries.check_status(0x8006010A - (1 << 32), "AX_SYS_Init", ": reboot")


def test_the_vendors_package(axengine, caplog, capsys, tmp_path):
    runtime = open_runtime()
    assert type(runtime) is VendorRuntime
    assert open_runtime() is runtime
    [record] = caplog.records  # said once
    assert "slower" in record.getMessage()
    model = runtime.load(tmp_path / "sum.axmodel")
    assert [group.inputs[0].shape for group in model.groups] == [(1, 2), (1, 3)]
    memory = runtime.allocate(512)
    call = model.bind(1, [(memory, 0), (memory, 128)], [(memory, 256)])
    memory.write(0, np.float32([1, 2, 3]))
    memory.write(128, np.float32([10, 20, 30]))
    call.run()
    assert memory.read(256, 12).view(np.float32).tolist() == [11, 22, 33]
    call.move("Input", 1, 256)
    call.move("Output", 0, 384)
    call.run()
    assert memory.read(384, 12).view(np.float32).tolist() == [12, 24, 36]
    memory.write(0, np.float32([-1, 0, 0]))
    with pytest.raises(BoardError, match=r"sum\.axmodel: axengine cannot run group 1"):
        call.run()
    with pytest.raises(BoardError, match=r"broken\.axmodel: axengine cannot load it"):
        runtime.load(tmp_path / "broken.axmodel")
    assert capsys.readouterr().out == ""  # standard output is for answers
    runtime.close()
    assert model.session is None


def test_places_are_checked(axengine, tmp_path):
    runtime = VendorRuntime()
    model, memory = runtime.load(tmp_path / "sum.axmodel"), runtime.allocate(256)
    for places in ([(memory, 0), (memory, 8)], [(memory, 0), (memory, 256)], [(memory, 0)]):
        with pytest.raises(ValueError, match=r"sum\.axmodel: b|zip"):
            model.bind(0, places, [(memory, 0)])
    for size in (0, (1 << 32) - 1):  # the latter is no number of 32 bits in whole lines
        with pytest.raises(BoardError, match=f"{size} bytes of NPU memory at once"):
            runtime.allocate(size)


class Described(NpuModel):
    """A model with one tensor, which its library describes."""

    DATA_TYPES: ClassVar = {1: "U8", 3: "F32"}

    def __init__(self, runtime, path, *tensor):
        self.tensor = tensor
        super().__init__(runtime, path)

    def _open(self):
        return 1

    def _describe(self, group):
        return iter([self.tensor]), iter([])

    def _give_back(self):
        pass


def test_tensors_that_make_no_sense(axengine, tmp_path):
    runtime = VendorRuntime()
    [group] = Described(runtime, tmp_path, "x", 1, [2, 3], 6).groups
    assert group.inputs == (TensorInfo("x", "U8", (2, 3)),)
    for dtype, shape, nbytes, words in [
        (2, [1], None, "number format"),
        (3, [1, 0], None, "damaged"),
        (3, [-1], None, "damaged"),
        (3, [1 << 20, 1 << 20], None, "damaged"),
        (3, [2, 3], 32, "padded"),
    ]:
        with pytest.raises(BoardError, match=f"'x' .*{words}"):
            Described(runtime, tmp_path, "x", dtype, shape, nbytes)
