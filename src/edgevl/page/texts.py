"""What the page says, in English and Chinese."""

from __future__ import annotations

from pathlib import Path

from edgevl.errors import EdgeVLError
from edgevl.generate import Answer
from edgevl.options import OPTIONS
from edgevl.page.conversation import PageTurn
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
