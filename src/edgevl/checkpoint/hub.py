"""Repositories on the Hub: downloading models, and finding those in its cache."""

from __future__ import annotations

import errno
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgevl.errors import DownloadError

#: What is downloaded: weights, configuration, tokenizer, models compiled for boards with their
#: embedding in the form that takes the least space. No code, no pickles.
PATTERNS = (
    "*.safetensors", "*.json", "*.txt", "*.jinja", "*.model",
    "*.axmodel", "*model.embed_tokens.weight.bfloat16.bin",
)  # fmt: skip
#: Beside models compiled for boards there are often the weights that they were made from; those of
#: checkpoints are never in a directory of their own.
LEFT_OUT = ("*/*.safetensors",)
#: The embedding's other forms, fetched where the first is not in the repository.
EMBEDDING_PATTERNS = ("*model.embed_tokens.weight.npy", "*model.embed_tokens.weight.float32.bin")

_REPO = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)


def is_repository(name: str) -> bool:
    """Whether ``name`` has the form of a Hub id, ``organisation/name``."""
    return _REPO.fullmatch(name) is not None and ".." not in name and "--" not in name


def download(repo: str, out: str | Path | None = None) -> Path:
    """Download a model from the Hub; what is there already is not fetched again.

    Only weights in safetensors, models compiled for boards, configuration and tokenizer files are
    fetched. Honours ``HF_ENDPOINT`` (a mirror), ``HF_HUB_OFFLINE``, ``HF_HOME`` and ``HF_TOKEN``.
    Progress is shown on a terminal.

    Args:
        repo: Hub id, such as ``OpenGVLab/InternVL3_5-1B``.
        out: directory for the files; by default the Hub's cache.

    Raises:
        DownloadError: no network, no such repository, no access, no space; the message says what
            to do.
    """
    if not is_repository(repo):
        raise DownloadError(
            f"{repo!r} is no Hub id; it has the form organisation/name, such as "
            "OpenGVLab/InternVL3_5-1B"
        )
    # Imported here because it takes longer than everything else together.
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if sys.stderr is None or not sys.stderr.isatty():
        disable_progress_bars()
    try:
        directory = _snapshot(repo, PATTERNS, local_dir=out)
        for pattern in EMBEDDING_PATTERNS:
            if any(directory.rglob("*.axmodel")) and not any(directory.rglob("*embed_tokens*")):
                _snapshot(repo, (pattern,), local_dir=out)
    except Exception as error:  # the hub, its HTTP library and the system raise many kinds
        raise DownloadError(_explain(repo, error)) from error
    return directory


def cached(repo: str) -> Path:
    """Return the directory of a repository in the Hub's cache; asks no network.

    Raises:
        OSError, ValueError: it is not there.
    """
    return _snapshot(repo, PATTERNS, local_files_only=True)


def _snapshot(repo: str, patterns: Sequence[str], **options: Any) -> Path:
    """Fetch, or with ``local_files_only`` find, the files of a repository that match."""
    import huggingface_hub

    return Path(
        huggingface_hub.snapshot_download(
            repo,
            allow_patterns=list(patterns),
            ignore_patterns=list(LEFT_OUT),
            max_workers=4,
            **options,
        )
    )


def _explain(repo: str, error: Exception) -> str:
    """Return one line on why a download failed and what to do."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    endpoint = constants.ENDPOINT
    elsewhere = (
        "or copy the directory from a machine that has it and give its path in place of the id"
    )
    if isinstance(error, GatedRepoError):
        return (
            f"{repo}: access is restricted; accept its terms at {endpoint}/{repo}, then set "
            "HF_TOKEN to a token of your account"
        )
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"{repo}: no such repository at {endpoint}; check the spelling (if it is private, set "
            "HF_TOKEN)"
        )
    if constants.HF_HUB_OFFLINE or isinstance(error, OfflineModeIsEnabled):
        return (
            f"{repo}: not in the cache, and HF_HUB_OFFLINE is set; unset it to download, "
            f"{elsewhere}"
        )
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
            return (
                f"{repo}: the disk is full; free space or choose another place (-o DIR, or set "
                "HF_HOME), then run it again: it resumes"
            )
        denied = (errno.EACCES, errno.EROFS, errno.EPERM)
        # A connection that a firewall denies has the same numbers, but no file name.
        if isinstance(cause, OSError) and cause.errno in denied and cause.filename:
            return (
                f"{repo}: cannot write to {cause.filename}; choose another place (-o DIR, or set "
                "HF_HOME)"
            )
        cause = cause.__cause__ or cause.__context__
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    if isinstance(error, HfHubHTTPError) and not isinstance(
        error, (LocalEntryNotFoundError, EntryNotFoundError)
    ):
        return f"{repo}: {endpoint} refused ({reason}); try again: it resumes"
    return (
        f"{repo}: {endpoint} cannot be reached; try again (it resumes), set HF_ENDPOINT to the "
        f"address of a mirror, {elsewhere} [{reason}]"
    )
