"""``edgevl doctor``: check this machine and the installation."""

from __future__ import annotations

import importlib
import platform
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgevl.cli.options import json_option
from edgevl.cli.terminal import print_result, reason
from edgevl.errors import EdgeVLError
from edgevl.machine import this_machine
from edgevl.version import __version__

if TYPE_CHECKING:
    from PIL import Image

#: What must be importable: distribution -> module. The same as ``dependencies`` in pyproject.toml.
NEEDED = {
    "numpy": "numpy",
    "pillow": "PIL.Image",
    "tokenizers": "tokenizers",
    "jinja2": "jinja2",
    "huggingface_hub": "huggingface_hub",
    "click": "click",
    "tqdm": "tqdm",
    "psutil": "psutil",
    "prompt_toolkit": "prompt_toolkit",
    "rich": "rich.markdown",
    "markdown-it-py": "markdown_it",
}

#: Extra -> its distributions and what it is for.
EXTRAS = {
    "heic": ("pillow-heif", "HEIC pictures"),
    "video": ("av", "videos"),
    "constrained": ("llguidance", "answers of a given form, such as JSON"),
    "serve": (
        "httpx2 anyio fastapi uvicorn prometheus-client pydantic llguidance av",
        "edgevl serve",
    ),
    "ui": ("gradio", "edgevl ui"),
    "board": ("cffi", "boards with an NPU, and their emulator"),
    "axera": ("onnx onnx-ir onnxslim onnxruntime pydantic json5", "edgevl compile"),
    "quantize": ("torch", "edgevl quantize"),
    "bench": ("matplotlib aiohttp", "the plot of edgevl bench, benchmarks/serving.py"),
    "reference": ("torch transformers", "comparison with the original, for developers"),
}

#: The number on the picture that `tiny` is asked about.
NUMBER = "407"


@click.command("doctor")
@json_option
def command(as_json: bool) -> int:
    """Check this machine and the installation; exit status 1 if something needed is broken."""
    report = examine()
    print_result(report, describe(report), as_json)
    return 1 if report["problems"] else 0


def examine() -> dict[str, Any]:
    """Look at everything; ``problems`` has a line for each thing that must be mended."""
    looks = {
        "machine": lambda: asdict(this_machine()),
        "cpu_engine": _cpu_engine,
        "npu": _npu,
        "hub": _hub,
        "tiny": _tiny,
    }
    problems: list[str] = []
    packages = _packages(problems)
    report: dict[str, Any] = {
        "edgevl": __version__,
        "location": str(Path(__file__).resolve().parents[1]),
        "python": platform.python_version(),
        "system": platform.platform(),
        "packages": packages,
        "extras": {
            name: {"present": all(map(_version, distributions.split())), "purpose": purpose}
            for name, (distributions, purpose) in EXTRAS.items()
        },
        **dict.fromkeys(looks),
        "problems": problems,
    }
    for name, look in looks.items():
        try:
            report[name] = look()
        except Exception as error:  # a doctor reports what is broken, whatever it is
            problems.append(f"{name}: {reason(error)}")
    if report["tiny"] and not report["tiny"]["right"]:
        problems.append(f"tiny: read {report['tiny']['answer']!r} where {NUMBER} is written")
    return report


def describe(report: dict[str, Any]) -> list[str]:
    """Turn a report into lines for people."""
    lines = [
        f"edgevl    {report['edgevl']} in {report['location']}",
        f"python    {report['python']} on {report['system']}",
        "packages  "
        + ", ".join(f"{name} {number or 'MISSING'}" for name, number in report["packages"].items()),
    ]
    for name, extra in report["extras"].items():
        state = "present" if extra["present"] else f'absent; pip install "edgevl[{name}]"'
        lines.append(f"extra     {name} ({extra['purpose']}): {state}")
    if machine := report["machine"]:
        lines += [
            f"cpu       {machine['cpu']} ({machine['architecture']}), "
            f"{machine['usable_cores']:g} of {machine['logical_cores']} cores usable, "
            f"{machine['physical_cores']} physical",
            f"isa       {', '.join(machine['features']) or 'nothing known'}",
            f"memory    {_gib(machine['memory_bytes'])}, "
            f"{_gib(machine['available_bytes'])} available",
        ]
    if engine := report["cpu_engine"]:
        others = ", ".join(engine["instruction_sets"])
        lines.append(
            f"engine    cpu with {engine['instruction_set']} (of {others}), "
            f"{engine['threads']} threads"
        )
    if npu := report["npu"]:
        lines += _describe_npu(npu)
    if hub := report["hub"]:
        lines += [
            f"hub       {hub['endpoint']}{' (offline mode)' if hub['offline'] else ''}",
            f"cache     {hub['cache']}, {_gib(hub['free_bytes'])} free",
        ]
    if tiny := report["tiny"]:
        lines.append(
            f"tiny      {tiny['path']}: read {tiny['answer']!r}, "
            f"loaded in {tiny['load_ms']:.0f} ms, answered in {tiny['answer_ms']:.0f} ms"
        )
    lines += [f"problem   {problem}" for problem in report["problems"]]
    lines.append("Something needs mending." if report["problems"] else "All is well.")
    return lines


def _packages(problems: list[str]) -> dict[str, str | None]:
    """Import what is needed: distribution -> version."""
    versions = {}
    for distribution, module in NEEDED.items():
        versions[distribution] = _version(distribution)
        try:
            importlib.import_module(module)
        except Exception as error:
            problems.append(f"{distribution}: {reason(error)}; pip install {distribution}")
    return versions


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _cpu_engine() -> dict[str, Any]:
    """Return what the native engine would compute with."""
    from edgevl.engine import native_missing

    if missing := native_missing():
        raise EdgeVLError(missing)
    from edgevl import _native
    from edgevl.engine.cpu import instruction_set

    return {
        "instruction_set": instruction_set(),
        "instruction_sets": _native.instruction_sets(),
        "threads": this_machine().threads,
    }


def _npu() -> dict[str, Any]:
    """Return what drives this computer's NPU, and what that says of itself."""
    from edgevl.axera.npu import installed_runtime, open_runtime

    name = installed_runtime()
    return {"runtime": name} | (asdict(open_runtime().info()) if name else {})


def _describe_npu(npu: dict[str, Any]) -> Iterator[str]:
    if npu["runtime"] is None:
        yield "npu       none here; without a board, edgevl compile --emulate"
        return
    about = [npu["version"] and f"version {npu['version']}", npu["chip"]]
    line = ", ".join([f"runtime {npu['runtime']}", *filter(None, about)])
    yield f"npu       {line}{' (emulated: no board computes)' if npu['emulated'] else ''}"
    if npu["memory_bytes"] is not None:
        free = "" if npu["free_bytes"] is None else f", {_gib(npu['free_bytes'])} free"
        yield f"          NPU memory (CMM) {_gib(npu['memory_bytes'])}{free}"


def _hub() -> dict[str, Any]:
    """Return where models come from and go to, without using the network."""
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE)
    existing = next(path for path in (cache, *cache.parents) if path.exists())
    return {
        "endpoint": constants.ENDPOINT,
        "offline": bool(constants.HF_HUB_OFFLINE),
        "cache": str(cache),
        "free_bytes": shutil.disk_usage(existing).free,
    }


def _tiny() -> dict[str, Any]:
    """Load the shipped model and ask it something that can be checked."""
    from edgevl.generate import load

    model = load("tiny")
    started = time.perf_counter()
    answer = model.ask("What number is this?", images=[_picture()], max_tokens=32)
    return {
        "path": str(model.checkpoint.path),
        "answer": answer.text,
        "right": answer.text.strip(" .") == NUMBER,
        "load_ms": answer.timings.load_ms,
        "answer_ms": 1000 * (time.perf_counter() - started),
    }


def _picture() -> Image.Image:
    """Draw a display that shows `NUMBER`."""
    from PIL import Image, ImageDraw, ImageFont

    image = Image.new("RGB", (224, 224), "#20242c")
    draw = ImageDraw.Draw(image)
    draw.text((112, 112), NUMBER, font=ImageFont.load_default(80), fill="#f0f0f0", anchor="mm")
    return image


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"
