"""What to say where a library of the extra ``axera`` is not installed."""

from edgevl.errors import BoardError


def missing(error: ImportError) -> BoardError:
    """Return the error for a library that could not be imported."""
    return BoardError(f"{error.name or error} is missing: pip install 'edgevl[axera]'")
