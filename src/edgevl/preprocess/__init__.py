"""Pictures to tiles, messages to token ids."""

from edgevl.preprocess.image import ImageSource, load_image
from edgevl.preprocess.messages import GeneratedTokens, Message
from edgevl.preprocess.picture import Picture, prepare_picture
from edgevl.preprocess.prompt import ImageSpan, Prompt, PromptEncoder

__all__ = [
    "GeneratedTokens",
    "ImageSource",
    "ImageSpan",
    "Message",
    "Picture",
    "Prompt",
    "PromptEncoder",
    "load_image",
    "prepare_picture",
]
