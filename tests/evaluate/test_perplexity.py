"""Windows of a text, and `edgevl eval --perplexity` and `--against…`."""

import json
import math
import shutil

import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

import edgevl
from edgevl import cli
from edgevl.engine import native_missing
from edgevl.errors import CheckpointError, ContextLengthError, EdgeVLError
from edgevl.evaluate import compare_vqa, evaluate_perplexity, read_text, text_windows
from edgevl.evaluate import perplexity as module
from edgevl.evaluate.perplexity import TextFileError
from edgevl.evaluate.vqa import Question

TEXT = "The quick brown fox jumps over the lazy dog. 快速的棕色狐狸跳过懒狗。\n" * 4

needs_native = pytest.mark.skipif(native_missing() is not None, reason="no native engine")


@pytest.fixture(scope="module")
def directory(mini_checkpoint):
    return mini_checkpoint("mini-qwen3")


@pytest.fixture(scope="module")
def other_directory(mini_checkpoint):
    return mini_checkpoint("mini-qwen3", seed=1)


@pytest.fixture(scope="module")
def model(directory):
    return edgevl.load(directory, engine="reference")


@pytest.fixture(scope="module")
def other(other_directory):
    return edgevl.load(other_directory, engine="reference")


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT, "utf-8")
    return path


@pytest.fixture(scope="module")
def with_start(directory, tmp_path_factory):
    """A checkpoint whose tokenizer puts <|im_start|> before any text."""
    copy = shutil.copytree(directory, tmp_path_factory.mktemp("start") / "copy")
    tokenizer = Tokenizer.from_file(str(copy / "tokenizer.json"))
    start = ("<|im_start|>", tokenizer.token_to_id("<|im_start|>"))
    tokenizer.post_processor = TemplateProcessing(f"{start[0]} $A", special_tokens=[start])
    tokenizer.save(str(copy / "tokenizer.json"))
    return copy


def logits_of(engine, ids):
    return engine.extend(engine.new_sequence(), ids)


def by_hand(model, windows):
    """Perplexity from the logits of the whole windows, one row at a time."""
    losses = []
    for window in windows:
        rows = logits_of(model.engine, window.tolist())
        for logits, token in zip(rows, window[1:], strict=False):
            logits = logits.astype(np.float64)
            losses.append(math.log(np.exp(logits).sum()) - logits[token])
    return math.exp(np.mean(losses)), len(losses)


# --- windows -----------------------------------------------------------------------------------


def test_windows_hold_the_whole_text(model):
    ids = model.prompts.tokenizer.encode(TEXT, add_special_tokens=False).ids
    windows = text_windows(model, TEXT, size=10)
    assert [len(window) for window in windows[:-1]] == [10] * (len(ids) // 10)
    assert np.concatenate(windows).tolist() == ids
    assert len(text_windows(model, TEXT, size=10, limit=2)) == 2
    assert max(map(len, text_windows(model, TEXT * 100))) == min(2048, model.engine.max_context)


def test_a_single_token_at_the_end_is_left_out(model):
    ids = model.prompts.tokenizer.encode(TEXT, add_special_tokens=False).ids
    windows = text_windows(model, TEXT, size=len(ids) - 1)
    assert [len(window) for window in windows] == [len(ids) - 1]


def test_windows_begin_as_the_tokenizer_begins(with_start):
    model = edgevl.load(with_start, engine="reference")
    plain = model.prompts.tokenizer.encode(TEXT, add_special_tokens=False).ids
    [start] = model.prompts.start_ids
    windows = text_windows(model, TEXT, size=10)
    assert {int(window[0]) for window in windows} == {start}
    assert max(map(len, windows)) == 10
    assert [i for window in windows for i in window[1:].tolist()] == plain
    assert evaluate_perplexity(model, windows).tokens == len(plain)


def test_too_short(model, directory):
    with pytest.raises(EdgeVLError, match="the text has 0 tokens; at least 2 are needed"):
        text_windows(model, "")
    with pytest.raises(EdgeVLError, match="a context of 1 tokens is too short"):
        text_windows(edgevl.load(directory, engine="reference", max_context=1), TEXT)


def test_a_tokenizer_of_another_model(model, monkeypatch):
    monkeypatch.setattr(model.prompts, "tokenizer", Foreign())
    with pytest.raises(CheckpointError, match="token id 1000000 is outside"):
        text_windows(model, TEXT)


class Foreign:
    def encode(self, text, add_special_tokens):
        return self

    ids = (1, 1_000_000)


def test_bad_files(tmp_path, monkeypatch):
    with pytest.raises(TextFileError, match=r"none\.txt: no such file"):
        read_text(tmp_path / "none.txt")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(TextFileError, match="not UTF-8 at byte 3"):
        read_text(tmp_path / "latin.txt")
    monkeypatch.setattr(module, "MAX_TEXT_BYTES", 1 << 20)
    with pytest.raises(TextFileError, match="larger than the limit of 1 MiB"):
        read_text("/dev/zero")
    (tmp_path / "bom.txt").write_bytes(b"\xef\xbb\xbfa\r\n")
    assert read_text(tmp_path / "bom.txt") == "a\r\n"


# --- perplexity --------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [7, 128])
def test_perplexity_is_that_of_the_reference(model, monkeypatch, chunk):
    monkeypatch.setattr(module, "CHUNK", chunk)
    windows = text_windows(model, TEXT, size=30)
    predicted = []
    result = evaluate_perplexity(model, windows, on_tokens=predicted.append)
    expected, tokens = by_hand(model, windows)
    assert result.perplexity == pytest.approx(expected, rel=1e-6)
    assert result.to_dict() == {"perplexity": result.perplexity, "tokens": tokens}
    assert sum(predicted) == tokens == sum(map(len, windows)) - len(windows)


def test_against_another(model, other):
    windows = text_windows(model, TEXT, size=30)
    result = evaluate_perplexity(model, windows, other)
    assert result.perplexity == pytest.approx(by_hand(model, windows)[0], rel=1e-6)
    assert result.against_perplexity == pytest.approx(by_hand(other, windows)[0], rel=1e-6)
    assert result.token_agreement < 1
    # The other is the reference: the divergence is weighed by its probabilities.
    total = 0.0
    for window in windows:
        q, p = (softmax(logits_of(each.engine, window[:-1].tolist())) for each in (model, other))
        total += (p * np.log(p / q)).sum()
    assert result.kl_divergence == pytest.approx(total / result.tokens, rel=1e-5)


def softmax(logits):
    exponentials = np.exp(logits.astype(np.float64))
    return exponentials / exponentials.sum(axis=1, keepdims=True)


def test_against_itself(model, directory):
    result = evaluate_perplexity(
        model, text_windows(model, TEXT), edgevl.load(directory, engine="reference")
    )
    assert (result.token_agreement, result.kl_divergence) == (1, 0)
    assert result.perplexity == result.against_perplexity


def test_answers_afterwards_are_those_of_before(directory):
    model = edgevl.load(directory, engine="reference")
    before = model.ask("Hello, who are you?", max_tokens=5).token_ids
    evaluate_perplexity(model, text_windows(model, TEXT))
    assert model.ask("Hello, who are you?", max_tokens=5).token_ids == before


@needs_native
def test_exact_logits_are_as_good_for_every_token(directory):
    """The INT4 head alone is off by a tenth; in bfloat16 what is left is rounding."""
    ids = list(range(100, 150))
    reference = edgevl.load(directory, engine="reference")
    expected = logits_of(reference.engine, ids)

    def off(**options):
        model = edgevl.load(directory, engine="cpu", threads=1, **options)
        logits = logits_of(model.engine, ids)
        return np.linalg.norm(logits - expected) / np.linalg.norm(expected)

    assert off(exact_logits=True) < 0.5 * off()
    assert off(exact_logits=True, precision="bf16") == off(precision="bf16")


def test_tokenizers_that_differ(model, with_start, mini_checkpoint, tmp_path):
    windows = text_windows(model, TEXT)
    with pytest.raises(EdgeVLError, match="have different tokenizers"):
        evaluate_perplexity(model, windows, edgevl.load(with_start, engine="reference"))
    with pytest.raises(EdgeVLError, match=r"have vocabularies of \d+ and \d+ tokens"):
        evaluate_perplexity(model, windows, edgevl.load("tiny", engine="reference"))


def test_a_shorter_context(model, other_directory):
    short = edgevl.load(other_directory, engine="reference", max_context=8)
    with pytest.raises(EdgeVLError, match=r"exceed the context of .*, 8: set it for both"):
        evaluate_perplexity(model, text_windows(model, TEXT), short)


# --- questions -------------------------------------------------------------------------------


@pytest.fixture
def question(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (56, 56, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    return Question(tmp_path / "a.png", "What is this?", ("x",), "all", 1)


def test_questions_against_another(model, other, question):
    asked = []
    result = compare_vqa(model, other, [question], lambda *pair: asked.append(pair), max_tokens=9)
    answer = other.ask(question.question, images=[question.image], max_tokens=9)
    assert asked[0][0].text == model.ask(question.question, [question.image], max_tokens=9).text
    assert asked[0][1].text == answer.text
    assert result.tokens == len(answer.token_ids) + (answer.finish_reason == "stop")
    # The same by single steps: prompt, then each token of the other's answer.
    logits = [
        np.concatenate(
            [
                block.copy()
                for block in each.score(
                    each.chat().prompt(question.question, [question.image]), answer.token_ids
                )
            ]
        )[: result.tokens]
        for each in (model, other)
    ]
    assert (logits[1].argmax(1)[: len(answer.token_ids)] == answer.token_ids).all()
    assert result.token_agreement == (logits[0].argmax(1) == logits[1].argmax(1)).mean()
    q, p = map(softmax, logits)
    assert result.kl_divergence == pytest.approx((p * np.log(p / q)).sum() / result.tokens)


def test_a_model_follows_itself(directory, question):
    one, same = (edgevl.load(directory, threads=1) for _ in range(2))
    result = compare_vqa(one, same, [question], max_tokens=200)
    assert (result.token_agreement, result.kl_divergence) == (1, 0)
    assert result.tokens > 150  # more than are forced at once


def test_forced_answers_have_the_logits_of_generated_ones(model, question):
    image, ids = question.image, (5, 6, 7)
    blocks = [
        block.copy() for block in model.score(model.chat().prompt("What is this?", [image]), ids)
    ]
    chat = model.chat()
    prompt = chat.ask("What is this?", images=[image], max_tokens=1).usage.prompt_tokens
    sequence = model._rounds.slots.first.sequence
    assert sequence.length in (prompt, prompt + 1)
    sequence.rewind(prompt)
    steps = [model.engine.decode([sequence], [i])[0].copy() for i in ids]
    np.testing.assert_allclose(np.concatenate(blocks)[1:], steps, rtol=1e-3, atol=1e-4)
    assert chat.messages  # `ask` records its turn, `prompt` does not
    chat = model.chat()
    chat.prompt("What is this?")
    assert not chat.messages


def test_an_answer_beyond_the_context(directory):
    model = edgevl.load(directory, engine="reference", max_context=60)
    with pytest.raises(ContextLengthError, match="prompt and answer are"):
        list(model.score(model.chat().prompt("Hello"), range(60)))


# --- the command -----------------------------------------------------------------------------


def run(capsys, *args):
    assert cli.main(["eval", *map(str, args), "--engine", "reference"]) == 0
    return capsys.readouterr().out


def test_perplexity_json(directory, other_directory, path, capsys):
    printed = json.loads(run(capsys, directory, "--perplexity", path, "--json"))
    assert printed.keys() == {"perplexity", "tokens"}
    args = ["--perplexity", path, "--against", other_directory, "--json"]
    compared = json.loads(run(capsys, directory, *args))
    assert compared.keys() == {
        *("perplexity", "tokens", "against_perplexity", "token_agreement", "kl_divergence")
    }
    assert compared["tokens"] == printed["tokens"]
    assert compared["perplexity"] == pytest.approx(printed["perplexity"])


@needs_native
@pytest.mark.parametrize(
    ("name", "own", "against"), [("precision", "int4", "bf16"), ("kv-cache", "bf16", "int8")]
)
def test_one_model_beside_itself_otherwise(directory, path, capsys, name, own, against):
    def measured(*args):
        command = ["eval", str(directory), "--perplexity", str(path), "--threads", "1", "--json"]
        assert cli.main([*command, *args]) == 0
        return json.loads(capsys.readouterr().out)

    compared = measured(f"--{name}", own, f"--against-{name}", against)
    assert compared["perplexity"] == pytest.approx(measured(f"--{name}", own)["perplexity"])
    alone = measured(f"--{name}", against)["perplexity"]
    assert compared["against_perplexity"] == pytest.approx(alone)
    assert compared["perplexity"] != pytest.approx(alone)
    assert compared["kl_divergence"] > 0


def test_the_reference_of_a_comparison(directory, other_directory, path, monkeypatch):
    """Which model is loaded how, for each way to name the reference."""
    asked = []

    def recorded(model, engine, precision, kv_cache, **options):
        asked.append((model, engine, precision, kv_cache))
        return edgevl.load(model, engine="reference", exact_logits=options["exact_logits"])

    monkeypatch.setattr("edgevl.generate.load", recorded)
    one, other = str(directory), str(other_directory)
    for args, expected in (
        (["--against", other], [(one, "auto", "auto", "bf16"), (other, "auto", "auto", "bf16")]),
        (
            ["--against", other, "--precision", "int8", "--against-precision", "int8"],
            [(one, "cpu", "int8", "bf16"), (other, "cpu", "int8", "bf16")],
        ),
        (
            ["--kv-cache", "int8", "--against-kv-cache", "bf16"],
            [(one, "cpu", "auto", "int8"), (one, "cpu", "auto", "bf16")],
        ),
        (
            ["--kv-cache", "int8", "--against-precision", "bf16", "--against-kv-cache", "bf16"],
            [(one, "cpu", "auto", "int8"), (one, "cpu", "bf16", "bf16")],
        ),
    ):
        asked.clear()
        assert cli.main(["eval", one, "--perplexity", str(path), "--limit", "1", *args]) == 0
        assert asked == expected


def test_perplexity_for_people(directory, path, capsys):
    out = run(capsys, directory, "--perplexity", path, "--against", directory, "--limit", "1")
    first, second, third = out.splitlines()
    assert first.startswith("perplexity  ")
    assert second.startswith("against     ")
    assert third.startswith("agreement   100.00% of ")
    assert third.endswith("KL divergence 0.0000 nats")


def test_questions_against_json(directory, question, capsys, tmp_path):
    path, saved = tmp_path / "q.jsonl", tmp_path / "answers.jsonl"
    line = {"image": "a.png", "question": question.question, "answer": "x"}
    path.write_text(json.dumps(line) + "\n")
    args = [directory, "--vqa", path, "--against", directory, "--max-tokens", "4"]
    printed = json.loads(run(capsys, *args, "--json", "--save", saved))
    assert printed == {
        "accuracy": 0.0,
        "questions": 1,
        "families": {"all": 0.0},
        "against_accuracy": 0.0,
        "against_families": {"all": 0.0},
        "tokens": printed["tokens"],
        "token_agreement": 1.0,
        "kl_divergence": 0.0,
    }
    record = json.loads(saved.read_text("utf-8"))
    assert record["text"] == record["against_text"]
    assert record["against_right"] is False
    header, *rows, agreement = run(capsys, *args).splitlines()
    assert header.endswith("accuracy   against")
    assert rows[-1].split() == ["total", "0", "1", "0.0%", "0.0%"]
    assert agreement.startswith("agreement   100.00% of")


def test_what_counts_all_logits_has_them_exact(directory, path, question, tmp_path, monkeypatch):
    load, asked = edgevl.load, []

    def recorded(model, exact_logits, **options):
        asked.append(exact_logits)
        return load(model, exact_logits=exact_logits, **options)

    monkeypatch.setattr("edgevl.generate.load", recorded)
    questions = tmp_path / "q.jsonl"
    questions.write_text('{"image": "a.png", "question": "?", "answer": "x"}\n')
    vqa = ["--vqa", str(questions), "--max-tokens", "1"]
    for options, expected in (
        (["--perplexity", str(path)], [True]),
        ([*vqa, "--against", str(directory)], [True, True]),
        (vqa, [False]),
    ):
        asked.clear()
        assert cli.main(["eval", str(directory), "--engine", "reference", *options]) == 0
        assert asked == expected


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "give either --vqa FILE.jsonl or --perplexity FILE"),
        (["--vqa", "q", "--perplexity", "t"], "give either"),
        (["--perplexity", "t", "--save", "x"], "--save goes with --vqa only"),
        (["--perplexity", "t", "--max-tokens", "5"], "--max-tokens goes with --vqa only"),
        (["--perplexity", "t", "--against-precision", "auto"], "auto is what MODEL has"),
        (
            ["--perplexity", "t", *("--against", "m", "--against-precision", "auto")],
            "auto is what MODEL has",
        ),
        (
            ["--vqa", "q", *("--kv-cache", "int8", "--against-kv-cache", "int8")],
            "--against-kv-cache int8 is what MODEL has: give another",
        ),
        (
            ["--vqa", "q", *("--engine", "axera", "--against-precision", "int8")],
            "--against-precision: engine cpu only, not axera",
        ),
    ],
)
def test_wrong_usage(args, message, capsys):
    assert cli.main(["eval", "m", *args]) == 2
    assert message in capsys.readouterr().err


def test_the_text_is_read_before_the_model(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("edgevl.generate.load", None)
    assert cli.main(["eval", "m", "--perplexity", str(tmp_path / "none")]) == 1
    assert "no such file" in capsys.readouterr().err
