"""Servers for tests: real ones on a free port, and a scheduler that does what the test says."""

import base64
import queue
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from edgevl.generate.generation import Answer, Delta, Timings, Usage
from edgevl.generate.sampling import LEAST, TokenLogprobs
from edgevl.generate.text import Piece
from edgevl.serve.app import PageGate, create_app
from edgevl.serve.server import Server, listen, url_of
from edgevl.serve.service import Service
from edgevl.serve.settings import Settings
from repository import EXAMPLES


def data_url(path, kind="image/png"):
    return f"data:{kind};base64,{base64.b64encode(Path(path).read_bytes()).decode()}"


METER = data_url(EXAMPLES / "meter.png")


def picture(url=METER, **more):
    return {"type": "image_url", "image_url": {"url": url, **more}}


def text(words):
    return {"type": "text", "text": words}


def user(*parts):
    return {"role": "user", "content": list(parts)}


def wait_until(holds, seconds=10.0):
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


@dataclass
class Running:
    url: str
    service: Service
    server: Server


@contextmanager
def serving(load, ready=True, make_page=None, **settings):
    """Run a server in a thread; ``load`` returns its model, ``make_page`` its page."""
    service = Service(Settings(name="tiny", **settings))
    sock = listen("127.0.0.1", 0)
    page = PageGate(make_page) if make_page else None
    server = Server(create_app(service, page), load)
    running = Running(url_of(sock), service, server)
    server = running.server
    thread = threading.Thread(target=server.run, args=([sock],))
    thread.start()
    try:
        wait_until(lambda: service.ready if ready else server.started)
        yield running
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


@dataclass
class Job:
    """A request as a scheduler gets it."""

    prompt: object
    params: object
    deliver: object
    client: str
    top_logprobs: int | None
    cancelled: bool = False
    ids: list = field(default_factory=list)

    def cancel(self):
        self.cancelled = True

    def say(self, words, thinking=False, token_id=5):
        logprobs = ()
        if self.top_logprobs is not None:
            top = ((token_id, -0.5), (6, LEAST))[: self.top_logprobs]
            logprobs = (TokenLogprobs(token_id, -0.5, top),)
        self.ids.append(token_id)
        self.deliver(Delta((Piece(words, thinking),), (token_id,), logprobs))

    def end(self, words="", thinking="", finish_reason="stop"):
        usage = Usage(len(self.prompt.token_ids), 0, len(self.ids), 2)
        timings = Timings(1.0, 2.0, 3.0, 4.0, 5.0, 200.0)
        self.deliver(Answer(words, thinking, tuple(self.ids), finish_reason, usage, timings))


class ScriptedScheduler:
    """Puts what it is given into ``jobs``, for the test to answer."""

    def __init__(self, model, max_sequences=16, max_queue=64):
        self.prompts = model.prompts
        self.max_context = model.engine.max_context
        self.jobs = queue.Queue()
        self.refusal = None
        self.waiting, self.running, self.alive = 0, 0, True

    def submit(self, prompt, params, deliver, client="", top_logprobs=None):
        if self.refusal:
            raise self.refusal
        job = Job(prompt, params, deliver, client, top_logprobs)
        self.jobs.put(job)
        return job

    def prepare(self, constraint):
        pass

    def next(self):
        return self.jobs.get(timeout=10)

    def close(self, timeout_s):
        self.alive = False


class EagerScheduler(ScriptedScheduler):
    """Answers at once."""

    def submit(self, prompt, params, deliver, client="", top_logprobs=None):
        job = Job(prompt, params, deliver, client, top_logprobs)
        job.say("Yes")
        job.end("Yes")
        return job
