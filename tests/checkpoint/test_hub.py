"""Downloads, against a small server on the loopback interface that stands for the Hub."""

import errno
import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest

from edgevl import loading
from edgevl.axera.directory import BoardModel
from edgevl.axera.layout import EMBEDDING_F32, EMBEDDING_NPY
from edgevl.checkpoint import Checkpoint, expected_tensors, hub, parse_config
from edgevl.errors import CheckpointError, DownloadError
from edgevl.loading import locate, pull
from fake_npu import write_board
from storage import CHAT, random_tensors, write_directory

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SOURCE = Path(hub.__file__).parents[2]


class Hub(BaseHTTPRequestHandler):
    """Serves the files of `server.files` as repository org/model; /gated, /broken misbehave."""

    def log_message(self, *_):
        pass

    def reply(self, status, body=b"", **headers):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self):
        path = unquote(self.path).split("?")[0]
        self.server.requests.append(f"{self.command} {path}")
        files = self.server.files
        if "/org/model" not in path:
            code = {"gated": "GatedRepo", "broken": ""}.get(path.split("/")[-3], "RepoNotFound")
            status = {"GatedRepo": 403, "": 500}.get(code, 404)
            self.reply(status, b"{}", X_Error_Code=code, X_Error_Message="no")
        elif path.startswith("/api/models/org/model/revision/"):
            siblings = [{"rfilename": name} for name in files]
            body = {"_id": "0", "id": "org/model", "sha": COMMIT, "siblings": siblings}
            self.reply(200, json.dumps(body).encode(), Content_Type="application/json")
        elif path.startswith("/api/models/org/model/tree/"):
            entries = [
                {"type": "file", "path": name, "size": len(data), "oid": "0" * 40}
                for name, data in files.items()
            ]
            self.reply(200, json.dumps(entries).encode(), Content_Type="application/json")
        elif path.startswith("/org/model/resolve/"):
            data = files[path.split("/", 5)[-1]]
            etag = f'"{hashlib.sha256(data).hexdigest()}"'
            self.reply(200, data, ETag=etag, X_Repo_Commit=COMMIT, Accept_Ranges="bytes")
        else:
            self.reply(404)

    do_HEAD = do_GET  # noqa: N815


@pytest.fixture
def server(tmp_path):
    source = write_directory(
        tmp_path / "source",
        CHAT,
        random_tensors(expected_tensors(parse_config(CHAT, "config.json")[1])),
        tokenizer_config={},
    )
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        server.files = {path.name: path.read_bytes() for path in source.iterdir()}
        server.files |= {
            "modeling_internvl_chat.py": b"raise SystemExit(9)",
            "pytorch_model.bin": b"\x80\x02.",
            "chat_template.jinja": b"{{ x }}",
            "merges.txt": b"a b",
            "README.md": b"# x",
        }
        server.requests = []
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()


def run(tmp_path, script, **environment):
    """Run Python with a fresh Hub cache; HF_ENDPOINT and the like are read at import."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    environment = kept | {
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1",
        "PYTHONPATH": str(SOURCE),
        **environment,
    }
    result = subprocess.run(
        [sys.executable, "-c", script],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result


ASK = """
import sys
from edgevl.loading import locate, pull
from edgevl.errors import EdgeVLError
for step in {steps!r}:
    try:
        print("ok", eval(step))
    except EdgeVLError as error:
        print(type(error).__name__, error)
"""


def test_pull(tmp_path, server):
    endpoint = f"http://127.0.0.1:{server.server_port}"
    out = tmp_path / "out"
    steps = [
        "pull('org/model')",
        "locate('org/model')",
        f"pull('org/model', {str(out)!r})",
        "pull('org/absent')",
        "pull('org/gated')",
        "pull('org/broken')",
    ]
    result = run(tmp_path, ASK.format(steps=steps), HF_ENDPOINT=endpoint)
    assert "%|" not in result.stderr  # no progress bar where there is no terminal
    first, again, local, absent, gated, broken = result.stdout.splitlines()
    for line in (first, again, local):
        assert line.startswith("ok ")
        directory = Path(line.removeprefix("ok "))
        Checkpoint.open(directory).close()
        names = {path.name for path in directory.iterdir() if path.is_file()}
        assert names == {
            "config.json",
            "model.safetensors",
            "tokenizer_config.json",
            "chat_template.jinja",
            "merges.txt",
        }
    assert first == again
    assert Path(local.removeprefix("ok ")) == out
    assert not any(".py" in line or ".bin" in line for line in server.requests)
    weights = [line for line in server.requests if "GET" in line and "model.safetensors" in line]
    # Once for the cache, at most once more for the other directory; not again for `locate`.
    assert len(weights) in (1, 2)
    assert absent.startswith("DownloadError org/absent: no such repository at " + endpoint)
    assert gated.startswith("DownloadError org/gated: access is restricted")
    assert "HF_TOKEN" in gated
    assert broken.startswith("DownloadError org/broken: ")
    assert "500" in broken

    # What is in the cache is used as it is, without a look at the Hub.
    server.requests.clear()
    result = run(tmp_path, ASK.format(steps=["locate('org/model')"]), HF_ENDPOINT=endpoint)
    assert result.stdout.strip() == first
    assert server.requests == []
    steps = ["locate('org/model')", "pull('org/model')", "locate('org/absent')"]
    for environment in ({"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}):
        result = run(tmp_path, ASK.format(steps=steps), **environment)
        located, pulled, absent = result.stdout.splitlines()
        assert located == first
        assert pulled == first
        assert absent.startswith("DownloadError org/absent: ")
        assert "give its path in place of the id" in absent
        named = "HF_HUB_OFFLINE" if "HF_HUB_OFFLINE" in environment else "HF_ENDPOINT"
        assert named in absent


def test_what_was_downloaded_is_checked(tmp_path, server):
    server.files["model.safetensors"] = b"version https://git-lfs.github.com/spec/v1\n"
    endpoint = f"http://127.0.0.1:{server.server_port}"
    result = run(tmp_path, ASK.format(steps=["pull('org/model')"]), HF_ENDPOINT=endpoint)
    assert result.stdout.startswith("CheckpointError ")
    assert "Git LFS" in result.stdout


@pytest.mark.parametrize(
    ("number", "words"),
    [(errno.ENOSPC, "disk is full"), (errno.EACCES, "cannot write"), (errno.EROFS, "cannot write")],
)
def test_a_disk_that_does_not_take_it(monkeypatch, number, words):
    def fail(*_, **__):
        try:
            raise OSError(number, os.strerror(number), "/cache/x")
        except OSError as error:
            raise RuntimeError("worker died") from error

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with pytest.raises(DownloadError, match=f"org/model: .*{words}.*HF_HOME") as error:
        pull("org/model")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["model", "a/b/c", "../a", "a/..", "-a/b", "", "a b/c", "a/b\n"])
def test_what_is_no_hub_id(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DownloadError, match="organisation/name"):
        pull(name)
    with pytest.raises(CheckpointError, match=r"tiny.*directory.*Hub id"):
        locate(name or "?")


def test_locate_a_directory(tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "pull", lambda *_: pytest.fail("asked the Hub"))
    (tmp_path / "org" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert locate("org/model") == Path("org/model")  # a directory goes first
    assert locate(tmp_path) == tmp_path
    for path in (tmp_path / "absent", "a\0b", "x" * 5000):
        with pytest.raises(CheckpointError, match="Hub id"):
            locate(path)


@pytest.mark.parametrize("place", ["wheel", "checkout"])
def test_locate_the_shipped_model(tmp_path, monkeypatch, place):
    package = tmp_path / "src" / "edgevl"
    monkeypatch.setattr(loading, "__file__", str(package / "loading.py"))
    with pytest.raises(CheckpointError, match="not in this installation"):
        locate("tiny")
    model = (package if place == "wheel" else tmp_path) / "models" / "tiny"
    model.mkdir(parents=True)
    (model / "config.json").write_text("{}")
    assert locate("tiny") == model


def test_huggingface_hub_is_not_imported_before_it_is_needed(tmp_path):
    script = "import sys, edgevl.loading; print('huggingface_hub' in sys.modules)"
    assert run(tmp_path, script).stdout == "False\n"


def test_a_file_is_not_taken_for_a_hub_id(tmp_path, monkeypatch):
    (tmp_path / "dir").mkdir()
    (tmp_path / "dir" / "model.safetensors").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        CheckpointError, match="is a file; give the directory of the checkpoint, dir"
    ):
        locate("dir/model.safetensors")


def test_a_mistyped_path_that_looks_like_a_hub_id_is_told_as_one(tmp_path, monkeypatch):
    def no_network(repo):
        raise DownloadError(f"{repo}: cannot be reached")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loading, "_cached", lambda repo: None)
    monkeypatch.setattr(loading, "pull", no_network)
    with pytest.raises(DownloadError, match="nor is there a directory models/tinny here"):
        locate("models/tinny")


@pytest.mark.parametrize("form", ["bfloat16.bin", "npy", "float32.bin"])
def test_pull_a_model_compiled_for_a_board(tmp_path, server, mini_checkpoint, form):
    board = write_board(tmp_path / "board", mini_checkpoint("mini-qwen3"))
    table = np.zeros((600, 56), np.float32)
    np.save(board / EMBEDDING_NPY, table)
    table.tofile(board / EMBEDDING_F32)
    compiled = {}
    tokenizer = {"X/model.safetensors": b"the weights", "config.json": b"{}", "infer.py": b"exit()"}
    for path in board.iterdir():
        place = "X_axmodel" if path.name.endswith((".axmodel", ".bin", ".npy")) else "X"
        (compiled if place == "X_axmodel" else tokenizer)[f"{place}/{path.name}"] = (
            path.read_bytes()
        )
    forms = ["bfloat16.bin", "npy", "float32.bin"]
    for absent in forms[: forms.index(form)]:
        del compiled[f"X_axmodel/model.embed_tokens.weight.{absent}"]
    server.files = compiled | tokenizer
    result = run(
        tmp_path,
        ASK.format(steps=["pull('org/model')", "locate('org/model')"]),
        HF_ENDPOINT=f"http://127.0.0.1:{server.server_port}",
    )
    pulled, located = result.stdout.splitlines()
    assert pulled == located
    assert pulled.startswith("ok "), pulled
    directory = Path(pulled.removeprefix("ok "))
    names = {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}
    left_out = {"X/model.safetensors", "infer.py"}
    left_out |= {name for name in compiled if "embed_tokens" in name and not name.endswith(form)}
    assert names == set(server.files) - left_out
    assert BoardModel(directory).embedding.path.name.endswith(form)
