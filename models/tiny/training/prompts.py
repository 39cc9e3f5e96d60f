"""The prompt: ChatML as in InternVL's template `internvl2_5`."""

TOKENS_A_TILE = 36

SYSTEM_MESSAGES = (
    # InternVL's own, which a user of `template: internvl2_5` gets by default
    "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的"
    "多模态大语言模型。",
    "You are a helpful assistant.",
    "You are InternVL.",
    "Answer briefly.",
    "请简短回答。",
)


def system_part(message: str) -> str:
    """A system message, before all turns."""
    return f"<|im_start|>system\n{message}<|im_end|>\n"


def image_part(tiles: int) -> str:
    """One image: all its tiles between one <img> and one </img>."""
    return f"<img>{'<IMG_CONTEXT>' * TOKENS_A_TILE * tiles}</img>\n"


def user_part(text: str) -> str:
    """A user's turn, up to where the model begins to write."""
    return f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"


def answer_part(text: str) -> str:
    """What the model has to write; the newline after it belongs to the next turn."""
    return f"{text}<|im_end|>"
