"""What two installed versions of EdgeVL say differently: their API, their help, tiny's answers.

    python benchmarks/same_answers.py BEFORE AFTER [--limit N] [--only 'reference,cpu int4 bf16']

BEFORE and AFTER are the Python interpreters of two environments, one with each version. Each prints
the OpenAPI document of its server, ``--help`` of every command, and the answers of its shipped
model to the held-out questions of this checkout, JSON among them, on the reference engine, on the
CPU in every precision with both caches, and on the emulated board. A line is printed for each
difference. Exit status 1: there is one.
"""

from __future__ import annotations

import argparse
import difflib
import itertools
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import click

HELDOUT = Path(__file__).resolve().parents[1] / "models" / "tiny" / "heldout"
#: Arguments of `edgevl.load`, by name.
ENGINES: dict[str, dict[str, Any]] = {
    "reference": {"engine": "reference"},
    **{
        f"cpu {precision} {cache}": {"engine": "cpu", "precision": precision, "kv_cache": cache}
        for precision in ("auto", "bf16", "int8", "int4")
        for cache in ("bf16", "int8")
    },
    "board": {"engine": "axera"},
}
#: Seconds in which a server must be there.
SERVER_S = 300.0


def main() -> int:
    """Let both versions speak, and compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("before", metavar="BEFORE")
    parser.add_argument("after", metavar="AFTER")
    parser.add_argument("--limit", type=int, metavar="N", help="questions of a file, all if absent")
    parser.add_argument("--only", type=_engines, default=[*ENGINES], help="engines, between commas")
    arguments = parser.parse_args()
    before, after = (
        said_by(python, arguments.only, arguments.limit)
        for python in (arguments.before, arguments.after)
    )
    count = 0
    for line in differences(before, after):
        count += 1
        print(line)
    print(f"{len(before | after)} things compared, {count} lines of differences", file=sys.stderr)
    return 1 if count else 0


def _engines(text: str) -> list[str]:
    if unknown := set(text.split(",")) - set(ENGINES):
        raise argparse.ArgumentTypeError(f"{unknown} unknown; there are {', '.join(ENGINES)}")
    return text.split(",")


def said_by(python: str, engines: list[str], limit: int | None) -> dict[str, str]:
    """Return what the version of an interpreter says, by what was asked.

    It runs outside of the checkout, with what is installed and nothing else.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    options = json.dumps({"engines": engines, "limit": limit})
    with tempfile.TemporaryDirectory() as directory:
        done = subprocess.run(
            [Path(python).absolute(), Path(__file__).resolve(), "--say", options],
            cwd=directory,
            env={**kept, "HF_HUB_OFFLINE": "1", "LC_ALL": "C.UTF-8", "PYTHONUTF8": "1"},
            stdout=subprocess.PIPE,
            check=False,
        )
    if done.returncode:
        raise SystemExit(f"{python}: status {done.returncode}")
    said: dict[str, str] = json.loads(done.stdout)
    return said


def differences(before: dict[str, str], after: dict[str, str]) -> Iterator[str]:
    """Yield a line for each difference; of texts with several lines, one for each of theirs."""
    for name in before | after:
        if name not in after:
            yield f"{name}: is gone"
        elif name not in before:
            yield f"{name}: is new"
        elif "\n" in before[name] + after[name]:
            lines = difflib.ndiff(before[name].splitlines(), after[name].splitlines())
            yield from (f"{name}: {line}" for line in lines if line[0] in "+-")
        elif before[name] != after[name]:
            yield f"{name}: {before[name]}, then {after[name]}"


def say(engines: list[str], limit: int | None) -> None:
    """Print all that this interpreter's version says."""
    import click

    from edgevl import cli

    said = {f"API {where}": value for where, value in leaves(api_document())}
    (group,) = (value for value in vars(cli).values() if isinstance(value, click.Group))
    for words, text in help_texts(group, None, "edgevl"):
        said[f"{words} --help"] = text
    for name in engines:
        print(f"{sys.executable}: {name}", file=sys.stderr)
        said |= {f"{name}, {question}": text for question, text in answers(name, limit)}
    print(json.dumps(said))


def api_document() -> Any:
    """Return the OpenAPI document of a server."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "edgevl", "serve", "tiny", "--no-ui", "--port", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        end = time.monotonic() + SERVER_S
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/openapi.json") as response:
                    return json.load(response)
            except urllib.error.URLError:
                if server.poll() is not None or time.monotonic() > end:
                    raise
                time.sleep(0.05)
    finally:
        server.terminate()
        server.wait()


def leaves(value: Any, where: str = "") -> Iterator[tuple[str, str]]:
    """Yield the values of a document that hold no others, each with its place."""
    if isinstance(value, (dict, list)) and value:
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(inner, f"{where}/{key}")
    else:
        yield where, json.dumps(value, ensure_ascii=False)


def help_texts(
    command: click.Command, parent: click.Context | None, name: str
) -> Iterator[tuple[str, str]]:
    """Yield the words of a command and of those below it, each with its help."""
    import click

    context = click.Context(command, parent, info_name=name, terminal_width=100)
    yield context.command_path, command.get_help(context)
    if isinstance(command, click.Group):
        for below in command.list_commands(context):
            found = command.get_command(context, below)
            assert found is not None
            yield from help_texts(found, context, below)


def answers(name: str, limit: int | None) -> Iterator[tuple[str, str]]:
    """Yield the place of each held-out question and what the shipped model answers on an engine."""
    import edgevl

    with tempfile.TemporaryDirectory() as directory:
        model = edgevl.load(compiled(directory) if name == "board" else "tiny", **ENGINES[name])
        for path in (HELDOUT / "questions.jsonl", HELDOUT / "json.jsonl"):
            with path.open(encoding="utf-8") as lines:
                for number, line in enumerate(itertools.islice(lines, limit), start=1):
                    asked = json.loads(line)
                    schema = asked.get("json_schema")
                    answer = model.ask(
                        asked["question"],
                        images=[HELDOUT / asked["image"]],
                        temperature=0,
                        repetition_penalty=1,
                        constraint=edgevl.Constraint.json_schema(schema) if schema else None,
                    )
                    tokens = f"{answer.usage.prompt_tokens} + {len(answer.token_ids)} tokens"
                    text = json.dumps(answer.text, ensure_ascii=False)
                    yield f"{path.name}:{number}", f"{text} ({tokens}, {answer.finish_reason})"


def compiled(directory: str) -> str:
    """Compile the shipped model for the emulated board."""
    board = f"{directory}/board"
    options = ["--target", "ax650", "--emulate", "-o", board]
    command = [sys.executable, "-m", "edgevl", "compile", "tiny", *options]
    subprocess.run(command, check=True, stdout=sys.stderr)
    return board


if __name__ == "__main__":
    if sys.argv[1:2] == ["--say"]:
        say(**json.loads(sys.argv[2]))
    else:
        sys.exit(main())
