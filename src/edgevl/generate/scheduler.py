"""Many answers at once: requests wait, are computed together, and get their text as it comes."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Generator, Iterator
from itertools import chain
from typing import TypeAlias

from edgevl.errors import EdgeVLError, QueueFullError
from edgevl.generate.constraint import Constraint
from edgevl.generate.generation import Answer, Delta, Generation
from edgevl.generate.model import Model
from edgevl.generate.rounds import Rounds
from edgevl.generate.sampling import SamplingParams
from edgevl.generate.text import Piece
from edgevl.preprocess import Prompt

log = logging.getLogger(__name__)

#: What a request is told: deltas, and at last the whole answer or what went wrong. An answer whose
#: request was cancelled has the ``finish_reason`` ``cancelled``.
Event: TypeAlias = Delta | Answer | Exception

#: Weight of the latest request in the running mean of their durations.
LATEST = 0.2
#: Time between the empty pieces of `Scheduler.run`, in seconds.
WAKE_S = 0.1
#: Bounds of what a refused client is told to wait, in seconds.
LEAST_WAIT_S, MOST_WAIT_S = 1.0, 60.0


class Request(Generation):
    """An answer that waits or is under way; `Scheduler.submit` makes requests."""

    def __init__(
        self,
        scheduler: Scheduler,
        prompt: Prompt,
        params: SamplingParams,
        deliver: Callable[[Event], object],
        client: str,
        top_logprobs: int | None,
    ) -> None:
        model, now = scheduler.model, time.perf_counter()
        super().__init__(
            model.prompts, model.masks, prompt, params, model.max_context, now, top_logprobs
        )
        self.client = client
        self.cancelled = False
        self.begun = 0.0  # time: when it got its slot
        self._scheduler = scheduler
        self._deliver = deliver

    def cancel(self) -> None:
        """Stop computing within a token or a tile; from any thread, and more than once."""
        self._scheduler.cancel(self)

    def deliver(self, event: Event) -> None:
        """Pass an event on; who cannot take it is gone."""
        try:
            self._deliver(event)
        except Exception:
            log.exception("an event could not be delivered")
            self.cancelled = True


class FairQueue:
    """Requests of several clients: each client's in order, and one of each client in turn.

    So a client with a hundred requests delays another's by one. Not safe between threads.
    """

    def __init__(self) -> None:
        self._clients: OrderedDict[str, deque[Request]] = OrderedDict()

    def __len__(self) -> int:
        return sum(map(len, self._clients.values()))

    def __iter__(self) -> Iterator[Request]:
        """Go through them; the first is the one that `get` takes."""
        return chain.from_iterable(self._clients.values())

    def put(self, request: Request) -> None:
        """Add a request behind those of its client."""
        self._clients.setdefault(request.client, deque()).append(request)

    def get(self) -> Request:
        """Take the next request.

        Raises:
            KeyError: there is none.
        """
        client, requests = self._clients.popitem(last=False)
        request = requests.popleft()
        if requests:
            self._clients[client] = requests  # behind the other clients
        return request

    def remove(self, request: Request) -> bool:
        """Drop a request; return whether it was there."""
        requests = self._clients.get(request.client, deque())
        if request not in requests:
            return False
        requests.remove(request)
        if not requests:
            del self._clients[request.client]
        return True


class Scheduler:
    """Answers many requests with one model, in a thread of its own.

    Clients take turns in a queue; the requests that have left it share `Rounds`.

    Args:
        model: what answers; nothing else may use it.
        max_sequences: most answers computed together, and prompts kept to be reused.
        max_queue: most requests that wait, at least 1.

    Attributes:
        model, max_queue: as given.
        max_context: most tokens of prompt and answer.
        prompts: turns messages into prompts.
    """

    def __init__(self, model: Model, max_sequences: int = 16, max_queue: int = 64) -> None:
        self.model = model
        self.max_queue = max_queue
        self.max_context = model.max_context
        self.prompts = model.prompts
        self._rounds: Rounds[Request] = Rounds(model.engine, max_sequences)
        self._queue = FairQueue()
        self._mean_s = LEAST_WAIT_S
        self._closing = False
        self._ended = False  # an answer, since what it computed was kept
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="scheduler", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Requests that wait for their turn."""
        return len(self._queue)

    @property
    def running(self) -> int:
        """Requests that are being computed."""
        return len(self._rounds.under_way)

    @property
    def alive(self) -> bool:
        """Whether it takes requests."""
        return self._thread.is_alive() and not self._closing

    def submit(
        self,
        prompt: Prompt,
        params: SamplingParams,
        deliver: Callable[[Event], object],
        client: str = "",
        top_logprobs: int | None = None,
    ) -> Request:
        """Queue a request.

        Args:
            prompt: what to answer.
            params: how.
            deliver: called with every event, mostly in the scheduler's thread: it must not block.
                The last one is an answer or an exception.
            client: who asks; clients take turns.
            top_logprobs: give the log-probability of each token, and of this many alternatives.

        Raises:
            QueueFullError: too many wait.
            ContextLengthError: the prompt leaves no room for an answer.
            PromptError: the constraint's grammar is malformed.
            EdgeVLError: it is closing, or constraints cannot be followed here.
        """
        self._check_open()
        request = Request(self, prompt, params, deliver, client, top_logprobs)
        with self._changed:
            self._check_open()
            self._queue.put(request)
            self._changed.notify()
        return request

    def prepare(self, constraint: Constraint) -> None:
        """Do what takes long the first time that answers are constrained, and check that one.

        Raises:
            PromptError: the constraint's grammar is malformed, or a part of it too complex.
            EdgeVLError: constraints cannot be followed here.
        """
        self.model.masks.check(constraint)

    def cancel(self, request: Request) -> None:
        """See `Request.cancel`."""
        with self._changed:
            request.cancelled = True
            waited = self._queue.remove(request)
        if waited:
            self._end(request)

    def run(
        self, prompt: Prompt, params: SamplingParams, started: float
    ) -> Generator[Piece, None, Answer]:
        """Yield the answer's text as it comes; return the answer. Closing the generator cancels.

        While nothing comes there is an empty piece now and then, so that who waits can leave.
        ``started`` is not used: the time in which a request waits counts anyway.
        """
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        request = self.submit(prompt, params, events.put)
        try:
            while True:
                try:
                    event = events.get(timeout=WAKE_S)
                except queue.Empty:
                    yield Piece("")
                    continue
                if isinstance(event, Exception):
                    raise event
                if isinstance(event, Answer):
                    return event
                yield from event.pieces
        finally:
            request.cancel()

    def close(self, timeout_s: float) -> None:
        """Refuse new requests, and cancel those that are not answered within ``timeout_s``."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(timeout_s)
        while self._thread.is_alive():
            with self._changed:
                requests = [*self._rounds.under_way, *self._queue]
            for request in requests:
                request.cancel()
            self._thread.join(0.1)

    def _check_open(self) -> None:
        if not self.alive:
            raise EdgeVLError(
                "the server is shutting down: ask again later", "服务正在关闭，请稍后再试"
            )
        if self.waiting >= self.max_queue:
            wait_s = self._mean_s * self.waiting / self._rounds.slots.most
            raise QueueFullError(
                f"{self.waiting} requests wait already: try again later",
                min(max(wait_s, LEAST_WAIT_S), MOST_WAIT_S),
                f"已有 {self.waiting} 个问题在等待，请稍后再试",
            )

    def _work(self) -> None:
        while True:
            with self._changed:
                while not (self._queue or self.running):
                    if self._closing:
                        return
                    self._changed.wait()
            for request in self._rounds.under_way:
                if request.cancelled:
                    self._end(request)
            self._start_next()
            for request, gain in self._rounds.step():
                if isinstance(gain, Exception):
                    self._end(request, gain)
                    continue
                if gain.token_ids or gain.pieces:
                    request.deliver(gain)
                if request.finish_reason:
                    self._end(request)
            if self._ended:  # the answer is delivered; others wait, once for each thing
                self._ended = False
                self._rounds.slots.keep()

    def _start_next(self) -> None:
        """Start the next request, if there is room for it."""
        with self._changed:
            if not self._queue:
                return
            request = next(iter(self._queue))
            try:
                begun = self._rounds.start(request)
            except Exception as error:  # there is no memory for a sequence
                self._queue.get()
                self._end(request, error)
                return
            if begun:
                self._queue.get()
                request.begun = time.perf_counter()

    def _end(self, request: Request, error: Exception | None = None) -> None:
        """Stop computing it and deliver the last event."""
        self._rounds.end(request)
        self._ended = True
        if request.begun:
            duration_s = time.perf_counter() - request.begun
            self._mean_s += LATEST * (duration_s - self._mean_s)
        if error is None:
            if not request.finish_reason:
                request.finish_reason = "cancelled"
            request.deliver(request.answer(self.model.load_ms))
        else:
            if not isinstance(error, EdgeVLError):
                log.error("an answer failed", exc_info=error)
            request.deliver(error)
