"""What the page shows: turns as the messages of Gradio's chat, and its words in two languages."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgevl.errors import EdgeVLError
from edgevl.generate import Answer
from edgevl.options import OPTIONS
from edgevl.page.conversation import PageTurn
from edgevl.preprocess.sources import short_name

#: What is set as a formula. ``$…$`` becomes ``\\(…\\)`` beforehand, where it is no price.
LATEX_DELIMITERS: list[dict[str, str | bool]] = [
    {"left": "$$", "right": "$$", "display": True},
    {"left": "\\[", "right": "\\]", "display": True},
    {"left": "\\(", "right": "\\)", "display": False},
]

_THINKING = {"en": "Thinking", "zh": "思考过程"}
_CODE = re.compile(r"(```.*?(?:```|\Z)|`[^`\n]*`|\$\$.*?\$\$)", re.DOTALL)
# As Pandoc does: no blank inside the dollars, and no digit after them.
_INLINE_FORMULA = re.compile(r"(?<![\\$])\$(?=[^\s$])([^$\n]*?[^\s$\\])\$(?![\d$])")
_GROUNDED = re.compile(r"(?:<ref>([^<]*)</ref>\s*)?<box>([^<]*)</box>")

#: Labels, translated in the browser.
LABELS = {
    "en": {
        "ask": "Ask something",
        "ask_picture": "Ask something; drop or paste pictures here",
        "camera": "Camera",
        "settings": "Settings",
        "system": "System message",
        "thinking": "Let the model think first",
        "max_tiles": "Most tiles of a picture",
        "frames": "Frames of a video",
        "frame_threshold": "Difference of frames",
        "frame_threshold_is": "A frame that differs by less, of 255, is the last one shown again",
        "next": "Apply to the next question.",
        "own": "Default: the model's generation_config.json",
        "more": "More sampling",
    },
    "zh": {
        "ask": "输入问题",
        "ask_picture": "输入问题，图片可拖入或粘贴到这里",
        "camera": "摄像头",
        "settings": "设置",
        "system": "系统消息",
        "thinking": "先思考再回答",
        "max_tiles": "每张图片的最大图块数",
        "frames": "每段视频的抽帧数",
        "frame_threshold": "帧差阈值",
        "frame_threshold_is": "与上一个展示的帧差别小于此值（满分 255）时，沿用上一帧",
        "next": "从下一个问题起生效。",
        "own": "默认值取自模型的 generation_config.json",
        "more": "更多采样选项",
    },
}

for _name, _option in OPTIONS.items():
    if _option.label is not None:
        LABELS["en"][_name], LABELS["zh"][_name] = _option.label


def language(accept: str) -> str:
    """Return ``"zh"`` or ``"en"`` for the header ``Accept-Language``."""
    return "zh" if accept.strip().lower().startswith("zh") else "en"


def failure(turn: PageTurn, lang: str) -> str:
    """Say in one line why ``turn`` has no answer, with files by the names that the user knows."""
    if not isinstance(turn.error, EdgeVLError):
        return (
            "内部错误，详见服务器日志"
            if lang == "zh"
            else "internal error; the server's log has it"
        )
    text = " ".join(((turn.error.chinese if lang == "zh" else "") or str(turn.error)).split())
    for path in turn.files:
        text = text.replace(short_name(str(path)), Path(path).name)
    return text


def stopped(lang: str) -> str:
    """Say that an answer was stopped."""
    return "已停止" if lang == "zh" else "stopped"


def working(seconds: float, lang: str) -> str:
    """Say that an answer is being computed."""
    return f"计算中… {seconds:.0f} 秒" if lang == "zh" else f"computing … {seconds:.0f} s"


def statistics(answer: Answer, context: int, lang: str) -> str:
    """Say how fast an answer was and what it took.

    Args:
        answer: the answer.
        context: most tokens of prompt and answer.
        lang: ``"en"`` or ``"zh"``.
    """
    usage, timings = answer.usage, answer.timings
    used = usage.prompt_tokens + usage.completion_tokens
    cut = answer.finish_reason == "length"
    if lang == "zh":
        parts = [
            f"首字 {timings.ttft_ms / 1000:.2f} 秒",
            f"{timings.decode_tokens_per_s:.1f} 词元/秒" if timings.decode_tokens_per_s else "",
            f"回答 {usage.completion_tokens} 词元",
            f"提示 {usage.prompt_tokens} 词元（图像 {usage.image_tokens}，"
            f"缓存命中 {usage.cached_tokens}）",
            f"上下文 {used} / {context}",
            "已达长度上限" if cut else "",
        ]
    else:
        parts = [
            f"first token {timings.ttft_ms / 1000:.2f} s",
            f"{timings.decode_tokens_per_s:.1f} tokens/s" if timings.decode_tokens_per_s else "",
            f"{usage.completion_tokens} tokens",
            f"prompt {usage.prompt_tokens} ({usage.image_tokens} of pictures, "
            f"{usage.cached_tokens} from the cache)",
            f"context {used} of {context}",
            "cut off at the token limit" if cut else "",
        ]
    return " · ".join(filter(None, parts))


def markdown(text: str) -> str:
    """Return an answer as the Markdown to show: formulas marked, boxes as text.

    HTML is left to the sanitizer of Gradio's chat.
    """
    parts = _CODE.split(text)
    for index in range(0, len(parts), 2):  # what is not code
        part = _INLINE_FORMULA.sub(r"\\(\1\\)", parts[index])
        parts[index] = _GROUNDED.sub(_box_as_text, part)
    return "".join(parts)


def _box_as_text(found: re.Match[str]) -> str:
    label, boxes = found.groups()
    return f"**{label}** `{boxes}`" if label else f"`{boxes}`"


def chat_messages(
    turns: Sequence[PageTurn], lang: str, growing: bool = False
) -> list[dict[str, Any]]:
    """Return the messages of Gradio's ``Chatbot`` for ``turns``.

    Args:
        turns: the conversation.
        lang: ``"en"`` or ``"zh"``.
        growing: whether the last turn's answer is still coming.
    """
    return [message for _, message in _pairs(turns, lang, growing)]


def asked_at(turns: Sequence[PageTurn], index: int) -> int | None:
    """Return the number of the turn whose question is message ``index``; None if it is another."""
    pairs = _pairs(turns, "en", False)
    if not 0 <= index < len(pairs):
        return None
    number, message = pairs[index]
    asked = message["role"] == "user" and isinstance(message["content"], dict)
    return number if asked and "text" in message["content"] else None


def _pairs(turns: Sequence[PageTurn], lang: str, growing: bool) -> list[tuple[int, dict[str, Any]]]:
    pairs = []
    for number, turn in enumerate(turns):
        last = growing and number == len(turns) - 1
        messages = [_file("user", path) for path in turn.files]
        if turn.text:
            messages.append(_text("user", turn.text))
        if turn.thinking.strip():
            status = "pending" if last and not turn.reply else "done"
            thoughts = _text("assistant", turn.thinking)
            messages.append(thoughts | {"metadata": {"title": _THINKING[lang], "status": status}})
        if turn.reply.strip():
            messages.append(_text("assistant", markdown(turn.reply)))
        if turn.drawing:
            messages.append(_file("assistant", turn.drawing))
        pairs += [(number, message) for message in messages]
    return pairs


def _text(role: str, text: str) -> dict[str, Any]:
    # As a dictionary: Gradio takes the indentation off plain strings.
    return {"role": role, "content": {"type": "text", "text": text}}


def _file(role: str, path: Path) -> dict[str, Any]:
    return {"role": role, "content": {"path": str(path), "alt_text": path.name}}
