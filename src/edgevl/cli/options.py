"""The options of commands that ask a model questions."""

from __future__ import annotations

from typing import Any, overload

import click

from edgevl.cli.terminal import Function


@overload
def as_unicode(text: str) -> str: ...


@overload
def as_unicode(text: None) -> None: ...


def as_unicode(text: str | None) -> str | None:
    """Read an argument as UTF-8, also where the locale (LC_ALL=C) says it is something else.

    Raises:
        click.UsageError: it is not.
    """
    try:
        return text and text.encode(errors="surrogateescape").decode()
    except UnicodeError:
        raise click.UsageError("a text on the command line is not valid UTF-8") from None


def answer_options(function: Function) -> Function:
    """Add what a question may ask for: ``system``, ``think``, ``max_tiles``, `SamplingParams`.

    Those but the first three have the names of its fields.
    """
    for option in reversed(_OPTIONS):
        function = option(function)
    return function


def _as_unicode(_: click.Context, __: click.Parameter, value: Any) -> Any:
    return tuple(map(as_unicode, value)) if isinstance(value, tuple) else as_unicode(value)


_OPTIONS = (
    click.option(
        "--system",
        metavar="TEXT",
        callback=_as_unicode,
        help="System message.  [default: the checkpoint's]",
    ),
    click.option("--think", is_flag=True, help="Let the model think first."),
    click.option(
        "--max-tiles",
        type=click.IntRange(min=1),
        metavar="N",
        help="Most tiles of a picture.  [default: the checkpoint's]",
    ),
    click.option(
        "--max-tokens",
        type=click.IntRange(min=1),
        default=512,
        show_default=True,
        metavar="N",
        help="Most tokens of an answer.",
    ),
    click.option(
        "--temperature",
        type=click.FloatRange(min=0),
        default=0.0,
        show_default=True,
        metavar="T",
        help="0 always takes the likeliest token.",
    ),
    click.option(
        "--top-p",
        type=click.FloatRange(0, 1, min_open=True),
        default=1.0,
        show_default=True,
        metavar="P",
        help="Draw from the likeliest tokens that reach this probability.",
    ),
    click.option(
        "--top-k",
        type=click.IntRange(min=0),
        default=0,
        show_default=True,
        metavar="K",
        help="Draw from the K likeliest tokens; 0 from all.",
    ),
    click.option(
        "--min-p",
        type=click.FloatRange(0, 1),
        default=0.0,
        show_default=True,
        metavar="P",
        help="Drop tokens less likely than this fraction of the likeliest.",
    ),
    click.option(
        "--repetition-penalty",
        type=click.FloatRange(min=0, min_open=True),
        default=1.0,
        show_default=True,
        metavar="R",
        help="Above 1, repeat less.",
    ),
    click.option(
        "--seed",
        type=click.IntRange(min=0),
        metavar="N",
        help="Same seed, same answer.",
    ),
    click.option(
        "--stop",
        multiple=True,
        metavar="TEXT",
        callback=_as_unicode,
        help="End before this text. Repeatable.",
    ),
)
