"""`edgevl doctor` and what it knows about the machine."""

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
    info = machine._cpuinfo(X86)
    assert info["model name"] == "Test CPU @ 3.00GHz"
    assert machine.features(info) == ("AVX2", "FMA", "F16C", "AVX-512", "AVX-512 VNNI")
    assert machine.features(machine._cpuinfo(ARM)) == (
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


def test_this_machine_agrees_with_the_system():
    found = machine.this_machine()
    assert found.cpu
    assert found.logical_cores == os.cpu_count()
    assert 0 < found.usable_cores <= found.logical_cores
    assert 0 < found.available_bytes <= found.memory_bytes <= psutil.virtual_memory().total


def test_lists_are_those_of_pyproject():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11 or later reads TOML")
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text("utf-8")
    project = tomllib.loads(text)["project"]

    def names(requirements):
        return {re.match(r"[\w-]+", requirement)[0] for requirement in requirements}

    assert set(doctor.NEEDED) == names(project["dependencies"])
    extras = {
        name: names(requirements)
        for name, requirements in project["optional-dependencies"].items()
        if name != "dev"
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
