"""Pictures to tiles, videos to frames, messages to token ids."""

from edgevl.preprocess.image import ImageSource, load_image
from edgevl.preprocess.messages import GeneratedTokens, Message
from edgevl.preprocess.picture import Picture, prepare_picture
from edgevl.preprocess.prompt import ImageSpan, Prompt, PromptEncoder
from edgevl.preprocess.tools import Tool, ToolCall
from edgevl.preprocess.video import Video, VideoSource, open_video, prepare_video

__all__ = [
    "GeneratedTokens",
    "ImageSource",
    "ImageSpan",
    "Message",
    "Picture",
    "Prompt",
    "PromptEncoder",
    "Tool",
    "ToolCall",
    "Video",
    "VideoSource",
    "load_image",
    "open_video",
    "prepare_picture",
    "prepare_video",
]
