"""The options of commands that run a model and ask it questions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import click

from edgevl.cli.terminal import note, show_notes, translated
from edgevl.errors import PromptError
from edgevl.files import read_text
from edgevl.options import OPTIONS, REQUIRED, Option, options_of

if TYPE_CHECKING:
    from edgevl.generate import Model

Function: TypeAlias = Callable[..., Any]
Decorator: TypeAlias = Callable[[Function], Function]

#: A file or directory, which need not be there.
FILE = click.Path(path_type=Path)
#: ``DEFAULT_FRAMES``, ``MAX_SAMPLED`` and ``MAX_DIFFERENCE`` of ``edgevl.preprocess.video``.
DEFAULT_FRAMES, MAX_FRAMES, MAX_DIFFERENCE = 8, 256, 255


def as_unicode(_: click.Context, __: click.Parameter, text: str | None) -> str | None:
    """Read an argument as UTF-8, also where the locale (LC_ALL=C) says it is something else.

    Raises:
        click.UsageError: it is not.
    """
    try:
        return text and text.encode(errors="surrogateescape").decode()
    except UnicodeError:
        raise click.UsageError("a text on the command line is not valid UTF-8") from None


def model_name(model: str) -> str:
    """Return what MODEL is called where its path is nobody's business: its last part."""
    from edgevl.preprocess.sources import short_name

    name = Path(model).name
    return short_name(name if name.strip(".") else Path(model).resolve().name or model)


def _together(decorators: Sequence[Decorator]) -> Decorator:
    """Return the decorator that adds options in the order given."""

    def add(function: Function) -> Function:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return add


def flags(kind: type, **callbacks: Callable[..., Any]) -> Decorator:
    """Return the decorator that adds the flags of a dataclass of options, by the fields' names.

    Args:
        kind: the dataclass.
        **callbacks: of click, for fields of which more is to be checked than their `Option` knows.
    """
    return _together(
        [_flag(option, callbacks.get(name)) for name, option in options_of(kind).items()]
    )


def taken(kind: type, given: dict[str, Any]) -> dict[str, Any]:
    """Take out of what click gives a command, and return, what are options of a dataclass."""
    return {name: given.pop(name) for name in options_of(kind) if name in given}


def _flag(option: Option, callback: Callable[..., Any] | None) -> Decorator:
    """Return the decorator that adds the flag of an option."""
    if option.kind == "switch":
        return click.option(option.flag, option.name, is_flag=True, help=option.help)
    values = {str(value): value for value in option.choices}
    default: Any = None if option.default is REQUIRED else option.default
    kind: Any = None
    if option.kind == "choice":
        kind = click.Choice([*values])
    elif option.kind in ("path", "paths"):
        kind = FILE
    elif option.kind in ("integer", "number"):
        range_of: Any = click.IntRange if option.kind == "integer" else click.FloatRange
        kind = range_of(option.low, option.high, min_open=option.above)

    def read(_: click.Context, __: click.Parameter, given: Any) -> Any:
        return given * option.unit if option.unit != 1 else values.get(given, given)

    return click.option(
        option.flag,
        option.name,
        type=kind,
        multiple=option.kind in ("texts", "paths"),
        callback=callback or read,
        default=default // option.unit if option.unit != 1 else default,
        required=option.default is REQUIRED,
        show_default=option.show_default,
        metavar=option.metavar,
        help=option.help or None,
    )


json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")

output_option = click.option(
    "-o",
    "--output",
    type=FILE,
    required=True,
    metavar="DIR",
    help="Directory to write; it must not exist, or be empty.",
)


def _check_key(_: click.Context, __: click.Parameter, value: str | None) -> str | None:
    # A variable that is not set (--api-key "$KEY") must not let everyone in.
    if value is not None and not (value.isascii() and value.isprintable() and value.strip()):
        raise click.BadParameter("must be printable ASCII, and not empty")
    return value and value.strip()


def listen_options(port: int) -> Decorator:
    """Add where to listen and whom to let in: ``host``, ``port``, ``api_key``.

    Args:
        port: default of the port.
    """
    return _together(
        [
            click.option(
                "--host",
                default="127.0.0.1",
                show_default=True,
                metavar="ADDRESS",
                help="Address to listen at; 0.0.0.0 lets other machines in.",
            ),
            click.option(
                "--port",
                type=click.IntRange(0, 65535),
                default=port,
                show_default=True,
                metavar="N",
                help="Port to listen at; 0 takes a free one.",
            ),
            click.option(
                "--api-key",
                envvar="EDGEVL_API_KEY",
                metavar="KEY",
                callback=_check_key,
                help="What clients must present, and the page's password. Better given as "
                "EDGEVL_API_KEY in the environment: others can see a process's arguments.",
            ),
        ]
    )


def question_of(given: dict[str, Any]) -> dict[str, Any]:
    """Return what `answer_options` gave as the arguments of `Model.ask`.

    Raises:
        click.UsageError: two of ``--json-object``, ``--json-schema`` and ``--think`` are given.
        EdgeVLError: the file has no schema that can be met, or ``llguidance`` is not installed.
    """
    think, json_object, json_schema = map(given.pop, ("think", "json_object", "json_schema"))
    if json_object + bool(json_schema) + bool(think) > 1:
        raise click.UsageError("--json-object, --json-schema and --think: give one of them")
    constraint = None
    if json_object or json_schema:
        from edgevl.generate.constraint import MAX_CONSTRAINT_BYTES, Constraint

        if json_schema is None:
            constraint = Constraint.json_object()
        else:
            name = f"--json-schema {json_schema}"
            text = read_text(
                json_schema, MAX_CONSTRAINT_BYTES, PromptError, name=name, may_be_pipe=True
            )
            try:
                constraint = Constraint.json_schema(text)
            except PromptError as error:
                raise PromptError(f"{name}: {error}") from None
    return {"thinking": think, "constraint": constraint, **given}


def _sampling_option(option: Option) -> Decorator:
    """Return the decorator that adds the flag of an option of the sampler."""

    def read(context: click.Context, parameter: click.Parameter, given: Any) -> Any:
        try:
            if option.kind == "texts":
                texts = tuple(as_unicode(context, parameter, text) for text in given)
                return option.check(texts) or None
            if option.kind == "biases":
                return option.parse(",".join(given)) if given else None
            return None if given is None else option.parse(given)
        except PromptError as error:
            raise click.BadParameter(str(error)) from None

    several = option.kind in ("texts", "biases")
    notes = [option.span] if option.span else []
    if option.from_checkpoint:
        notes.insert(0, f"default: generation_config.json's, else {option.default:g}")
    elif not several and option.default is not None:
        notes.insert(0, f"default: {option.default:g}")
    return click.option(
        option.flag,
        multiple=several,
        callback=read,
        metavar=option.metavar,
        help=option.help + " Repeatable." * several + f"  [{'; '.join(notes)}]" * bool(notes),
    )


#: Adds what a question may ask for: ``system``, ``think``, ``max_tiles``, ``frames``,
#: ``frame_threshold``, ``json_object``, ``json_schema``, and the fields of `SamplingOptions` by
#: their names, None where they are not given.
answer_options = _together(
    [
        click.option(
            "--system",
            metavar="TEXT",
            callback=as_unicode,
            help="System message.  [default: the checkpoint's]",
        ),
        click.option(
            "--think/--no-think",
            default=None,
            help="Let the model think first, or tell it not to; default: as its template has it.",
        ),
        click.option(
            "--max-tiles",
            type=click.IntRange(min=1),
            metavar="N",
            help="Most tiles of a picture.  [default: the checkpoint's]",
        ),
        click.option(
            "--frames",
            type=click.IntRange(1, MAX_FRAMES),
            default=DEFAULT_FRAMES,
            show_default=True,
            metavar="N",
            help="Frames taken of a video.",
        ),
        click.option(
            "--frame-threshold",
            type=click.FloatRange(0, MAX_DIFFERENCE),
            default=0.0,
            show_default=True,
            metavar="T",
            help="Take a frame for the last one that was shown where no spot of it differs by T "
            "or more, of 255; 0 shows all as they are.",
        ),
        *map(_sampling_option, OPTIONS.values()),
        click.option("--json-object", is_flag=True, help="Answer with a JSON object."),
        click.option(
            "--json-schema",
            type=click.Path(exists=True, dir_okay=False, path_type=Path),
            metavar="FILE",
            help="Answer with JSON of the JSON schema in FILE.",
        ),
    ]
)


def load_model(model: str, quiet: bool = False, **options: Any) -> Model:
    """Load a model with options of `edgevl.load`; tell who waits.

    Unless ``quiet``, tell what there is to note before it is asked, too.
    """
    from edgevl.generate import load

    note(translated(f"loading {model} …", f"正在加载 {model} …"))
    loaded = load(model, **options)
    if not quiet:
        config = loaded.checkpoint.config
        show_notes(loaded.engine.notes)
        if config.sampling:  # answers may differ each time
            listed = ", ".join(f"{name} {value:g}" for name, value in config.sampling.items())
            by_default = translated(
                f"sampling by default as generation_config.json has it: {listed}",
                f"采样默认值取自模型的 generation_config.json：{listed}",
            )
            show_notes([by_default])
        show_notes(config.ignored)
    return loaded
