"""``edgevl eval``: accuracy on a file of questions."""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click

from edgevl.cli.terminal import engine_options, is_terminal, note, print_json, replacing


@click.command("eval")
@click.argument("model")
@click.option(
    "--vqa",
    required=True,
    type=click.Path(path_type=Path),
    metavar="FILE.jsonl",
    help="Questions: one JSON object a line with image, question, answer, family.",
)
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Ask only the first N.")
@click.option("--max-tokens", type=click.IntRange(min=1), default=512, show_default=True)
@click.option(
    "--max-tiles",
    type=click.IntRange(min=1),
    help="Most tiles of a picture.  [default: the checkpoint's]",
)
@click.option(
    "--save",
    type=click.Path(path_type=Path),
    metavar="FILE.jsonl",
    help="Write every answer, to read the failures.",
)
@engine_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(
    model: str,
    vqa: Path,
    limit: int | None,
    max_tokens: int,
    max_tiles: int | None,
    save: Path | None,
    as_json: bool,
    **loading: Any,
) -> None:
    """Ask MODEL the questions of a file and print the share of right answers.

    Decoding is greedy. docs/evaluate.md says when an answer counts as right.
    """
    # Before the libraries of the model are loaded, so that a wrong line is told at once.
    from edgevl.evaluate import Outcome, evaluate_vqa, read_questions

    questions = read_questions(vqa, limit)
    with ExitStack() as stack:
        record = stack.enter_context(replacing(save)) if save else None
        from tqdm import tqdm

        import edgevl

        note(f"loading {model} …")
        loaded = edgevl.load(model, **loading)
        for line in loaded.engine.notes:
            note(line)
        bar = stack.enter_context(
            tqdm(total=len(questions), unit="question", disable=not is_terminal(sys.stderr))
        )
        right = 0

        def on_outcome(outcome: Outcome) -> None:
            nonlocal right
            right += outcome.right
            bar.update()
            bar.set_postfix_str(f"{right / bar.n:.1%} right" if bar.n else "")
            if record is not None:
                line = json.dumps(outcome.to_dict(), ensure_ascii=False) + "\n"
                record.write(line.encode(errors="backslashreplace"))

        result = evaluate_vqa(
            loaded, questions, on_outcome, max_tokens=max_tokens, max_tiles=max_tiles
        )
    if as_json:
        print_json(result.to_dict())
        return
    width = max(len(name) for name in ("family", "total", *result.families))
    click.echo(f"{'family':<{width}}  {'right':>6}  {'asked':>6}  accuracy")
    for name, (correct, asked) in result.families.items():
        click.echo(f"{name:<{width}}  {correct:>6}  {asked:>6}  {correct / asked:>8.1%}")
    correct = sum(outcome.right for outcome in result.outcomes)
    asked = len(result.outcomes)
    click.echo(f"{'total':<{width}}  {correct:>6}  {asked:>6}  {result.accuracy:>8.1%}")
