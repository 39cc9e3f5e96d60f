"""Turns as the messages that Gradio's chat shows."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgevl.page.conversation import PageTurn

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
