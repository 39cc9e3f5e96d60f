"""The official client against a running server with the shipped model."""

import json

import httpx2
import pytest
from PIL import Image

import edgevl
from clips import write_clip
from repository import EXAMPLES
from running_server import data_url, picture, serving, text, user

openai = pytest.importorskip("openai", reason="the official client is not installed")

PART = "messages[0].content[0].image_url"
QUESTION = "What number is on the display?"


@pytest.fixture(scope="module")
def server():
    with serving(lambda: edgevl.load("tiny", threads=1), api_key="secret") as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(
        base_url=f"{server.url}/v1", api_key="secret", max_retries=0, timeout=30
    ) as client:
        yield client


def ask(client, *messages, **more):
    return client.chat.completions.create(model="tiny", messages=list(messages), **more)


def test_a_picture(client):
    completion = ask(client, user(picture(), text(QUESTION)))
    (choice,) = completion.choices
    assert choice.message.content == "7305"
    assert choice.message.role == "assistant"
    assert choice.finish_reason == "stop"
    assert completion.model == "tiny"
    usage = completion.usage
    assert usage.completion_tokens >= 1
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.prompt_tokens_details.image_tokens > 0
    assert completion.timings["ttft_ms"] > 0


def test_the_prompt_is_that_of_the_python_interface(client):
    """So the answers of server and chat agree, and the prefix cache serves both."""
    whole = edgevl.load("tiny", threads=1).ask(QUESTION, images=[EXAMPLES / "meter.png"])
    completion = ask(client, user(picture(), text(QUESTION)))
    assert completion.usage.prompt_tokens == whole.usage.prompt_tokens
    assert completion.usage.completion_tokens == whole.usage.completion_tokens
    again = ask(client, user(picture(), text(QUESTION)))
    assert again.usage.prompt_tokens_details.cached_tokens == whole.usage.prompt_tokens - 1


def test_stream(client):
    chunks = list(
        ask(
            client,
            user(picture(), text(QUESTION)),
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    deltas = [chunk.choices[0].delta for chunk in chunks[:-1]]
    assert [delta.role for delta in deltas[1:]] == [None] * (len(deltas) - 1)
    assert "".join(delta.content or "" for delta in deltas) == "7305"
    assert [c.choices[0].finish_reason for c in chunks[-3:-1]] == [None, "stop"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens >= 1
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == 1


def test_pictures_across_turns(client):
    """The same as in a conversation in Python."""
    meter, label = EXAMPLES / "meter.png", EXAMPLES / "label.png"
    chat = edgevl.load("tiny", threads=1).chat(system="Be brief.")
    first = chat.ask(QUESTION, images=[meter])
    second = chat.ask("What does the label say?", images=[label])
    completion = ask(
        client,
        {"role": "developer", "content": [text("Be "), text("brief.")]},
        user(picture(), text(QUESTION)),
        {"role": "assistant", "content": first.text},
        user(picture(data_url(label)), text("What does the label say?")),
    )
    assert completion.choices[0].message.content == second.text
    assert completion.usage.prompt_tokens == second.usage.prompt_tokens


def test_what_an_answer_gives_can_be_sent_back(client):
    first = ask(client, user(picture(), text(QUESTION))).choices[0].message
    second = ask(client, user(picture(), text(QUESTION)), first.to_dict(), user(text(QUESTION)))
    assert second.choices[0].message.content


def test_low_detail_is_one_tile(client, tmp_path):
    Image.new("RGB", (448, 224)).save(tmp_path / "wide.png")
    wide = data_url(tmp_path / "wide.png")

    def tokens(part, **more):
        asked = ask(client, user(part, text("?")), max_tokens=1, **more)
        return asked.usage.prompt_tokens_details.image_tokens

    low = tokens(picture(wide, detail="low"))
    assert tokens(picture(wide)) > low > 0
    assert tokens(picture(wide), extra_body={"max_tiles": 1}) == low


def test_a_video(client, tmp_path):
    pytest.importorskip("av")
    clip = write_clip(tmp_path / "clip.mp4")
    video = {"type": "video_url", "video_url": {"url": data_url(clip, "video/mp4")}}

    def tokens(frames):
        asked = ask(client, user(video, text("?")), max_tokens=1, extra_body={"frames": frames})
        return asked.usage.prompt_tokens_details.image_tokens

    assert tokens(4) == 2 * tokens(2) > 0


def test_frames_of_a_video_that_are_alike(server, client, tmp_path):
    pytest.importorskip("av")
    clip = write_clip(tmp_path / "clip.mp4", size=(80, 64))  # which no other test has shown
    video = {"type": "video_url", "video_url": {"url": data_url(clip, "video/mp4")}}
    engine = server.service.loaded().scheduler.model.engine

    def tiles(threshold):
        before = engine.timings().tiles
        more = {"frames": 4, "frame_threshold": threshold}
        ask(client, user(video, text("?")), max_tokens=1, extra_body=more)
        return engine.timings().tiles - before

    assert tiles(255) == 1
    assert tiles(None) == 3
    with pytest.raises(openai.BadRequestError, match="frame_threshold"):
        tiles(256)


def test_json_schema(client):
    schema = {
        "type": "object",
        "properties": {"number": {"type": "integer", "minimum": 0, "maximum": 9999}},
        "required": ["number"],
        "additionalProperties": False,
    }
    completion = ask(
        client,
        user(picture(), text(QUESTION)),
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "reading", "schema": schema, "strict": True},
        },
    )
    assert list(json.loads(completion.choices[0].message.content)) == ["number"]


def test_a_schema_beside_json_object(client):
    """As llama.cpp and others take it."""
    schema = {"type": "object", "properties": {"n": {"const": 7}}, "required": ["n"]}
    completion = ask(
        client,
        user(picture(), text(QUESTION)),
        response_format={"type": "json_object", "schema": schema},
    )
    assert json.loads(completion.choices[0].message.content) == {"n": 7}


def test_several_answers_and_seeds(client):
    def answers(**more):
        completion = ask(client, user(text("Hello")), n=3, temperature=20, max_tokens=8, **more)
        assert [choice.index for choice in completion.choices] == [0, 1, 2]
        return [choice.message.content for choice in completion.choices]

    assert answers(seed=-5) == answers(seed=-5)
    assert len(set(answers(seed=-5))) > 1
    assert answers(seed=-4)[:2] == answers(seed=-5)[1:]


def test_stop_and_length(client):
    said = ask(client, user(picture(), text(QUESTION)), stop=["30", "never"])
    assert said.choices[0].message.content == "7"
    assert said.choices[0].finish_reason == "stop"
    said = ask(client, user(picture(), text(QUESTION)), max_completion_tokens=1)
    assert said.choices[0].finish_reason == "length"
    assert said.usage.completion_tokens == 1


def test_completions(client):
    prompt = "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    completion = client.completions.create(model="tiny", prompt=prompt, max_tokens=5)
    (choice,) = completion.choices
    assert choice.text
    tokenizer = edgevl.load("tiny", threads=1).prompts.tokenizer
    ids = tokenizer.encode(prompt, add_special_tokens=False).ids
    assert completion.usage.prompt_tokens == len(ids)  # special tokens are tokens here
    same = client.completions.create(model="tiny", prompt=[ids, ids], max_tokens=5, n=2)
    assert [found.text for found in same.choices] == [choice.text] * 4
    assert [found.index for found in same.choices] == [0, 1, 2, 3]
    assert same.usage.prompt_tokens == 2 * len(ids)
    events = list(client.completions.create(model="tiny", prompt=prompt, max_tokens=5, stream=True))
    assert "".join(event.choices[0].text for event in events) == choice.text


def test_models(client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "edgevl"
    with pytest.raises(openai.NotFoundError) as error:
        client.models.retrieve("gpt-4o")
    assert error.value.code == "model_not_found"


@pytest.mark.parametrize(
    ("messages", "more", "param", "words"),
    [
        ([], {}, "messages", "at least 1"),
        ([user(picture("data:image/png;base64,AAAA"))], {}, PART, ""),
        ([user(picture("/etc/passwd"))], {}, PART, "data: URL"),
        (
            [user(picture("file:///etc/passwd"))],
            {},
            PART,
            "data: URL",
        ),
        ([user(picture("http://169.254.1.1/"))], {}, PART, ""),
        ([user(text("a"), {"type": "text"})], {}, "messages[0].content[1].text", "Missing"),
        ([user(picture(detail="fine"))], {}, f"{PART}.detail", ""),
        ([{"role": "king", "content": "a"}], {}, "messages[0]", "role"),
        ([{"role": "user", "content": {}}], {}, "messages[0].content", ""),
        ([user(text("a"))], {"temperature": -1}, "temperature", ""),
        ([user(text("a"))], {"temperature": "hot"}, "temperature", ""),
        ([user(text("a"))], {"n": 17}, "n", ""),
        ([user(text("a"))], {"max_tokens": 0}, "max_tokens", ""),
        ([user(text("a"))], {"stop": [""]}, "stop[0]", ""),
        ([user(text("a"))], {"frequency_penalty": 2.5}, "frequency_penalty", ""),
        ([user(text("a"))], {"logit_bias": {"5": -101}}, "logit_bias.5", ""),
        ([user(text("a"))], {"logit_bias": {"five": 1}}, "logit_bias", "'five'"),
        ([user(text("a"))], {"logit_bias": {"99999": 1}}, "logit_bias", "no token 99999"),
        (
            [user(text("a"))],
            {"extra_body": {"repetition_penalty": 1e-300}},
            "repetition_penalty",
            "",
        ),
        ([user(text("a"))], {"extra_body": {"repeat_penalty": 0}}, "repeat_penalty", ""),
        ([user(text("a"))], {"top_logprobs": 2}, "top_logprobs", "logprobs"),
        (
            [user({"type": "image_url", "image_url": "data:,"})],
            {},
            "messages[0].content[0].image_url",
            "empty; not a picture",
        ),
        (
            [user(text("a"))],
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "schema": {"type": "strange"}},
                }
            },
            "response_format.json_schema.schema.type",
            "strange",
        ),
        (
            [user(text("a"))],
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {
                        "schema": {"items": {"type": "string", "pattern": "(.{0,500}){0,500}"}}
                    },
                }
            },
            "response_format.json_schema.schema.items.pattern",
            "simplify it",
        ),
        (
            [user(text("a"))],
            {"response_format": {"type": "json_object"}, "extra_body": {"enable_thinking": True}},
            "response_format",
            "thinking",
        ),
    ],
)
def test_faults_of_requests(client, messages, more, param, words):
    with pytest.raises(openai.BadRequestError) as error:
        ask(client, *messages, **more)
    assert error.value.param == param
    assert error.value.type == "invalid_request_error"
    assert words in error.value.message
    assert "\n" not in error.value.body["message"]


def test_values_that_change_nothing_are_taken(client):
    completion = ask(
        client,
        user(text("Hello")),
        max_tokens=1,
        frequency_penalty=0,
        presence_penalty=0.0,
        logit_bias={},
        user="me",
        metadata={"a": "b"},
        store=False,
        tools=[],
        tool_choice="auto",
        parallel_tool_calls=True,
        response_format={"type": "text"},
    )
    assert completion.choices[0].finish_reason == "length"


def test_too_long(client):
    with pytest.raises(openai.BadRequestError) as error:
        ask(client, user(text("word " * 20000)))
    assert error.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as error:
        ask(client, user(*[picture()] * 200))
    assert error.value.code == "context_length_exceeded"
    assert error.value.param.startswith("messages[0].content[")


def test_errors_of_the_client(server, client):
    with pytest.raises(openai.AuthenticationError) as error:
        ask(client.with_options(api_key="wrong"), user(text("a")))
    assert error.value.code == "invalid_api_key"
    assert "Authorization: Bearer KEY" in error.value.message
    with pytest.raises(openai.NotFoundError) as error:
        client.chat.completions.create(model="gpt-4o", messages=[user(text("a"))])
    assert (error.value.code, error.value.param) == ("model_not_found", "model")
    assert httpx2.get(f"{server.url}/metrics").status_code == 401
    assert httpx2.get(f"{server.url}/health").json() == {"status": "ok"}
    assert httpx2.get(f"{server.url}/ready").json() == {"status": "ok"}


def test_metrics(server, client):
    ask(client, user(picture(), text(QUESTION)))
    page = httpx2.get(f"{server.url}/metrics", headers={"authorization": "Bearer secret"}).text
    numbers = dict(line.rsplit(" ", 1) for line in page.splitlines() if line[0] != "#")
    assert float(numbers['edgevl_requests_total{route="/v1/chat/completions",status="200"}']) > 0
    assert float(numbers["edgevl_time_to_first_token_seconds_count"]) > 0
    assert float(numbers["edgevl_time_per_output_token_seconds_count"]) > 0
    for kind in ("prompt", "cached", "image", "completion"):
        assert float(numbers[f'edgevl_tokens_total{{kind="{kind}"}}']) > 0
    assert numbers["edgevl_waiting"] == "0.0"
