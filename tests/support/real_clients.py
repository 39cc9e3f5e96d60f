"""What people ask `edgevl serve` with, against one that runs: a table of what each client got.

    edgevl serve tiny --no-ui &
    python tests/support/real_clients.py http://127.0.0.1:8000/v1 [CLIENT ...]

Not part of the tests, since the clients are many and large. They go into an environment of their
own, outside of the checkout, as ``tests/support/real_clients.txt`` says; what is not installed is
left out. Nothing but the server is asked, and whatever these libraries would send elsewhere is
off. Each thing that is tried is checked: the text is what a bare request gets, the picture is read,
objects and calls are of their schema. Exit status 1: something went wrong.
"""

import asyncio
import base64
import json
import os
import sys
import tempfile
import urllib.request
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from repository import EXAMPLES

os.environ |= {
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "LITELLM_TELEMETRY": "False",
    "OPENAI_AGENTS_DISABLE_TRACING": "1",
    "LANGCHAIN_TRACING_V2": "false",
    "LANGSMITH_TRACING": "false",
    "DO_NOT_TRACK": "1",
    "OPENAI_API_KEY": "none",
}

METER = EXAMPLES / "meter.png"
DATA_URL = f"data:image/png;base64,{base64.b64encode(METER.read_bytes()).decode()}"
QUESTION = "What number is on the display?"
GREETING = "Hello"
READ = "7305"
#: For questions whose answer could else go on until the context is full.
MAX_TOKENS = 200

Tries = dict[str, Callable[[], Any]]


def bare(url: str, **body: Any) -> str:
    """Return the text of an answer to a request made by hand: what the clients must get as well."""
    data = json.dumps({"model": "tiny", **body}).encode()
    request = urllib.request.Request(
        f"{url}/chat/completions", data, {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        text: str = json.load(response)["choices"][0]["message"]["content"]
    return text


def check(holds: object, what: object) -> None:
    if not holds:
        raise AssertionError(f"got {what!r}")


def is_reading(value: Any) -> str:
    """Check an object of the schema; return it as text."""
    number = value["number"] if isinstance(value, dict) else value.number
    check(type(number) is int, value)
    return f'{{"number": {number}}}'


def is_call(name: str, arguments: str | dict[str, Any]) -> str:
    """Check a call of the tool; return it as text."""
    parsed = json.loads(arguments) if isinstance(arguments, str) else arguments
    check(name == "weather" and list(parsed) == ["city"], (name, arguments))
    check(parsed["city"] in ("Paris", "Rome"), arguments)
    return "a call of weather"


def weather(city: Literal["Paris", "Rome"]) -> str:
    """Return the weather of a city."""
    return f"It is sunny in {city}."


TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Return the weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Paris", "Rome"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
        "strict": True,
    },
}
SEEN = [
    {
        "role": "user",
        "content": [
            {"type": "image_url", "image_url": {"url": DATA_URL}},
            {"type": "text", "text": QUESTION},
        ],
    }
]
SAID = [{"role": "user", "content": GREETING}]


def _reading() -> Any:
    from pydantic import BaseModel

    class Reading(BaseModel):
        number: int

    return Reading


def _format() -> dict[str, Any]:
    schema = _reading().model_json_schema() | {"additionalProperties": False}
    return {
        "type": "json_schema",
        "json_schema": {"name": "reading", "schema": schema, "strict": True},
    }


def with_openai(url: str, said: str) -> Tries:
    import openai

    client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
    ask = client.chat.completions.create
    more: dict[str, Any] = {"model": "tiny", "max_tokens": MAX_TOKENS}

    def chat() -> str:
        text = ask(messages=SAID, **more).choices[0].message.content
        check(text == said, text)
        return "the same text"

    def stream() -> str:
        chunks = list(
            ask(messages=SEEN, stream=True, stream_options={"include_usage": True}, **more)
        )
        text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        check(text == READ and chunks[-1].usage.total_tokens > 0, text)
        return text

    def picture() -> str:
        text = ask(messages=SEEN, **more).choices[0].message.content
        check(text == READ, text)
        return text

    def parse() -> str:
        parsed = client.chat.completions.parse(messages=SEEN, response_format=_reading(), **more)
        return is_reading(parsed.choices[0].message.parsed)

    def tools() -> str:
        messages: list[Any] = list(SAID)
        message = (
            ask(
                messages=messages,
                tools=[TOOL],
                tool_choice="required",
                parallel_tool_calls=False,
                **more,
            )
            .choices[0]
            .message
        )
        call = message.tool_calls[0]
        told = is_call(call.function.name, call.function.arguments)
        result = weather(json.loads(call.function.arguments)["city"])
        messages += [message, {"role": "tool", "tool_call_id": call.id, "content": result}]
        text = ask(messages=messages, tools=[TOOL], **more).choices[0].message.content
        check(text, text)
        return f"{told}, its result sent back"

    def both() -> str:
        message = (
            client.chat.completions.parse(
                messages=SEEN, tools=[TOOL], response_format=_reading(), **more
            )
            .choices[0]
            .message
        )
        if message.tool_calls:
            call = message.tool_calls[0]
            return is_call(call.function.name, call.function.arguments)
        return is_reading(message.parsed)

    return {
        "chat": chat, "stream": stream, "picture": picture, "object": parse, "tools": tools,
        "tools with object": both,
    }  # fmt: skip


def with_litellm(url: str, said: str) -> Tries:
    import litellm

    litellm.telemetry = False
    more: dict[str, Any] = {
        "model": "openai/tiny",
        "api_base": url,
        "api_key": "none",
        "max_tokens": MAX_TOKENS,
    }

    def ask(**given: Any) -> Any:
        return litellm.completion(**more, **given)

    def chat() -> str:
        text = ask(messages=SAID).choices[0].message.content
        check(text == said, text)
        return "the same text"

    def stream() -> str:
        text = "".join(c.choices[0].delta.content or "" for c in ask(messages=SEEN, stream=True))
        check(text == READ, text)
        return text

    def picture() -> str:
        text = ask(messages=SEEN).choices[0].message.content
        check(text == READ, text)
        return text

    def parse() -> str:
        text = ask(messages=SEEN, response_format=_reading()).choices[0].message.content
        return is_reading(json.loads(text))

    def tools() -> str:
        messages: list[Any] = list(SAID)
        message = ask(messages=messages, tools=[TOOL], tool_choice="required").choices[0].message
        told = ""
        messages.append(message)
        for call in message.tool_calls:
            told = is_call(call.function.name, call.function.arguments)
            messages.append({"role": "tool", "tool_call_id": call.id, "content": "Sunny."})
        check(ask(messages=messages, tools=[TOOL]).choices[0].message.content, "nothing")
        return f"{told}, its result sent back"

    def both() -> str:
        answer = ask(messages=SEEN, tools=[TOOL], response_format=_format())
        message = answer.choices[0].message
        if message.tool_calls:
            call = message.tool_calls[0]
            return is_call(call.function.name, call.function.arguments)
        return is_reading(json.loads(message.content))

    return {
        "chat": chat, "stream": stream, "picture": picture, "object": parse, "tools": tools,
        "tools with object": both,
    }  # fmt: skip


def with_langchain(url: str, said: str) -> Tries:
    from langchain_core.messages import HumanMessage, ToolMessage
    from langchain_openai import ChatOpenAI

    model = ChatOpenAI(
        model="tiny", base_url=url, api_key="none", max_tokens=MAX_TOKENS, temperature=0
    )
    seen = [HumanMessage(content=SEEN[0]["content"])]

    def chat() -> str:
        text = model.invoke(GREETING).content
        check(text == said, text)
        return "the same text"

    def stream() -> str:
        text = "".join(str(chunk.content) for chunk in model.stream(seen))
        check(text == READ, text)
        return text

    def picture() -> str:
        text = model.invoke(seen).content
        check(text == READ, text)
        return str(text)

    def parse() -> str:
        return is_reading(model.with_structured_output(_reading()).invoke(seen))

    def tools() -> str:
        message = model.bind_tools([TOOL], tool_choice="any").invoke(GREETING)
        told = ""
        messages: list[Any] = [HumanMessage(GREETING), message]
        for call in message.tool_calls:
            told = is_call(call["name"], call["args"])
            messages.append(ToolMessage("Sunny.", tool_call_id=call["id"]))
        check(model.bind_tools([TOOL]).invoke(messages).content, "nothing")
        return f"{told}, its result sent back"

    def both() -> str:
        bound = model.bind_tools([TOOL], response_format=_reading(), strict=True)
        message = bound.invoke(seen)
        if message.tool_calls:
            return is_call(message.tool_calls[0]["name"], message.tool_calls[0]["args"])
        return is_reading(message.additional_kwargs["parsed"])

    return {
        "chat": chat, "stream": stream, "picture": picture, "object": parse, "tools": tools,
        "tools with object": both,
    }  # fmt: skip


def with_llama_index(url: str, said: str) -> Tries:
    from llama_index.core.llms import ChatMessage, ImageBlock, TextBlock
    from llama_index.core.tools import FunctionTool
    from llama_index.llms.openai_like import OpenAILike

    model = OpenAILike(
        model="tiny", api_base=url, api_key="none", is_chat_model=True, temperature=0,
        is_function_calling_model=True, max_tokens=MAX_TOKENS, should_use_structured_outputs=True,
    )  # fmt: skip
    seen = [ChatMessage(role="user", blocks=[ImageBlock(path=METER), TextBlock(text=QUESTION)])]
    said_messages = [ChatMessage(role="user", content=GREETING)]

    def chat() -> str:
        text = model.chat(said_messages).message.content
        check(text == said, text)
        return "the same text"

    def stream() -> str:
        text = "".join(chunk.delta or "" for chunk in model.stream_chat(seen))
        check(text == READ, text)
        return text

    def picture() -> str:
        text = model.chat(seen).message.content
        check(text == READ, text)
        return str(text)

    def parse() -> str:
        return is_reading(model.as_structured_llm(_reading()).chat(seen).raw)

    def tools() -> str:
        tool = FunctionTool.from_defaults(weather)
        answer = model.chat_with_tools([tool], chat_history=said_messages, tool_required=True)
        calls = model.get_tool_calls_from_response(answer)
        told = [is_call(call.tool_name, call.tool_kwargs) for call in calls]
        results = [
            ChatMessage(
                role="tool", content="Sunny.", additional_kwargs={"tool_call_id": c.tool_id}
            )
            for c in calls
        ]
        again = model.chat_with_tools(
            [tool], chat_history=[*said_messages, answer.message, *results]
        )
        check(again.message.content, "nothing")
        return f"{told[0]}, its result sent back"

    def both() -> str:
        tool = FunctionTool.from_defaults(weather)
        answer = model.chat_with_tools([tool], chat_history=seen, response_format=_format())
        calls = model.get_tool_calls_from_response(answer, error_on_no_tool_call=False)
        if calls:
            return is_call(calls[0].tool_name, calls[0].tool_kwargs)
        return is_reading(json.loads(answer.message.content))

    return {
        "chat": chat, "stream": stream, "picture": picture, "object": parse, "tools": tools,
        "tools with object": both,
    }  # fmt: skip


def with_pydantic_ai(url: str, said: str) -> Tries:
    from pydantic_ai import Agent, BinaryContent, NativeOutput, ToolOutput
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider

    model = OpenAIChatModel("tiny", provider=OpenAIProvider(base_url=url, api_key="none"))
    seen = [BinaryContent(METER.read_bytes(), media_type="image/png"), QUESTION]
    settings: Any = {"max_tokens": MAX_TOKENS, "temperature": 0.0}

    def agent(**more: Any) -> Any:
        return Agent(model, model_settings=settings, **more)

    def chat() -> str:
        text = agent().run_sync(GREETING).output
        check(text == said, text)
        return "the same text"

    def stream() -> str:
        async def read() -> str:
            async with agent().run_stream(seen) as result:
                return "".join([piece async for piece in result.stream_text(delta=True)])

        text = asyncio.run(read())
        check(text == READ, text)
        return text

    def picture() -> str:
        text = agent().run_sync(seen).output
        check(text == READ, text)
        return str(text)

    def parse() -> str:
        return is_reading(agent(output_type=NativeOutput(_reading())).run_sync(seen).output)

    def tools() -> str:
        return is_reading(agent(output_type=ToolOutput(_reading())).run_sync(seen).output)

    def both() -> str:
        output = NativeOutput(_reading())
        return is_reading(agent(output_type=output, tools=[weather]).run_sync(seen).output)

    return {
        "chat": chat, "stream": stream, "picture": picture, "object": parse, "tools": tools,
        "tools with object": both,
    }  # fmt: skip


def with_instructor(url: str, said: str) -> Tries:
    import instructor
    import openai

    def ask(mode: Any, **more: Any) -> Any:
        client = instructor.from_openai(openai.OpenAI(base_url=url, api_key="none"), mode=mode)
        return client.chat.completions.create(
            model="tiny", messages=SEEN, response_model=_reading(), max_tokens=MAX_TOKENS, **more
        )

    def stream() -> str:
        partial = instructor.Partial[_reading()]
        client = instructor.from_openai(
            openai.OpenAI(base_url=url, api_key="none"), mode=instructor.Mode.JSON_SCHEMA
        )
        pieces = client.chat.completions.create(
            model="tiny", messages=SEEN, response_model=partial, max_tokens=MAX_TOKENS, stream=True
        )
        return is_reading(list(pieces)[-1])

    return {
        "stream": stream,
        "object": lambda: is_reading(ask(instructor.Mode.JSON_SCHEMA)),
        "tools": lambda: is_reading(ask(instructor.Mode.TOOLS)),
    }


def with_agents(url: str, said: str) -> Tries:
    from agents import Agent, ModelSettings, Runner, function_tool, set_tracing_disabled
    from agents.models.openai_chatcompletions import OpenAIChatCompletionsModel
    from openai import AsyncOpenAI
    from openai.types.responses import ResponseTextDeltaEvent

    set_tracing_disabled(True)
    client = AsyncOpenAI(base_url=url, api_key="none")
    model = OpenAIChatCompletionsModel("tiny", client)
    seen: Any = [
        {
            "role": "user",
            "content": [
                {"type": "input_image", "image_url": DATA_URL, "detail": "auto"},
                {"type": "input_text", "text": QUESTION},
            ],
        }
    ]
    called: list[str] = []

    def look_up(city: Literal["Paris", "Rome"]) -> str:
        """Return the weather of a city."""
        called.append(city)
        return weather(city)

    tool = function_tool(look_up, name_override="weather")

    def agent(settings: dict[str, Any] | None = None, **more: Any) -> Any:
        given: Any = {"max_tokens": MAX_TOKENS, "temperature": 0.0, **(settings or {})}
        return Agent(name="A", model=model, model_settings=ModelSettings(**given), **more)

    def run(of: Any, asked: Any) -> Any:
        return asyncio.run(Runner.run(of, asked)).final_output

    def chat() -> str:
        text = run(agent(), GREETING)
        check(text == said, text)
        return "the same text"

    def stream() -> str:
        async def read() -> str:
            result = Runner.run_streamed(agent(), seen)
            return "".join(
                [
                    event.data.delta
                    async for event in result.stream_events()
                    if event.type == "raw_response_event"
                    and isinstance(event.data, ResponseTextDeltaEvent)
                ]
            )

        text = asyncio.run(read())
        check(text == READ, text)
        return text

    def picture() -> str:
        text = run(agent(), seen)
        check(text == READ, text)
        return str(text)

    def parse() -> str:
        return is_reading(run(agent(output_type=_reading()), seen))

    def tools() -> str:
        called.clear()
        text = run(agent({"tool_choice": "required"}, tools=[tool]), GREETING)
        check(called and text, (called, text))
        return "weather was called, its result sent back"

    def both() -> str:
        return is_reading(run(agent(tools=[tool], output_type=_reading()), seen))

    return {
        "chat": chat, "stream": stream, "picture": picture, "object": parse, "tools": tools,
        "tools with object": both,
    }  # fmt: skip


def with_llm(url: str, said: str) -> Tries:
    folder = tempfile.mkdtemp()
    os.environ["LLM_USER_PATH"] = folder
    about = {
        "model_id": "tiny", "model_name": "tiny", "api_base": url, "vision": True,
        "supports_schema": True, "supports_tools": True,
    }  # fmt: skip
    Path(folder, "extra-openai-models.yaml").write_text(json.dumps([about]))
    import llm

    model = llm.get_model("tiny")
    meter = llm.Attachment(path=str(METER))

    def chat() -> str:
        text = model.prompt(GREETING, stream=False, max_tokens=MAX_TOKENS).text()
        check(text == said, text)
        return "the same text"

    def stream() -> str:
        text = "".join(model.prompt(QUESTION, attachments=[meter], max_tokens=MAX_TOKENS))
        check(text == READ, text)
        return text

    def picture() -> str:
        text = model.prompt(QUESTION, attachments=[meter], stream=False).text()
        check(text == READ, text)
        return text

    def parse() -> str:
        answer = model.prompt(QUESTION, attachments=[meter], schema=_reading(), stream=False)
        return is_reading(json.loads(answer.text()))

    def tools() -> str:
        answer = model.chain(GREETING, tools=[weather], options={"max_tokens": MAX_TOKENS})
        check(answer.text(), "nothing")
        return "offered; the answer is text"

    def both() -> str:
        answer = model.prompt(
            QUESTION, attachments=[meter], schema=_reading(), tools=[weather], stream=False,
            max_tokens=MAX_TOKENS,
        )  # fmt: skip
        if calls := answer.tool_calls():
            return is_call(calls[0].name, calls[0].arguments)
        return is_reading(json.loads(answer.text()))

    return {
        "chat": chat, "stream": stream, "picture": picture, "object": parse, "tools": tools,
        "tools with object": both,
    }  # fmt: skip


CLIENTS: dict[str, Callable[[str, str], Tries]] = {
    "openai": with_openai,
    "litellm": with_litellm,
    "langchain-openai": with_langchain,
    "llama-index-llms-openai-like": with_llama_index,
    "pydantic-ai-slim": with_pydantic_ai,
    "instructor": with_instructor,
    "openai-agents": with_agents,
    "llm": with_llm,
}


def main(url: str, *wanted: str) -> int:
    """Try all clients that are installed, or those that are wanted; print what came."""
    said = bare(url, messages=SAID, max_tokens=MAX_TOKENS)
    failures = 0
    print("| client | version | tried | what came |\n|---|---|---|---|")
    for name in wanted or CLIENTS:
        try:
            installed = version(name)
        except PackageNotFoundError:
            print(f"{name} is not installed", file=sys.stderr)
            continue
        for tried, run in CLIENTS[name](url, said).items():
            try:
                came = f"right: {run()}"
            except Exception as error:
                failures += 1
                came = f"wrong: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
            print(f"| {name} | {installed} | {tried} | {came} |", flush=True)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(*(sys.argv[1:] or ["http://127.0.0.1:8000/v1"])))
