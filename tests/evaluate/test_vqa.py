"""Question files, normalising, judging, and `edgevl eval`."""

import json

import pytest
from PIL import Image

from edgevl import Constraint, cli
from edgevl.evaluate.vqa import QuestionFileError, is_right, normalise, read_questions
from fake_model import FakeModel

LINE = {"image": "a.png", "question": "What number?", "answer": "7", "family": "numbers"}


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "questions"
    folder.mkdir()
    Image.new("RGB", (8, 8)).save(folder / "a.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "outside.png")
    return folder


def write(folder, *lines):
    path = folder / "q.jsonl"
    path.write_text(
        "".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines), "utf-8"
    )
    return path


def test_read(folder):
    path = write(folder, LINE, "", LINE | {"answer": ["seven", "7"]}, {**LINE, "family": "数字"})
    questions = read_questions(path)
    assert [q.answers for q in questions] == [("7",), ("seven", "7"), ("7",)]
    assert [q.family for q in questions] == ["numbers", "numbers", "数字"]
    assert [q.line for q in questions] == [1, 3, 4]
    assert questions[0].image == folder / "a.png"
    assert len(read_questions(path, limit=2)) == 2


def test_family_may_be_left_out(folder):
    del (line := dict(LINE))["family"]
    assert read_questions(write(folder, line))[0].family == "all"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"q.jsonl:2: not JSON"),
        ("[" * 100_000, r"q.jsonl:2: not JSON"),
        ("[]", r"q.jsonl:2: not an object"),
        (LINE | {"image": 3}, r"q.jsonl:2: `image` must be"),
        (LINE | {"question": " "}, r"q.jsonl:2: `question` must be"),
        (LINE | {"question": "\ud800"}, r"q.jsonl:2: `question` has half a surrogate"),
        (LINE | {"answer": 7}, r"q.jsonl:2: `answer` must be .*in quotes"),
        (LINE | {"answer": []}, r"q.jsonl:2: `answer` must be"),
        (LINE | {"answer": ["a", ""]}, r"q.jsonl:2: `answer` must be"),
        (LINE | {"answer": ["a", {"b": "\ud800"}]}, r"q.jsonl:2: `answer` has half a surrogate"),
        (LINE | {"json_schema": {"type": "number?"}}, r"q.jsonl:2: json_schema"),
        (LINE | {"json_schema": None}, r"q.jsonl:2: json_schema .*must be an object"),
        (LINE | {"family": None}, r"q.jsonl:2: `family` must be"),
        (LINE | {"image": "../outside.png"}, r"q.jsonl:2: .* lies outside of"),
        (LINE | {"image": "/etc/hostname"}, r"q.jsonl:2: .* lies outside of"),
        (LINE | {"image": "link.png"}, r"q.jsonl:2: .* lies outside of"),
        (LINE | {"image": "missing.png"}, r"q.jsonl:2: .* is not a file"),
        (LINE | {"image": "."}, r"q.jsonl:2: .* is not a file"),
        (LINE | {"image": "a\0.png"}, r"q.jsonl:2: .* is not a usable path"),
        (LINE | {"image": "a" * 5000}, r"q.jsonl:2: "),
    ],
)
def test_bad_lines_are_named(folder, line, message):
    (folder / "link.png").symlink_to(folder.parent / "outside.png")
    with pytest.raises(QuestionFileError, match=message):
        read_questions(write(folder, LINE, line))


def test_bad_files(folder):
    with pytest.raises(QuestionFileError, match="no questions"):
        read_questions(write(folder))
    with pytest.raises(QuestionFileError, match="no such file"):
        read_questions(folder / "none.jsonl")
    with pytest.raises(QuestionFileError, match="directory"):
        read_questions(folder)
    (folder / "latin.jsonl").write_bytes(b'{"question": "\xe9"}')
    with pytest.raises(QuestionFileError, match="not UTF-8"):
        read_questions(folder / "latin.jsonl")


@pytest.mark.parametrize(
    ("text", "form"),
    [
        (" Forty  Two. ", "forty two"),
        ("４２。", "42"),
        ("ＲＥＤ！ ", "red"),
        ("straße", "strasse"),
        ("3.5", "3.5"),
        ("。", ""),
    ],
)
def test_normalise(text, form):
    assert normalise(text) == form


BOX = "<ref>a</ref><box>[[0, 0, 100, 100]]</box>"


@pytest.mark.parametrize(
    ("text", "answers", "right"),
    [
        ("7.", ["7"], True),
        ("The number is 7", ["7"], False),
        ("红色", ["red", "红色"], True),
        ("", ["7"], False),
        ("<box>[[0, 0, 100, 60]]</box>", [BOX], True),
        ("<box>[[0, 0, 100, 40]]</box>", [BOX], False),
        (BOX + BOX, [BOX], False),
        ("nowhere", [BOX], False),
        ("nowhere", [BOX, "Nowhere"], True),
    ],
)
def test_is_right(text, answers, right):
    assert is_right(text, answers) is right


SHAPES = {
    "shapes": [
        {"shape": "circle", "count": 2, "box": "<box>[[0, 0, 100, 100]]</box>"},
        {"shape": "star", "count": 1, "box": "<box>[[500, 500, 600, 600]]</box>"},
    ],
    "colors": ["red", "blue"],
    "found": True,
}


@pytest.mark.parametrize(
    ("given", "right"),
    [
        (lambda _: None, True),
        (lambda v: v.update(shapes=v["shapes"][::-1]), True),  # detections have no order
        (lambda v: v.update(colors=["Red ", "BLUE"]), True),  # texts as elsewhere
        (lambda v: v.update(colors=["blue", "red"]), False),
        (lambda v: v.update(colors=["red"]), False),
        (lambda v: v["shapes"][0].update(count=2.0), True),  # the same number
        (lambda v: v["shapes"][0].update(count="2"), False),
        (lambda v: v["shapes"][1].update(count=True), False),
        (lambda v: v.update(found=1), False),
        (lambda v: v["shapes"][0].update(box=[0, 0, 100, 60]), True),
        (lambda v: v["shapes"][0].update(box=[[0, 0, 100, 60]]), True),
        (lambda v: v["shapes"][0].update(box=[0, 0, 100, 40]), False),
        (lambda v: v["shapes"][0].update(box=None), False),
        (lambda v: v.update(extra=1), False),
        (lambda v: v.pop("found"), False),
        (lambda v: v["shapes"].append(v["shapes"][0]), False),
        (lambda v: v["shapes"].__setitem__(1, v["shapes"][0]), False),
    ],
)
@pytest.mark.parametrize("form", ["{}", "```json\n{}\n```"])
def test_objects_are_right_by_value(given, right, form):
    """A number is not its text nor true, a box is right from an IoU of 0.5, all keys are there."""
    value = json.loads(json.dumps(SHAPES))
    for item, box in zip(value["shapes"], ([0, 0, 100, 100], [500, 500, 600, 600]), strict=True):
        item["box"] = box
    given(value)
    text = form.replace("{}", json.dumps(value, indent=1))
    assert is_right(text, [SHAPES]) is right
    assert is_right(text, ["seven", SHAPES]) is right


@pytest.mark.parametrize("text", ["", "7", "null", "{", '{"shapes": [', "[" * 10_000])
def test_what_is_no_object_is_wrong(text):
    assert not is_right(text, [SHAPES])


@pytest.fixture
def model(monkeypatch):
    model = FakeModel(lambda question: [question.removeprefix("say ")])
    monkeypatch.setattr("edgevl.generate.load", model.load)
    return model


@pytest.fixture
def path(folder):
    return write(
        folder,
        {"image": "a.png", "question": "say 7", "answer": "7", "family": "numbers"},
        {"image": "a.png", "question": "say 8", "answer": "9", "family": "numbers"},
        {"image": "a.png", "question": "say 红", "answer": ["红"], "family": "colours"},
    )


def test_eval_json(model, path, capsys):
    args = ["eval", "m", "--vqa", str(path), "--json", "--engine", "reference", "--max-tiles", "2"]
    assert cli.main(args) == 0
    assert json.loads(capsys.readouterr().out) == {
        "accuracy": pytest.approx(2 / 3),
        "questions": 3,
        "families": {"colours": 1.0, "numbers": 0.5},
    }
    assert model.load_options == {
        "model": "m",
        "engine": "reference",
        "max_context": None,
        "precision": "auto",
        "threads": None,
        "kv_cache": "bf16",
        "keep_bytes": 10**9,
        "exact_logits": False,
    }
    assert model.calls[0]["images"] == [path.parent / "a.png"]
    assert model.calls[0]["max_tiles"] == 2


def test_a_schema_is_what_the_answer_is_made_to_be(model, folder, capsys):
    """Each line's own: the next question is free again."""
    model.say = lambda question: ['{"n": 7}']
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    line = {"image": "a.png", "question": "How many?", "answer": {"n": 7}}
    path = write(folder, line | {"json_schema": schema}, line)
    assert cli.main(["eval", "m", "--vqa", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["accuracy"] == 1.0
    assert model.calls[0]["constraint"] == Constraint.json_schema(schema)
    assert model.calls[1]["constraint"] is None


def test_eval_table_and_limit(model, path, capsys):
    assert cli.main(["eval", "m", "--vqa", str(path), "--limit", "2"]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines() == [
        "family    right   asked  accuracy",
        "numbers       1       2     50.0%",
        "total         1       2     50.0%",
    ]
    assert err == ""  # no terminal, no progress


def test_eval_saves_every_answer(model, path, tmp_path, capsys):
    saved = tmp_path / "answers.jsonl"
    assert cli.main(["eval", "m", "--vqa", str(path), "--save", str(saved)]) == 0
    records = [json.loads(line) for line in saved.read_text("utf-8").splitlines()]
    assert [record["right"] for record in records] == [True, False, True]
    assert records[2]["text"] == "红"
    assert records[1] == {
        "line": 2,
        "image": str(path.parent / "a.png"),
        "question": "say 8",
        "answer": ["9"],
        "family": "numbers",
        "text": "8",
        "right": False,
    }


def test_eval_says_what_is_wrong_before_it_loads_the_model(model, path, capsys):
    path.write_text(path.read_text("utf-8") + "oops\n", "utf-8")
    assert cli.main(["eval", "m", "--vqa", str(path)]) == 1
    assert capsys.readouterr().err.startswith(f"edgevl: error: {path}:4: not JSON")
    assert not model.load_options


def test_eval_needs_a_writable_record_before_it_asks(model, path, tmp_path, capsys):
    args = ["eval", "m", "--vqa", str(path), "--save", str(tmp_path / "no" / "x.jsonl")]
    assert cli.main(args) == 1
    assert "cannot be written" in capsys.readouterr().err
    assert not model.calls
