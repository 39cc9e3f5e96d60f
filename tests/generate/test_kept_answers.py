"""What one process has computed costs the next one nothing, and changes no answer."""

import shutil

import numpy as np
import pytest
from PIL import Image

import edgevl

pytest.importorskip("edgevl._native", reason="the native engine is not built")

from edgevl.engine import packed
from edgevl.generate import prefix
from edgevl.generate.prefix import FeatureCache, KeptPrefixes
from edgevl.generate.scheduler import Scheduler
from edgevl.loading import locate
from edgevl.preprocess import Message, Tool, prepare_picture
from running_server import picture as shown
from running_server import serving, text, user

SYSTEM = "You read meters for a living. Say what they show, and nothing else. " * 8
QUESTION = "What number is on the display?"


@pytest.fixture
def directory(tmp_path, monkeypatch):
    """The shipped model in a directory of its own, as if it were large."""
    monkeypatch.setattr(packed, "CACHE_FROM_BYTES", 0)
    return shutil.copytree(locate("tiny"), tmp_path / "model")


def load(directory, **options):
    return edgevl.load(directory, threads=1, **options)


def image(seed=0):
    return np.random.default_rng(seed).integers(0, 256, (300, 500, 3), np.uint8)


def kept_files(directory, kind=""):
    return sorted((directory / ".edgevl" / "kept").glob(f"{kind}*"))


def first_logits(model, system=SYSTEM, seed=0):
    """Return the logits of the answer's first token."""
    prompt = model.chat(system).prompt(QUESTION, [image(seed)])
    [logits] = next(model.score(prompt, []))
    return logits.copy()


@pytest.mark.parametrize("options", [{}, {"precision": "int4", "kv_cache": "int8"}])
def test_a_second_start_computes_the_question_only(directory, options):
    reference = load(directory, keep_bytes=0, **options)
    expected = reference.ask(QUESTION, [image()], SYSTEM, max_tokens=20)
    logits = first_logits(reference)
    assert expected.usage.cached_tokens == 0
    assert not (directory / ".edgevl" / "kept").exists()

    first = load(directory, **options).ask(QUESTION, [image()], SYSTEM, max_tokens=20)
    assert first.usage.cached_tokens == 0
    assert first.timings.vision_ms > 0
    assert len(kept_files(directory, "features-")) == len(kept_files(directory, "prefix-")) == 1

    model = load(directory, **options)
    second = model.ask(QUESTION, [image()], SYSTEM, max_tokens=20)
    system = model.chat(SYSTEM).prompt(QUESTION).system
    assert second.usage.cached_tokens == system >= prefix.LEAST_KEPT_TOKENS
    assert second.timings.vision_ms == 0
    timings = model.engine.timings()
    assert timings.tiles == 0
    assert timings.prefill_tokens == second.usage.prompt_tokens - system
    assert second.token_ids == first.token_ids == expected.token_ids
    np.testing.assert_array_equal(first_logits(load(directory, **options)), logits)


def test_damage_costs_the_computation_only(directory):
    expected = load(directory).ask(QUESTION, [image()], SYSTEM, max_tokens=20)
    for path in kept_files(directory):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    damaged = load(directory).ask(QUESTION, [image()], SYSTEM, max_tokens=20)
    assert damaged.token_ids == expected.token_ids
    assert damaged.usage.cached_tokens == 0
    again = load(directory).ask(QUESTION, [image()], SYSTEM, max_tokens=20)
    assert again.usage.cached_tokens > 0
    assert again.token_ids == expected.token_ids


@pytest.mark.parametrize("options", [{"keep_bytes": 0}, {"cache": False}, {"exact_logits": True}])
def test_who_asks_leaves_nothing_behind(directory, options):
    load(directory, **options).ask(QUESTION, [image()], SYSTEM, max_tokens=2)
    assert not (directory / ".edgevl" / "kept").exists()


def test_small_models_keep_nothing(directory, monkeypatch):
    monkeypatch.setattr(packed, "CACHE_FROM_BYTES", 64 << 20)
    load(directory).ask(QUESTION, [image()], SYSTEM, max_tokens=2)
    assert not (directory / ".edgevl").exists()


def test_a_short_system_message_is_not_kept(directory):
    load(directory).ask(QUESTION, system="Be brief.", max_tokens=2)
    assert kept_files(directory) == []


def test_of_a_conversation_the_system_message_is_kept(directory):
    def keep(question, turns):
        """Hold a conversation and return the files that are left of it."""
        chat = load(directory).chat(SYSTEM)
        for _ in range(turns):
            chat.ask(question, max_tokens=80)
        files = {path.name: path.read_bytes() for path in kept_files(directory)}
        shutil.rmtree(directory / ".edgevl" / "kept")
        return files

    kept = keep("Say more about it, in all the words that you know.", 3)
    assert len(kept) == 1
    assert kept == keep("?", 1)  # nothing of the question


def test_a_system_message_with_a_picture(directory):
    config = load(directory).checkpoint.config
    seen = prepare_picture(Image.fromarray(image()), config)
    messages = [Message("system", (SYSTEM, seen)), Message.user(QUESTION)]

    def answer(model):
        scheduler = Scheduler(model)
        try:
            prompt = model.prompts.encode(messages)
            pieces = scheduler.run(prompt, model.chat().params(max_tokens=20), 0.0)
            try:
                while True:
                    next(pieces)
            except StopIteration as stop:
                return prompt, stop.value
        finally:
            scheduler.close(60)

    prompt, first = answer(load(directory))
    assert prompt.system > prompt.images[0].start + prompt.images[0].length
    again = load(directory)
    _, second = answer(again)
    assert second.usage.cached_tokens == prompt.system
    assert again.engine.timings().tiles == 0
    assert second.token_ids == first.token_ids


def test_a_server_that_is_started_again(directory):
    def usage_of(running):
        import httpx2

        body = {
            "model": "tiny",
            "messages": [
                {"role": "system", "content": SYSTEM},
                user(shown(), text(QUESTION)),
            ],
            "max_tokens": 8,
        }
        answer = httpx2.post(f"{running.url}/v1/chat/completions", json=body, timeout=60).json()
        return answer["choices"][0]["message"]["content"], answer["usage"]

    with serving(lambda: load(directory)) as running:
        first, usage = usage_of(running)
        assert usage["prompt_tokens_details"]["cached_tokens"] == 0
    with serving(lambda: load(directory)) as running:
        second, usage = usage_of(running)
        assert usage["prompt_tokens_details"]["cached_tokens"] > prefix.LEAST_KEPT_TOKENS
    assert second == first


# --- which system messages are worth their disk ------------------------------------------------


class Nowhere:
    """Has and keeps nothing."""

    def put(self, *_):
        pass


def test_the_first_is_kept_and_what_a_second_conversation_begins_with():
    prefixes = KeptPrefixes(Nowhere())
    assert prefixes.wants([1], [10])
    assert prefixes.wants([1], [10])  # the answer was broken off, nothing is kept
    prefixes.put([1], None)
    assert not prefixes.wants([2], [10])
    assert not prefixes.wants([2], [10, 11])  # the conversation goes on
    assert prefixes.wants([2], [11])
    assert not prefixes.wants([3], [10])


def test_what_is_kept_is_not_saved_again(directory, monkeypatch):
    model = load(directory)
    saved = []
    save = model.engine.save
    monkeypatch.setattr(model.engine, "save", lambda *given: saved.append(given) or save(*given))
    for number in range(3):
        model.ask(f"{number}?", system=SYSTEM, max_tokens=1)
    assert len(saved) == 1


def test_few_are_remembered(monkeypatch):
    monkeypatch.setattr(prefix, "REMEMBERED_PREFIXES", 2)
    prefixes = KeptPrefixes(Nowhere())
    prefixes.put([9], None)
    for number in range(3):
        prefixes.wants([number], [10])
    assert prefixes.wants([1], [11])
    assert not prefixes.wants([0], [11])


def test_features_that_made_room_are_not_written(monkeypatch):
    monkeypatch.setattr(prefix, "FEATURE_CACHE_TILES", 1)
    written = {}

    class Kept:
        def get(self, kind, key):
            return None

        def put(self, kind, key, make):
            written[key] = make()

    class Picture:
        def __init__(self, digest):
            self.digest, self.pixels = digest, np.zeros((1, 3, 8, 8), np.float32)

    features = FeatureCache(Kept())
    rows = np.zeros((4, 8), np.float32)
    features.put(Picture("a"), rows)
    features.put(Picture("b"), rows)
    features.keep()
    features.keep()
    assert list(written) == ["b"]


# --- where a system message ends --------------------------------------------------------------


def test_a_prompt_tells_its_system_message():
    prompts = edgevl.load("tiny").prompts

    def system(messages, **options):
        prompt = prompts.encode(messages, **options)
        return prompts.tokenizer.decode(
            prompt.token_ids[: prompt.system].tolist(), skip_special_tokens=False
        )

    asked = [Message.user("Hello <|im_end|> there")]
    assert system([Message.system("Be <|im_end|> brief."), *asked]).endswith(
        "Be <|im_end|> brief.<|im_end|>"
    )
    assert "Hello" not in system(asked)
    tool = Tool("add", "Adds.", {"type": "object", "properties": {}})
    assert "Adds." in system([Message.system("Be brief."), *asked], tools=[tool])
    assert prompts.encode_text("Hello").system == 0
