"""`edgevl batch`: rows in order, error rows, resuming, refusals."""

import base64
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest

import edgevl
from clips import write_clip
from edgevl import Constraint, cli
from edgevl.batch import answer_rows, open_batch, rows, run, run_batch
from edgevl.errors import CheckpointError, EdgeVLError, PromptError
from edgevl.preprocess import load_image, prepare_picture, prepare_video, sources
from repository import EXAMPLES

NUMBER = "What number is on the display?"
ANSWERS = {"handwriting.png": "916", "label.png": "2048", "meter.png": "7305", "word.png": "Coffee"}


@pytest.fixture(scope="module")
def model():
    return edgevl.load("tiny", threads=1)


@pytest.fixture
def pictures(tmp_path, monkeypatch):
    """A directory with the example pictures that tiny can read, one of them in a directory."""
    for name in ("LC_ALL", "LC_MESSAGES", "LANG"):
        monkeypatch.delenv(name, raising=False)
    directory = tmp_path / "pictures"
    (directory / "more").mkdir(parents=True)
    for name in ANSWERS:
        shutil.copy(EXAMPLES / name, directory / ("more" if name == "label.png" else "") / name)
    return directory


def write_lines(directory, *lines):
    path = directory / "questions.jsonl"
    text = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("\n".join(text), "utf-8")
    return path


def read(path):
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def listing(directory):
    return sorted(path.name for path in directory.iterdir())


def batch(source, output, *options):
    args = ["batch", "tiny", "--input", str(source), "-o", str(output), "--threads", "1"]
    return cli.main([*args, *options])


def answered(model, path, **options):
    """The rows of a file or directory."""
    return list(
        answer_rows(model, open_batch(path, options.pop("question", None)).rows(), **options)
    )


def test_a_directory(pictures, tmp_path, capsys):
    (pictures / "notes.txt").write_text("no picture")
    (pictures / "damaged.jpg").write_bytes(b"\xff\xd8\xff\xe0 and no more")
    out = tmp_path / "out.jsonl"
    assert batch(pictures, out, "-q", NUMBER) == 0
    found = read(out)
    names = ["damaged.jpg", "handwriting.png", "meter.png", "more/label.png", "word.png"]
    assert [row["id"] for row in found] == names
    assert [row["images"] for row in found] == [[name] for name in names]
    assert {row["question"] for row in found} == {NUMBER}
    assert [row.get("text") for row in found] == [None, "916", "7305", "2048", "Coffee"]
    assert found[0].keys() == {"id", "images", "question", "error"}
    assert "damaged.jpg" in found[0]["error"]
    assert found[1].keys() >= {"token_ids", "finish_reason", "usage", "timings"}
    assert capsys.readouterr() == (f"{out}\n", "1 of 5 failed; their `error` says why\n")
    assert listing(tmp_path) == ["out.jsonl", "pictures"]


def test_lines(pictures, tmp_path, capsys):
    data = base64.b64encode((EXAMPLES / "label.png").read_bytes()).decode()
    url = "data:image/png;base64," + data
    path = write_lines(
        pictures,
        {"image": "meter.png"},
        "",
        {"image": str(EXAMPLES / "word.png"), "question": "What word is this?", "id": 7},
        {"images": [url], "id": "first"},
        {"images": ["more/label.png"], "max_tokens": 2, "system": "Be brief."},
        {"image": url},
        {"images": [], "question": "Hello", "id": None},
        {"image": url, "id": "own", "temperature": 0, "stop": ["48"], "seed": 3},
    )
    out = tmp_path / "out.jsonl"
    assert batch(path, out, "-q", NUMBER, "--temperature", "9", "--top-k", "1") == 0
    found = read(out)
    assert [row["id"] for row in found] == [
        "meter.png", 7, "first", "more/label.png", "line 6", "line 7", "own",
    ]  # fmt: skip
    texts = [row["text"] for row in found]
    assert texts[:5] == ["7305", "Coffee", "2048", "20", "2048"]
    assert found[1]["question"] == "What word is this?"
    assert found[2]["images"] == ["data:image/png;base64,…"]
    assert found[3]["finish_reason"] == "length"
    assert found[5]["usage"]["image_tokens"] == 0
    assert texts[6] == "20"
    assert capsys.readouterr().err == ""


BAD_LINES = {
    '{"image": "meter.png"': "not JSON",
    "[" * 100_000: "not JSON",
    '"meter.png"': "not an object",
    '{"question": "x"}': "no `image`",
    '{"image": "meter.png", "images": []}': "both",
    '{"image": 3}': "`image` must be",
    '{"images": "meter.png"}': "`images` a list",
    '{"images": [""]}': "must be",
    '{"image": "meter.png", "question": " "}': "`question` must be a text, not empty",
    '{"image": "meter.png", "question": "\\ud800"}': "surrogate",
    '{"image": "meter.png", "sytem": "x"}': "unknown field 'sytem'",
    '{"image": "meter.png", "max_tokens": 0}': "max_tokens is 0: it must be",
    '{"image": "meter.png", "top_p": "1"}': "top_p is '1': it must be a number, 0 to 1",
    '{"image": "meter.png", "id": 1.5}': "`id`",
    '{"video": "clip.mp4", "videos": []}': "both `video` and `videos`",
    '{"video": ["clip.mp4"]}': "`video` must be",
    '{"video": "clip.mp4", "frames": 0}': "frames must be a whole number from 1 to 256",
    '{"video": "clip.mp4", "frames": 257}': "frames must",
    '{"video": "clip.mp4", "frames": true}': "frames must",
    '{"video": "clip.mp4", "frame_threshold": 256}': "frame_threshold must be a number from 0 to",
    '{"video": "missing.mp4"}': "no such file",
    '{"video": "meter.png"}': "not a video",
    '{"video": "http://example.invalid/a.mp4"}': "not fetched",
    '{"image": "missing.png"}': "no such file",
    '{"image": "-"}': "no such file",
    '{"image": "\\ud800.png"}': "not a path",
    '{"video": "\\ud800.mp4"}': "not a path",
    '{"image": "http://\\ud83d.example/a.png"}': "not fetched",
    '{"image": "data:image/png;base64,\\ud83d"}': "half a surrogate pair",
    '{"image": "data:image/png,\\ud83d"}': "half a surrogate pair",
    '{"image": "data:\\ud83d;base64,AAAA"}': "not a picture",
    '{"video": "data:video/mp4;base64,\\ud83d"}': "half a surrogate pair",
    '{"image": "meter.png", "\\ud83d": 1}': "unknown field '\\ud83d'",
    '{"image": "meter.png", "id": "\\ud83d"}': "surrogate",
    '{"image": "http://example.invalid/a.png"}': "not fetched",
    '{"image": "data:image/png;base64,AAAA"}': "not a picture",
    '{"image": "more"}': "directory",
    '{"image": "meter.png", "question": "<image> <image>"}': "<image>",
}


def test_bad_lines_are_error_rows_and_the_run_goes_on(model, pictures):
    path = write_lines(pictures, *BAD_LINES, {"image": "meter.png", "id": "last"})
    *bad, good = answered(model, path, question=NUMBER)
    assert len(bad) == len(BAD_LINES)
    for row, (line, message) in zip(bad, BAD_LINES.items(), strict=True):
        assert message in row["error"], line[:80]
        assert "text" not in row
    assert bad[0]["error"].startswith("line 1: ")
    assert (bad[9]["id"], bad[9]["images"]) == ("meter.png", ["meter.png"])
    assert good["text"] == "7305"


def test_rows_with_half_a_surrogate_pair_are_written(pictures, tmp_path):
    # Such as a client's that cuts a text between the two halves of an emoji.
    path = write_lines(pictures, {"image": "\ud83d.png"}, {"image": "data:,\ud83d"}, "{")
    assert batch(path, tmp_path / "out.jsonl", "-q", NUMBER) == 1
    found = read(tmp_path / "out.jsonl")
    assert [row["id"] for row in found] == ["\ud83d.png", "line 2", "line 3"]
    assert all("error" in row for row in found)


def test_all_that_pillow_calls_a_picture_is_one(pictures, model):
    from PIL import Image

    formats = ("JPEG", "MPO", "PNG", "WEBP", "BMP", "GIF", "TIFF")
    known = [suffix for suffix, name in Image.registered_extensions().items() if name in formats]
    assert set(known) <= {*sources.PICTURE_SUFFIXES}
    shutil.copy(pictures / "meter.png", pictures / "a.JFIF")  # whatever it is inside
    shutil.copy(pictures / "meter.png", pictures / "b.jpe")
    found = answered(model, pictures, question=NUMBER)
    assert [row["text"] for row in found[:2]] == ["7305", "7305"]
    assert [row["id"] for row in found[:2]] == ["a.JFIF", "b.jpe"]
    assert {".hif", ".heic", ".heif"} <= {*sources.PICTURE_SUFFIXES}


def test_files_that_hide_are_not_pictures(pictures):
    # As macOS leaves them beside pictures on other systems' disks.
    for name in ("._meter.png", ".hidden.png", ".thumbnails/meter.png", "more/._label.png"):
        (pictures / name).parent.mkdir(exist_ok=True)
        shutil.copy(pictures / "meter.png", pictures / name)
    ids = [row.id for row in open_batch(pictures, NUMBER).rows()]
    assert ids == ["handwriting.png", "meter.png", "more/label.png", "word.png"]


def test_a_line_needs_a_question(model, pictures):
    [row] = answered(model, write_lines(pictures, {"image": "meter.png"}))
    assert "--question" in row["error"]


def test_lines_that_are_no_text_or_too_long(model, pictures, monkeypatch):
    monkeypatch.setattr(rows, "MAX_LINE_BYTES", 100)
    path = pictures / "questions.jsonl"
    long = b'{"image": "' + b"x" * 500 + b'"}\n'
    path.write_bytes(b'\xef\xbb\xbf{"image": "meter.png"}\r\n' + long + b"\xff\n" + long[:-1])
    source = open_batch(path, NUMBER)
    assert len(source) == 4
    found = list(answer_rows(model, source.rows()))
    assert found[0]["text"] == "7305"
    assert [row["error"].partition(" at")[0] for row in found[1:]] == [
        "line 2: over the limit of 0 MiB",
        "line 3: not UTF-8",
        "line 4: over the limit of 0 MiB",
    ]


def test_pictures_beyond_the_context_are_not_all_decoded(pictures, monkeypatch):
    model = edgevl.load("tiny", threads=1, max_context=100)  # a picture has 36 tokens
    decoded = []
    monkeypatch.setattr(
        run,
        "prepare_picture",
        lambda source, *rest: decoded.append(source) or prepare_picture(source, *rest),
    )
    path = write_lines(pictures, {"images": ["meter.png"] * 50}, {"image": "meter.png"})
    crowded, good = answered(model, path, question=NUMBER, max_tokens=9)
    assert "context" in crowded["error"]
    assert good["text"] == "7305"
    assert len(decoded) == 4


def test_too_little_memory_for_a_picture_is_its_row(model, pictures, monkeypatch):
    def prepare(source, *rest):
        if source.name == "meter.png":
            raise MemoryError
        return prepare_picture(source, *rest)

    monkeypatch.setattr(run, "prepare_picture", prepare)
    texts = [row.get("text") for row in answered(model, pictures, question=NUMBER)]
    assert texts == ["916", None, "2048", "Coffee"]


def test_what_rows_share_is_computed_once(model, pictures, monkeypatch):
    decoded = []
    monkeypatch.setattr(
        run,
        "prepare_picture",
        lambda source, *rest: decoded.append(source.name) or prepare_picture(source, *rest),
    )
    path = write_lines(
        pictures,
        {"image": "meter.png"},
        {"image": "meter.png", "question": "显示屏上的数字是多少？"},
        {"image": "word.png"},
        {"image": "meter.png"},
    )
    found = answered(model, path, question=NUMBER)
    assert decoded == ["meter.png", "word.png", "meter.png"]
    assert found[1]["usage"]["cached_tokens"] > found[1]["usage"]["image_tokens"]
    assert found[1]["timings"]["vision_ms"] == 0  # encoded for the first row
    assert found[3]["timings"]["vision_ms"] == 0
    assert [row["text"] for row in found] == ["7305", "7305", "Coffee", "7305"]


def test_the_next_picture_is_decoded_while_one_is_asked_about(model, pictures, monkeypatch):
    started = {name: threading.Event() for name in ANSWERS}

    def prepare(source, *rest):
        started[source.name].set()
        return prepare_picture(source, *rest)

    monkeypatch.setattr(run, "prepare_picture", prepare)
    ask, questions = model.ask, []

    def waiting_ask(*args, **options):
        if not questions:  # about handwriting.png, the first
            assert started["meter.png"].wait(10)
            assert not started["word.png"].is_set()  # the last: one row ahead, no more
        questions.append(args)
        return ask(*args, **options)

    monkeypatch.setattr(model, "ask", waiting_ask)
    assert len(answered(model, pictures, question=NUMBER)) == 4


@pytest.fixture
def clip(pictures):
    return write_clip(pictures / "clip.mp4", frames=20)


def test_videos_in_a_directory(model, pictures, clip, tmp_path):
    (pictures / "BROKEN.MOV").write_bytes(b"no video")
    out = tmp_path / "out.jsonl"
    assert batch(pictures, out, "-q", NUMBER, "--frames", "3", "--max-tokens", "5") == 0
    broken, shown, *rest = read(out)
    assert (broken["id"], broken["images"], broken["videos"]) == ("BROKEN.MOV", [], ["BROKEN.MOV"])
    assert "BROKEN.MOV: not a video" in broken["error"]
    assert (shown["id"], shown["images"], shown["videos"]) == ("clip.mp4", [], ["clip.mp4"])
    asked = model.ask(NUMBER, videos=[clip], frames=3, max_tokens=5)
    assert shown["token_ids"] == list(asked.token_ids)
    assert shown["usage"]["image_tokens"] == 3 * model.checkpoint.config.image_tokens
    assert [row["text"] for row in rest] == ["916", "7305", "2048", "Coffee"]
    assert all("videos" not in row for row in rest)


def test_a_threshold_of_a_run_and_of_a_line(model, pictures):
    write_clip(pictures / "clip.mp4", size=(80, 64))  # which no other test has shown
    line = {"video": "clip.mp4"}
    path = write_lines(pictures, line, line | {"frame_threshold": 0})
    before = model.engine.timings().tiles
    found = answered(model, path, question=NUMBER, frames=4, frame_threshold=255, max_tokens=1)
    assert model.engine.timings().tiles - before == 1 + 3  # the first is known
    assert [row["usage"]["image_tokens"] for row in found] == [4 * 36, 4 * 36]


def test_videos_in_lines(model, pictures, clip):
    url = "data:video/mp4;base64," + base64.b64encode(clip.read_bytes()).decode()
    path = write_lines(
        pictures,
        {"video": "clip.mp4"},
        {"videos": ["clip.mp4", str(clip)], "frames": 2, "images": ["meter.png"]},
        {"video": url, "frames": 1},
        {"videos": [], "question": "Hello"},
    )
    found = answered(model, path, question=NUMBER, frames=4, max_tokens=3)
    tokens = model.checkpoint.config.image_tokens
    assert [row["usage"]["image_tokens"] // tokens for row in found] == [4, 5, 1, 0]
    assert [row["id"] for row in found] == ["clip.mp4", "meter.png", "line 3", "line 4"]
    assert found[2]["videos"] == ["data:video/mp4;base64,…"]
    mixed = model.ask(
        NUMBER, images=[pictures / "meter.png"], videos=[clip, clip], frames=2, max_tokens=3
    )
    assert found[1]["token_ids"] == list(mixed.token_ids)


def test_a_video_is_decoded_once_for_rows_in_a_row(model, pictures, clip, monkeypatch):
    decoded = []
    monkeypatch.setattr(
        run,
        "prepare_video",
        lambda source, *rest: decoded.append(rest[1]) or prepare_video(source, *rest),
    )
    line = {"video": "clip.mp4"}
    path = write_lines(pictures, line, line | {"question": "What?"}, line | {"frames": 3})
    found = answered(model, path, question=NUMBER, frames=2, max_tokens=2)
    assert decoded == [2, 3]
    assert found[1]["timings"]["vision_ms"] == 0


def test_frames_beyond_the_context_are_not_decoded(pictures, clip, monkeypatch):
    model = edgevl.load("tiny", threads=1, max_context=100)  # a frame has 36 tokens
    monkeypatch.setattr(run, "prepare_video", lambda *args: pytest.fail("decoded"))
    path = write_lines(pictures, {"video": "clip.mp4"}, {"image": "meter.png"})
    crowded, good = answered(model, path, question=NUMBER, max_tokens=9)
    assert "need 288 tokens or more, but the context holds 100" in crowded["error"]
    assert good["text"] == "7305"


def test_frames_out_of_range_end_the_run_at_once(model, pictures):
    with pytest.raises(PromptError, match="frames must be"):
        answered(model, pictures, question=NUMBER, frames=0)


def test_answers_of_a_given_form(pictures, tmp_path, capsys):
    schema = tmp_path / "schema.json"
    schema.write_text('{"enum": ["七", "seven"]}', "utf-8")
    path = write_lines(pictures, {"image": "meter.png"}, {"image": "word.png"})
    assert batch(path, "-", "-q", NUMBER, "--json-schema", str(schema)) == 0
    texts = [json.loads(line)["text"] for line in capsys.readouterr().out.splitlines()]
    assert {json.loads(text) for text in texts} <= {"七", "seven"}
    out = tmp_path / "out.jsonl"
    assert batch(path, out, "-q", NUMBER, "--json-object", "--max-tokens", "9") == 0
    assert all(row["text"].startswith("{") for row in read(out))


def test_standard_output(pictures, capsys):
    assert batch(write_lines(pictures, {"image": "meter.png"}, "x"), "-", "-q", NUMBER) == 0
    out, err = capsys.readouterr()
    assert [json.loads(line).get("text") for line in out.splitlines()] == ["7305", None]
    assert err == "1 of 2 failed; their `error` says why\n"


def test_messages_in_chinese(pictures, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LANG", "zh_CN.UTF-8")
    assert batch(write_lines(pictures, "x"), "-") == 1
    assert capsys.readouterr().err == "1 条中有 1 条失败，原因见各行的 `error`\n"


def test_all_failed_is_status_1_and_the_rows_are_there(pictures, tmp_path):
    out = tmp_path / "out.jsonl"
    assert batch(write_lines(pictures, "x", "y"), out) == 1
    assert len(read(out)) == 2


@pytest.mark.parametrize(
    ("source", "options", "status", "message"),
    [
        ("missing", [], 1, "missing: no such file or directory"),
        ("empty", ["-q", "x"], 1, "empty: has no pictures or videos (.jpg"),
        ("blank.jsonl", [], 1, "blank.jsonl: has no questions"),
        ("pictures", [], 1, "needs a question"),
        ("pictures/meter.png", ["-q", "x"], 1, "meter.png: is a picture or video; give"),
        ("pictures", ["-q", " "], 1, "question is empty"),
        ("pictures", ["-q", "x", "--max-tokens", "0"], 2, "--max-tokens"),
        ("pictures", ["-q", "x", "--max-tiles", "99"], 1, "max_tiles must be 1 to 40"),
        ("pictures", ["-q", "x", "--temperature", "inf"], 2, "temperature is inf"),
        ("pictures", ["-q", "x", "--logit-bias", "99999=1"], 1, "the model has no token 99999"),
        ("pictures", ["-q", "x", "--frames", "257"], 2, "--frames"),
        ("pictures", ["-q", "x", "--json-object", "--think"], 2, "give one of them"),
        ("pictures", ["-q", "x", "--json-schema", os.devnull], 1, "--json-schema /dev/null: "),
        ("pictures", ["-q", "\udcff"], 2, "not valid UTF-8"),
        ("pictures", ["-q", "x", "--system", "\udcff"], 2, "not valid UTF-8"),
    ],
)
def test_mistakes_are_one_line(pictures, tmp_path, source, options, status, message, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "blank.jsonl").write_text("\n \n")
    before = listing(tmp_path)
    assert batch(tmp_path / source, tmp_path / "out.jsonl", *options) == status
    out, err = capsys.readouterr()
    assert (out, "Traceback" in err) == ("", False)
    assert message in err.splitlines()[-1]
    assert listing(tmp_path) == before


def test_an_output_that_exists_is_refused(pictures, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    out.write_text("mine")
    assert batch(pictures, out, "-q", NUMBER) == 1
    assert "out.jsonl: exists already" in capsys.readouterr().err
    assert out.read_text() == "mine"


def test_nor_is_one_overwritten_that_comes_to_be_meanwhile(model, pictures, tmp_path):
    source, out = open_batch(pictures, NUMBER), tmp_path / "out.jsonl"
    with pytest.raises(EdgeVLError, match="exists already"):
        run_batch(model, source, out, progress=lambda done, total: out.write_text("theirs"))
    assert out.read_text() == "theirs"
    with pytest.raises(EdgeVLError, match="exists already"):
        run_batch(model, source, out)
    out.unlink()
    run_batch(model, source, out, progress=lambda done, total: pytest.fail("asked again"))
    assert len(read(out)) == 4


def test_a_directory_of_too_many_files_is_refused(pictures, monkeypatch):
    monkeypatch.setattr(sources, "MAX_FILES", 3)
    with pytest.raises(EdgeVLError, match="more than 3 files"):
        open_batch(pictures, NUMBER)


class StopError(Exception):
    pass


def interrupted(model, source, out, after, **options):
    """Run a batch that fails after some rows; return those that are in its directory."""

    def stop(done, total):
        if done == after:
            raise StopError

    with pytest.raises(StopError):
        run_batch(model, source, out, progress=stop, **options)
    return out.with_name(out.name + ".partial") / "rows.jsonl"


@pytest.mark.parametrize("torn", [b'{"id": "half', b"\0\0\0\0", b"\0\0\0\n", b"7\n"])
def test_a_torn_line_is_written_again(model, pictures, tmp_path, torn):
    source, out = open_batch(pictures, NUMBER), tmp_path / "out.jsonl"
    kept = interrupted(model, source, out, 2)
    begun = kept.read_bytes()
    kept.write_bytes(begun + torn)
    seen = []
    result = run_batch(model, source, out, progress=lambda *counts: seen.append(counts))
    assert (result.rows, result.failed) == (4, 0)
    assert seen == [(3, 4), (4, 4)]
    assert out.read_bytes().startswith(begun)
    assert [row["text"] for row in read(out)] == ["916", "7305", "2048", "Coffee"]


def test_failures_before_an_interruption_count(model, pictures, tmp_path):
    source, out = open_batch(write_lines(pictures, "x", "y", "z")), tmp_path / "out.jsonl"
    interrupted(model, source, out, 2)
    assert run_batch(model, source, out).failed == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 2}, "another seed"),
        ({"frames": 9}, "another frames"),
        ({"constraint": Constraint.regex("[0-9]+")}, r"another constraint \([0-9a-f]{16}, now"),
        ({"system": "S"}, "another system"),
        ({"loading": {"precision": "bf16"}}, "another precision"),
        ({"question": "What?"}, "another question"),
        ({"picture": "new.png"}, "another input, its contents"),
        ({"model": "mini"}, "another model"),
    ],
)
def test_resuming_something_else_is_refused(
    model, pictures, tmp_path, mini_checkpoint, change, message
):
    out, begun = tmp_path / "out.jsonl", {"seed": 1, "loading": {"precision": "auto"}}
    begun |= {"system": None, "stop": ("A",), "frames": 8, "constraint": Constraint.json_object()}
    begun |= {"max_tokens": 9}
    kept = interrupted(model, open_batch(pictures, NUMBER), out, 1, **begun)
    before = kept.read_bytes()
    question, other = change.pop("question", NUMBER), model
    if name := change.pop("picture", None):
        shutil.copy(EXAMPLES / "meter.png", pictures / name)
    if change.pop("model", None):
        other = edgevl.load(mini_checkpoint(), engine="reference")
    with pytest.raises(EdgeVLError, match=message):
        run_batch(other, open_batch(pictures, question), out, **begun | change)
    assert kept.read_bytes() == before
    assert not out.exists()


def test_a_model_that_fails_ends_the_run(model, pictures, tmp_path, monkeypatch):
    def ask(*args, **options):
        raise EdgeVLError("weights are damaged")

    monkeypatch.setattr(model, "ask", ask)
    with pytest.raises(EdgeVLError, match="damaged"):
        run_batch(model, open_batch(pictures, NUMBER), tmp_path / "out.jsonl")
    assert listing(tmp_path) == ["pictures"]


def test_a_model_without_vision_answers_until_a_picture_comes(model, pictures, monkeypatch):
    monkeypatch.setattr(model.checkpoint, "has_vision", False)
    path = write_lines(pictures, {"images": [], "question": "Hello"}, {"image": "missing.png"})
    results = answer_rows(model, open_batch(path, NUMBER).rows())
    assert "error" not in next(results)
    with pytest.raises(CheckpointError, match="no vision weights"):
        next(results)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_run_that_is_killed_goes_on(pictures, tmp_path, number, capsys):
    source = write_lines(pictures, *({"image": name, "id": i} for i in range(120) for name in (
        "meter.png", "more/label.png", "word.png")))  # fmt: skip
    out, kept = tmp_path / "out.jsonl", tmp_path / "out.jsonl.partial" / "rows.jsonl"
    args = ["batch", "tiny", "--input", source, "-o", out, "--threads", "1", "-q", NUMBER]
    run = subprocess.Popen([sys.executable, "-m", "edgevl", *args], stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not (kept.exists() and kept.stat().st_size > 5000):
        assert run.poll() is None, "it ended before it was killed"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    run.send_signal(number)
    message = run.communicate(timeout=60)[1].decode()
    if number == signal.SIGTERM:
        assert run.returncode == 143
        assert f"interrupted; the same command goes on in {kept.parent}\n" in message
    assert not out.exists()
    begun = kept.read_bytes()
    begun = begun[: begun.rindex(b"\n") + 1]
    assert cli.main([str(arg) for arg in args]) == 0
    assert out.read_bytes().startswith(begun)
    found = read(out)
    assert [row["id"] for row in found] == [i for i in range(120) for _ in range(3)]
    assert [row["text"] for row in found] == ["7305", "2048", "Coffee"] * 120
    assert not kept.parent.exists()


def test_a_prepared_picture_is_taken_as_it_is(model):
    picture = prepare_picture(load_image(EXAMPLES / "meter.png"), model.checkpoint.config)
    assert prepare_picture(picture, model.checkpoint.config) is picture
    assert model.ask(NUMBER, images=[picture]).text == "7305"


def test_names_that_are_not_utf8_survive(model, pictures, tmp_path):
    name = os.fsdecode(b"\xff.png")
    shutil.copy(EXAMPLES / "meter.png", pictures / name)
    out = tmp_path / "out.jsonl"
    run_batch(model, open_batch(pictures, NUMBER), out)
    row = read(out)[-1]
    assert (row["id"], row["text"]) == (name, "7305")
