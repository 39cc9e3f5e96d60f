"""How fast a model runs here, beside what the machine allows, measured in the same run.

A shared machine's memory bandwidth swings with its neighbours, so a time alone says little. Every
round measures the read bandwidth, then each step of the model, then the bandwidth again; the result
is the median over the rounds. Inputs are random: no time depends on what a picture shows or a token
means.

Beside the times goes the roofline of the machine (Williams et al. 2009), and where the steps lie
under it. Intensity counts what a step cannot avoid: the multiply-adds of its products, and reading
each weight and each cached position once. It comes from the shapes alone.
"""

from __future__ import annotations

import math
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import IO, Any

import numpy as np

from edgevl.checkpoint import ModelConfig
from edgevl.checkpoint.architecture import matrices, text_layer, vision_components, vision_layers
from edgevl.engine import Engine, base
from edgevl.errors import CheckpointError, ContextLengthError, EdgeVLError
from edgevl.generate import Model
from edgevl.machine import this_machine

#: Bytes read to measure the bandwidth: many times what a last-level cache holds.
READ_BYTES = 512 << 20

#: Labels lie some points beside what they name.
_OFFSET: dict[str, Any] = {"textcoords": "offset points", "fontsize": 8}

#: Measures the machine: -> read bandwidth in GB/s, int8 rate in 1e9 operations a second.
Probe = Callable[[], tuple[float, float]]


@dataclass(frozen=True)
class Prefill:
    """Prefill of ``tokens`` positions into an empty cache."""

    tokens: int
    ms: float

    @property
    def tokens_per_s(self) -> float:
        """Positions computed in a second."""
        return 1000 * self.tokens / self.ms


@dataclass(frozen=True)
class Decode:
    """Greedy decoding, a token at a time, the choice of the token included.

    Attributes:
        after: positions in the cache before the first token.
        tokens: tokens decoded.
        ms_per_token: median over the rounds.
        bytes_per_token: weights and cache that a token reads, half-way through; None if unknown.
        fraction_of_bandwidth: median over the rounds of each one's rate of reading, divided by the
            bandwidth measured just before and after it; None if either is unknown.
    """

    after: int
    tokens: int
    ms_per_token: float
    bytes_per_token: int | None
    fraction_of_bandwidth: float | None

    @property
    def tokens_per_s(self) -> float:
        """Tokens decoded in a second."""
        return 1000 / self.ms_per_token

    @property
    def achieved_gb_s(self) -> float | None:
        """Rate of reading weights and cache, in GB/s."""
        if self.bytes_per_token is None:
            return None
        return self.bytes_per_token / self.ms_per_token / 1e6


@dataclass(frozen=True)
class BenchResult:
    """What was measured, medians all.

    Attributes:
        model: as it was named by the caller.
        cpu: name of the processor.
        threads: of the engine; None where the engine does not say.
        read_bandwidth_gb_s: of memory, with as many threads; None if it cannot be measured.
        int8_gops: 1e9 int8 operations a second, a multiply-add counting two; None likewise.
        vision_ms: for one tile; None if it was not asked for.
        prefill: one for each length.
        decode: after the middle one of those lengths.
        weights_bytes: all weights as the engine holds them; None if unknown.
        peak_rss_bytes: most memory the process had resident, before the machine was measured.
        load_ms: time to load the model.
        rounds: how often each step was measured.
        notes: what a reader must know of the engine, a line each.
    """

    model: str
    cpu: str
    threads: int | None
    read_bandwidth_gb_s: float | None
    int8_gops: float | None
    vision_ms: float | None
    prefill: tuple[Prefill, ...]
    decode: Decode
    weights_bytes: int | None
    peak_rss_bytes: int
    load_ms: float
    rounds: int
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return what ``edgevl bench --json`` prints; unknown values are None."""
        decode = self.decode
        return {
            "machine": {
                "cpu": self.cpu,
                "threads": self.threads,
                "read_bandwidth_gb_s": self.read_bandwidth_gb_s,
                "int8_gops": self.int8_gops,
            },
            "model": self.model,
            "vision": None if self.vision_ms is None else {"ms_per_tile": self.vision_ms},
            "prefill": [{**vars(step), "tokens_per_s": step.tokens_per_s} for step in self.prefill],
            "decode": {
                "after_tokens": decode.after,
                "tokens": decode.tokens,
                "tokens_per_s": decode.tokens_per_s,
                "ms_per_token": decode.ms_per_token,
                "bytes_per_token": decode.bytes_per_token,
                "achieved_gb_s": decode.achieved_gb_s,
                "fraction_of_bandwidth": decode.fraction_of_bandwidth,
            },
            "memory": {
                "weights_bytes": self.weights_bytes,
                "peak_rss_bytes": self.peak_rss_bytes,
            },
            "load_ms": self.load_ms,
            "runs": self.rounds,
            "notes": list(self.notes),
        }


def run_bench(
    model: Model,
    name: str,
    load_ms: float,
    prompt_tokens: Sequence[int],
    generate: int,
    image: bool,
    runs: int,
    progress: Callable[[str], object] = lambda step: None,
) -> BenchResult:
    """Measure a model that has just been loaded.

    Args:
        model: what to measure.
        name: of the model, for the result.
        load_ms: time it took to load, for the result.
        prompt_tokens: lengths to prefill, at least one.
        generate: tokens to decode after the middle one of these lengths.
        image: encode a tile, too.
        runs: rounds measured, after one to warm up.
        progress: called with the name of each step before it.

    Raises:
        EdgeVLError: a count is less than 1.
        ContextLengthError: the model's context is too short for what was asked.
        CheckpointError: ``image`` is asked for and the model has no vision encoder.
    """
    if not prompt_tokens or min(*prompt_tokens, generate, runs) < 1:
        raise EdgeVLError(
            f"prompt_tokens {list(prompt_tokens)}, generate {generate}, runs {runs}: each must be "
            "at least 1"
        )
    if image and not model.checkpoint.has_vision:
        raise CheckpointError(
            f"{model.checkpoint.path} has no vision weights: leave out --image, or give the whole "
            "checkpoint"
        )
    after = sorted(prompt_tokens)[(len(prompt_tokens) - 1) // 2]
    needed = max(*prompt_tokens, after + generate)
    if needed > model.engine.max_context:
        raise ContextLengthError(
            f"{needed} tokens are asked for, but the context holds {model.engine.max_context}: "
            "lower --prompt-tokens or --generate"
        )
    steps = _Steps(model, max(prompt_tokens), after, generate)
    once: dict[str, Callable[[], float]] = {}
    if image:
        once["vision"] = steps.vision_ms
    for tokens in prompt_tokens:
        once[f"prefill {tokens}"] = partial(steps.prefill_ms, tokens)

    for step, measure in {**once, "decode": steps.decode_ms}.items():
        progress(f"warm-up, {step}")
        measure()
    peak_rss = peak_rss_bytes()  # before the buffer is allocated that the probe reads
    threads = model.engine.threads
    probe = machine_probe(threads)
    if probe is not None:
        probe()

    times: dict[str, list[float]] = {step: [] for step in (*once, "decode")}
    rates: list[tuple[float, float]] = []
    fractions: list[float] = []
    bytes_per_token = decode_bytes(model.engine, model.checkpoint.config, after + generate // 2)
    for number in range(1, runs + 1):
        for step, measure in once.items():
            progress(f"round {number} of {runs}, {step}")
            times[step].append(measure())
        progress(f"round {number} of {runs}, decode")
        around = [probe()] if probe else []
        times["decode"].append(steps.decode_ms())
        around += [probe()] if probe else []
        rates += around
        if around and bytes_per_token is not None:
            achieved = bytes_per_token / times["decode"][-1] / 1e6
            fractions.append(achieved / statistics.mean(bandwidth for bandwidth, _ in around))
    medians = {step: statistics.median(values) for step, values in times.items()}
    weights = model.engine.weight_bytes()
    return BenchResult(
        model=name,
        cpu=this_machine().cpu,
        threads=threads,
        read_bandwidth_gb_s=_median([bandwidth for bandwidth, _ in rates]),
        int8_gops=_median([int8_rate for _, int8_rate in rates]),
        vision_ms=medians.get("vision"),
        prefill=tuple(Prefill(n, medians[f"prefill {n}"]) for n in prompt_tokens),
        decode=Decode(
            after,
            generate,
            medians["decode"],
            bytes_per_token,
            _median(fractions),
        ),
        weights_bytes=weights.total if weights else None,
        peak_rss_bytes=peak_rss,
        load_ms=load_ms,
        rounds=runs,
        notes=model.engine.notes,
    )


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


def decode_bytes(engine: Engine, config: ModelConfig, context: int) -> int | None:
    """Return the bytes that one token reads with ``context`` positions cached.

    That is what products read of the decoder and the head, a row of the embedding, and the cache.
    None where the engine does not say what its weights take.
    """
    weights = engine.weight_bytes()
    if weights is None:
        return None
    row = weights.embedding // config.text.vocab_size
    return weights.text + row + context * weights.cache_per_token


def machine_probe(threads: int | None) -> Probe | None:
    """Return what measures this machine with that many threads; None without the native module."""
    try:
        from edgevl import _native
    except ImportError:
        return None
    if threads is None:
        return None
    pool = _native.ThreadPool(threads)
    return lambda: (_native.read_bandwidth(pool, READ_BYTES), _native.int8_rate(pool))


def peak_rss_bytes() -> int:
    """Return the most memory this process has had resident, files mapped into it included."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB


class _Steps:
    """The steps of a model, each of which returns how long it took in milliseconds."""

    def __init__(self, model: Model, longest: int, after: int, generate: int) -> None:
        self._model = model
        self._after = after
        self._generate = generate
        random = np.random.default_rng(0)
        vocabulary = model.checkpoint.config.text.vocab_size
        # The same in every round: their rows of the embedding are read from a file, which the
        # system may have to fetch the first time.
        self._token_ids = random.integers(vocabulary, size=longest, dtype=np.int64)
        size = model.checkpoint.config.vision.image_size
        self._tile = random.standard_normal((1, 3, size, size), dtype=np.float32)

    def vision_ms(self) -> float:
        """Encode one tile."""
        return elapsed_ms(lambda: self._model.engine.encode_images(self._tile))

    def prefill_ms(self, tokens: int) -> float:
        """Prefill random tokens into an empty cache; looking up their embeddings is not timed."""
        with self._model.sequence() as sequence:
            return self._prefill_ms(sequence, tokens)

    def decode_ms(self) -> float:
        """Decode after a prefill that is not timed: -> milliseconds a token."""

        def decode() -> None:
            token_id = 0
            for _ in range(self._generate):
                token_id = int(engine.decode([sequence], [token_id]).argmax())

        engine = self._model.engine
        with self._model.sequence() as sequence:
            self._prefill_ms(sequence, self._after)
            return elapsed_ms(decode) / self._generate

    def _prefill_ms(self, sequence: base.Sequence, tokens: int) -> float:
        embeddings = self._model.engine.embed(self._token_ids[:tokens])
        return elapsed_ms(lambda: self._model.engine.prefill(sequence, embeddings))


def elapsed_ms(work: Callable[[], object]) -> float:
    """Return how long ``work`` takes, in milliseconds."""
    started = time.perf_counter()
    work()
    return 1000 * (time.perf_counter() - started)


@dataclass(frozen=True)
class Step:
    """A measured step: operations (a multiply-add counts two), bytes read at least, duration."""

    name: str
    operations: float
    bytes: float
    ms: float

    @property
    def intensity(self) -> float:
        """Operations a byte."""
        return self.operations / self.bytes

    @property
    def gops(self) -> float:
        """Rate reached, in 1e9 operations a second."""
        return self.operations / self.ms / 1e6


def decoder_operations(config: ModelConfig, tokens: int, cached: int) -> float:
    """Return the operations of the decoder for ``tokens`` positions after ``cached`` others.

    Linear layers, attention to what each position can see, and the head for the last position.
    """
    text = config.text
    linears = [linear for matrix in matrices(text_layer(text)) for linear in matrix.linears]
    products = sum(linear.outputs * linear.inputs for linear in linears)
    seen = tokens * cached + tokens * (tokens + 1) / 2
    layer = tokens * products + 2 * seen * text.num_attention_heads * text.head_dim
    return 2 * (text.num_hidden_layers * layer + text.hidden_size * text.vocab_size)


def vision_operations(config: ModelConfig) -> float:
    """Return the operations of the encoder and the projector for one tile."""
    layers, patches = vision_layers(config), config.vision.num_patches
    total = layers * 2 * (patches + 1) ** 2 * config.vision.hidden_size  # attention
    for matrix in matrices(vision_components(config, layers)):
        (linear,) = matrix.linears
        rows = patches if linear.kernel else patches + 1
        if matrix.native.startswith("projector"):
            rows = config.image_tokens
        total += rows * linear.outputs * linear.inputs
    return 2 * total


def roofline_steps(
    result: BenchResult, config: ModelConfig, weights: base.WeightBytes
) -> list[Step]:
    """Return the measured steps with their operations and bytes."""
    steps = []
    if result.vision_ms is not None:
        steps.append(Step("vision", vision_operations(config), weights.vision, result.vision_ms))
    for prefill in result.prefill:
        operations = decoder_operations(config, prefill.tokens, 0)
        steps.append(Step(f"prefill {prefill.tokens}", operations, weights.text, prefill.ms))
    decode = result.decode
    context = decode.after + decode.tokens // 2
    operations = decoder_operations(config, 1, context)
    read = weights.text + context * weights.cache_per_token
    steps.append(Step("decode", operations, read, decode.ms_per_token))
    return steps


def plot_roofline(
    result: BenchResult, config: ModelConfig, weights: base.WeightBytes | None, file: IO[bytes]
) -> None:
    """Draw the roofline with the measured steps as PNG into ``file``.

    Raises:
        EdgeVLError: matplotlib is missing, or the engine or the machine was not measured.
    """
    bandwidth, int8_gops = result.read_bandwidth_gb_s, result.int8_gops
    if weights is None or bandwidth is None or int8_gops is None:
        raise EdgeVLError(
            "--plot: this engine does not say what its weights take, or the machine's rates could "
            "not be measured: use --engine cpu"
        )
    require_matplotlib()
    from matplotlib.figure import Figure

    steps = roofline_steps(result, config, weights)
    ridge = int8_gops / bandwidth
    low = min(ridge, *(step.intensity for step in steps)) / 2
    high = max(ridge, *(step.intensity for step in steps)) * 2
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.set_axisbelow(True)
    axes.loglog([low, ridge, high], [low * bandwidth, int8_gops, int8_gops], color="0.3")
    middle = math.sqrt(low * ridge)
    axes.annotate(
        f"{bandwidth:.1f} GB/s", (middle, middle * bandwidth), (-8, 4), ha="right", **_OFFSET
    )
    axes.annotate(f"{int8_gops:.0f} int8 GOPS", (ridge, int8_gops), (6, 5), **_OFFSET)
    for step in steps:
        attainable = min(int8_gops, step.intensity * bandwidth)
        axes.plot(step.intensity, step.gops, "o")
        label = f"{step.name}\n{step.gops / attainable:.0%}"
        # Beside the line; above the prefills, which lie side by side; below.
        offset = {"decode": (28, -20), "vision": (0, 8)}.get(step.name, (0, -24))
        axes.annotate(label, (step.intensity, step.gops), offset, ha="center", **_OFFSET)
    axes.set_xlabel("operations per byte read")
    axes.set_ylabel("1e9 operations per second")
    axes.set_title(f"{result.model} on {result.cpu}, {result.threads} threads", fontsize=10)
    axes.grid(which="both", color="0.9")
    axes.margins(y=0.2)
    figure.savefig(file, format="png", dpi=150)


def require_matplotlib() -> None:
    """Raise an EdgeVLError that says what to install, if matplotlib is missing."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise EdgeVLError(
            '--plot needs matplotlib, which is missing: pip install "edgevl[bench]"'
        ) from None
