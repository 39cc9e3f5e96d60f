"""Messages of a request to a prompt."""

from __future__ import annotations

from collections.abc import Sequence

from anyio import to_thread

from edgevl.errors import CheckpointError, PromptError
from edgevl.preprocess import Message, Prompt
from edgevl.preprocess.messages import Part
from edgevl.preprocess.tools import Tool
from edgevl.preprocess.video import DEFAULT_FRAMES
from edgevl.serve.errors import blamed_on
from edgevl.serve.requests import (
    AnyMessage,
    AssistantMessage,
    ChatRequest,
    ImagePart,
    SystemMessage,
    TextPart,
    Texts,
    UserPart,
)
from edgevl.serve.sampling import check_length
from edgevl.serve.service import ENCODING, Loaded
from edgevl.serve.tools import calls_of, in_order_of_calls


async def encode(
    request: ChatRequest, loaded: Loaded, thinking: bool | None, tools: Sequence[Tool]
) -> Prompt:
    """Load the pictures of a conversation and encode it, with the tools that are shown.

    Raises:
        ApiError: a picture or video cannot be had, or the messages make no prompt.
    """
    loading = _Loading(request, loaded)
    messages = [
        await loading.message(message, f"messages[{number}]")
        for number, message in in_order_of_calls(request.messages)
    ]
    with blamed_on("messages"):
        try:
            prompt = await to_thread.run_sync(
                loaded.prompts.encode,
                _one_system(messages),
                thinking,
                tools,
                loaded.scheduler.max_context,
                limiter=ENCODING,
            )
        except CheckpointError as error:
            # Templates refuse sequences of roles that they were not written for.
            raise PromptError(f"the chat template refuses the messages: {error}") from None
        return check_length(prompt, loaded.scheduler.max_context)


class _Loading:
    """Turns the messages of one request into ours."""

    def __init__(self, request: ChatRequest, loaded: Loaded) -> None:
        self._frames = request.frames or DEFAULT_FRAMES
        self._max_tiles = request.max_tiles
        self._media = loaded.media
        self._budget = loaded.media.budget()

    async def message(self, message: AnyMessage, where: str) -> Message:
        if isinstance(message, AssistantMessage):
            with blamed_on(f"{where}.tool_calls"):
                calls = calls_of(message)
            with blamed_on(f"{where}.content"):
                thoughts = message.reasoning_content or ""
                said = _text(message.content or message.refusal or "")
                return Message.assistant(said, calls, thoughts)
        with blamed_on(f"{where}.content"):
            if isinstance(message, SystemMessage):
                return Message.system(_text(message.content))
            if isinstance(message.content, str):
                return Message(message.role, (message.content,))
        parts: list[Part] = []
        for number, part in enumerate(message.content):
            parts += await self._part(part, f"{where}.content[{number}]")
        with blamed_on(f"{where}.content"):
            return Message(message.role, tuple(parts))

    async def _part(self, part: UserPart, where: str) -> list[Part]:
        """Return a part as `Message.user` puts it: a line for each picture, and for each frame."""
        if isinstance(part, TextPart):
            return [part.text]
        with blamed_on(f"{where}.{part.type}"):
            if isinstance(part, ImagePart):
                max_tiles = 1 if part.image_url.detail == "low" else self._max_tiles
                url = part.image_url.url
                return [await self._media.picture(url, max_tiles, self._budget), "\n"]
            frames = await self._media.video(part.video_url.url, self._frames, self._budget)
            return list(Message.user("", videos=[frames]).parts)


def _text(content: Texts) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)


def _one_system(messages: Sequence[Message]) -> Sequence[Message]:
    """Join the system messages at the beginning: most templates know one."""
    count = 0
    while count < len(messages) and messages[count].role == "system":
        count += 1
    if count < 2:
        return messages
    text = "\n\n".join(str(part) for message in messages[:count] for part in message.parts)
    return [Message.system(text), *messages[count:]]
