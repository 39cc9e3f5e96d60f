"""Conversations: what is reused, what is dropped, what is recorded."""

import shutil
import threading
import time

import numpy as np
import pytest
from PIL import Image

import edgevl
from edgevl.errors import ContextLengthError, EdgeVLError, PromptError
from edgevl.generate.generation import Generation
from edgevl.generate.sampling import SamplingParams
from edgevl.generate.session import Turn
from edgevl.generate.token_mask import TokenMasks
from edgevl.loading import locate
from edgevl.preprocess import GeneratedTokens, Message, Picture


@pytest.fixture(scope="module")
def directory(mini_checkpoint):
    return mini_checkpoint("mini-qwen3", "internvl_chat")


@pytest.fixture
def model(directory):
    return edgevl.load(directory)


def picture(seed, size=(56, 56)):
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), np.uint8)
    return Image.fromarray(pixels)


def count_work(model, call):
    """Run ``call`` and return its result with the tiles and prompt tokens the engine computed."""
    before = model.engine.timings()
    result = call()
    after = model.engine.timings()
    return result, after.tiles - before.tiles, after.prefill_tokens - before.prefill_tokens


def test_a_second_turn_computes_only_what_is_new(model):
    chat = model.chat()
    first = chat.ask("What is this?", images=[picture(0)], max_tokens=6)
    second, tiles, computed = count_work(model, lambda: chat.ask("And now?", max_tokens=6))
    assert tiles == 0
    assert computed == second.usage.prompt_tokens - second.usage.cached_tokens
    # All but the last generated token, which ended the answer and was never computed, is reused.
    reused = first.usage.prompt_tokens + first.usage.completion_tokens
    assert reused - 1 <= second.usage.cached_tokens <= reused


def test_reuse_does_not_change_the_answer(model, directory):
    chat = model.chat()
    chat.ask("What is this?", images=[picture(0)], max_tokens=6)
    continued = chat.ask("And now?", images=[picture(1)], max_tokens=20)
    fresh = edgevl.load(directory).chat()
    fresh.turns.append(chat.turns[0])
    recomputed = fresh.ask("And now?", images=[picture(1)], max_tokens=20)
    assert recomputed.usage.cached_tokens == 0
    assert continued.usage.cached_tokens > 0
    assert continued.token_ids == recomputed.token_ids


def test_the_same_question_costs_one_position(model):
    first = model.ask("What is this?", images=[picture(0)], max_tokens=4)
    again, tiles, computed = count_work(
        model, lambda: model.ask("What is this?", images=[picture(0)], max_tokens=4)
    )
    assert (tiles, computed) == (0, 1)
    assert again.token_ids == first.token_ids


def test_another_picture_is_not_taken_for_the_cached_one(model, directory):
    model.ask("What is this?", images=[picture(0)], max_tokens=8)
    answer, tiles, _ = count_work(
        model, lambda: model.ask("What is this?", images=[picture(1)], max_tokens=8)
    )
    assert tiles == 1
    fresh = edgevl.load(directory).ask("What is this?", images=[picture(1)], max_tokens=8)
    assert answer.token_ids == fresh.token_ids
    assert answer.usage.cached_tokens < answer.usage.prompt_tokens - answer.usage.image_tokens


def test_a_picture_is_encoded_once_wherever_it_stands(model):
    model.ask("<image> and text", images=[picture(0)], max_tokens=2)
    _, tiles, _ = count_work(
        model, lambda: model.ask("something else, then <image>", images=[picture(0)], max_tokens=2)
    )
    assert tiles == 0


def test_one_picture_needs_no_list(model):
    listed = model.ask("What?", images=[picture(0)], max_tokens=4)
    assert model.ask("What?", images=picture(0), max_tokens=4).token_ids == listed.token_ids


def test_streaming_gives_the_same_text(model):
    asked = model.ask("Tell me", images=[picture(3)], max_tokens=30)
    stream = model.stream("Tell me", images=[picture(3)], max_tokens=30)
    with pytest.raises(EdgeVLError, match="not complete"):
        _ = stream.answer
    assert "".join(stream) == asked.text == stream.answer.text
    assert stream.answer.token_ids == asked.token_ids


def test_max_tokens_and_finish_reason(model):
    answer = model.ask("Tell me", max_tokens=5)
    assert (answer.finish_reason, answer.usage.completion_tokens) == ("length", 5)
    stop_id = answer.token_ids[2]
    model.prompts.stop_ids = model.prompts.stop_ids | {stop_id}
    stopped = model.ask("Tell me", max_tokens=5)
    end = answer.token_ids.index(stop_id)
    assert (stopped.finish_reason, stopped.token_ids) == ("stop", answer.token_ids[:end])


def test_a_stop_string_is_not_part_of_the_answer(model):
    whole = model.ask("Tell me", max_tokens=40).text
    stop = whole[len(whole) // 2 :][:3]
    answer = model.ask("Tell me", max_tokens=40, stop=[stop])
    assert answer.text == whole[: whole.index(stop)]
    assert answer.finish_reason == "stop"


def test_seeds(model):
    def draw(seed):
        return model.ask("Tell me", max_tokens=12, temperature=2.0, seed=seed).token_ids

    assert draw(1) == draw(1) != draw(2)


def test_usage_adds_up(model):
    answer = model.ask("<image> <image>", images=[picture(0), picture(1)], max_tokens=3)
    tokens_per_tile = model.checkpoint.config.image_tokens
    assert answer.usage.image_tokens == 2 * tokens_per_tile + 0
    assert answer.usage.prompt_tokens > answer.usage.image_tokens
    assert len(answer.token_ids) == answer.usage.completion_tokens == 3
    timings = answer.timings
    assert timings.ttft_ms >= timings.vision_ms + timings.prefill_ms > 0
    assert timings.decode_tokens_per_s == pytest.approx(1000 / timings.decode_ms_per_token)
    assert timings.load_ms > 0


def test_the_oldest_turns_go_first(directory):
    model = edgevl.load(directory, max_context=160)
    chat = model.chat(system="Be brief.")
    for turn in range(12):
        answer = chat.ask(f"Question number {turn}", max_tokens=8)
        assert answer.usage.prompt_tokens + 8 <= 160
    texts = [part for message in chat.messages for part in message.parts if isinstance(part, str)]
    assert texts[-1] == "Question number 11"
    assert "Question number 0" not in texts
    assert texts == [f"Question number {n}" for n in range(12 - len(texts), 12)]
    assert [m.role for m in chat.messages] == ["user", "assistant"] * len(texts)
    # The turns stay, but nothing of them that takes memory.
    assert [turn.text for turn in chat.turns] == [f"Question number {n}" for n in range(12)]
    assert [bool(turn.messages) for turn in chat.turns] == [
        turn.text in texts for turn in chat.turns
    ]


def test_a_message_that_cannot_fit_gives_both_numbers(directory):
    model = edgevl.load(directory, max_context=64)
    chat = model.chat()
    chat.ask("hi", max_tokens=2)
    with pytest.raises(ContextLengthError, match=r"needs \d{3,} tokens, but the context holds 64"):
        chat.ask("word " * 200, max_tokens=2)
    assert len(chat.messages) == 2
    assert chat.ask("hi", max_tokens=2).usage.completion_tokens <= 2


def test_the_answer_ends_where_the_context_does(directory):
    model = edgevl.load(directory, max_context=64)
    answer = model.ask("hi", max_tokens=1000)
    assert answer.usage.prompt_tokens + answer.usage.completion_tokens == 64
    assert answer.finish_reason == "length"


def test_history_keeps_the_very_tokens(model):
    chat = model.chat()
    answer = chat.ask("hi", max_tokens=5)
    assert chat.messages[1].parts == (GeneratedTokens(answer.token_ids),)
    chat.reset()
    assert chat.messages == ()
    chat.ask("hi", max_tokens=5, stop=["\x00 never said"])
    assert chat.messages[1].parts == (GeneratedTokens(answer.token_ids),)
    chat.reset()
    assert chat.ask("hi", max_tokens=5).token_ids == answer.token_ids


def test_a_turn_is_taken_back(model):
    chat = model.chat()
    first = chat.ask("hi", max_tokens=5)
    kept = chat.messages
    second = chat.ask("and?", max_tokens=5)
    assert chat.undo().answer == second
    assert chat.messages == kept
    again = chat.ask("and?", max_tokens=5)
    assert again.token_ids == second.token_ids
    assert again.usage.cached_tokens >= first.usage.prompt_tokens
    for _ in range(3):
        chat.undo()
    assert chat.messages == ()


def test_the_system_message_may_change(model):
    chat = model.chat()
    plain = chat.ask("hi", max_tokens=5)
    chat.reset()
    chat.system = "Count the sheep."
    changed = chat.ask("hi", max_tokens=5)
    expected = model.chat(system="Count the sheep.").ask("hi", max_tokens=5)
    assert changed.token_ids == expected.token_ids
    assert changed.usage.prompt_tokens == expected.usage.prompt_tokens
    assert changed.usage.prompt_tokens != plain.usage.prompt_tokens


def test_a_conversation_without_end_takes_no_more_memory(model, monkeypatch):
    monkeypatch.setattr("edgevl.generate.session.MAX_TURNS", 3)
    chat = model.chat()
    for number in range(5):
        chat.ask(f"{number}", images=[picture(number)], max_tokens=1)
    assert [turn.text for turn in chat.turns] == ["2", "3", "4"]
    assert not any(turn.shown for turn in chat.turns)  # but the model is told of them
    assert sum(isinstance(part, Picture) for m in chat.messages for part in m.parts) == 3


def test_an_edited_turn_takes_the_place_of_those_after_it(model):
    chat = model.chat()
    first, expected = chat.ask("hi", max_tokens=5), chat.ask("and?", max_tokens=5)
    chat.ask("and so?", max_tokens=5)
    kept = list(chat.turns)
    with pytest.raises(ContextLengthError):
        chat.answer(Turn("word " * 5000), kept[:1])
    chat.answer(Turn("and?"), kept[:1], max_tokens=5).close()  # before its first word
    assert chat.turns == kept
    for _ in chat.answer(turn := Turn("and?"), kept[:1], max_tokens=5):
        assert chat.turns == kept
    assert chat.turns == [kept[0], turn]
    assert (chat.turns[0].answer, turn.answer.token_ids) == (first, expected.token_ids)


def test_an_abandoned_stream_keeps_what_was_said_and_harms_nothing(model, directory):
    chat = model.chat()
    stream = chat.stream("Tell me a story", max_tokens=30)
    said = next(stream) + next(stream)
    stream.close()
    assert chat.messages[1].parts == (said,)
    assert chat.turns[0].to_dict() == {
        "question": "Tell me a story",
        "images": [],
        "text": said,
        "finish_reason": "interrupted",
    }
    fresh = edgevl.load(directory).ask("Another thing", max_tokens=10)
    assert model.ask("Another thing", max_tokens=10).token_ids == fresh.token_ids


def test_an_interrupt_inside_the_engine_harms_nothing(model, directory, monkeypatch):
    chat = model.chat()
    chat.ask("hi", max_tokens=3)
    decode, calls = model.engine.decode, []

    def interrupted(sequences, token_ids):
        calls.append(token_ids)
        logits = decode(sequences, token_ids)
        if len(calls) == 3:  # the engine has moved on, its caller never learns
            raise KeyboardInterrupt
        return logits

    with monkeypatch.context() as patch:
        patch.setattr(model.engine, "decode", interrupted)
        with pytest.raises(KeyboardInterrupt):
            chat.ask("and then?", max_tokens=20)
    fresh = edgevl.load(directory).chat()
    fresh.turns.extend(chat.turns)
    expected = fresh.ask("go on", max_tokens=10).token_ids
    assert chat.ask("go on", max_tokens=10).token_ids == expected


def test_two_streams_of_one_thread_do_not_mix(model):
    first = model.stream("Tell me", max_tokens=20)
    next(first)
    with pytest.raises(EdgeVLError, match="still being streamed"):
        model.ask("hi", max_tokens=2)
    first.close()
    assert model.ask("hi", max_tokens=2).usage.completion_tokens <= 2


def test_threads_take_turns(model, directory):
    questions = [f"Question {n}" for n in range(6)]
    answers = {}

    def work(question):
        answers[question] = model.ask(question, max_tokens=6).token_ids

    threads = [threading.Thread(target=work, args=(question,)) for question in questions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    single = edgevl.load(directory)
    assert answers == {q: single.ask(q, max_tokens=6).token_ids for q in questions}


def test_a_wrong_number_of_pictures_is_said(model):
    with pytest.raises(PromptError, match=r"2.*1|1.*2"):
        model.ask("<image> <image>", images=[picture(0)])


def test_sampling_is_checked_before_pictures_are_read(model):
    with pytest.raises(PromptError, match="temperature"):
        model.ask("hi", images=["/does/not/exist.png"], temperature=-1)


def test_the_time_of_a_token_is_not_that_of_its_reader(model):
    stream = model.stream("Tell me", max_tokens=6)
    started = time.perf_counter()
    for _ in stream:
        time.sleep(0.3)
    elapsed_ms = 1000 * (time.perf_counter() - started)
    timings = stream.answer.timings
    assert 0 < 5 * timings.decode_ms_per_token < elapsed_ms - 900


def test_none_is_no_picture(model):
    assert model.ask("Tell me", images=None, max_tokens=2).usage.image_tokens == 0


# Templates that open the thinking themselves, as those of models that always think.


@pytest.fixture(scope="module")
def thinker(tmp_path_factory):
    """The shipped model with such a template; ``enable_thinking`` false closes it at once."""
    path = tmp_path_factory.mktemp("thinker") / "tiny"
    shutil.copytree(locate("tiny"), path, ignore=shutil.ignore_patterns("heldout", "training"))
    turns = (path / "chat_template.jinja").read_text()
    opening = (
        "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}"
        "{% else %}{{ '<think>\n' }}{% endif %}"
    )
    (path / "chat_template.jinja").write_text(turns + opening)
    return edgevl.load(path, threads=1)


THOUGHT = edgevl.Constraint.regex("\ntwo digits\n</think>\n\n42")


def test_thoughts_that_the_template_has_opened_are_told_from_the_answer(thinker):
    chat = thinker.chat()
    stream = chat.stream("hi", constraint=THOUGHT)
    pieces = list(stream)
    assert "".join(piece for piece in pieces if piece.thinking) == "two digits"
    assert "".join(piece for piece in pieces if not piece.thinking) == "42"
    assert (stream.answer.thinking, stream.answer.text) == ("two digits", "42")
    assert chat.messages[1] == Message.assistant("42", thinking="two digits")
    # The next prompt has the answer without its thoughts, and opens them again.
    following = thinker.prompts.tokenizer.decode(chat.prompt("and?").token_ids.tolist(), False)
    assert following.count("<|im_start|>assistant\n42<|im_end|>") == 1
    assert following.endswith("<|im_start|>assistant\n<think>\n")


def test_without_thoughts_all_is_the_answer(thinker):
    chat = thinker.chat(thinking=False)
    answer = chat.ask("hi", constraint=edgevl.Constraint.regex("42"))
    assert (answer.thinking, answer.text) == ("", "42")
    assert chat.messages[1].parts == (GeneratedTokens(answer.token_ids),)
    # Thoughts that are empty do not stay in the conversation either.
    empty = edgevl.Constraint.regex("<think>\n\n</think>\n\n42")
    chat.ask("hi", constraint=empty)
    assert chat.messages[3] == Message.assistant("42")


def test_an_answer_that_is_cut_off_in_its_thoughts_has_no_text(thinker):
    answer = thinker.ask("hi", constraint=THOUGHT, max_tokens=3)
    assert (answer.finish_reason, answer.text) == ("length", "")
    assert "two digits".startswith(answer.thinking)
    assert answer.thinking


def test_a_constraint_is_for_what_comes_after_the_thoughts(thinker):
    """Or a JSON answer would be all thoughts and no answer."""
    tokenizer = thinker.prompts.tokenizer
    masks = TokenMasks(tokenizer, thinker.prompts.stop_ids)
    digits = edgevl.Constraint.regex("[0-9]{2}")
    params = SamplingParams(constraint=digits, max_tokens=50)
    prompt = thinker.prompts.encode([Message.user("hi")])
    generation = Generation(thinker.prompts, masks, prompt, params, 512, 0.0)
    wanted = tokenizer.encode("Hm, {x}.</think>\n\nNo", add_special_tokens=False).ids
    random = np.random.default_rng(0)
    for token_id in [*wanted, *[0] * 9]:
        logits = random.normal(size=tokenizer.get_vocab_size()).astype(np.float32)
        logits[token_id] = 99
        generation.take(logits[None], 0.0)
        if generation.finish_reason:
            break
    answer = generation.answer(0.0)
    assert answer.thinking == "Hm, {x}."
    assert answer.text.isdigit()
    assert len(answer.text) == 2
    assert answer.finish_reason == "stop"
