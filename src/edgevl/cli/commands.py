"""The commands of a conversation: their names, what they take and what they do."""

from __future__ import annotations

import unicodedata
from typing import NamedTuple

from edgevl.cli.terminal import chinese


class Command(NamedTuple):
    """A command, each text in English and in Chinese."""

    argument: tuple[str, str]
    does: tuple[str, str]


COMMANDS = {
    "/image": Command(
        ("PATH", "路径"),
        (
            "show a picture with the next question (repeat for several)",
            "为下一个问题附上图片（可多次使用）",
        ),
    ),
    "/video": Command(
        ("PATH", "路径"), ("show a video with the next question", "为下一个问题附上视频")
    ),
    "/retry": Command(("", ""), ("answer the last question again", "重新回答上一个问题")),
    "/undo": Command(
        ("", ""),
        (
            "forget the last question; what it showed goes with the next",
            "撤回上一个问题，其图片和视频将随下一个问题一起发送",
        ),
    ),
    "/system": Command(
        ("TEXT", "文本"),
        (
            "system message from now on; without TEXT the model's own",
            "设置系统消息；不带文本则恢复模型默认值",
        ),
    ),
    "/set": Command(
        ("NAME VALUE", "名称 值"),
        (
            "set temperature, max_tokens, seed, …; without NAME list them",
            "设置 temperature、max_tokens、seed 等；不带参数则列出当前值",
        ),
    ),
    "/reset": Command(("", ""), ("forget everything said so far", "清空对话，重新开始")),
    "/save": Command(
        ("FILE", "文件"), ("write the conversation to a JSON file", "将对话保存为 JSON 文件")
    ),
    "/help": Command(("", ""), ("show this", "显示本帮助")),
    "/exit": Command(("", ""), ("leave (or Ctrl-D)", "退出（或按 Ctrl-D）")),
}

_BEFORE = (
    "Type a question, drop or paste the path of a picture or video, or:",
    "直接输入问题，拖入或粘贴图片、视频的路径，或使用：",
)
_AFTER = (
    "Alt-Enter, or \\ at the end of a line, begins a new line. "
    "Tab completes commands and paths.\n"
    "Ctrl-C stops an answer, or clears what is typed.",
    "按 Alt-Enter 或在行尾输入 \\ 可换行，按 Tab 可补全命令和路径。\n"
    "按 Ctrl-C 可中断回答，或清空已输入的内容。",
)


def help_text() -> str:
    """Say in the user's language what can be typed."""
    language = int(chinese())
    heads = {
        name: f"{name} {command.argument[language]}".strip() for name, command in COMMANDS.items()
    }
    column = max(map(_cells, heads.values())) + 2
    return "\n".join(
        [
            _BEFORE[language],
            *(
                f"  {head}{' ' * (column - _cells(head))}{COMMANDS[name].does[language]}"
                for name, head in heads.items()
            ),
            _AFTER[language],
        ]
    )


def _cells(text: str) -> int:
    """Return how many cells of a terminal ``text`` fills."""
    return sum(1 + (unicodedata.east_asian_width(char) in "WF") for char in text)
