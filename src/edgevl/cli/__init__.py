"""The ``edgevl`` command: one file a subcommand, imported only when it is called."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Sequence

import click

from edgevl.cli.terminal import leave_on_signals, reason
from edgevl.version import __version__

#: Subcommand, the name of a module with an object ``command`` -> one-line help.
COMMANDS = {
    "chat": "Ask a picture, once or in a conversation.",
    "ui": "Talk about pictures and videos in the browser.",
    "batch": "Ask about many pictures, into a file; goes on where it stopped.",
    "serve": "Serve programs that speak OpenAI's API.",
    "pull": "Download a checkpoint from the Hub.",
    "quantize": "Make a smaller, faster checkpoint and say what it cost.",
    "compile": "Compile for an Axera NPU, or for its emulator.",
    "eval": "Measure accuracy on questions, or perplexity on a text.",
    "bench": "Measure speed, beside what the machine allows.",
    "plan": "Compute speed and memory on a board beforehand.",
    "synth": "Write a checkpoint of real shapes and random weights.",
    "doctor": "Check this machine and the installation.",
}


class LazyGroup(click.Group):
    """A group whose subcommands are imported when they run, so that ``--help`` is instant."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names in the order of ``COMMANDS``."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the module of ``cmd_name`` and return its command."""
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"edgevl.cli.{cmd_name}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the subcommands from the table, without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, message="edgevl %(version)s")
def group() -> None:
    """Run InternVL vision-language models on this machine.

    MODEL is a Hub id, a checkpoint directory, or `tiny`, the small model that comes with EdgeVL.
    Results go to standard output, everything else to standard error.

    \b
    edgevl chat tiny -q "What number is on the display?" -i meter.png
    """  # noqa: D301


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status.

    Returns:
        0 done, 1 failed (one line on standard error says why), 2 wrong usage, 130 interrupted by
        Ctrl-C, 143 by SIGTERM, 129 by the end of the terminal (see `leave_on_signals`).
        With ``EDGEVL_DEBUG=1`` in the environment a failure also shows where it happened.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            # A terminal that cannot show Chinese gets \uXXXX in its place, not a crash.
            stream.reconfigure(errors="backslashreplace")
    leave_on_signals()
    try:
        status = group.main(args, prog_name="edgevl", standalone_mode=False)
        if sys.stdout is not None:  # closed by the caller
            sys.stdout.flush()
        return status if isinstance(status, int) else 0
    except (click.Abort, KeyboardInterrupt):
        return 130
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except SystemExit as stop:  # of a signal, or click's own answer to a closed pipe
        _abandon_stdout()
        return stop.code if isinstance(stop.code, int) else 1
    except Exception as error:
        if isinstance(error, OSError):
            _abandon_stdout()
        if isinstance(error, BrokenPipeError):
            return 1  # the reader (head, less) has left and wants to hear no more
        if os.environ.get("EDGEVL_DEBUG", "0") not in ("", "0"):
            traceback.print_exc()
        click.echo(f"edgevl: error: {reason(error)}", err=True)
        return 1


def _abandon_stdout() -> None:
    """Point standard output at nothing, so that the flush at exit cannot fail again."""
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)
    except (OSError, ValueError, AttributeError):  # captured or closed
        pass
