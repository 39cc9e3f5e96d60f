"""The Python face: load a model, ask it."""

from __future__ import annotations

import threading
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from edgevl.checkpoint import ModelDirectory
from edgevl.engine import Engine, base
from edgevl.engine.base import Floats
from edgevl.errors import ContextLengthError, EdgeVLError
from edgevl.generate.generation import Answer, Generation
from edgevl.generate.rounds import Rounds
from edgevl.generate.sampling import SamplingParams
from edgevl.generate.session import Session, Stream
from edgevl.generate.text import Piece
from edgevl.generate.token_mask import TokenMasks
from edgevl.loading import load_engine, locate, open_model
from edgevl.options import KVCacheFormat, LoadOptions, Precision
from edgevl.preprocess import Prompt, PromptEncoder, Tool
from edgevl.preprocess.video import DEFAULT_FRAMES

#: Tokens of a given answer whose logits are computed at once: 78 MB with 151,936 in the vocabulary.
FORCED_BLOCK = 128


def load(
    model: str | Path,
    engine: str = "auto",
    max_context: int | None = None,
    precision: Precision = "auto",
    threads: int | None = None,
    kv_cache: KVCacheFormat = "bf16",
    exact_logits: bool = False,
    cache: bool = True,
    keep_bytes: int = LoadOptions.keep_bytes,
) -> Model:
    """Load a model.

    Args:
        model: ``tiny``, a checkpoint directory, a board's model directory, or a Hub id, which is
            downloaded if need be.
        engine: ``auto`` or a name in `edgevl.loading.ENGINES`.
        max_context: most tokens of prompt and answer; default and limit is what the model was
            trained for. Memory follows use.
        precision: of the weights in memory. ``auto`` takes 4-bit GPTQ as it is and everything else
            to INT8; ``int4``, ``int8`` and ``bf16`` round to that.
        threads: how many compute; default is one for each physical core that may be used.
        kv_cache: how keys and values are stored. ``int8`` takes half the memory of ``bf16``, and a
            long context is read in less time.
        exact_logits: compute the logits of all tokens as well as those of the best. Answers do not
            need it; comparisons of whole distributions do. Slower, and takes more memory.
        cache: keep what large weights are packed to in ``.edgevl`` beside the checkpoint, where
            the next start finds it.
        keep_bytes: where weights are kept so, most bytes there for the features of pictures, and
            the keys and values of long system messages, that answers were computed with: the next
            start does not compute them again. What was used longest ago makes room. 0 keeps none.

    Raises:
        CheckpointError: the checkpoint is missing, malformed, or not supported.
        BoardError: the model is a board's, and incomplete or without an NPU to run it.
        DownloadError: it could not be downloaded.
        EdgeVLError: the memory does not suffice, or an argument is not one of its choices.
    """
    started = time.perf_counter()
    options = LoadOptions(
        engine,
        max_context,
        precision,
        kv_cache,
        threads,
        keep_bytes,
        exact_logits=exact_logits,
        cache=cache,
    )
    checkpoint = open_model(locate(model), engine)
    prompts = PromptEncoder(checkpoint)  # first: what parsing takes is free again for the weights
    loaded = load_engine(checkpoint, options)
    return Model(checkpoint, loaded, prompts, load_ms=1000 * (time.perf_counter() - started))


class Model:
    """A loaded model, as `load` returns it. Threads may share it: one answer is computed at a time.

    Attributes:
        checkpoint: what it was loaded from.
        engine: what computes it.
        prompts: its tokenizer and chat template.
        masks: what constrains answers.
        load_ms: what loading took, in milliseconds.
    """

    def __init__(
        self,
        checkpoint: ModelDirectory,
        engine: Engine,
        prompts: PromptEncoder,
        load_ms: float = 0.0,
    ) -> None:
        self.checkpoint = checkpoint
        self.engine = engine
        self.prompts = prompts
        self.load_ms = load_ms
        self._rounds: Rounds[Generation] = Rounds(engine, 1, whole_prompts=True)
        self.masks = TokenMasks(prompts.tokenizer, prompts.stop_ids)
        self._lock = threading.Lock()
        self._owner: int | None = None

    @property
    def max_context(self) -> int:
        """Most tokens of prompt and answer."""
        return self.engine.max_context

    def ask(
        self,
        text: str,
        images: Any = (),
        system: str | None = None,
        thinking: bool | None = None,
        max_tiles: int | None = None,
        videos: Any = (),
        frames: int = DEFAULT_FRAMES,
        tools: Sequence[Tool] = (),
        frame_threshold: float = 0.0,
        **sampling: Any,
    ) -> Answer:
        """Ask one question; for the arguments and errors see `chat` and `Session.ask`."""
        session = self.chat(system, thinking, max_tiles, tools)
        return session.ask(
            text, images, videos, frames, frame_threshold=frame_threshold, **sampling
        )

    def stream(
        self,
        text: str,
        images: Any = (),
        system: str | None = None,
        thinking: bool | None = None,
        max_tiles: int | None = None,
        videos: Any = (),
        frames: int = DEFAULT_FRAMES,
        tools: Sequence[Tool] = (),
        frame_threshold: float = 0.0,
        **sampling: Any,
    ) -> Stream:
        """Ask one question and receive the answer as it is generated; see `Session.stream`."""
        session = self.chat(system, thinking, max_tiles, tools)
        return session.stream(
            text, images, videos, frames, frame_threshold=frame_threshold, **sampling
        )

    def chat(
        self,
        system: str | None = None,
        thinking: bool | None = None,
        max_tiles: int | None = None,
        tools: Sequence[Tool] = (),
    ) -> Session:
        """Start a conversation; for the arguments see `Session`."""
        return Session(self.checkpoint, self, system, thinking, max_tiles, tools)

    def run(
        self, prompt: Prompt, params: SamplingParams, started: float
    ) -> Generator[Piece, None, Answer]:
        """Yield an answer's text as it comes, and return the answer; `Session` asks this.

        Another thread's answer is waited for. ``prompt`` is shorter than the context, ``started``
        the ``time.perf_counter()`` when the question was asked.

        Raises:
            EdgeVLError: this thread has an answer of this model under way, which could never end.
        """
        with self._turn():
            generation = Generation(
                self.prompts, self.masks, prompt, params, self.max_context, started
            )
            begun = self._rounds.start(generation)
            assert begun, "no other answer is under way"
            while not generation.finish_reason:
                for _, gain in self._rounds.step():
                    if isinstance(gain, Exception):
                        raise gain
                    yield from gain.pieces
            return generation.answer(self.load_ms)

    def score(self, prompt: Prompt, token_ids: Sequence[int]) -> Generator[Floats, None, None]:
        """Yield the logits with which a given answer would be generated (teacher forcing).

        Args:
            prompt: what is answered; `Session.prompt` makes one.
            token_ids: the answer.

        Yields:
            Logits of each of ``token_ids``, then of what follows them: blocks float32 [T, V], which
            the model's next computation overwrites.

        Raises:
            ContextLengthError: prompt and answer exceed the engine's context.
            EdgeVLError: this thread has an answer of this model under way.
        """
        length = len(prompt.token_ids) + len(token_ids)
        if length > self.max_context:
            raise ContextLengthError(
                f"prompt and answer are {length} tokens, but the context holds "
                f"{self.max_context}: let answers be shorter, or use fewer tiles (max_tiles)"
            )
        with self._turn():
            slot = self._rounds.slots.first
            yield slot.read(prompt)
            for begin in range(0, len(token_ids), FORCED_BLOCK):
                yield slot.extend(list(token_ids[begin : begin + FORCED_BLOCK]))

    @contextmanager
    def sequence(self) -> Iterator[base.Sequence]:
        """Lend the sequence that answers are computed in, empty, for calls of `engine`.

        Other threads' answers wait meanwhile. When it is given back it is emptied.

        Raises:
            EdgeVLError: this thread has an answer of this model under way.
        """
        with self._turn():
            slot = self._rounds.slots.first
            slot.truncate(0)
            try:
                yield slot.sequence
            finally:
                slot.truncate(0)

    def embed(self, prompt: Prompt) -> Floats:
        """Return what the decoder reads: float32 [T, H], features of pictures in their places.

        Pictures that were asked about lately are not encoded again. Not from between the pieces of
        an answer that this thread has under way: it would wait for ever.
        """
        with self._lock:
            return self._rounds.slots.first.embed(prompt)

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """Have the engine to oneself; wait for other threads."""
        thread = threading.get_ident()
        if self._owner == thread:
            raise EdgeVLError("an answer is still being streamed: read it to its end or close it")
        with self._lock:
            self._owner = thread
            try:
                self._rounds.clear()  # an answer may have been broken off
                yield
                self._rounds.slots.keep()
            finally:
                self._owner = None
