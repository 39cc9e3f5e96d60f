"""`edgevl compile` with a Pulsar2 that is a stand-in: command lines, resuming, failures."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest

import vision_stand_ins
from edgevl.axera.layout import BoardShape
from edgevl.boards.settings import CompileSettings
from edgevl.boards.text_checkpoint import write_text_checkpoint
from edgevl.checkpoint import Checkpoint
from edgevl.checkpoint.safetensors import SafetensorsFile
from edgevl.cli import main
from edgevl.errors import BoardError
from gptq_checkpoints import write_gptq
from repository import SUPPORT

SHAPE = ["--context", "127", "--chunk", "16", "--max-prefill", "32"]
LAYERS = [f"qwen3_p16_l{n}_together.axmodel" for n in range(3)] + ["qwen3_post.axmodel"]
VISION = "internvl_vit_model_1x3x56x56.axmodel"
EMBEDDINGS = [f"model.embed_tokens.weight.{end}" for end in ("npy", "float32.bin", "bfloat16.bin")]
BUILD_VISION = [
    "build",
    *("--input", "done/vision.onnx"),
    *("--config", "done/pulsar2-vision.json"),
    *("--output_dir", "making/vision"),
    *("--output_name", VISION),
    *("--npu_mode", "NPU3"),
    *("--target_hardware", "AX650"),
]
BUILD_TEXT = [
    "llm_build",
    *("--input_path", "done/text-model"),
    *("--output_path", "making/text"),
    *("--hidden_state_type", "bf16"),
    *("--prefill_len", "16"),
    *("--kv_cache_len", "127"),
    *("--last_kv_cache_len", "16"),
    *("--last_kv_cache_len", "32"),
    *("--weight_type", "s8"),
    *("--chip", "AX650"),
    *("--check_level", "1"),
    *("--parallel", "4"),
]


class Desk:
    """A place to compile at: a model, an output, a Pulsar2, and what was asked of it."""

    def __init__(self, path, model, monkeypatch, capsys):
        self.path = path
        self.model = model
        self.output = path / "out"
        self.partial = path / "out.partial"
        self.monkeypatch = monkeypatch
        self.capsys = capsys
        self.pulsar2 = path / "bin" / "pulsar2"
        self.pulsar2.parent.mkdir()
        self._install(self.pulsar2, "fake_pulsar2.py")
        monkeypatch.setenv("FAKE_CALLS", str(path / "calls"))

    def _install(self, path, fake):
        path.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{SUPPORT / fake}" "$@"\n')
        path.chmod(0o755)

    def install_docker(self):
        self._install(self.path / "bin" / "docker", "fake_docker.py")
        self.put_on_path()

    def put_on_path(self):
        self.monkeypatch.setenv("PATH", f"{self.path / 'bin'}:{os.environ['PATH']}")

    def arguments(self, *options, target="ax650"):
        shape = [] if "--context" in options else SHAPE
        given = [] if {"--pulsar2", "--dry-run", "--emulate"} & {*options} else self.given()
        output = ["-o", str(self.output), "--target", target]
        return ["compile", str(self.model), *output, *shape, *given, *options]

    def given(self):
        return ["--pulsar2", str(self.pulsar2)]

    def compile(self, *options, **more):
        """Run the command: -> its exit status and what it says on standard error."""
        status = main(self.arguments(*options, **more))
        return status, self.capsys.readouterr().err

    def make(self, *options, **more):
        """Run the command, which succeeds and warns of nothing."""
        status, said = self.compile(*options, **more)
        assert (status, said) == (0, ""), said

    def dry_run(self, *options):
        status, said = self.compile("--dry-run", *options)
        assert status == 0, said

    def calls(self):
        """Return the builds asked for since the last time, without those of docker."""
        file = self.path / "calls"
        lines = file.read_text().splitlines() if file.exists() else []
        file.unlink(missing_ok=True)
        return [json.loads(line) for line in lines]

    def board(self):
        return json.loads((self.output / "board.json").read_text())

    def set(self, **variables):
        """Set FAKE_<NAME> for the stand-ins; None unsets."""
        for name, value in variables.items():
            if value is None:
                self.monkeypatch.delenv(f"FAKE_{name}")
            else:
                self.monkeypatch.setenv(
                    f"FAKE_{name}", value if isinstance(value, str) else json.dumps(value)
                )


@pytest.fixture
def desk(tmp_path, mini_checkpoint, monkeypatch, capsys):
    vision_stand_ins.install(lambda name, module: monkeypatch.setitem(sys.modules, name, module))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # where the lock of builds is
    return Desk(tmp_path, mini_checkpoint(), monkeypatch, capsys)


def files(directory):
    return {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}


# --- a whole compilation -----------------------------------------------------------------------


def test_everything_a_board_needs_is_there_and_nothing_else(desk):
    desk.make()
    assert desk.calls() == [BUILD_VISION, BUILD_TEXT]
    side = {path.name for path in desk.model.iterdir() if not path.name.startswith(".")}
    logs = {"logs/vision.log", "logs/text.log"}
    expected = {*LAYERS, VISION, *EMBEDDINGS, *side, *logs, "board.json"} - {"model.safetensors"}
    assert files(desk.output) == expected
    assert (desk.output / LAYERS[2]).read_bytes() == f"text {LAYERS[2]}".encode()
    assert not desk.partial.exists()
    board = desk.board()
    assert board.pop("created")
    assert board.pop("seconds") >= 0
    assert board.pop("edgevl")
    assert board.pop("files") == {
        name: {
            "bytes": (desk.output / name).stat().st_size,
            "sha256": hashlib.sha256((desk.output / name).read_bytes()).hexdigest(),
        }
        for name in (*LAYERS, VISION, *EMBEDDINGS)
    }
    assert board == {
        "model": "mini-qwen3",
        "target": "ax650",
        "chip": "AX650",
        "npu_mode": "NPU3",
        "context": 127,
        "chunk": 16,
        "max_prefill": 32,
        "max_tiles": 1,
        "uint8_input": False,
        "weights": "s8",
        "post_topk": 0,
        "compiler": "pulsar2 5.1",
        "llm_build": 1,
        "cosines": {
            "vision_onnx": 0.9999987,
            "layers": {"decode layer 0": 0.9986067835921196, "prefill layer 0": 0.9975},
        },
        "warnings": [],
    }


def test_the_newer_command_is_used_where_it_is(desk):
    desk.set(VERSION="6.0")
    desk.make("--decode-step", "64")
    assert desk.calls()[1] == [
        "llm_build2",
        *("--input_path", "done/text-model"),
        *("--output_path", "making/text"),
        *("--hidden_state_type", "bf16"),
        *("--prefill_len", "48"),
        *("--prefill_step_size", "16"),
        *("--max_context", "128"),
        *("--weight_type", "s8"),
        *("--post_weight_type", "s8"),
        *("--decode_step_size", "64"),
        *("--model_config", "done/model-config.json"),
        *("--chip", "AX650"),
        *("--check_level", "1"),
        *("--parallel", "4"),
    ]
    assert desk.board()["compiler"] == "pulsar2 6.0"
    assert desk.board()["llm_build"] == 2


def test_options_reach_pulsar2(desk):
    desk.put_on_path()
    options = ["--npu-mode", "NPU1", "--weight-type", "s4", "--post-topk", "8", "--llm-build", "1"]
    options += ["--parallel", "2", "--check-level", "0", "--max-prefill", "0"]
    desk.monkeypatch.setattr(Desk, "given", lambda self: [])  # found on PATH
    desk.make(*options, target="ax630c")
    vision, text = desk.calls()
    assert vision[-4:] == ["--npu_mode", "NPU1", "--target_hardware", "AX620E"]
    assert text[7:] == [
        *("--prefill_len", "16", "--kv_cache_len", "127", "--weight_type", "s4"),
        *("--post_topk", "8", "--npu_mode", "NPU1", "--chip", "AX620E"),
        *("--check_level", "0", "--parallel", "2"),
    ]
    assert desk.board()["cosines"]["layers"] == {}


def test_a_configuration_is_taken_but_for_the_pictures(desk):
    config = {"quant": {"input_configs": [{"tensor_name": "i", "calibration_dataset": "mine"}]}}
    (desk.path / "mine.json").write_text(json.dumps(config))
    desk.set(FAIL={"vision": ["stopped", 1, 0]})
    assert desk.compile("--pulsar2-config", str(desk.path / "mine.json"))[0] == 1
    made = json.loads((desk.partial / "done" / "pulsar2-vision.json").read_text())
    inputs = made["quant"]["input_configs"]
    assert inputs == [{"tensor_name": "i", "calibration_dataset": "done/calibration.tar"}]
    (desk.path / "mine.json").write_text(json.dumps(config | {"more": 1}))
    status, said = desk.compile("--pulsar2-config", str(desk.path / "mine.json"))
    assert status == 1
    assert "was begun with another configuration than" in said


def test_gptq_stays_and_text_alone_has_no_vision(desk):
    original = write_gptq(desk.path / "gptq")
    desk.model = desk.path / "text-only"
    desk.model.mkdir()
    with Checkpoint.open(original) as checkpoint:
        write_text_checkpoint(checkpoint, desk.model)
    desk.make()
    calls = desk.calls()
    assert [call[0] for call in calls] == ["llm_build"]
    assert "--weight_type" not in calls[0]
    assert not list(desk.output.glob("internvl*"))
    assert desk.board()["weights"] == "gptq-4"
    assert desk.board()["cosines"]["vision_onnx"] is None


def test_no_pytorch_is_needed():
    code = "import sys, edgevl.cli.compile, edgevl.boards.run; print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "False\n"


# --- Docker ------------------------------------------------------------------------------------


def test_docker_sees_the_work_directory_and_no_more(desk):
    desk.install_docker()
    desk.make("--pulsar2", "docker:pulsar2:5.1")
    calls = desk.calls()
    assert [call for call in calls if call[0] != "docker"] == [BUILD_VISION, BUILD_TEXT]
    runs = [call for call in calls if call[:2] == ["docker", "run"]]
    name, mount = runs[1][3], f'--mount=type=bind,"source={desk.partial}",target=/data'
    assert name.startswith("--name=edgevl-")
    environment = "--env=FLOAT_MATMUL_USE_CONV_EU=1"
    expected = ["--rm", name, environment, mount, "--workdir=/data", "pulsar2:5.1", "pulsar2"]
    assert runs[1][2:] == [*expected, *BUILD_VISION]
    assert desk.board()["compiler"] == "pulsar2 5.1"


def test_docker_and_a_place_with_punctuation(desk):
    desk.install_docker()
    desk.output = desk.path / "12:30, it is" / "out"
    desk.make("--pulsar2", "docker:pulsar2:5.1")
    desk.output = desk.output.with_name("script")
    desk.dry_run("--pulsar2", "docker:pulsar2:5.1")
    result = run_script(desk)
    assert result.returncode == 0, result.stderr
    assert {*LAYERS, VISION, "board.json"} <= files(desk.output)


def test_what_a_container_wrote_as_root_is_given_back(desk):
    desk.install_docker()
    desk.monkeypatch.setattr(os, "getuid", lambda: 12345)
    desk.make("--pulsar2", "docker:pulsar2:5.1")
    given = [call for call in desk.calls() if "--entrypoint=chown" in call]
    assert given[0][3:] == [
        *(
            f'--mount=type=bind,"source={desk.partial}",target=/data',
            "--entrypoint=chown",
            "pulsar2:5.1",
        ),
        *("-R", f"12345:{os.getgid()}", "/data"),
    ]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            "permission denied while trying to connect to the Docker daemon socket",
            "may not use it (permission denied); `sudo usermod",
        ),
        (
            "Cannot connect to the Docker daemon at unix:///var/run/docker.sock. Is the docker "
            "daemon running?",
            "its daemon is not running; `sudo systemctl start docker`",
        ),
        ("Error: No such image: pulsar2:5.1", "no such image here; `docker load -i`"),
        ("Something new", "docker image inspect pulsar2:5.1: Something new"),
    ],
)
def test_a_docker_that_cannot_be_used_is_told_before_the_work(desk, error, message):
    desk.install_docker()
    desk.set(DOCKER={"error": error})
    status, said = desk.compile("--pulsar2", "docker:pulsar2:5.1")
    assert status == 1
    assert message in said
    assert said.count("\n") == 1
    assert not desk.output.exists()
    assert not desk.partial.exists()


def test_without_docker_or_pulsar2_there_are_two_other_ways(desk):
    desk.monkeypatch.setenv("PATH", str(desk.path))
    for given in (["--pulsar2", "docker:pulsar2:5.1"], ["--pulsar2", "missing"], None):
        if given is None:
            desk.monkeypatch.setattr(Desk, "given", lambda self: [])
        status, said = desk.compile(*(given or []))
        assert status == 1
        assert "--dry-run" in said
        assert "--emulate" in said
        assert said.count("\n") == 1
    assert not desk.partial.exists()


# --- failures ----------------------------------------------------------------------------------

TRACEBACK = "Traceback (most recent call last):\n  File 'a.py', line 3\nValueError: bad scale"


@pytest.mark.parametrize(
    ("lines", "status", "message"),
    [
        ("working", 137, "ran out of memory"),
        ("working", -9, "ran out of memory"),
        ("a.py\nMemoryError", 1, "ran out of memory; close other programs, give Docker more"),
        ("terminate called after throwing an instance of 'std::bad_alloc'", 134, "out of memory"),
        ("OSError: [Errno 28] No space left on device: '/data/x'", 1, "the disk is full"),
        (TRACEBACK, 1, "Pulsar2 failed with status 1: ValueError: bad scale (see "),
        ("", 3, "Pulsar2 failed with status 3 (see "),
        (
            "ok\nERROR: op type Resize(cubic) is not supported\nValueError: stopped",
            1,
            "cannot compile an operator, line 3 of {log}: ERROR: op type Resize(cubic) is not",
        ),
        (
            "NotImplementedError: unimplemented operator: Einsum",
            1,
            "line 2 of {log}: NotImplementedError: unimplemented operator: Einsum",
        ),
    ],
)
def test_failures_are_one_line_and_the_next_run_goes_on(desk, lines, status, message):
    desk.set(FAIL={"vision": [lines, status, 1]})
    code, said = desk.compile()
    log = desk.partial / "logs" / "vision.log"
    assert code == 1
    assert message.format(log=log) in said
    assert said.count("\n") == 1
    assert not desk.output.exists()
    assert not (desk.partial / "done" / "vision").exists()
    assert desk.calls() == [BUILD_VISION]
    desk.set(FAIL=None)
    onnx = desk.partial / "done" / "vision.onnx"
    onnx.write_bytes(b"kept")  # what is done is not made again
    code, _ = desk.compile("--parallel", "1")
    assert code == 0
    assert [call[0] for call in desk.calls()] == ["build", "llm_build"]


@pytest.mark.parametrize("missing", [VISION, LAYERS[1], LAYERS[3]])
def test_a_build_that_writes_too_little_is_not_published(desk, missing):
    desk.set(MISSING=missing)
    status, said = desk.compile()
    assert status == 1
    assert f"Pulsar2 has ended without writing {missing}, see " in said
    assert not desk.output.exists()
    vision_was_built = missing != VISION
    desk.set(MISSING=None)
    desk.calls()
    desk.make()
    assert [call[0] for call in desk.calls()] == ["build", "llm_build"][vision_was_built:]


@pytest.mark.parametrize("cosine", ["0.912", "nan"])
def test_layers_that_are_not_exact_are_warned_of(desk, cosine):
    desk.set(COSINE=cosine)
    status, said = desk.compile()
    assert status == 0
    shown = "0.9120" if cosine == "0.912" else "nan"
    warning = f"decode layer 0: cosine {shown} to the same in floats, below 0.99; compare answers"
    assert warning in said
    assert "prefill" not in said
    assert len(desk.board()["warnings"]) == 1
    layers = desk.board()["cosines"]["layers"]
    assert layers == {
        "decode layer 0": 0.912 if cosine == "0.912" else None,
        "prefill layer 0": 0.9975,
    }


def test_layers_that_are_whole_stay_when_only_their_check_fails(desk):
    """Pulsar2's manual says to ignore it."""
    desk.set(FAIL={"check": ["RuntimeError: check", 1]})
    status, said = desk.compile()
    assert status == 0
    assert "wrote all layers, but its check of them failed" in said


def test_a_build_that_does_not_exit_is_stopped_once_all_is_done(desk):
    desk.monkeypatch.setattr("edgevl.boards.pulsar2.EXIT_GRACE_S", 0.2)
    desk.monkeypatch.setattr("edgevl.boards.pulsar2.STOP_GRACE_S", 0.5)
    desk.monkeypatch.setattr("edgevl.boards.pulsar2.POLL_S", 0.1)
    desk.set(LINGER="1")
    desk.make()


def test_the_older_pulsar2_has_no_decode_step(desk):
    status, said = desk.compile("--decode-step", "64")
    assert status == 1
    assert "--decode-step 64: llm_build has none; give --llm-build 2 and a Pulsar2" in said
    assert not desk.partial.exists()


def test_a_mistake_in_the_first_settings_can_be_mended(desk):
    """Nothing depends on them yet."""
    (desk.path / "broken.json").write_text("{")
    assert desk.compile("--pulsar2-config", str(desk.path / "broken.json"))[0] == 1
    assert not desk.partial.exists()
    desk.make()


def test_other_settings_do_not_go_on_with_what_is_done(desk):
    desk.set(FAIL={"text": ["no", 1, 2]})
    assert desk.compile()[0] == 1
    status, said = desk.compile("--weight-type", "s4")
    assert status == 1
    assert "was begun with another weight_type (None, now s4)" in said


# --- interruptions -----------------------------------------------------------------------------


def start(desk, *options):
    """Start the command in a process of its own."""
    code = (
        f"import sys; sys.path.insert(0, {str(SUPPORT)!r})\n"
        "import vision_stand_ins; vision_stand_ins.install()\n"
        "from edgevl.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, *desk.arguments(*options)],
        env={**os.environ, "TMPDIR": str(desk.path)},
        stderr=subprocess.PIPE,
        text=True,
        # Which shells have their background jobs ignore.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def wait_for(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def alive(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize("slow", ["vision", "text"])
def test_killed_anywhere_nothing_looks_finished_and_a_second_run_completes(desk, slow):
    desk.set(SLOW=slow)
    process = start(desk)
    first = VISION if slow == "vision" else LAYERS[0]
    wait_for((desk.partial / "making" / slow / first).exists)
    wait_for(lambda: "pid" in json.loads((desk.partial / "build.json").read_text()))
    build = json.loads((desk.partial / "build.json").read_text())["pid"]
    process.kill()
    process.wait()
    process.stderr.close()
    assert not desk.output.exists()
    assert not (desk.partial / "done" / slow).exists()
    assert alive(build)  # nobody told it
    desk.set(SLOW=None)
    desk.calls()
    desk.make()
    assert not alive(build)
    made = ["build", "llm_build"] if slow == "vision" else ["llm_build"]
    assert [call[0] for call in desk.calls()] == made
    assert {*LAYERS, VISION, "board.json"} <= files(desk.output)


@pytest.mark.parametrize(
    ("number", "docker"),
    [(signal.SIGINT, False), (signal.SIGINT, True), (signal.SIGTERM, False), (signal.SIGHUP, True)],
)
def test_a_signal_stops_the_build_with_all_its_processes(desk, number, docker):
    options = []
    if docker:
        desk.install_docker()
        options = ["--pulsar2", "docker:pulsar2:5.1"]
    desk.set(SLOW="text")
    process = start(desk, *options)
    wait_for((desk.partial / "making" / "text" / LAYERS[0]).exists)
    wait_for(lambda: "pid" in json.loads((desk.partial / "build.json").read_text()))
    leader = psutil.Process(json.loads((desk.partial / "build.json").read_text())["pid"])
    builds = [leader, *leader.children(recursive=True)]
    process.send_signal(number)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 128 + number
    assert f"interrupted; the same command goes on in {desk.output}.partial" in said
    assert not any(alive(each.pid) for each in builds)
    assert not desk.output.exists()
    if docker:
        calls = desk.calls()
        ran = next(call for call in calls if "llm_build" in call)
        assert ["docker", "kill", ran[3].removeprefix("--name=")] in calls
    desk.set(SLOW=None)
    desk.make(*options)


def test_builds_wait_for_each_other(desk):
    import fcntl

    lock = (desk.path / f"edgevl-pulsar2-{os.getuid()}.lock").open("w")
    fcntl.flock(lock, fcntl.LOCK_EX)
    process = start(desk)
    wait_for((desk.partial / "making" / "vision").exists)
    time.sleep(0.5)
    assert process.poll() is None
    assert desk.calls() == []
    lock.close()
    _, said = process.communicate(timeout=60)
    assert process.returncode == 0, said
    assert desk.calls() == [BUILD_VISION, BUILD_TEXT]


# --- without Pulsar2 ---------------------------------------------------------------------------


def run_script(desk, **environment):
    return subprocess.run(
        [desk.output / "build.sh"],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_dry_run_is_finished_by_its_script(desk):
    status, said = desk.compile("--dry-run")
    assert status == 0
    assert "is not a board's model yet: copy it to a machine with Pulsar2" in said
    assert desk.calls() == []
    assert {path.name for path in desk.output.iterdir()} == {
        "build",
        "build.sh",
        "NOT-BUILT-YET.txt",
    }
    moved = desk.path / "another place"
    desk.output.rename(moved)
    desk.output = moved
    desk.monkeypatch.chdir(desk.path)
    result = run_script(desk, PULSAR2="bin/pulsar2")
    assert result.returncode == 0, result.stderr
    assert "cos_sim is: 0.9975" in result.stdout
    assert desk.calls() == [BUILD_VISION, BUILD_TEXT]
    left = {name for name in files(desk.output) if not name.startswith("build")}
    scripted = desk.board()
    desk.output = desk.path / "direct"
    desk.make()
    logs = {name for name in files(desk.output) if name.startswith("logs/")}
    assert left == files(desk.output) - logs
    direct = desk.board()
    assert scripted["compiler"] == "pulsar2 5.1"
    for board in (scripted, direct):
        assert {board.pop(name) is None for name in ("created", "seconds", "cosines")} == {False}
    assert scripted == direct


def test_without_sha256sum_the_script_lists_no_more_files(desk):
    desk.dry_run()
    desk.put_on_path()
    listed = json.loads((desk.output / "build" / "board.json").read_text())["files"]
    assert set(listed) == set(EMBEDDINGS)
    tools = desk.path / "tools"
    tools.mkdir()
    for place in os.environ["PATH"].split(os.pathsep):
        for tool in Path(place).glob("*"):
            if tool.name != "sha256sum" and not (tools / tool.name).exists():
                (tools / tool.name).symlink_to(tool)
    result = run_script(desk, PATH=str(tools))
    assert result.returncode == 0, result.stderr
    assert desk.board()["files"] == listed
    assert {*LAYERS, VISION} <= files(desk.output)


def test_the_script_goes_on_after_a_failure(desk):
    desk.dry_run("--llm-build", "2")
    desk.put_on_path()
    desk.set(VERSION="6.1", FAIL={"text": ["ValueError: no", 1, 2]})
    result = run_script(desk)
    assert result.returncode == 1
    assert "ValueError: no" in result.stderr
    assert "error: text: Pulsar2 failed, see " in result.stderr
    assert "NOT-BUILT-YET.txt" in files(desk.output)
    assert "board.json" not in files(desk.output)
    desk.set(FAIL=None, MISSING=LAYERS[2])
    desk.calls()
    result = run_script(desk)
    assert f"Pulsar2 has not written {LAYERS[2]}" in result.stderr
    desk.set(MISSING=None)
    result = run_script(desk)
    assert result.returncode == 0, result.stderr
    assert [call[0] for call in desk.calls()] == ["llm_build2"] * 2
    assert desk.board()["compiler"] == "pulsar2 6.1"
    assert {*LAYERS, VISION} <= files(desk.output)


def test_the_script_runs_docker_too(desk):
    desk.install_docker()
    desk.dry_run("--pulsar2", "docker:pulsar2:5.1")
    result = run_script(desk)
    assert result.returncode == 0, result.stderr
    assert [call for call in desk.calls() if call[0] != "docker"] == [BUILD_VISION, BUILD_TEXT]
    desk.output = desk.path / "again"
    desk.dry_run()
    result = run_script(desk, PULSAR2="docker:other")
    assert result.returncode == 1
    assert "no image other: docker load -i" in result.stderr
    result = run_script(desk, PULSAR2="/nowhere/pulsar2")
    assert "no program /nowhere/pulsar2: set PULSAR2" in result.stderr


def test_an_emulated_model_needs_no_pulsar2(desk):
    desk.monkeypatch.setenv("PATH", str(desk.path))
    desk.make("--emulate", "--post-topk", "5")
    assert desk.calls() == []
    assert {*LAYERS, VISION, *EMBEDDINGS, "board.json", "config.json"} <= files(desk.output)
    board = desk.board()
    assert (board["compiler"], board["weights"], board["cosines"]) == ("emulator", "bf16", None)
    assert board["post_topk"] == 5
    assert (desk.output / LAYERS[3]).read_bytes() == b"emulated ax650 5"


@pytest.mark.parametrize(
    "option",
    [
        ("--pulsar2", "x"),
        ("--pulsar2-config", "x"),
        ("--calibration-images", "x"),
        ("--llm-build", "2"),
        ("--decode-step", "128"),
    ],
)
def test_what_an_emulated_model_takes_no_notice_of_is_refused(desk, option):
    status, said = desk.compile("--emulate", *option)
    assert status == 1
    assert f"{' '.join(option)}: --emulate does without Pulsar2; leave it out" in said


def test_what_is_compiled_is_not_compiled_again(desk):
    desk.make("--emulate")
    desk.model, desk.output = desk.output, desk.path / "again"
    status, said = desk.compile("--emulate")
    assert status == 1
    assert "out: is compiled for a board already; give the checkpoint" in said


# --- what is refused before any work -----------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "target", "message"),
    [
        (["--npu-mode", "NPU3"], "ax630c", "--npu-mode NPU3: ax630c has NPU1, NPU2"),
        (["--chunk", "20"], "ax650", "--chunk 20: must be a multiple of 16 up to 1024"),
        (["--chunk", "128"], "ax650", "--context 127: must be from 128 (--chunk) to 4095"),
        (["--context", "4096"], "ax650", "--context 4096: must be from 128 (--chunk) to 4095"),
        (["--max-prefill", "40"], "ax650", "--max-prefill 40: must be a multiple of --chunk 16,"),
        (
            ["--max-prefill", "128"],
            "ax650",
            "--max-prefill 128: with one more chunk of 16 it exceeds --context 127; at most 112",
        ),
        (
            ["--context", "4095", "--chunk", "16", "--max-prefill", "1024"],
            "ax650",
            "takes 65 shape groups of --chunk 16, at most 64 are built: use a larger --chunk",
        ),
        (["--post-topk", "601"], "ax650", "--post-topk 601: must be from 0 to 600"),
        (["--emulate", "--weight-type", "s4"], "ax650", "the emulator computes in bf16"),
        (
            ["--decode-step", "64", "--llm-build", "1"],
            "ax650",
            "--decode-step 64: llm_build has none",
        ),
        (["--dry-run", "--emulate"], "ax650", "--dry-run and --emulate: give one of the two"),
    ],
)
def test_what_contradicts_itself_is_one_line(desk, options, target, message):
    status, said = desk.compile(*options, target=target)
    assert status == 1
    assert message in said
    assert said.count("\n") == 1
    assert not desk.partial.exists()
    assert desk.calls() == []


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"target": "ax651"}, "--target ax651: choose ax650, ax630c"),
        ({"parallel": 257}, "--parallel 257: must be 1 to 256"),
        ({"context": 0}, "--context 0: must be 1 or more"),
        ({"llm_build": 3}, "--llm-build 3: choose 1, 2"),
    ],
)
def test_settings_are_checked_for_programs_too(values, message):
    with pytest.raises(BoardError, match=message):
        CompileSettings(**({"target": "ax650"} | values))


def test_gptq_has_its_weight_type_already(desk):
    desk.model = write_gptq(desk.path / "gptq")
    status, said = desk.compile("--weight-type", "s4")
    assert status == 1
    assert "--weight-type s4: the text of" in said
    assert "is in 4-bit GPTQ; leave it out" in said


def test_a_model_that_does_not_fit_the_board_is_refused(desk):
    from dataclasses import replace

    from edgevl.boards.settings import TARGETS

    small = replace(TARGETS["ax630c"], memory_bytes=400_000)
    desk.monkeypatch.setitem(TARGETS, "ax630c", small)
    status, said = desk.compile(target="ax630c")
    assert status == 1
    assert "takes about 0.0 GB of NPU memory" in said
    assert "compile a smaller model, one quantized to int4, or a shorter --context" in said


def test_a_disk_without_room_is_told_before_the_work(desk):
    usage = shutil.disk_usage(desk.path)
    desk.monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    status, said = desk.compile()
    assert status == 1
    assert "0.0 GB free on that disk" in said
    assert not desk.partial.exists()


def test_a_vision_encoder_beyond_onnx_is_refused(desk, monkeypatch):
    monkeypatch.setattr("edgevl.boards.run.MAX_ONNX_BYTES", 1000)
    status, said = desk.compile()
    assert status == 1
    assert "in float32, but an ONNX file ends at 2 GB: use a model with InternViT-300M" in said


def test_what_pulsar2_is_given_is_the_model(desk):
    desk.set(FAIL={"text": ["no", 1, 0]})
    assert desk.compile()[0] == 1
    text = desk.partial / "done" / "text-model"
    with Checkpoint.open(desk.model) as checkpoint:
        written = SafetensorsFile(text / "model.safetensors")
        stored = checkpoint.stored("language_model.lm_head.weight")
        assert (written["lm_head.weight"].data == stored.data).all()
    assert BoardShape(127, 16, 32).histories() == (0, 16, 32)


def test_what_is_not_built_yet_says_so(desk):
    desk.dry_run()
    desk.model, desk.output = desk.output, desk.path / "again"
    expected = (
        f"{desk.model}: not built yet, see NOT-BUILT-YET.txt in it: run {desk.model}/build.sh"
    )
    for options in (["-q", "x"], ["-q", "x", "--engine", "axera"]):
        assert main(["chat", str(desk.model), *options]) == 1
        assert expected in desk.capsys.readouterr().err
    status, said = desk.compile("--emulate")
    assert status == 1
    assert "is compiled for a board already" in said


def test_fewer_pictures_than_samples_are_told(desk):
    pictures = desk.path / "pictures"
    pictures.mkdir()
    for number in range(3):
        (pictures / f"{number}.png").touch()
    options = ["--calibration-images", str(pictures), "--samples"]
    line = f"{pictures}: 3 different pictures to calibrate on, --samples 4 were asked for"
    desk.set(FAIL={"text": ["ValueError: no", 1, 2]})
    assert desk.compile(*options, "4")[0] == 1
    desk.set(FAIL=None)
    status, said = desk.compile(*options, "4")  # resumed: the pictures are not counted again
    assert status == 0
    assert f"warning: {line}" in said
    assert desk.board()["warnings"][0].startswith(line)
    desk.output = desk.path / "enough"
    desk.make(*options, "3")
