"""``edgevl eval``: accuracy on a file of questions, or perplexity on a text."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import click
from click.core import ParameterSource

from edgevl.cli.options import FILE, flags, json_option, load_model
from edgevl.cli.terminal import bar_of, print_result, show_notes
from edgevl.files import replacing
from edgevl.options import KV_CACHE_FORMATS, PRECISIONS, LoadOptions, SamplingOptions

if TYPE_CHECKING:
    from edgevl.evaluate import Outcome, PerplexityResult, VQAComparison, VQAResult
    from edgevl.generate import Model

#: A model's name, and the options to load it with.
Loading: TypeAlias = tuple[str, dict[str, Any]]


@click.command("eval")
@click.argument("model")
@click.option(
    "--vqa",
    type=FILE,
    metavar="FILE.jsonl",
    help="Questions: one JSON object a line with image, question, answer, family.",
)
@click.option(
    "--perplexity",
    type=FILE,
    metavar="FILE",
    help="Plain text, UTF-8, to predict token by token.",
)
@click.option(
    "--against",
    metavar="MODEL",
    help="A reference to compare with: how often the same token comes first, KL divergence.",
)
@click.option(
    "--against-precision",
    type=click.Choice(PRECISIONS),
    help="Precision of the reference, which is MODEL itself without --against.",
)
@click.option(
    "--against-kv-cache",
    type=click.Choice(KV_CACHE_FORMATS),
    help="The same for its keys and values.",
)
@click.option(
    "--limit",
    type=click.IntRange(min=1),
    metavar="N",
    help="Take only the first N questions, or windows of text.",
)
@click.option(
    "--max-tokens",
    type=click.IntRange(min=1),
    default=SamplingOptions.max_tokens,
    show_default=True,
)
@click.option(
    "--max-tiles",
    type=click.IntRange(min=1),
    help="Most tiles of a picture.  [default: the checkpoint's]",
)
@click.option(
    "--save",
    type=FILE,
    metavar="FILE.jsonl",
    help="Write every answer, to read the failures.",
)
@flags(LoadOptions)
@json_option
def command(
    model: str,
    vqa: Path | None,
    perplexity: Path | None,
    against: str | None,
    against_precision: str | None,
    against_kv_cache: str | None,
    limit: int | None,
    max_tokens: int,
    max_tiles: int | None,
    save: Path | None,
    as_json: bool,
    **loading: Any,
) -> None:
    """Measure MODEL on a file of questions (--vqa) or on a text (--perplexity).

    Decoding is greedy. docs/evaluate.md says when an answer counts as right, and how every figure
    is defined.
    """
    changes = {"precision": against_precision, "kv_cache": against_kv_cache}
    models = _models(model, against, loading, changes)
    result: VQAResult | VQAComparison | PerplexityResult
    if vqa is not None and perplexity is None:
        options = {"max_tokens": max_tokens, "max_tiles": max_tiles}
        result = _evaluate_vqa(models, vqa, limit, save, options)
        lines = _describe_vqa(result)
    elif perplexity is not None and vqa is None:
        for name in ("max_tokens", "max_tiles", "save"):
            if (
                click.get_current_context().get_parameter_source(name)
                is ParameterSource.COMMANDLINE
            ):
                raise click.UsageError(f"--{name.replace('_', '-')} goes with --vqa only")
        result = _evaluate_perplexity(models, perplexity, limit)
        lines = _describe_perplexity(result)
    else:
        raise click.UsageError("give either --vqa FILE.jsonl or --perplexity FILE")
    print_result(result.to_dict(), lines, as_json)


def _models(
    model: str, against: str | None, loading: dict[str, Any], changes: dict[str, str | None]
) -> list[Loading]:
    """Return MODEL and, if it is to be compared, the reference.

    Args:
        model: MODEL.
        against: the reference, if it is another.
        loading: options of MODEL.
        changes: options that the reference has otherwise; None: as MODEL has it.

    Raises:
        click.UsageError: another engine than ``cpu`` is to have the changes, or without them the
            reference is MODEL itself.
    """
    changed = {name: value for name, value in changes.items() if value is not None}
    if changed:
        flags = {name: f"--against-{name.replace('_', '-')}" for name in changed}
        if loading["engine"] not in ("auto", "cpu"):
            given = " and ".join(flags.values())
            raise click.UsageError(f"{given}: engine cpu only, not {loading['engine']}")
        # What else `auto` may take would leave the changes out.
        loading = loading | {"engine": "cpu"}
        if against in (None, model) and loading | changed == loading:
            same = " and ".join(f"{flag} {changed[name]}" for name, flag in flags.items())
            raise click.UsageError(f"{same} is what MODEL has: give another")
    if against is None and not changed:
        return [(model, loading)]
    return [(model, loading), (model if against is None else against, loading | changed)]


def _evaluate_vqa(
    models: list[Loading],
    path: Path,
    limit: int | None,
    save: Path | None,
    options: dict[str, Any],
) -> VQAResult | VQAComparison:
    # Before the libraries of the model are loaded, so that a wrong line is told at once.
    from edgevl.evaluate import compare_vqa, evaluate_vqa, read_questions

    questions = read_questions(path, limit)
    with ExitStack() as stack:
        record = stack.enter_context(replacing(save)) if save else None
        model, other = _load(models)
        bar = stack.enter_context(bar_of(total=len(questions), unit="question"))
        right = 0

        def on_outcome(outcome: Outcome, reference: Outcome | None = None) -> None:
            nonlocal right
            right += outcome.right
            bar.update()
            bar.set_postfix_str(f"{right / bar.n:.1%} right" if bar.n else "")
            if record is not None:
                fields = outcome.to_dict()
                if reference is not None:
                    fields |= {"against_text": reference.text, "against_right": reference.right}
                line = json.dumps(fields, ensure_ascii=False) + "\n"
                record.write(line.encode(errors="backslashreplace"))

        if other is None:
            return evaluate_vqa(model, questions, on_outcome, **options)
        return compare_vqa(model, other, questions, on_outcome, **options)


def _evaluate_perplexity(models: list[Loading], path: Path, limit: int | None) -> PerplexityResult:
    from edgevl.evaluate import evaluate_perplexity, read_text, text_windows

    text = read_text(path)
    model, other = _load(models, exact_logits=True)
    windows = text_windows(model, text, limit=limit)
    with bar_of(total=sum(len(window) - 1 for window in windows), unit="token") as bar:
        return evaluate_perplexity(model, windows, other, bar.update)


def _load(models: list[Loading], exact_logits: bool = False) -> tuple[Model, Model | None]:
    """Load the model, and the one to compare with: where there is one, both with exact logits."""
    exact_logits = exact_logits or len(models) > 1
    loaded: list[Model] = []
    for name, options in models:
        loaded.append(load_model(name, quiet=True, exact_logits=exact_logits, **options))
        show_notes(loaded[-1].engine.notes)
    return loaded[0], loaded[1] if len(loaded) > 1 else None


def _describe_vqa(result: VQAResult | VQAComparison) -> Iterator[str]:
    """Yield a table of families; with a reference, its accuracy is the last column."""
    from edgevl.evaluate import VQAResult

    compared = None if isinstance(result, VQAResult) else result
    rows = _table(result if isinstance(result, VQAResult) else result.result)
    width = max(len(name) for name in ("family", *(name for name, _, _ in rows)))
    header = f"{'family':<{width}}  {'right':>6}  {'asked':>6}  accuracy"
    lines = [
        f"{name:<{width}}  {right:>6}  {asked:>6}  {right / asked:>8.1%}"
        for name, right, asked in rows
    ]
    if compared is None:
        yield from (header, *lines)
        return
    yield f"{header}   against"
    for line, (_, right, asked) in zip(lines, _table(compared.against), strict=True):
        yield f"{line}  {right / asked:>8.1%}"
    yield _agreement(compared.tokens, compared.token_agreement, compared.kl_divergence)


def _table(result: VQAResult) -> list[tuple[str, int, int]]:
    """Return name, right and asked of every family, and of all."""
    right = sum(outcome.right for outcome in result.outcomes)
    rows = [(name, *counts) for name, counts in result.families.items()]
    return [*rows, ("total", right, len(result.outcomes))]


def _describe_perplexity(result: PerplexityResult) -> Iterator[str]:
    yield f"perplexity  {result.perplexity:.3f} on {result.tokens} tokens"
    if result.against_perplexity is not None:
        yield f"against     {result.against_perplexity:.3f}"
        assert result.token_agreement is not None
        assert result.kl_divergence is not None
        yield _agreement(result.tokens, result.token_agreement, result.kl_divergence)


def _agreement(tokens: int, share: float, divergence: float) -> str:
    return (
        f"agreement   {share:.2%} of {tokens} most likely tokens, "
        f"KL divergence {divergence:.4f} nats"
    )
