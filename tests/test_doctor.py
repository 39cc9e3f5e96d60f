"""`edgevl doctor` and what it knows about the machine."""

import dataclasses
import json
import math
import os
import re
from pathlib import Path

import psutil
import pytest

from edgevl import cli, machine
from edgevl.cli import doctor
from fake_model import FakeModel

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


def test_cgroup_memory_limit(tmp_path):
    assert machine.cgroup_limit("memory.max", "v1", tmp_path) == math.inf
    (tmp_path / "memory.max").write_text("max\n")
    assert machine.cgroup_limit("memory.max", "v1", tmp_path) == math.inf
    (tmp_path / "memory.max").write_text("1000\n")
    assert machine.cgroup_limit("memory.max", "v1", tmp_path) == 1000


@pytest.mark.parametrize(
    ("files", "available"),
    [
        ({}, math.inf),
        ({"memory.max": "max\n", "memory.current": "900\n"}, math.inf),
        ({"memory.max": "1000\n", "memory.current": "900\n"}, 100),
        (
            {
                "memory.max": "1000\n",
                "memory.current": "900\n",
                "memory.stat": "anon 5\ninactive_file 300\nactive_file 7\n",
            },
            400,
        ),
        ({"memory.max": "1000\n", "memory.current": "1200\n"}, 0),
        ({"a/memory.max": "500\n", "a/memory.current": "20\n", "memory.max": "600\n"}, 480),
        (
            {
                "memory/memory.limit_in_bytes": "1000\n",
                "memory/memory.usage_in_bytes": "700\n",
                "memory/memory.stat": "inactive_file 1\ntotal_inactive_file 200\n",
            },
            301,
        ),
    ],
)
def test_memory_that_cgroups_leave(tmp_path, monkeypatch, files, available):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    read = machine._read
    group = "0::/a\n"
    monkeypatch.setattr(
        machine, "_read", lambda path: group if path == Path("/proc/self/cgroup") else read(path)
    )
    assert machine.cgroup_available(tmp_path) == available


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
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text("utf-8")
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
    assert {name: set(packages) for name, (packages, _) in doctor.EXTRAS.items()} == extras


class Tiny(FakeModel):
    class checkpoint:  # noqa: N801
        path = Path("/models/tiny")


@pytest.mark.parametrize(("answer", "status"), [(doctor.NUMBER, 0), ("nonsense", 1)])
def test_a_wrong_answer_is_a_problem(monkeypatch, capsys, answer, status):
    model = Tiny(lambda question: [answer])
    monkeypatch.setattr("edgevl.load", model.load)
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
    model = Tiny(lambda question: [OSError(5, "Input/output error")])
    monkeypatch.setattr("edgevl.load", model.load)
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
