"""Loading the model of a command, and saying so."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgevl.cli.terminal import chinese, note, show_notes

if TYPE_CHECKING:
    from edgevl.generate import Model


def load_model(model: str, **options: Any) -> Model:
    """Load a model with what `engine_options` gave; tell who waits, and what the engine notes."""
    import edgevl

    note(f"{'正在加载' if chinese() else 'loading'} {model} …")
    loaded = edgevl.load(model, **options)
    show_notes(loaded.engine.notes)
    return loaded
