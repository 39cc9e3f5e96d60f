"""Sampling: each filter against its definition, what a checkpoint says, who may ask for what."""

import json
import shutil
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest

import edgevl
from edgevl import cli
from edgevl.batch.rows import FIELDS
from edgevl.checkpoint.config_parser import parse_sampling
from edgevl.errors import EdgeVLError, PromptError
from edgevl.generate.sampling import Sampler, SamplingParams, _likeliest, _place
from edgevl.loading import locate
from edgevl.options import OPTIONS

LOGITS = np.log(np.array([0.5, 0.25, 0.15, 0.1], np.float32))


def frequencies(draws=4000, logits=LOGITS, **params):
    """Share of each token among many draws."""
    sampler = Sampler(SamplingParams(**{"temperature": 1.0, "seed": 7} | params), [])
    counts = np.bincount([sampler.choose(logits) for _ in range(draws)], minlength=len(logits))
    return counts / draws


def test_greedy_takes_the_first_of_the_most_likely():
    assert Sampler(SamplingParams(), []).choose(np.float32([1, 3, 3, 2])) == 1


def test_temperature_one_draws_from_the_distribution():
    # Standard error of a share is at most sqrt(0.25 / 4000) = 0.008; four of them.
    np.testing.assert_allclose(frequencies(), [0.5, 0.25, 0.15, 0.1], atol=0.032)


def test_low_temperature_sharpens():
    squared = np.array([0.5, 0.25, 0.15, 0.1]) ** 2
    np.testing.assert_allclose(frequencies(temperature=0.5), squared / squared.sum(), atol=0.032)


def test_tiny_temperature_is_greedy_and_does_not_overflow():
    assert frequencies(draws=50, temperature=1e-30)[0] == 1


@pytest.mark.parametrize(
    ("params", "kept"),
    [
        ({"top_k": 1}, [0]),
        ({"top_k": 2}, [0, 1]),
        ({"top_k": 100}, [0, 1, 2, 3]),
        ({"top_p": 0.4}, [0]),
        ({"top_p": 0.6}, [0, 1]),
        ({"top_p": 0.85}, [0, 1, 2]),
        ({"min_p": 0.4}, [0, 1]),
        ({"min_p": 1.0}, [0]),
        ({"top_k": 3, "top_p": 0.8}, [0, 1]),  # of the three: 0.56, 0.28, 0.17
    ],
)
def test_filters_keep_exactly(params, kept):
    assert np.flatnonzero(frequencies(draws=500, **params)).tolist() == kept


def test_filters_work_on_unsorted_logits():
    assert np.flatnonzero(frequencies(draws=200, logits=LOGITS[::-1], top_k=2)).tolist() == [2, 3]


def test_top_k_takes_the_first_of_equals():
    logits = np.array([1, 3, 2, 3, 3, 0], np.float32)
    assert np.flatnonzero(frequencies(draws=200, logits=logits, top_k=2)).tolist() == [1, 3]


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, np.nextafter(1.0, 0)])
def test_a_share_of_the_total_has_its_place(share):
    weights = np.zeros(2000, np.float32)
    weights[[3, 511, 512, 1300]] = 1
    assert _place(weights, share) == (3, 511, 512, 1300)[int(share * 4)]
    assert _place(weights[3:4], share) == 0


@pytest.mark.parametrize("top_p", [0.2, 0.5, 0.9])
def test_the_nucleus_among_many(top_p):
    logits = np.random.default_rng(0).standard_normal(60).astype(np.float32)
    probabilities = np.exp(logits.astype(np.float64)) / np.exp(logits.astype(np.float64)).sum()
    order = np.argsort(-probabilities)
    count = int(np.searchsorted(np.cumsum(probabilities[order]), top_p)) + 1
    found = frequencies(draws=6000, logits=logits, top_p=top_p)
    assert np.flatnonzero(found).tolist() == sorted(order[:count])
    kept = probabilities[order[:count]] / probabilities[order[:count]].sum()
    np.testing.assert_allclose(found[order[:count]], kept, atol=0.03)


def test_same_seed_same_draws_and_other_seed_other():
    flat = np.zeros(1000, np.float32)

    def draw(seed):
        sampler = Sampler(SamplingParams(temperature=1, seed=seed), [])
        return [sampler.choose(flat) for _ in range(20)]

    assert draw(1) == draw(1) != draw(2)


def test_no_seed_differs_from_run_to_run():
    flat = np.zeros(100_000, np.float32)
    first, second = (
        Sampler(SamplingParams(temperature=1), []),
        Sampler(SamplingParams(temperature=1), []),
    )
    assert [first.choose(flat) for _ in range(4)] != [second.choose(flat) for _ in range(4)]


def test_repetition_penalty_covers_prompt_and_answer():
    logits = np.float32([4, 3, 2.5, -1])
    sampler = Sampler(SamplingParams(repetition_penalty=2.0), prompt_ids=[0])
    # 4 / 2 = 2 < 3; then 3 / 2 = 1.5 < 2.5; then 2.5 / 2 = 1.25, and 2 is the largest again.
    assert [sampler.choose(logits) for _ in range(3)] == [1, 2, 0]
    assert logits.tolist() == [4, 3, 2.5, -1]  # the caller's array is left alone


def test_repetition_penalty_lowers_negative_logits():
    sampler = Sampler(SamplingParams(repetition_penalty=2.0), prompt_ids=[0])
    assert sampler.choose(np.float32([-1, -1.5])) == 1


@pytest.mark.parametrize("bad", [[0, np.nan], [0, np.inf], [-np.inf, -np.inf]])
def test_logits_that_are_not_finite_are_an_error(bad):
    with pytest.raises(EdgeVLError, match="not finite"):
        Sampler(SamplingParams(), []).choose(np.float32(bad))


@pytest.mark.parametrize("params", [{}, {"repetition_penalty": 1.5}, {"top_p": 0.9}])
def test_tokens_with_a_logit_of_minus_infinity_are_never_drawn(params):
    logits = np.float32([-np.inf, -1, -np.inf, -1.5])
    assert Sampler(SamplingParams(**params), [0, 1]).choose(logits) in (1, 3)
    assert np.flatnonzero(frequencies(draws=200, logits=logits, **params)).tolist() == [1, 3]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 0),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", 101),
        ("top_k", -2),
        ("top_p", -0.1),
        ("top_p", 1.01),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("repetition_penalty", 0),
        ("repetition_penalty", 1e-300),
        ("repetition_penalty", 1e300),
        ("frequency_penalty", 2.1),
        ("presence_penalty", -2.1),
        ("logit_bias", {5: 101}),
        ("logit_bias", {5: float("nan")}),
        ("logit_bias", {-1: 1}),
        ("logit_bias", {2**31: 1}),
        ("logit_bias", dict.fromkeys(range(1025), 1)),
        ("seed", -1),
        ("stop", ("",)),
    ],
)
def test_values_out_of_range_name_field_and_value(name, value):
    with pytest.raises(PromptError, match=f"^{name} is "):
        SamplingParams(**{name: value})


def test_one_stop_string_may_be_given_alone():
    assert SamplingParams(stop="###").stop == ("###",)


@pytest.mark.parametrize(
    "params",
    [
        {"max_tokens": 1.5},  # would never be reached exactly
        {"max_tokens": "5"},
        {"top_k": 2.5},
        {"seed": 0.5},
        {"temperature": None},
        {"top_p": "1"},
        {"min_p": True},
        {"logit_bias": [5, 1]},
        {"logit_bias": {"five": 1}},
        {"logit_bias": {5: "1"}},
        {"stop": 5},
        {"stop": (5,)},
    ],
)
def test_values_of_the_wrong_type_are_refused(params):
    with pytest.raises(PromptError, match=f"{next(iter(params))} is .*: it must be"):
        SamplingParams(**params)


def test_numpy_numbers_are_numbers():
    assert SamplingParams(max_tokens=np.int64(3), temperature=np.float32(0.5)).max_tokens == 3


def test_the_tiniest_temperature_is_greedy_and_quiet(recwarn):
    assert frequencies(draws=5, temperature=5e-324)[0] == 1
    assert not recwarn.list


# --- against formulas -------------------------------------------------------------------------


def penalized(logits, prompt, answer, params):
    """Logits after biases and penalties, in float64, as vLLM's documentation defines them."""
    result = logits.astype(np.float64)
    for token, bias in params.logit_bias.items():
        result[token] += bias
    for token in {*prompt, *answer}:
        factor = params.repetition_penalty
        result[token] = result[token] / factor if result[token] > 0 else result[token] * factor
    for token, count in Counter(answer).items():
        result[token] -= params.frequency_penalty * count + params.presence_penalty
    return result


def distribution(logits, params):
    """What transformers' warpers leave of logits: temperature, top-k, top-p, min-p, in float64."""
    scores = logits / params.temperature
    if params.top_k > 0:
        scores = np.where(
            scores < np.sort(scores)[-min(params.top_k, len(scores))], -np.inf, scores
        )
    chances = np.exp(scores - scores.max())
    chances /= chances.sum()
    ascending = np.argsort(chances, kind="stable")
    removed = ascending[np.cumsum(chances[ascending]) <= 1 - params.top_p]
    chances[np.setdiff1d(removed, ascending[-1:])] = 0
    chances[chances < params.min_p * chances.max()] = 0
    return chances / chances.sum()


PENALTIES = [
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.7},
    {"frequency_penalty": 0.5},
    {"presence_penalty": 1.5},
    {"frequency_penalty": -0.4, "presence_penalty": -1.0},
    {"logit_bias": {3: 2.5, 17: -100, 40: 100 / 7}},
    {
        "repetition_penalty": 1.1,
        "frequency_penalty": 0.3,
        "presence_penalty": 0.2,
        "logit_bias": {2: 1.5, 5: -3},
    },
]
FILTERS = [
    {},
    {"temperature": 0.6, "top_k": 20, "top_p": 0.95},
    {"temperature": 1.7, "top_p": 0.7, "min_p": 0.2},
    {"temperature": 0.4, "top_k": -1, "min_p": 0.1},
]


@pytest.mark.parametrize("penalty", PENALTIES)
def test_penalties_are_their_formulas(penalty):
    random = np.random.default_rng(1)
    rows = (random.standard_normal((60, 50)) * 2).astype(np.float32)
    prompt = random.integers(0, 50, 20).tolist()
    params = SamplingParams(**penalty)
    sampler, answer = Sampler(params, prompt), []
    for row in rows:
        before = row.copy()
        answer.append(sampler.choose(row))
        assert answer[-1] == np.argmax(penalized(row, prompt, answer[:-1], params))
        np.testing.assert_array_equal(row, before)  # of which log-probabilities are told
    plain = Sampler(SamplingParams(), prompt)
    assert answer != [plain.choose(row) for row in rows]


class Shares:
    """Stands for the random state: every share of the whole, one after the other."""

    def __init__(self, count):
        self._shares = iter((np.arange(count) + 0.5) / count)

    def random(self):
        return next(self._shares)


@pytest.mark.parametrize("penalty", [{}, *PENALTIES])
@pytest.mark.parametrize("filters", FILTERS)
def test_what_is_drawn_is_the_filtered_distribution(filters, penalty):
    """The order counts: penalties before the temperature, that before top-k, top-p and min-p."""
    random = np.random.default_rng(2)
    row = (random.standard_normal(60) * 2).astype(np.float32)
    prompt, answer = random.integers(0, 60, 30).tolist(), random.integers(0, 60, 15).tolist()
    params = SamplingParams(**{"temperature": 1.0} | filters | penalty)
    draws = 400
    sampler = Sampler(params, prompt)
    for token in answer:
        sampler._seen.add(token)
    sampler._random, sampler._seen.add = Shares(draws), lambda token: None
    counts = np.bincount([sampler.choose(row) for _ in range(draws)], minlength=60)
    expected = distribution(penalized(row, prompt, answer, params), params)
    np.testing.assert_allclose(counts / draws, expected, atol=1.01 / draws)


def test_the_prompt_counts_for_repetition_alone():
    """OpenAI's penalties are of what was said; one counts every time, the other once."""
    row = np.float32([3, 2.2, 0])
    for penalty in ("frequency_penalty", "presence_penalty"):
        sampler = Sampler(SamplingParams(**{penalty: 0.5}), prompt_ids=[0] * 100)
        said = [sampler.choose(row) for _ in range(6)]
        assert said == ([0, 0, 1, 0, 1, 0] if penalty == "frequency_penalty" else [0] * 6)


@pytest.mark.parametrize("count", [1, 7, 300, 1187, 1188, 5000, 151_936, 10**9])
def test_the_largest_of_a_vocabulary(count):
    random = np.random.default_rng(count)
    row = random.standard_normal(151_936).astype(np.float32).round(2)  # many are equal
    row[random.integers(0, len(row), 1000)] = -np.inf
    expected = np.sort(np.argsort(-row, kind="stable")[:count])
    np.testing.assert_array_equal(_likeliest(row, count), expected)


@pytest.mark.parametrize("params", [{"top_p": 0}, {"top_p": 0.0, "top_k": 5}, {"top_k": 1}])
def test_one_token_that_is_kept_is_greedy(params):
    params = SamplingParams(temperature=1.5, **params)
    assert params.greedy
    row = np.float32([1, 3, 3, 2])
    assert {Sampler(params, []).choose(row) for _ in range(50)} == {1}


@pytest.mark.parametrize("top_k", [0, -1])
def test_two_ways_to_keep_all(top_k):
    assert (frequencies(draws=300, top_k=top_k) > 0).all()


@pytest.mark.parametrize("temperature", [0, 1.5])
@pytest.mark.parametrize(
    "params",
    [
        {"logit_bias": {2: -100, 0: 100}},
        {"repetition_penalty": 100},
        {"frequency_penalty": 2, "presence_penalty": 2},
    ],
)
def test_a_constraint_is_stronger_than_any_penalty(params, temperature):
    mask = SimpleNamespace(
        apply=lambda row: np.where(np.arange(len(row)) == 2, row, np.float32(-np.inf)),
        accept=lambda token: None,
        complete=False,
    )
    sampler = Sampler(SamplingParams(temperature=temperature, **params), [2], mask)
    assert [sampler.choose(np.float32([40, 30, -50, 3])) for _ in range(300)] == [2] * 300


@pytest.mark.parametrize("penalty", [0.01, 100])
@pytest.mark.parametrize("temperature", [0, 1e-300, 100])
def test_the_ends_of_the_ranges_are_quiet(penalty, temperature, recwarn):
    row = np.float32([1e6, -1e6, 0, -np.inf])
    params = SamplingParams(temperature=temperature, repetition_penalty=penalty, seed=1)
    sampler = Sampler(params, [0, 1, 2, 3])
    assert {sampler.choose(row) for _ in range(50)} <= {0, 1, 2}
    assert not recwarn.list


# --- what a checkpoint says -------------------------------------------------------------------

QWEN3 = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95}


@pytest.mark.parametrize(
    ("generation", "expected"),
    [
        ({}, {}),
        ({"_from_model_config": True, "transformers_version": "4.37.2"}, {}),  # InternVL3.5
        (QWEN3, {"temperature": 0.6, "top_k": 20, "top_p": 0.95}),
        (
            QWEN3 | {"repetition_penalty": 1.05, "min_p": None},  # Qwen2.5
            {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "repetition_penalty": 1.05},
        ),
        # transformers' rule: greedy, whatever the temperature; what else there is waits for one.
        ({"temperature": 0.6, "top_p": 0.9}, {"top_p": 0.9}),
        (QWEN3 | {"do_sample": False}, {"top_k": 20, "top_p": 0.95}),
        ({"do_sample": False, "temperature": 0.0, "top_k": 0}, {"top_k": 0}),
        ({"do_sample": True}, {"temperature": 1.0}),
        ({"do_sample": True, "temperature": 0}, {"temperature": 0}),
        ({"do_sample": True, "top_k": 50.0}, {"temperature": 1.0, "top_k": 50}),
        # Not the file's to say, or not known here.
        ({"max_new_tokens": 7, "presence_penalty": 1.5, "seed": 3, "num_beams": 4}, {}),
    ],
)
def test_generation_config(generation, expected):
    assert parse_sampling(generation) == (expected, ())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", "hot"),
        ("temperature", -1),
        ("temperature", float("nan")),
        ("top_p", 1.5),
        ("top_k", 0.5),
        ("top_k", True),
        ("min_p", [0.1]),
        ("repetition_penalty", 10**400),
        ("repetition_penalty", 0),
    ],
)
def test_junk_in_generation_config_is_named_and_left_out(name, value):
    usual = {"temperature": 0.6, "top_k": 20, "top_p": 0.95}
    sampling, [line] = parse_sampling(QWEN3 | {name: value})
    assert sampling == {other: value for other, value in usual.items() if other != name}
    assert line.startswith(f"generation_config.json: {name} is ")
    assert len(line) < 200
    if name == "temperature":  # which is not needed without do_sample
        assert parse_sampling({name: value}) == ({}, ())


@pytest.fixture
def with_generation(mini_checkpoint, tmp_path):
    """Return a function (**fields) -> a checkpoint with these in its generation_config.json."""

    def make(**fields):
        directory = tmp_path / "checkpoint"
        shutil.copytree(mini_checkpoint("mini-qwen3"), directory, dirs_exist_ok=True)
        path = directory / "generation_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))
        return directory

    return make


def test_the_checkpoint_s_defaults_hold_until_a_question_says_otherwise(with_generation):
    model = edgevl.load(with_generation(**QWEN3, repetition_penalty=1.2), engine="reference")

    def ask(**sampling):
        return model.ask("Say it", max_tokens=20, **sampling).token_ids

    plain = edgevl.load(with_generation(do_sample=False, repetition_penalty=1.0), "reference")

    def ask_plain(**sampling):
        return plain.ask("Say it", max_tokens=20, **sampling).token_ids

    usual = {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "repetition_penalty": 1.2}
    assert ask(seed=1) == ask_plain(seed=1, **usual) != ask(seed=2)
    assert ask(seed=1, temperature=None) == ask(seed=1)
    assert ask(seed=1, top_k=500) == ask_plain(seed=1, **usual | {"top_k": 500}) != ask(seed=1)
    assert ask(temperature=0) == ask_plain(repetition_penalty=1.2)
    assert ask(temperature=0, repetition_penalty=1) == ask_plain() != ask(temperature=0)


def test_a_checkpoint_with_junk_loads_and_says_so(with_generation, capsys):
    directory = with_generation(**QWEN3 | {"top_p": "most"})
    assert cli.main(["chat", str(directory), "-q", "x", "--max-tokens", "1"]) == 0
    err = capsys.readouterr().err
    assert "sampling by default as generation_config.json has it: temperature 0.6, top_k 20" in err
    assert "generation_config.json: top_p is 'most': it must be a number, 0 to 1" in err


def test_figures_are_greedy_whatever_the_checkpoint_says(with_generation, tmp_path, monkeypatch):
    from edgevl.evaluate import evaluate_vqa, read_questions

    shutil.copy(locate("tiny").parents[1] / "examples" / "meter.png", tmp_path)
    (tmp_path / "q.jsonl").write_text('{"image": "meter.png", "question": "?", "answer": "1"}\n')
    model = edgevl.load(with_generation(**QWEN3, repetition_penalty=2.0), engine="reference")
    seen = []
    run = model.run
    monkeypatch.setattr(
        model,
        "run",
        lambda prompt, params, at: seen.append(params) or run(prompt, params, at),
    )
    evaluate_vqa(model, read_questions(tmp_path / "q.jsonl"), max_tokens=2)
    assert [(each.greedy, each.repetition_penalty) for each in seen] == [(True, 1)]


def test_a_bias_is_of_a_token_of_the_model(mini_checkpoint):
    model = edgevl.load(mini_checkpoint("mini-qwen3"), engine="reference")
    for token_id in (model.checkpoint.config.text.vocab_size, 2**31 - 1):
        with pytest.raises(PromptError, match=f"logit_bias: the model has no token {token_id}"):
            model.ask("x", logit_bias={token_id: 1})
    first = model.ask("x", max_tokens=1).token_ids[0]
    assert model.ask("x", max_tokens=1, logit_bias={str(first): -100}).token_ids != (first,)
    assert model.ask("x", max_tokens=3, logit_bias={7: 100}).token_ids == (7, 7, 7)


# --- the same everywhere ----------------------------------------------------------------------


@pytest.mark.parametrize("command", ["chat", "batch"])
def test_every_option_is_a_flag_that_says_its_range_and_default(command, capsys):
    assert cli.main([command, "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for name, option in OPTIONS.items():
        flag = f"--{name.replace('_', '-')} {option.metavar} {option.help}"
        assert flag in text
        said = text.split(flag)[1].split(" --")[0]
        assert option.span in said
        if option.from_checkpoint:
            assert f"[default: generation_config.json's, else {option.default:g}" in said


def test_every_option_is_in_a_request_and_in_a_line_of_a_batch():
    serve = pytest.importorskip("edgevl.serve.requests")
    schema = serve.ChatRequest.model_json_schema()["properties"]
    assert set(OPTIONS) <= set(FIELDS)
    assert set(OPTIONS) <= set(schema)
    for name, option in OPTIONS.items():
        if option.kind == "number":
            [number] = [kind for kind in schema[name]["anyOf"] if kind["type"] == "number"]
            assert (number["minimum"], number["maximum"]) == (option.low, option.high)
    assert schema["repeat_penalty"]["anyOf"] == schema["repetition_penalty"]["anyOf"]


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("temperature", "0.5", 0.5),
        ("top_k", "-1", -1),
        ("stop", "a b", ("a b",)),
        ("logit_bias", "5=-100", {5: -100}),
        ("logit_bias", "5=1, 7=-0.5", {5: 1, 7: -0.5}),
    ],
)
def test_values_as_text(name, text, value):
    option = OPTIONS[name]
    assert option.parse(text) == value
    assert option.parse(option.spell(value)) == value


def test_nothing_as_text():
    params = SamplingParams()
    shown = {name: option.spell(getattr(params, name)) for name, option in OPTIONS.items()}
    assert shown["seed"] == shown["stop"] == shown["logit_bias"] == "-"
    assert shown["temperature"] == "0.0"
