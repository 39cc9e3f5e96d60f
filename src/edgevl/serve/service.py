"""What all requests share: the model, its scheduler, the threads for pictures, the metrics."""

from __future__ import annotations

import re
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from edgevl.generate.model import Model
from edgevl.generate.scheduler import Scheduler
from edgevl.serve.errors import ApiError, as_api_error, stopping, unavailable
from edgevl.serve.fetch import Fetcher
from edgevl.serve.media import Media
from edgevl.serve.requests import IgnoredFields
from edgevl.serve.responses import TokenTexts
from edgevl.serve.settings import Settings
from edgevl.serve.telemetry import Metrics


@dataclass(frozen=True)
class Loaded:
    """What there is once the model is loaded; ``sampling`` are the checkpoint's defaults."""

    scheduler: Scheduler
    media: Media
    texts: TokenTexts
    sampling: Mapping[str, Any]


class Service:
    """What all requests share.

    Attributes:
        settings: What the operator decides.
        created: Unix time in seconds of the server's start.
        metrics: What Prometheus reads.
        ignored: What is said of fields that are not known.
    """

    def __init__(self, settings: Settings) -> None:
        """Be alive, but not ready: `start` comes with the model."""
        self.settings = settings
        self.created = int(time.time())
        self.metrics = Metrics()
        self.ignored = IgnoredFields(settings.strict)
        self._loaded: Loaded | None = None
        self._path = settings.name  # of the model, once it is known

    def start(self, model: Model) -> Scheduler:
        """Take a model and be ready; return what answers with it. From any thread."""
        scheduler = Scheduler(model, max_queue=self.settings.max_queue)
        fetcher = Fetcher(self.settings.allowed_hosts)
        self.metrics.watch(scheduler)
        self._path = str(model.checkpoint.path)
        self._loaded = Loaded(
            scheduler,
            Media(model.checkpoint, scheduler.max_context, fetcher),
            TokenTexts(scheduler.prompts.tokenizer),
            model.checkpoint.config.sampling,
        )
        return scheduler

    def close(self) -> None:
        """Take no more requests; wait for those under way, up to ``grace_s``; cancel the rest."""
        if self._loaded is not None:
            self._loaded.scheduler.close(self.settings.grace_s)

    @property
    def scheduler(self) -> Scheduler | None:
        """The scheduler, once the model is loaded."""
        return self._loaded.scheduler if self._loaded else None

    @property
    def ready(self) -> bool:
        """Whether requests are taken."""
        return self._loaded is not None and self._loaded.scheduler.alive

    def loaded(self) -> Loaded:
        """Return what answers requests.

        Raises:
            ApiError: it is not ready.
        """
        if self._loaded is None:
            raise unavailable("the model is still being loaded: try again in a while")
        if not self._loaded.scheduler.alive:
            raise stopping()
        return self._loaded

    def check_name(self, name: str) -> None:
        """Check that ``name`` is the model's.

        Raises:
            ApiError: it is not.
        """
        if name != self.settings.name:
            message = f"there is no model of this name here: give {self.settings.name!r}"
            raise ApiError(404, message, "model", "model_not_found")

    def client_error(self, error: Exception) -> ApiError:
        """Return what a client is told of ``error``: nothing of where the model is.

        Its frames are cleared. They hold bodies and pictures, and may hold on to one another until
        Python looks for such cycles, which may be many requests later.
        """
        cause: BaseException | None = error
        while cause is not None:
            traceback.clear_frames(cause.__traceback__)
            cause = cause.__cause__ or cause.__context__
        failure = as_api_error(error)
        path = rf"(?<![\w./-]){re.escape(self._path)}(?![\w-])"  # nothing that only contains it
        failure.detail.message = re.sub(path, lambda _: self.settings.name, failure.detail.message)
        return failure
