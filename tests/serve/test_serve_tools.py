"""Tool calls through the official client: forced with the shipped model, chosen with a script."""

import json
import shutil
import threading

import pytest

import edgevl
from edgevl.generate.constraint import Constraint
from edgevl.loading import locate
from edgevl.preprocess.tools import Tool
from repository import DATA
from running_server import METER, ScriptedScheduler, picture, serving, text, user

openai = pytest.importorskip("openai", reason="the official client is not installed")

READING = {
    "type": "object",
    "properties": {"value": {"type": "integer"}, "unit": {"enum": ["kWh", "m3"]}},
    "required": ["value", "unit"],
    "additionalProperties": False,
}


def tool(name, parameters=None, **more):
    function = {"name": name, "description": f"Does {name}.", **more}
    if parameters is not None:
        function["parameters"] = parameters
    return {"type": "function", "function": function}


TOOLS = [tool("store_reading", READING), tool("now")]


def client_of(url):
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60)


@pytest.fixture(scope="module")
def client():
    with serving(lambda: edgevl.load("tiny", threads=1)) as running, client_of(running.url) as it:
        yield it


def ask(client, *messages, **more):
    return client.chat.completions.create(model="tiny", messages=list(messages), **more)


def called(name, arguments="{}", call_id="c1"):
    return {
        "id": call_id,
        "type": "function",
        "function": {"name": name, "arguments": arguments},
    }


def result(call_id, content="done"):
    return {"role": "tool", "tool_call_id": call_id, "content": content}


QUESTION = user(picture(METER), text("Store what the meter says."))


# --- with the shipped model -------------------------------------------------------------------


def test_a_required_call_is_valid(client):
    completion = ask(
        client, QUESTION, tools=TOOLS, tool_choice="required", parallel_tool_calls=False
    )
    (choice,) = completion.choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    (call,) = choice.message.tool_calls
    assert call.id.startswith("call_")
    arguments = json.loads(call.function.arguments)
    if call.function.name == "store_reading":
        assert isinstance(arguments["value"], int)
        assert arguments["unit"] in ("kWh", "m3")
    else:
        assert (call.function.name, arguments) == ("now", {})


@pytest.mark.parametrize("stream", [False, True])
def test_a_named_call_and_what_follows(client, stream):
    choice = {"type": "function", "function": {"name": "store_reading"}}
    asked = ask(client, QUESTION, tools=TOOLS, tool_choice=choice, stream=stream)
    if stream:
        chunks = [chunk.choices[0] for chunk in asked]
        assert chunks[-1].finish_reason == "tool_calls"
        (call,) = [call for chunk in chunks for call in chunk.delta.tool_calls or ()]
        assert call.index == 0
        assert not any(chunk.delta.content for chunk in chunks)
    else:
        (call,) = asked.choices[0].message.tool_calls
    assert set(json.loads(call.function.arguments)) == {"value", "unit"}
    answer = ask(
        client,
        QUESTION,
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [called(call.function.name, call.function.arguments, call.id)],
        },
        result(call.id, "stored"),
        tools=TOOLS,
    )
    assert answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.prompt_tokens_details.cached_tokens > 0


def test_a_message_can_be_sent_back_as_it_came(client):
    forced = {"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False}
    message = ask(client, QUESTION, **forced).choices[0].message
    results = [result(call.id) for call in message.tool_calls]
    assert ask(client, QUESTION, message.to_dict(), *results, tools=TOOLS, max_tokens=2)


def test_no_tools_with_none(client):
    with_tools = ask(client, QUESTION, tools=TOOLS, tool_choice="none", max_tokens=2)
    without = ask(client, QUESTION, max_tokens=2)
    assert with_tools.usage.prompt_tokens == without.usage.prompt_tokens
    shown = ask(client, QUESTION, tools=TOOLS, max_tokens=2)
    assert shown.usage.prompt_tokens > without.usage.prompt_tokens


OBJECT = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"]}
FORMAT = {"type": "json_schema", "json_schema": {"name": "x", "schema": OBJECT}}


@pytest.mark.parametrize("choice", ["auto", "required", "none"])
def test_tools_with_a_form(client, choice):
    """A call or an object; with required a call, with none an object."""
    kinds = set()
    for seed in range(8):
        more = {"temperature": 3.0, "seed": seed, "max_tokens": 300, "parallel_tool_calls": False}
        answer = ask(
            client, QUESTION, tools=TOOLS, tool_choice=choice, response_format=FORMAT, **more
        ).choices[0]
        if answer.message.tool_calls:
            [call] = answer.message.tool_calls
            assert isinstance(json.loads(call.function.arguments), dict)
            assert (answer.message.content, answer.finish_reason) == (None, "tool_calls")
            kinds.add("call")
        elif answer.finish_reason == "stop":
            assert json.loads(answer.message.content) in ({"n": 1}, {"n": 2})
            kinds.add("object")
    assert kinds <= {"auto": {"call", "object"}, "required": {"call"}, "none": {"object"}}[choice]
    assert kinds


CALLS = {"role": "assistant", "tool_calls": [called("now", call_id="a"), called("now", "{}", "b")]}


@pytest.mark.parametrize(
    ("messages", "more", "param", "words"),
    [
        ([], {"tools": [tool("bad name")]}, "tools[0].function", "letters, digits"),
        ([], {"tools": [tool("a"), tool("a")]}, "tools", "two are named a"),
        ([], {"tools": [tool("a", {"type": "string"})]}, "tools[0].function", '"object"'),
        ([], {"tool_choice": "required"}, "tool_choice", "needs tools"),
        (
            [],
            {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "f"}}},
            "tool_choice",
            "no tool is named 'f'",
        ),
        (
            [],
            {"tools": [tool("a", {"properties": {"x": {"type": "odd"}}})]}
            | {"tool_choice": "required"},
            "tools.a.parameters.properties.x.type",
            "odd",
        ),
        # Also where they need not be called, since the answer is one or the other.
        (
            [],
            {"tools": [tool("a", {"properties": {"x": {"not": {}}}})]}
            | {"response_format": {"type": "json_object"}},
            "tools.a.parameters.properties.x.not",
            "",
        ),
        (
            [],
            {"tools": TOOLS, "tool_choice": "required", "extra_body": {"enable_thinking": True}},
            "tool_choice",
            "thinking",
        ),
        ([result("x")], {}, "messages[1].tool_call_id", "'x' is not that of a call"),
        ([CALLS, result("a"), result("a")], {}, "messages[3].tool_call_id", "has a result already"),
        ([CALLS, result("a"), user(text("and?"))], {}, "messages", "the tool call 'b' must come"),
        ([CALLS, result("b")], {}, "messages", "the tool call 'a' must come"),
        (
            [{"role": "assistant", "tool_calls": [called("now", "[]")]}, result("c1")],
            {},
            "messages[1].tool_calls",
            "must be a JSON object",
        ),
    ],
)
def test_faults(client, messages, more, param, words):
    with pytest.raises(openai.BadRequestError) as error:
        ask(client, user(text("Hello")), *messages, **more)
    assert error.value.param == param
    assert words in error.value.message
    assert "\n" not in error.value.body["message"]


# --- with a model that says what it should ----------------------------------------------------


@pytest.fixture
def scripted(monkeypatch):
    monkeypatch.setattr("edgevl.serve.service.Scheduler", ScriptedScheduler)
    with serving(lambda: edgevl.load("tiny", threads=1)) as running, client_of(running.url) as it:
        yield it, running.service.scheduler


def in_background(work):
    results = []
    thread = threading.Thread(target=lambda: results.append(work()))
    thread.start()
    return thread, results


def test_results_come_in_the_order_of_the_calls(scripted):
    client, scheduler = scripted
    prompts = []
    for order in ("ab", "ba"):
        thread, _ = in_background(
            lambda order=order: ask(
                client,
                user(text("Hello")),
                CALLS,
                *(result(call_id, f"result {call_id}") for call_id in order),
            )
        )
        job = scheduler.next()
        prompts.append(job.prompt.token_ids.tolist())
        job.end("Yes")
        thread.join(10)
    assert prompts[0] == prompts[1]
    said = scheduler.prompts.tokenizer.decode(prompts[0], skip_special_tokens=False)
    assert said.index("result a") < said.index("result b")


@pytest.mark.parametrize("stream", [False, True])
def test_a_model_that_calls_of_itself(scripted, stream):
    client, scheduler = scripted

    def work():
        asked = ask(client, user(text("Hello")), tools=TOOLS, stream=stream, n=2)
        return list(asked) if stream else asked

    thread, results = in_background(work)
    first, second = scheduler.next(), scheduler.next()
    call = '<tool_call>\n{"name": "store_reading", "arguments": {"value": 7}}\n</tool_call>'
    for piece in ("Let me see.\n", *call, "\n" + call.replace("7", "8")):
        first.say(piece)
    first.end()
    second.say("<tool_call> is how I would call it")
    second.end()
    thread.join(10)
    (found,) = results
    if stream:
        deltas = {0: [], 1: []}
        for chunk in found:
            for choice in chunk.choices:
                deltas[choice.index].append(choice)
        texts = ["".join(c.delta.content or "" for c in deltas[n]) for n in (0, 1)]
        calls = [[x for c in deltas[n] for x in c.delta.tool_calls or ()] for n in (0, 1)]
        assert [call.index for call in calls[0]] == [0, 1]
        reasons = [deltas[n][-1].finish_reason for n in (0, 1)]
    else:
        texts = [choice.message.content for choice in found.choices]
        calls = [choice.message.tool_calls or [] for choice in found.choices]
        reasons = [choice.finish_reason for choice in found.choices]
    assert texts == ["Let me see.", "<tool_call> is how I would call it"]
    assert [[c.function.arguments for c in each] for each in calls] == [
        ['{"value": 7}', '{"value": 8}'],
        [],
    ]
    assert len({call.id for call in calls[0]}) == 2
    assert reasons == ["tool_calls", "stop"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_model_that_may_call_once(scripted, stream):
    """What it says after its first call is not given, nor what that took."""
    client, scheduler = scripted
    asking = {"tools": TOOLS, "parallel_tool_calls": False, "stream": stream, "logprobs": True}

    def work():
        asked = ask(client, user(text("Hello")), **asking)
        return list(asked) if stream else asked

    thread, results = in_background(work)
    job = scheduler.next()
    call = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
    for piece in ("I look.", "\n" + call + "\n" + call, "\nAnd", "\n" + call):
        job.say(piece)
    job.end()
    thread.join(10)
    (found,) = results
    if stream:
        choices = [chunk.choices[0] for chunk in found]
        said = "".join(choice.delta.content or "" for choice in choices)
        calls = [call for choice in choices for call in choice.delta.tool_calls or ()]
        tokens = [token for c in choices if c.logprobs for token in c.logprobs.content]
        reason = choices[-1].finish_reason
    else:
        (choice,) = found.choices
        said, calls = choice.message.content, choice.message.tool_calls
        tokens, reason = choice.logprobs.content, choice.finish_reason
    assert (said, [call.function.name for call in calls]) == ("I look.", ["now"])
    assert (len(tokens), reason) == (2, "tool_calls")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("words", "content", "calls"),
    [
        ('{"name": "now", "arguments": {}}', None, [("now", "{}")]),
        (
            '```json\n{"name": "store_reading", "arguments": {"value": 7, "unit": "m3"}}\n```',
            None,
            [("store_reading", '{"value": 7, "unit": "m3"}')],
        ),
        ('{"name": "later", "arguments": {}}', '{"name": "later", "arguments": {}}', []),
    ],
)
def test_calls_without_tags(scripted, stream, words, content, calls):
    client, scheduler = scripted

    def work():
        asked = ask(client, user(text("Hello")), tools=TOOLS, stream=stream)
        return list(asked) if stream else asked

    thread, results = in_background(work)
    job = scheduler.next()
    for piece in words:
        job.say(piece)
    job.end()
    thread.join(10)
    (found,) = results
    if stream:
        choices = [choice for chunk in found for choice in chunk.choices]
        said = "".join(choice.delta.content or "" for choice in choices) or None
        called = [call for choice in choices for call in choice.delta.tool_calls or ()]
        reason = choices[-1].finish_reason
    else:
        (choice,) = found.choices
        said, called = choice.message.content, choice.message.tool_calls or []
        reason = choice.finish_reason
    assert said == content
    assert [(call.function.name, call.function.arguments) for call in called] == calls
    assert reason == ("tool_calls" if calls else "stop")


@pytest.mark.parametrize("arguments", ["", " ", None, {}, "{}", "absent"])
def test_no_arguments_in_history_are_an_empty_object(scripted, arguments):
    """Clients send what the server of another model gave them."""
    client, scheduler = scripted
    call = called("now", arguments)
    if arguments == "absent":
        del call["function"]["arguments"]
    messages = [user(text("Hi")), {"role": "assistant", "tool_calls": [call]}, result("c1")]
    thread, _ = in_background(lambda: ask(client, *messages))
    job = scheduler.next()
    job.end("Yes")
    thread.join(10)
    prompt = scheduler.prompts.tokenizer.decode(job.prompt.token_ids.tolist(), False)
    assert '{"name": "now", "arguments": {}}' in prompt


def test_arguments_as_an_object_in_history(scripted):
    client, scheduler = scripted
    call = called("store_reading", {"unit": "m³"})
    messages = [user(text("Hi")), {"role": "assistant", "tool_calls": [call]}, result("c1")]
    thread, _ = in_background(lambda: ask(client, *messages))
    job = scheduler.next()
    job.end("Yes")
    thread.join(10)
    prompt = scheduler.prompts.tokenizer.decode(job.prompt.token_ids.tolist(), False)
    assert '"arguments": {"unit": "m³"}}' in prompt


QWEN3_TEMPLATE = (DATA / "qwen3_chat_template.jinja").read_text()


@pytest.fixture
def qwen3(monkeypatch, tmp_path):
    """The shipped model with Qwen3's template, which has three kinds of ``enable_thinking``."""
    monkeypatch.setattr("edgevl.serve.service.Scheduler", ScriptedScheduler)
    path = shutil.copytree(locate("tiny"), tmp_path / "tiny")
    (path / "chat_template.jinja").write_text(QWEN3_TEMPLATE)
    with serving(lambda: edgevl.load(path, threads=1)) as running, client_of(running.url) as it:
        yield it, running.service.scheduler


def test_thinking_on_off_and_as_the_template_has_it(qwen3):
    client, scheduler = qwen3

    def prompt_with(*messages, **extra):
        asked = messages or (user(text("Hi")),)
        thread, _ = in_background(lambda: ask(client, *asked, extra_body=extra))
        job = scheduler.next()
        job.end("Yes")
        thread.join(10)
        return scheduler.prompts.tokenizer.decode(job.prompt.token_ids.tolist(), False)

    plain = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    off = plain + "<think>\n\n</think>\n\n"
    assert prompt_with() == prompt_with(enable_thinking=None) == plain
    assert prompt_with(enable_thinking=False) == off
    assert prompt_with(chat_template_kwargs={"enable_thinking": False}) == off
    assert prompt_with(chat_template_kwargs={}) == plain
    on = prompt_with(chat_template_kwargs={"enable_thinking": True})
    assert on == prompt_with(enable_thinking=True)
    assert on.endswith(plain)
    assert "thinking process within <think>" in on
    # The field itself comes before the one in chat_template_kwargs.
    both = {"enable_thinking": False, "chat_template_kwargs": {"enable_thinking": True}}
    assert prompt_with(**both) == off
    # Thoughts that come back are kept or dropped as the template has it.
    asked, said = user(text("Hi")), {"role": "assistant", "reasoning_content": "Hm."}
    called_now = said | {"content": "", "tool_calls": [called("now")]}
    assert "<think>\nHm.\n</think>\n\n<tool_call>" in prompt_with(asked, called_now, result("c1"))
    assert "Hm." not in prompt_with(asked, said | {"content": "Yes"}, asked)


def test_an_answer_cut_off_in_a_call_is_text(scripted):
    client, scheduler = scripted
    thread, results = in_background(lambda: ask(client, user(text("Hello")), tools=TOOLS))
    job = scheduler.next()
    job.say('<tool_call>\n{"name": "now", "argu')
    job.end(finish_reason="length")
    thread.join(10)
    (choice,) = results[0].choices
    assert choice.finish_reason == "length"
    assert choice.message.content == '<tool_call>\n{"name": "now", "argu'
    assert not choice.message.tool_calls


def test_an_answer_cut_off_after_a_call_says_so(scripted):
    client, scheduler = scripted
    thread, results = in_background(lambda: ask(client, user(text("Hello")), tools=TOOLS))
    job = scheduler.next()
    job.say('<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>\n')
    job.end(finish_reason="length")
    thread.join(10)
    (choice,) = results[0].choices
    assert choice.message.tool_calls
    assert choice.finish_reason == "length"


@pytest.mark.parametrize("several", [False, True])
def test_one_call_or_several(scripted, several):
    client, scheduler = scripted
    forced = {"tool_choice": "required", "parallel_tool_calls": several}
    thread, _ = in_background(lambda: ask(client, user(text("Hi")), tools=[tool("now")], **forced))
    job = scheduler.next()
    job.end()
    thread.join(10)
    now = Tool("now", "Does now.", None)
    assert job.params.constraint == Constraint.tool_calls([now], several=several)
    assert job.params.constraint != Constraint.tool_calls([now], several=not several)
