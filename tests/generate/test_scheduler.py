"""Many answers at once: the same as one by one, fair, bounded, and gone when cancelled."""

import queue
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import edgevl
from edgevl.errors import ContextLengthError, EdgeVLError, QueueFullError
from edgevl.generate import Answer, SamplingParams, Session
from edgevl.generate.generation import Delta
from edgevl.generate.prefix import Slots
from edgevl.generate.scheduler import FairQueue, Scheduler
from edgevl.preprocess import Message, prepare_picture


@pytest.fixture(scope="module")
def directory(mini_checkpoint):
    return mini_checkpoint("mini-qwen3", "internvl_chat")


@pytest.fixture(scope="module")
def model(directory):
    return edgevl.load(directory, threads=1)


@pytest.fixture
def scheduler(directory):
    scheduler = Scheduler(edgevl.load(directory, threads=1), max_sequences=4, max_queue=8)
    yield scheduler
    scheduler.close(0)
    assert not scheduler._thread.is_alive()


def picture(model, seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (56, 56, 3), np.uint8)
    return prepare_picture(Image.fromarray(pixels), model.checkpoint.config)


def prompt_of(model, text, *pictures, system=None):
    messages = [] if system is None else [Message.system(system)]
    return model.prompts.encode([*messages, Message.user(text, pictures)])


class Request:
    """Submits a prompt and keeps its events."""

    def __init__(self, scheduler, prompt, client="", top_logprobs=None, **sampling):
        self.events = queue.SimpleQueue()
        self.chunks = []
        params = SamplingParams(**sampling)
        self.ticket = scheduler.submit(prompt, params, self.events.put, client, top_logprobs)

    def next(self):
        return self.events.get(timeout=60)

    def result(self):
        while isinstance(event := self.next(), Delta):
            self.chunks.append(event)
        assert self.events.empty()
        return event


def until(condition):
    for _ in range(2000):
        if condition():
            return
        time.sleep(0.005)
    raise AssertionError("did not happen within 10 s")


def long_answer(**others):
    """Sampling that goes on for as long as the context lets it."""
    return {"max_tokens": 10**6, "temperature": 50.0, "seed": 1} | others


# --- answers ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sampling",
    [
        {},
        {"temperature": 1.5, "seed": 7},
        {"frequency_penalty": 0.3, "presence_penalty": 0.2, "logit_bias": {40: 3, 41: -100}},
        {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "repetition_penalty": 1.1, "seed": 7},
    ],
)
def test_answers_computed_together_are_those_of_one_by_one(scheduler, model, sampling):
    sampling |= {"max_tokens": 24}
    prompts = [
        prompt_of(model, "What is this?", picture(model, seed % 3), system="Be brief." * (seed % 2))
        if seed % 2
        else prompt_of(model, f"Question {seed} " * (seed + 1))
        for seed in range(7)
    ]
    requests = [Request(scheduler, prompt, **sampling) for prompt in prompts]
    answers = [request.result() for request in requests]
    for prompt, request, answer in zip(prompts, requests, answers, strict=True):
        alone = drain(model.run(prompt, SamplingParams(**sampling), 0.0))
        assert answer.token_ids == alone.token_ids
        assert (answer.text, answer.finish_reason) == (alone.text, alone.finish_reason)
        assert answer.text == "".join(p for chunk in request.chunks for p in chunk.pieces)
        assert answer.token_ids == tuple(i for chunk in request.chunks for i in chunk.token_ids)
        assert answer.usage.prompt_tokens == alone.usage.prompt_tokens
    assert scheduler.running == scheduler.waiting == 0


def drain(pieces):
    while True:
        try:
            next(pieces)
        except StopIteration as stop:
            return stop.value


def test_a_session_over_a_scheduler_is_one_over_a_model(scheduler, model):
    def talk(answerer):
        session = Session(model.checkpoint, answerer)
        first = session.ask("What is this?", images=[picture_image(0)], max_tokens=6)
        return first, session.ask("And now?", max_tokens=6)

    alone, together = talk(model), talk(scheduler)
    assert [a.token_ids for a in alone] == [a.token_ids for a in together]
    assert together[1].usage.cached_tokens >= together[0].usage.prompt_tokens
    assert together[1].timings.ttft_ms > 0


def picture_image(seed):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (56, 56, 3), np.uint8))


def test_a_prompt_is_computed_once_for_all_who_ask_it(scheduler, model):
    prompt = prompt_of(model, "What is in this picture? " * 4, picture(model, 5))
    requests = [Request(scheduler, prompt, max_tokens=4) for _ in range(4)]
    usages = [request.result().usage for request in requests]
    assert usages[0].cached_tokens == 0
    # Though the first was still being answered: its sequence was shared.
    assert {usage.cached_tokens for usage in usages[1:]} == {usages[0].prompt_tokens - 1}
    assert scheduler.model.engine.timings().tiles == 1


def test_logprobs_are_of_the_whole_distribution(scheduler, model):
    prompt = prompt_of(model, "Say something")
    request = Request(scheduler, prompt, top_logprobs=3, max_tokens=5, repetition_penalty=1.7)
    answer = request.result()
    logprobs = [entry for chunk in request.chunks for entry in chunk.logprobs]
    assert [entry.token_id for entry in logprobs] == list(answer.token_ids)
    rows = np.concatenate([block.copy() for block in model.score(prompt, answer.token_ids)])
    for entry, row in zip(logprobs, rows.astype(np.float64), strict=False):
        expected = row - row.max() - np.log(np.exp(row - row.max()).sum())
        np.testing.assert_allclose(entry.logprob, expected[entry.token_id], atol=1e-4)
        assert [token for token, _ in entry.top] == np.argsort(-row, kind="stable")[:3].tolist()
        np.testing.assert_allclose([p for _, p in entry.top], np.sort(expected)[:-4:-1], atol=1e-4)
    without = Request(scheduler, prompt, top_logprobs=0, max_tokens=1)
    without.result()
    assert without.chunks[0].logprobs[0].top == ()


# --- the queue --------------------------------------------------------------------------------


def test_clients_take_turns():
    waiting, last = FairQueue(), None
    for client, item in [("a", 1), ("a", 2), ("a", 3), ("b", 4), ("c", 5), ("b", 6)]:
        request = SimpleNamespace(client=client, number=item)
        waiting.put(request)
        last = request if client == "c" else last
    assert waiting.remove(last)
    assert not waiting.remove(last)
    assert sorted(request.number for request in waiting) == [1, 2, 3, 4, 6]
    assert next(iter(waiting)).number == 1
    taken = [waiting.get().number for _ in range(len(waiting))]
    assert taken == [1, 4, 2, 6, 3]
    with pytest.raises(KeyError):
        waiting.get()


def test_a_full_queue_refuses_and_says_when(scheduler, model):
    prompt = prompt_of(model, "Go on")
    requests = [Request(scheduler, prompt, **long_answer()) for _ in range(4)]
    until(lambda: scheduler.waiting == 0)
    requests += [Request(scheduler, prompt, **long_answer()) for _ in range(8)]
    until(lambda: scheduler.running == 4)
    with pytest.raises(QueueFullError, match="8 requests wait already") as refused:
        Request(scheduler, prompt)
    assert 1 <= refused.value.retry_after_s <= 60
    for request in requests:
        request.ticket.cancel()
    for request in requests:
        assert request.result().finish_reason == "cancelled"
    assert Request(scheduler, prompt, max_tokens=2).result().finish_reason


def test_a_greedy_client_does_not_hold_up_another(scheduler, model):
    prompt = prompt_of(model, "Go on")
    running = [Request(scheduler, prompt, "greedy", **long_answer()) for _ in range(4)]
    until(lambda: scheduler.waiting == 0)
    waiting = [Request(scheduler, prompt, "greedy", **long_answer()) for _ in range(5)]
    modest = Request(scheduler, prompt, "modest", max_tokens=3)
    for request in (running[0], running[1]):
        request.ticket.cancel()
    assert modest.result().finish_reason
    assert scheduler.waiting >= 3
    for request in running + waiting:
        request.ticket.cancel()


def slow_reader(directory):
    """Start a scheduler that reads eight tokens in 3 ms."""
    scheduler = Scheduler(edgevl.load(directory, threads=1), max_sequences=4)
    engine = scheduler.model.engine
    engine.chunk, step = 8, engine.step

    def slowly(prompt, answers):
        time.sleep(0.003)
        return step(prompt, answers)

    engine.step = slowly
    return scheduler


def test_a_short_prompt_goes_between_the_chunks_of_a_long_one(directory, model):
    scheduler = slow_reader(directory)
    long = Request(scheduler, prompt_of(model, "word " * 300), max_tokens=1)
    until(lambda: scheduler.running == 1)
    short = [Request(scheduler, prompt_of(model, f"{n}"), max_tokens=1) for n in range(3)]
    assert all(request.result().finish_reason for request in short)
    assert long.events.empty()
    assert long.result().finish_reason
    # The same prompt is not computed twice at a time.
    same = [Request(scheduler, prompt_of(model, "text " * 200), max_tokens=1) for _ in range(3)]
    cached = [request.result().usage.cached_tokens for request in same]
    assert cached[1] == cached[2] > cached[0]
    scheduler.close(10)


def test_a_long_prompt_is_read_though_short_ones_keep_coming(directory, model):
    scheduler = slow_reader(directory)
    long = Request(scheduler, prompt_of(model, "word " * 300), max_tokens=1)
    until(lambda: scheduler.running == 1)
    ended = []

    def go_on(event):
        if isinstance(event, Answer) and not ended:
            ask_again(scheduler, model, go_on)

    for _ in range(3):
        ask_again(scheduler, model, go_on)
    assert long.result().finish_reason
    ended.append(True)
    scheduler.close(10)


def ask_again(scheduler, model, deliver):
    words = str(np.random.default_rng().integers(10**9))
    scheduler.submit(prompt_of(model, words), SamplingParams(max_tokens=1), deliver)


# --- cancelling, errors, the end --------------------------------------------------------------


def test_a_cancelled_answer_stops_within_a_token(scheduler, model):
    request = Request(scheduler, prompt_of(model, "Go on"), **long_answer())
    for _ in range(3):
        assert isinstance(request.next(), Delta)
    request.ticket.cancel()
    request.ticket.cancel()
    answer = request.result()
    assert answer.finish_reason == "cancelled"
    computed = scheduler.model.engine.timings().decode_tokens
    assert len(answer.token_ids) - 1 <= computed <= len(answer.token_ids)
    until(lambda: scheduler.running == 0)


def test_a_closed_stream_cancels(scheduler, model):
    session = Session(model.checkpoint, scheduler)
    stream = session.stream("Go on", **long_answer())
    next(stream)
    stream.close()
    until(lambda: scheduler.running == 0)
    assert session.messages  # what was said so far


def test_a_failing_answer_is_the_only_one(scheduler, model, monkeypatch):
    steady = Request(scheduler, prompt_of(model, "Go on"), **long_answer())
    steady.next()
    broken = prompt_of(model, "What is this?", picture(model, 0))

    def fail(self, pixels):
        raise EdgeVLError("the encoder is broken")

    with monkeypatch.context() as patched:
        patched.setattr("edgevl.engine.cpu.CpuEngine.encode_images", fail)
        error = Request(scheduler, broken).result()
    assert str(error) == "the encoder is broken"
    for _ in range(3):
        assert isinstance(steady.next(), Delta)
    with monkeypatch.context() as patched:
        patched.setattr("edgevl.engine.cpu.CpuEngine.decode", fail)
        assert isinstance(steady.result(), EdgeVLError | TypeError)
    assert isinstance(Request(scheduler, broken, max_tokens=2).result(), Answer)


def test_a_sequence_that_cannot_be_had_fails_its_request_only(scheduler, model, monkeypatch):
    steady = Request(scheduler, prompt_of(model, "Go on"), **long_answer())
    steady.next()

    def fail(self):
        raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr("edgevl.engine.cpu.CpuEngine.new_sequence", fail)
        assert isinstance(Request(scheduler, prompt_of(model, "Hello")).result(), MemoryError)
    assert isinstance(steady.next(), Delta)
    steady.ticket.cancel()
    assert isinstance(Request(scheduler, prompt_of(model, "Hello"), max_tokens=2).result(), Answer)


def test_answers_that_outgrow_the_memory_are_cut_off(scheduler, model, monkeypatch):
    monkeypatch.setattr("edgevl.generate.prefix.RESERVED_TOKENS", 4)
    monkeypatch.setattr(scheduler.prompts, "stop_ids", frozenset())
    monkeypatch.setattr("edgevl.generate.text.Detokenizer.finish", lambda self: "held back")
    idle, prompt = prompt_of(model, "word " * 20), prompt_of(model, "Go on")
    Request(scheduler, idle, max_tokens=1).result()
    scheduler._rounds.slots._room = room = 4 * len(prompt.token_ids) + len(idle.token_ids)
    requests = [Request(scheduler, prompt, **long_answer(seed=seed)) for seed in range(2)]
    cut = requests[0].result()
    assert cut.finish_reason == "length"
    assert cut.text.endswith("held back")
    assert cut.text == "".join(p for chunk in requests[0].chunks for p in chunk.pieces)
    # What is idle has given way first, and the other answer has the room of the one cut off.
    assert cut.usage.prompt_tokens + cut.usage.completion_tokens >= room / 2 - 2
    last = requests[1].result()
    assert sum(map(len, scheduler._rounds.slots._slots)) <= room + 2
    assert last.usage.prompt_tokens + last.usage.completion_tokens >= room - 2


def test_a_failure_of_all_together_is_told_to_all(scheduler, model, monkeypatch):
    monkeypatch.setattr(scheduler.prompts, "stop_ids", frozenset())
    requests = [Request(scheduler, prompt_of(model, "Go on"), **long_answer()) for _ in range(3)]
    for request in requests:
        request.next()

    def fail(*_):
        raise EdgeVLError("the weights are damaged")

    with monkeypatch.context() as patched:
        patched.setattr("edgevl.engine.cpu.CpuEngine.decode", fail)
        assert [str(request.result()) for request in requests] == ["the weights are damaged"] * 3
    assert isinstance(Request(scheduler, prompt_of(model, "Go on"), max_tokens=2).result(), Answer)


def test_a_failure_to_choose_is_told_to_one(scheduler, model, monkeypatch):
    monkeypatch.setattr(scheduler.prompts, "stop_ids", frozenset())
    first, second = (
        Request(scheduler, prompt_of(model, "Go on"), **long_answer()) for _ in range(2)
    )
    for request in (first, second):
        request.next()

    def fail(*_):
        raise EdgeVLError("constraint: it is too complex")

    monkeypatch.setattr(first.ticket, "take", fail)
    assert isinstance(first.result(), EdgeVLError)
    assert isinstance(second.result(), Answer)


def test_an_answer_fills_the_context(scheduler, model, monkeypatch):
    monkeypatch.setattr(scheduler.prompts, "stop_ids", frozenset())
    answer = Request(scheduler, prompt_of(model, "Go on"), **long_answer()).result()
    assert answer.finish_reason == "length"
    assert answer.usage.prompt_tokens + answer.usage.completion_tokens == scheduler.max_context


def test_answers_go_on_while_a_prompt_is_read(scheduler, model, monkeypatch):
    monkeypatch.setattr(scheduler.prompts, "stop_ids", frozenset())
    steady = Request(scheduler, prompt_of(model, "Go on"), **long_answer())
    steady.next()
    so_far, encode = [], scheduler.model.engine.__class__.encode_images

    def counted(self, pixels):
        so_far.append(len(steady.ticket._token_ids))
        return encode(self, pixels)

    monkeypatch.setattr("edgevl.engine.cpu.CpuEngine.encode_images", counted)
    pictures = [picture(model, seed) for seed in range(10, 13)]
    Request(scheduler, prompt_of(model, "What?", *pictures), max_tokens=1).result()
    steady.ticket.cancel()
    assert len(so_far) >= 3
    assert len(set(so_far)) == len(so_far)  # a token at least between two tiles


def test_a_prompt_is_left_within_a_tile(scheduler, model, monkeypatch):
    tiles, encode = [], scheduler.model.engine.__class__.encode_images

    def cancelling(self, pixels):
        tiles.append(pixels)
        request.ticket.cancel()
        return encode(self, pixels)

    pictures = [picture(model, seed) for seed in range(20, 23)]
    prompt = prompt_of(model, "What?", *pictures)
    monkeypatch.setattr("edgevl.engine.cpu.CpuEngine.encode_images", cancelling)
    with scheduler._changed:  # or it might begin before there is a request to cancel
        request = Request(scheduler, prompt, max_tokens=1)
    assert request.result().finish_reason == "cancelled"
    assert len(tiles) == 1


def test_who_waits_can_leave_at_once(scheduler, model, monkeypatch):
    monkeypatch.setattr(scheduler.prompts, "stop_ids", frozenset())
    prompt = prompt_of(model, "Go on")
    running = [Request(scheduler, prompt, **long_answer()) for _ in range(4)]
    until(lambda: scheduler.waiting == 0)
    waiting = Request(scheduler, prompt)
    waiting.ticket.cancel()
    assert waiting.events.get_nowait().finish_reason == "cancelled"
    assert scheduler.waiting == 0
    for request in running:
        request.ticket.cancel()


def test_who_cannot_be_told_is_gone(scheduler, model, monkeypatch):
    def gone(event):
        raise RuntimeError("the loop is closed")

    monkeypatch.setattr(scheduler.prompts, "stop_ids", frozenset())
    ticket = scheduler.submit(prompt_of(model, "Go on"), SamplingParams(**long_answer()), gone)
    until(lambda: scheduler.running + scheduler.waiting == 0)
    assert ticket.answer(0).usage.completion_tokens <= 2
    assert scheduler.alive


def test_what_is_too_long_is_refused_at_once(scheduler, model):
    with pytest.raises(ContextLengthError, match=r"the prompt needs \d+ tokens, but the context"):
        Request(scheduler, prompt_of(model, "word " * scheduler.max_context))


def test_closing_lets_answers_end(directory, model):
    scheduler = Scheduler(edgevl.load(directory, threads=1), 2)
    requests = [Request(scheduler, prompt_of(model, f"{n}"), max_tokens=5) for n in range(5)]
    scheduler.close(60)
    assert not scheduler.alive
    assert all(request.result().finish_reason in ("stop", "length") for request in requests)
    with pytest.raises(EdgeVLError, match="shutting down"):
        Request(scheduler, prompt_of(model, "Hello"))


def test_closing_cancels_what_takes_too_long(directory, model):
    scheduler = Scheduler(edgevl.load(directory, threads=1), 2)
    prompt = prompt_of(model, "Go on")
    requests = [Request(scheduler, prompt, **long_answer()) for _ in range(5)]
    requests[0].next()
    scheduler.close(0.01)
    assert requests[-1].result().finish_reason == "cancelled"


def test_many_threads(scheduler, model):
    prompt = prompt_of(model, "What is this?", picture(model, 1))
    expected = Request(scheduler, prompt, max_tokens=6).result().token_ids
    answers = []

    def ask(number):
        session = Session(model.checkpoint, scheduler)
        image = picture_image(1)
        for _ in range(3):
            stream = session.stream("What is this?", images=[image], max_tokens=6)
            session.reset()
            if number % 2:
                stream.close()
            else:
                for _ in stream:
                    pass
                answers.append(stream.answer.token_ids)
            session.reset()

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [expected] * 9


# --- which sequence takes a prompt ------------------------------------------------------------


@pytest.fixture
def slots(directory):
    return Slots(edgevl.load(directory, threads=1).engine, 3)


def test_a_conversation_goes_on_in_its_slot(slots, model):
    first = slots.take(prompt_of(model, "Hello there, how are you?"), 100)
    first.read(prompt_of(model, "Hello there, how are you?"))
    slots.release(first)
    assert slots.take(prompt_of(model, "Hello there, how are you today?"), 100) is first


def test_what_is_in_use_is_shared_and_not_taken(slots, model):
    prompt = prompt_of(model, "Hello there, how are you?")
    first = slots.take(prompt, 100)
    first.read(prompt)
    second = slots.take(prompt, 100)
    assert second is not first
    assert len(second) == len(first)
    third = slots.take(prompt, 100)
    assert len({id(slot) for slot in (first, second, third)}) == 3
    assert slots.take(prompt, 100) is None


def test_a_long_conversation_is_not_lost_to_a_short_prefix(slots, model):
    long = prompt_of(model, "word " * 60)
    first = slots.take(long, 200)
    first.read(long)
    slots.release(first)
    other = prompt_of(model, "something else")
    second = slots.take(other, 100)
    assert second is not first
    assert 0 < len(second) < len(other.token_ids)  # what the template begins with
    assert len(first) == len(long.token_ids)


def test_the_slot_idle_for_longest_gives_way(slots, model):
    taken = []
    for word in "abc":
        prompt = prompt_of(model, word * 60)
        slot = slots.take(prompt, 200)
        slot.read(prompt)
        taken.append(slot)
    for slot in (taken[1], taken[0], taken[2]):
        slots.release(slot)
    assert slots.take(prompt_of(model, "d" * 60), 200) is taken[1]


def test_memory_bounds_what_is_held(slots, model):
    prompts = [prompt_of(model, letter * 60) for letter in "abc"]
    length = max(len(prompt.token_ids) for prompt in prompts)
    slots._room = 2.5 * length
    first = slots.take(prompts[0], length)
    first.read(prompts[0])
    slots.release(first)
    second = slots.take(prompts[1], length)
    second.read(prompts[1])
    assert len(first)
    assert slots.take(prompts[2], 2 * length) is None  # the two together are too much
    third = slots.take(prompts[2], length)
    assert third is not None
    assert not len(first) or third is first  # what was idle made room
    slots.release(second)
    slots.release(third)
    assert slots.take(prompts[0], 100 * length) is not None  # alone, anything is tried


def test_an_engine_with_one_sequence_has_one_slot(directory, model):
    slots = Slots(edgevl.load(directory, engine="reference").engine, 8)
    prompt = prompt_of(model, "Hello")
    slot = slots.take(prompt, 100)
    assert slots.take(prompt, 100) is None
    slots.release(slot)
    assert slots.take(prompt, 100) is slot


def test_requests_to_an_engine_with_one_sequence_take_turns(directory, model):
    scheduler = Scheduler(edgevl.load(directory, engine="reference"))
    prompts = [prompt_of(model, f"Question {n}") for n in range(3)]
    answers = [Request(scheduler, prompt, max_tokens=3) for prompt in prompts]
    assert all(len(request.result().token_ids) <= 3 for request in answers)
    scheduler.close(10)
