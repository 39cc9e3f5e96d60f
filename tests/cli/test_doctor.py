"""`edgevl doctor` and what it knows about the machine."""

import dataclasses
import json
import math
import os
import re
import sys
from pathlib import Path

import psutil
import pytest

from edgevl import cli, machine
from edgevl.axera import npu as runtimes
from edgevl.axera.npu import ax, libraries
from edgevl.axera.npu.ax import read_cmm
from edgevl.cli import doctor
from edgevl.errors import BoardError
from fake_model import FakeModel
from repository import ROOT

X86 = """\
processor	: 0
model name	: Test CPU @ 3.00GHz
flags		: fpu sse4_2 avx2 fma f16c avx512f avx512_vnni

processor	: 1
model name	: Other
flags		: fpu
"""
ARM = "processor\t: 0\nFeatures\t: fp asimd asimdhp asimddp i8mm bf16\nCPU part\t: 0xd41\n"


def test_features_of_x86_and_arm():
    info = machine._fields(X86)
    assert info["model name"] == "Test CPU @ 3.00GHz"
    assert machine.features(info) == ("AVX2", "FMA", "F16C", "AVX-512", "AVX-512 VNNI")
    assert machine.features(machine._fields(ARM)) == (
        "NEON",
        "NEON FP16",
        "NEON dot product",
        "I8MM",
        "BF16",
    )
    assert machine.features({}) == ()


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, math.inf),
        ({"cpu.max": "max 100000\n"}, math.inf),
        ({"cpu.max": "150000 100000\n"}, 1.5),
        ({"cpu.max": "400000 100000\n", "a/b/cpu.max": "200000 100000\n"}, 2.0),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, math.inf),
        ({"cpu/cpu.cfs_quota_us": "50000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 0.5),
    ],
)
def test_cgroup_quota(tmp_path, monkeypatch, files, cores):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    read = machine._read
    group = "0::/a/b\n"
    monkeypatch.setattr(
        machine, "_read", lambda path: group if path == Path("/proc/self/cgroup") else read(path)
    )
    assert machine.cgroup_cores(tmp_path) == cores


@pytest.mark.parametrize(
    ("files", "total", "available"),
    [
        ({}, math.inf, math.inf),
        ({"memory.max": "max\n", "memory.current": "900\n"}, math.inf, math.inf),
        ({"memory.max": "1000\n", "memory.current": "900\n"}, 1000, 100),
        (
            {
                "memory.max": "1000\n",
                "memory.current": "900\n",
                "memory.stat": "anon 5\ninactive_file 300\nactive_file 7\n",
            },
            1000,
            400,
        ),
        ({"memory.max": "1000\n", "memory.current": "1200\n"}, 1000, 0),
        ({"a/memory.max": "500\n", "a/memory.current": "20\n", "memory.max": "600\n"}, 500, 480),
        (
            {
                "memory/memory.limit_in_bytes": "1000\n",
                "memory/memory.usage_in_bytes": "700\n",
                "memory/memory.stat": "inactive_file 1\ntotal_inactive_file 200\n",
            },
            1000,
            301,
        ),
    ],
)
def test_memory_that_cgroups_leave(tmp_path, monkeypatch, files, total, available):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    read = machine._read
    group = "0::/a\n"
    monkeypatch.setattr(
        machine, "_read", lambda path: group if path == Path("/proc/self/cgroup") else read(path)
    )
    assert machine.cgroup_memory(tmp_path) == (total, available)


def test_hyper_threads_of_a_core_count_once(tmp_path):
    for cpu, siblings in enumerate(("0,2", "1,3", "0,2", "1,3", None)):
        topology = tmp_path / f"cpu{cpu}" / "topology"
        topology.mkdir(parents=True)
        if siblings:
            (topology / "thread_siblings_list").write_text(siblings + "\n")
    assert machine.physical_cores({0, 1, 2, 3}, tmp_path) == 2
    assert machine.physical_cores({1, 3}, tmp_path) == 1
    assert machine.physical_cores({0, 4}, tmp_path) == 2
    assert machine.physical_cores({7, 8}, tmp_path) == 2  # nothing is told of these
    assert 1 <= machine.physical_cores(None) <= os.cpu_count()


@pytest.mark.parametrize(
    ("physical", "usable", "threads"), [(4, 8, 4), (4, 2.5, 2), (4, 0.5, 1), (1, 2, 1)]
)
def test_threads_are_what_cores_and_quota_pay_for(physical, usable, threads):
    found = dataclasses.replace(
        machine.this_machine(), physical_cores=physical, usable_cores=usable
    )
    assert found.threads == threads


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity on this system")
def test_affinity_is_respected():
    cpus = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(cpus)})
        assert machine.this_machine().threads == 1
    finally:
        os.sched_setaffinity(0, cpus)


def test_this_machine_agrees_with_the_system():
    found = machine.this_machine()
    assert found.cpu
    assert found.logical_cores == os.cpu_count()
    assert 0 < found.usable_cores <= found.logical_cores
    assert 1 <= found.threads <= found.physical_cores <= found.logical_cores
    assert 0 < found.available_bytes <= found.memory_bytes <= psutil.virtual_memory().total


def test_memory_is_what_psutil_says(monkeypatch):
    for _ in range(2):
        total, available = machine.memory()
        assert total == psutil.virtual_memory().total
        assert available == pytest.approx(psutil.virtual_memory().available, rel=0.2)
        monkeypatch.setattr(machine, "_read", lambda path: "")  # a system without /proc


def test_lists_are_those_of_pyproject():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11 or later reads TOML")
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    project = tomllib.loads(text)["project"]

    def names(requirements):
        found = set()
        for requirement in requirements:
            if own := re.match(r"edgevl\[([\w,]+)\]", requirement):
                for extra in own[1].split(","):
                    found |= names(project["optional-dependencies"][extra])
            else:
                found.add(re.match(r"[\w-]+", requirement)[0])
        return found

    assert set(doctor.NEEDED) == names(project["dependencies"])
    extras = {
        name: names(requirements)
        for name, requirements in project["optional-dependencies"].items()
        if name not in ("all", "dev")
    }
    assert {name: set(packages.split()) for name, (packages, _) in doctor.EXTRAS.items()} == extras


@pytest.mark.parametrize(("answer", "status"), [(doctor.NUMBER, 0), ("nonsense", 1)])
def test_a_wrong_answer_is_a_problem(monkeypatch, capsys, answer, status):
    model = FakeModel(lambda question: [answer])
    monkeypatch.setattr("edgevl.generate.load", model.load)
    assert cli.main(["doctor", "--json"]) == status
    report = json.loads(capsys.readouterr().out)
    assert len(report["problems"]) == status
    assert report["tiny"]["answer"] == answer
    assert report["packages"]["numpy"]
    assert report["machine"]["logical_cores"] == os.cpu_count()
    assert report["hub"]["free_bytes"] > 0
    if report["cpu_engine"]:
        assert report["cpu_engine"]["instruction_set"] in report["cpu_engine"]["instruction_sets"]


def test_what_is_broken_is_reported_and_the_rest_too(monkeypatch, capsys):
    model = FakeModel(lambda question: [OSError(5, "Input/output error")])
    monkeypatch.setattr("edgevl.generate.load", model.load)
    monkeypatch.setitem(doctor.NEEDED, "not-there", "not_there")
    assert cli.main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "not-there MISSING" in out
    assert "problem   not-there: " in out
    assert "problem   tiny: Input/output error" in out
    assert "cpu       " in out
    assert out.endswith("Something needs mending.\n")


def test_all_is_well_here(capsys):
    """The shipped model is loaded and reads the number that doctor draws."""
    status = cli.main(["doctor"])
    assert "All is well." in capsys.readouterr().out
    assert status == 0


# --- the NPU -----------------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch):
    """No model is loaded, and no NPU is found but what a test installs."""
    monkeypatch.setattr("edgevl.generate.load", FakeModel(lambda question: [doctor.NUMBER]).load)
    for name in (runtimes.VARIABLE, libraries.DIRECTORY_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(runtimes, "_started", {})
    monkeypatch.setattr(runtimes.atexit, "register", lambda function: None)
    return monkeypatch


def report(capsys):
    status = cli.main(["doctor", "--json"])
    found = json.loads(capsys.readouterr().out)
    lines = [line for line in doctor.describe(found) if line.startswith(("npu", "   "))]
    return status, found, lines


def test_without_an_npu_nothing_is_wrong(quick, capsys):
    quick.setenv(libraries.DIRECTORY_VARIABLE, "/nowhere")
    quick.setitem(sys.modules, "axengine", None)
    status, found, lines = report(capsys)
    assert (status, found["npu"]) == (0, {"runtime": None})
    assert lines == ["npu       none here; without a board, edgevl compile --emulate"]


@pytest.fixture
def emulator(quick):
    pytest.importorskip("cffi")
    try:
        directory = libraries.emulator_directory()
    except BoardError as missing:
        pytest.skip(str(missing))
    quick.setenv(libraries.DIRECTORY_VARIABLE, str(directory))
    quick.setenv("EDGEVL_EMULATOR_CMM", "3000")
    return quick


@pytest.mark.parametrize("name", ["ax", "axcl"])
def test_an_emulated_npu_is_called_so(emulator, capsys, name):
    emulator.setenv(runtimes.VARIABLE, name)
    status, found, lines = report(capsys)
    assert status == 0
    npu = found["npu"]
    assert (npu["runtime"], npu["emulated"], npu["memory_bytes"]) == (name, True, 3000 << 20)
    free = npu["free_bytes"]
    assert 0 < free <= 3000 << 20
    assert "EdgeVL emulator (emulated: no board computes)" in lines[0]
    assert lines[1].startswith("          NPU memory (CMM) 2.9 GiB, ")
    memory = runtimes.open_runtime().allocate(1 << 20)
    assert report(capsys)[1]["npu"]["free_bytes"] == free - (1 << 20)
    memory.close()
    assert report(capsys)[1]["npu"]["free_bytes"] == free


def test_an_npu_that_does_not_answer_is_a_problem(emulator, capsys):
    emulator.setenv("EDGEVL_EMULATOR_CMM", "none")
    status, found, _ = report(capsys)
    assert (status, found["npu"]) == (1, None)
    [problem] = found["problems"]
    assert "libax_sys.so is there, but AX_SYS_Init failed with status 0x80060002" in problem


#: As programs for boards read it: a list of partitions and blocks, and their sums.
CMM = """\
--------------------SDK VERSION-------------------
[Axera version]: ax_cmm V1.45.0 Aug 30 2024
+---PARTITION: Phys(0x180000000, 0x27FFFFFFF), Size=4194304KB(4096MB),    NAME="anonymous"
 nBlock(Max=9, Cur=9, New=9, Free=0)  nbytes(Max=5840896B(5704KB,5MB), Cur=5840896B(5704KB,5MB))
   |-Block: phys(0x180000000, 0x180013FFF), cache =non-cacheable, length=80KB(0MB),  name="TDP"

---CMM_USE_INFO:
 total size=4194304KB(4096MB),used=283228KB(276MB + 604KB),remain=3911076KB(3819MB + 420KB),\
partition_number=1,block_number=9
"""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (CMM, (4194304 << 10, 3911076 << 10)),
        ("total size = 1024 KB, used = 24 KB", (1 << 20, 1000 << 10)),
        ("Total size: 1024KB", (1 << 20, None)),
        ("another form", (None, None)),
        ("", (None, None)),
        (None, (None, None)),
    ],
)
def test_memory_of_a_board(tmp_path, text, expected):
    path = tmp_path / "mem_cmm_info"
    if text is not None:
        path.write_text(text)
    assert read_cmm(path) == expected


def test_what_a_board_says(quick, capsys, tmp_path):
    """With a library that is no emulator, chip and memory come from the drivers' files."""
    cffi = pytest.importorskip("cffi")
    (tmp_path / "chip_type").write_text("AX650N_CHIP\n")
    (tmp_path / "version").write_text("Ax_Version V3.6.2_20250731140456\n")
    (tmp_path / "mem_cmm_info").write_text(CMM)
    quick.setattr(ax, "PROC", tmp_path)

    class Library:
        def AX_ENGINE_GetVersion(self):  # noqa: N802
            return functions.new("char[]", b"2.12.0s")

    functions = cffi.FFI()
    runtime = ax.AxRuntime.__new__(ax.AxRuntime)
    runtime.functions, runtime.system, runtime.engine = functions, object(), Library()
    quick.setattr("edgevl.axera.npu.installed_runtime", lambda: "ax")
    quick.setattr("edgevl.axera.npu.open_runtime", lambda: runtime)
    status, _, lines = report(capsys)
    assert status == 0
    assert lines == [
        "npu       runtime ax, version 2.12.0s, AX650N_CHIP, Ax_Version V3.6.2_20250731140456",
        "          NPU memory (CMM) 4.0 GiB, 3.7 GiB free",
    ]
