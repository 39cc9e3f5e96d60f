"""``edgevl pull``: download a checkpoint."""

from __future__ import annotations

from pathlib import Path

import click


@click.command("pull")
@click.argument("repo")
@click.option(
    "-o",
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help="Directory to write to.  [default: the Hub's cache, where MODEL finds it by its id]",
)
def command(repo: str, output: Path | None) -> None:
    """Download the checkpoint REPO (such as OpenGVLab/InternVL3_5-1B) from the Hub.

    Prints the directory. An interrupted download goes on where it stopped. The environment
    variable HF_ENDPOINT names a mirror; HF_HUB_OFFLINE=1 forbids the network.
    """
    from edgevl.loading import pull

    click.echo(pull(repo, output))
