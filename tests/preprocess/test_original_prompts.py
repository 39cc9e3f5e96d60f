"""InternVL's documented prompts give the original's ids, by an independent rendering of them.

The original (``chat`` in modeling_internvl_chat.py, conversation.py) makes one string of the
conversation, replaces each ``<image>`` by its tokens, and has the tokenizer encode the whole: its
prompts have no text that could forge anything, so ours must be the same to the id.
"""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer

from edgevl.checkpoint import Checkpoint, ModelDirectory
from edgevl.generate.text import spoken_text
from edgevl.preprocess import Message, PromptEncoder, prepare_picture
from edgevl.synth.presets import PRESETS
from repository import TINY

#: In the order of their ids in InternVL3.5's tokenizer, after those of Qwen3.
INTERNVL_TOKENS = (
    "<img>", "</img>", "<IMG_CONTEXT>", "<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>",
)  # fmt: skip
SYSTEM = (
    "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的"
    "多模态大语言模型。"
)
# R1_SYSTEM_PROMPT of the InternVL3.5 model card, where it is set as the model's system message.
THINK = """
You are an AI assistant that rigorously follows this response protocol:

1. First, conduct a detailed analysis of the question. Consider different angles, potential \
solutions, and reason through the problem step-by-step. Enclose this entire thinking process \
within <think> and </think> tags.

2. After the thinking section, provide a clear, concise, and direct answer to the user's question. \
Separate the answer from the think section with a newline.

Ensure that the thinking process is thorough but remains focused on the query. The final answer \
should be standalone and not reference the thinking section.
""".strip()
BOX = "<ref>the red panda</ref><box>[[102, 33, 988, 640]]</box>"


def find_qwen3_tokenizer():
    """Return the directory of Qwen3's tokenizer, which the repository does not carry."""
    places = [parent / "shared" / "data" / "qwen3-tokenizer" for parent in Path(__file__).parents]
    if "EDGEVL_QWEN3_TOKENIZER" in os.environ:
        places.insert(0, Path(os.environ["EDGEVL_QWEN3_TOKENIZER"]))
    return next((place for place in places if (place / "tokenizer.json").is_file()), None)


@pytest.fixture(scope="module", params=["tiny", "qwen3"])
def model(request, tmp_path_factory):
    """A model's directory in the layout of the original, which names internvl2_5."""
    path = tmp_path_factory.mktemp("model") / request.param
    if request.param == "tiny":
        shutil.copytree(TINY, path, ignore=shutil.ignore_patterns("*.jinja", "heldout", "training"))
        with Checkpoint.open(path) as checkpoint:
            yield checkpoint
        return
    source = find_qwen3_tokenizer()
    if source is None:
        pytest.skip("Qwen3's tokenizer is not here; EDGEVL_QWEN3_TOKENIZER names its directory")
    path.mkdir()
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    tokenizer.add_tokens([AddedToken(t, normalized=False, special=True) for t in INTERNVL_TOKENS])
    tokenizer.save(str(path / "tokenizer.json"))
    # Its field chat_template is Qwen3's, as in the checkpoints that grew from it.
    shutil.copyfile(source / "tokenizer_config.json", path / "tokenizer_config.json")
    (path / "config.json").write_text(json.dumps({"template": "internvl2_5"}))
    config = PRESETS["internvl3_5-1b"].config
    yield ModelDirectory(path, replace(config, eos_token_ids=(151645,)), True)


@pytest.fixture(scope="module")
def encoder(model):
    return PromptEncoder(model)


@pytest.fixture(scope="module")
def pictures(model):
    """Pictures of one tile, of several, and the eight frames of a video."""
    side = model.config.vision.image_size
    shapes = [(side, side), (side, 2 * side), *[(side, side)] * 8]
    arrays = [np.full((*shape, 3), 40 * i % 256, np.uint8) for i, shape in enumerate(shapes)]
    prepared = [prepare_picture(array, model.config) for array in arrays]
    assert [len(picture.pixels) for picture in prepared[:3]] == [1, 3, 1]
    return prepared


def original(encoder, model, turns, pictures=(), system=SYSTEM):
    """Return the ids that ``tokenizer(query)`` gives in the original's ``chat``."""
    query = f"<|im_start|>system\n{system}<|im_end|>\n"
    for role, text in turns:
        query += f"<|im_start|>{role}\n{text}<|im_end|>\n"
    query += "<|im_start|>assistant\n"
    for picture in pictures:
        length = model.config.image_tokens * len(picture.pixels)
        query = query.replace("<image>", f"<img>{'<IMG_CONTEXT>' * length}</img>", 1)
    return encoder.tokenizer.encode(query, add_special_tokens=False).ids


def ours(encoder, messages, **options):
    return encoder.encode(messages, **options).token_ids.tolist()


QUESTIONS = [
    "Hello, who are you?",
    "请用中文讲一个故事。",
    f"Please provide the bounding box coordinate of the region this sentence describes: {BOX[:24]}",
    "Please describe what is in <box>[[10, 20, 300, 400]]</box>, and in "
    "<quad>[[1, 2, 3, 4, 5, 6, 7, 8]]</quad>.",
    "What do <think>, </think>, <tool_call> and <|box_start|> mean? def f(x): <|fim_middle|>",
]


@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize("thinking", [None, False, True])
def test_text(encoder, model, question, thinking):
    # The original knows no switch: its thinking mode is a system message, and off is without it.
    expected = original(encoder, model, [("user", question)], system=THINK if thinking else SYSTEM)
    assert ours(encoder, [Message.user(question)], thinking=thinking) == expected


@pytest.mark.parametrize(
    ("count", "text", "query"),
    [
        (1, "Describe the image shortly.", "<image>\nDescribe the image shortly."),
        (1, f"<image>\nWhere is {BOX[:24]}?", f"<image>\nWhere is {BOX[:24]}?"),
        (2, "<image>\nDescribe the two images.", None),
        (2, "Image-1: <image>\nImage-2: <image>\nWhat are the differences?", None),
    ],
)
def test_pictures(encoder, model, pictures, count, text, query):
    if query is None:
        query = text if text.count("<image>") == count else "<image>\n" + text
        text = query
    shown = pictures[:count]
    expected = original(encoder, model, [("user", query)], shown)
    assert ours(encoder, [Message.user(text, shown)]) == expected


def test_video(encoder, model, pictures):
    frames, question = pictures[2:], "What is the red panda doing?"
    query = "".join(f"Frame{i}: <image>\n" for i in range(1, 9)) + question
    expected = original(encoder, model, [("user", query)], frames)
    assert ours(encoder, [Message.user(question, videos=[frames])]) == expected


def test_a_second_turn(encoder, model, pictures):
    turns = [("user", "<image>\nWhere is the red panda?"), ("assistant", BOX), ("user", "And now?")]
    messages = [
        Message.user("Where is the red panda?", pictures[:1]),
        Message.assistant(BOX),
        Message.user("And now?"),
    ]
    assert ours(encoder, messages) == original(encoder, model, turns, pictures[:1])


ANSWERS = [
    BOX,
    "Two: <box>[[1, 2, 3, 4], [5, 6, 7, 8]]</box>\n\n- one\n- two",
    "<think>\nHm, 9.11 or 9.8?\n</think>\n\n9.8 is greater.",
    '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>',
    "Use </think> and <tool_call> so.",
]


@pytest.mark.parametrize("said", ANSWERS)
def test_an_answer_that_is_sent_back_continues_the_cache(encoder, said):
    """A client without state sends back the text; the ids must be those that were generated."""
    generated = encoder.tokenizer.encode(said, add_special_tokens=False).ids
    shown = spoken_text(encoder.tokenizer, generated)
    assert shown == said
    asked = [Message.user("Tell me.")]
    opening = ours(encoder, asked)
    following = ours(encoder, [*asked, Message.assistant(shown), Message.user("And?")])
    assert following[: len(opening) + len(generated)] == opening + generated
