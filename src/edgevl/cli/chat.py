"""``edgevl chat``: ask a picture or video once, or hold a conversation."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click

from edgevl.cli.options import answer_options, as_unicode, flags, load_model, question_of, taken
from edgevl.cli.terminal import Printer, is_terminal, print_answer, print_json
from edgevl.errors import EdgeVLError
from edgevl.files import as_text, replacing
from edgevl.options import LoadOptions

#: A question from standard input is read up to this size.
MAX_QUESTION_BYTES = 1 << 20


@click.command("chat")
@click.argument("model")
@click.option(
    "-q",
    "--question",
    metavar="TEXT",
    callback=as_unicode,
    help="Ask once; - reads standard input.",
)
@click.option(
    "-i",
    "--image",
    "images",
    multiple=True,
    metavar="IMAGE",
    help="A picture: path, data: URL, or - for standard input. May be repeated.",
)
@click.option(
    "-v",
    "--video",
    "videos",
    multiple=True,
    metavar="VIDEO",
    help="A video: path, data: URL, or - for standard input. May be repeated.",
)
@answer_options
@flags(LoadOptions)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option(
    "--draw-boxes",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="OUT.png",
    help="Draw the answer's boxes on the first picture.",
)
def command(
    model: str,
    question: str | None,
    images: tuple[str, ...],
    videos: tuple[str, ...],
    as_json: bool,
    draw_boxes: Path | None,
    **options: Any,
) -> None:
    """Ask MODEL about pictures and videos.

    With -q, or with the question on standard input, it answers once. Otherwise a conversation
    begins; /help in it lists what it understands.

    \b
    edgevl chat tiny -q "What number is on the display?" -i meter.png
    edgevl chat OpenGVLab/InternVL3_5-1B -i left.jpg -i right.jpg
    edgevl chat OpenGVLab/InternVL3_5-1B -v clip.mp4 -q "What happens?"
    """  # noqa: D301
    loading = taken(LoadOptions, options)
    converse = question is None and is_terminal(sys.stdin)
    if converse and (as_json or draw_boxes):
        raise click.UsageError("--json and --draw-boxes need a question: add -q TEXT")
    if draw_boxes and not images:
        raise click.UsageError("--draw-boxes needs a picture: add -i IMAGE")
    piped = (images + videos).count("-")
    if piped and (question is None or question == "-" or piped > 1):
        raise click.UsageError("standard input can be read once: give the question with -q TEXT")
    if not converse and question in (None, "-"):
        question = _read_question()
    if question is not None and not question.strip():
        raise click.UsageError("the question is empty: give it with -q TEXT")

    with ExitStack() as stack:
        # What can fail at once fails before the model is loaded: files, what is shown.
        asked = question_of(options)
        drawing_format = _format(draw_boxes) if draw_boxes else None
        drawing = stack.enter_context(replacing(draw_boxes)) if draw_boxes else None
        from edgevl.preprocess import load_image, open_video

        pictures = [load_image(image) for image in images]
        clips: list[Any] = [open_video(video) for video in videos]
        loaded = load_model(model, **loading)
        if question is None:
            from edgevl.cli.conversation import Conversation
            from edgevl.generate.session import Attachment

            session = loaded.chat(
                **{name: asked.pop(name) for name in ("system", "thinking", "max_tiles")}
            )
            shown = [Attachment(pictures[i], False, name) for i, name in enumerate(images)]
            shown += [Attachment(clips[i], True, name) for i, name in enumerate(videos)]
            Conversation(model, session, asked).run(shown)
            return
        stream = loaded.stream(question, images=pictures, videos=clips, **asked)
        if as_json:
            for _ in stream:
                pass
            answer = stream.answer
            print_json(answer.to_dict())
        else:
            answer = print_answer(stream, Printer())
        if drawing is not None:
            from edgevl.evaluate import boxes

            found = boxes.parse_boxes(answer.text)
            if not found:
                raise EdgeVLError(
                    "--draw-boxes: the answer has no <box>, nothing was drawn; ask where it is"
                )
            boxes.draw_boxes(pictures[0], found).save(drawing, format=drawing_format)


def _read_question() -> str:
    if sys.stdin is None:
        raise click.UsageError("standard input is closed: give the question with -q TEXT")
    data = sys.stdin.buffer.read(MAX_QUESTION_BYTES + 1)
    name = "the question on standard input"
    return as_text(data, MAX_QUESTION_BYTES, name, click.UsageError).strip()


def _format(path: Path) -> str:
    """Return Pillow's name of the format that ``path`` ends in."""
    from PIL import Image

    extensions = Image.registered_extensions()
    name = extensions.get(path.suffix.lower(), "")
    if name not in ("PNG", "JPEG", "WEBP", "BMP"):
        raise click.UsageError(f"--draw-boxes {path}: the name must end in .png, .jpg or .webp")
    return name
