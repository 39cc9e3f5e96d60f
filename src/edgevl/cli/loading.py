"""Loading the model of a command, and saying so."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from edgevl.cli.terminal import chinese, note, show_notes

if TYPE_CHECKING:
    from edgevl.generate import Model


def load_model(model: str, **options: Any) -> Model:
    """Load a model with what `engine_options` gave; tell who waits, and what there is to note."""
    from edgevl.generate import load

    note(f"{'正在加载' if chinese() else 'loading'} {model} …")
    loaded = load(model, **options)
    config = loaded.checkpoint.config
    show_notes([*loaded.engine.notes, *_describe_sampling(config.sampling), *config.ignored])
    return loaded


def _describe_sampling(sampling: Mapping[str, Any]) -> Iterator[str]:
    """Say in the user's language that a checkpoint has defaults: answers may differ each time."""
    if sampling:
        listed = ", ".join(f"{name} {value:g}" for name, value in sampling.items())
        yield (
            f"采样默认值取自模型的 generation_config.json：{listed}"
            if chinese()
            else f"sampling by default as generation_config.json has it: {listed}"
        )
