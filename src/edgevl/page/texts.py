"""What the page says, in English and Chinese."""

from __future__ import annotations

import re
from pathlib import Path

from edgevl.errors import EdgeVLError
from edgevl.generate import Answer
from edgevl.options import OPTIONS
from edgevl.page.conversation import Turn
from edgevl.preprocess.sources import short_name

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
        "next": "从下一个问题起生效。",
        "own": "默认值取自模型的 generation_config.json",
        "more": "更多采样选项",
    },
}

for _name, _option in OPTIONS.items():
    if _option.label is not None:
        LABELS["en"][_name], LABELS["zh"][_name] = _option.label

# What a turn's error says -> the same in Chinese; the rest stays English.
_NAME = r"(?P<name>.+?): "
_CHINESE_ERRORS = [
    (
        rf"{_NAME}.*not a picture",
        "{name}：不是可读取的图片，请用 JPEG、PNG、WebP、BMP、GIF、TIFF 或 HEIC",
    ),
    (rf"{_NAME}damaged (?:or truncated )?picture", "{name}：图片已损坏"),
    (rf"{_NAME}over the limit of (?P<limit>\d+ .iB)", "{name}：超过 {limit} 的大小上限，请先缩小"),
    (
        rf"{_NAME}(?:more pixels than|.* pixels are over) the limit of (?P<limit>\d+)",
        "{name}：图片超过 {limit} 像素的上限，请先缩小",
    ),
    (rf"{_NAME}(?:.*not a video|has no moving picture)", "{name}：不是可读取的视频"),
    (rf"{_NAME}damaged or truncated video", "{name}：视频已损坏或不完整"),
    (rf"{_NAME}no such file", "{name}：文件已过期，请重新上传"),
    (
        r"the message needs (?P<needed>\d+) tokens, but the context holds (?P<context>\d+)",
        "这条消息需要 {needed} 个词元，而上下文只能容纳 {context} 个（含回答）："
        "请缩短文字，或减少图片、图块或视频帧",
    ),
    (
        r"the text has (?P<markers>\d+) <image> markers but (?P<count>\d+)",
        "文字中有 {markers} 个 <image> 标记，但图片有 {count} 张：请让数量一致，或不写标记",
    ),
    (rf"{_NAME}HEIC needs a decoder", "{name}：这里不能读取 HEIC，请改用 JPEG 或 PNG"),
    (rf"{_NAME}a picture of .* has nothing to see", "{name}：图片太小"),
    (
        rf"{_NAME}over the limit of (?P<limit>\d+) frames",
        "{name}：超过 {limit} 帧的上限，请截取需要的部分",
    ),
    (rf"{_NAME}FFmpeg has no decoder", "{name}：无法解码，请先转换为 H.264"),
    (rf"{_NAME}the size of its frames", "{name}：画面尺寸未知或过大，请先缩小"),
    (r"the question exceeds (?P<limit>\d+) characters", "问题超过 {limit} 个字符，请缩短"),
    (
        r"the question has more than (?P<limit>\d+) files",
        "一个问题最多 {limit} 个文件，请分几次提问",
    ),
    (r"(?P<waiting>\d+) requests wait already", "已有 {waiting} 个问题在等待，请稍后再试"),
    (r"the server is shutting down", "服务正在关闭，请稍后再试"),
    (r".* has no vision weights", "这个模型没有视觉部分，只能回答文字问题"),
]


def language(accept: str) -> str:
    """Return ``"zh"`` or ``"en"`` for the header ``Accept-Language``."""
    return "zh" if accept.strip().lower().startswith("zh") else "en"


def failure(turn: Turn, lang: str) -> str:
    """Say in one line why ``turn`` has no answer, with files by the names that the user knows."""
    if not isinstance(turn.error, EdgeVLError):
        return (
            "内部错误，详见服务器日志"
            if lang == "zh"
            else "internal error; the server's log has it"
        )
    text = " ".join(str(turn.error).split())
    for path in (*turn.pictures, *turn.videos):
        text = text.replace(short_name(str(path)), Path(path).name)
    if lang == "zh":
        for pattern, chinese in _CHINESE_ERRORS:
            if found := re.match(pattern, text):
                return chinese.format(**found.groupdict())
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
