"""Pulsar2's command lines."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from edgevl.axera.layout import BoardShape, vision_file
from edgevl.boards.settings import DEFAULT_WEIGHT_TYPE, CompileSettings
from edgevl.boards.targets import TARGETS

#: Matrix products in bfloat16 on the convolution unit: a much shorter prefill.
ENVIRONMENT = {"FLOAT_MATMUL_USE_CONV_EU": "1"}
#: Where the working directory is seen in a container.
MOUNTED = "/data"
#: What ``--model_config`` says of models that normalise queries and keys, as Qwen3 does.
QK_NORM_CONFIG = {"use_qk_norm": True, "qk_norm_after_rope": False}


def vision_command(
    settings: CompileSettings, image_size: int, onnx: str, config: str, output: str
) -> list[str]:
    """Return the arguments that compile the vision encoder.

    Args:
        settings: how to compile.
        image_size: side of a tile in pixels.
        onnx: the model.
        config: the build's configuration.
        output: directory that `vision_file` is written to.
    """
    target = TARGETS[settings.target]
    return [
        "build",
        *("--input", onnx),
        *("--config", config),
        *("--output_dir", output),
        *("--output_name", vision_file(image_size)),
        *("--npu_mode", settings.npu_mode or target.default_npu_mode),
        *("--target_hardware", target.chip),
    ]


def text_command(
    settings: CompileSettings,
    generation: int,
    checkpoint: str,
    output: str,
    *,
    quantized: bool,
    model_config: str | None,
) -> list[str]:
    """Return the arguments that compile the text model.

    Args:
        settings: how to compile.
        generation: 1 for ``llm_build``, 2 for ``llm_build2``.
        checkpoint: directory of the text model.
        output: directory that the layers are written to.
        quantized: whether the weights are GPTQ, which fixes their type.
        model_config: for generation 2, a file with `QK_NORM_CONFIG`, or None.
    """
    command = [
        "llm_build" if generation == 1 else "llm_build2",
        *("--input_path", checkpoint),
        *("--output_path", output),
        *("--hidden_state_type", "bf16"),
        *(_shape_1 if generation == 1 else _shape_2)(settings.shape),
    ]
    if not quantized:
        command += ["--weight_type", settings.weight_type or DEFAULT_WEIGHT_TYPE]
    if generation == 2:
        command += ["--post_weight_type", "s8"]
        if settings.decode_step is not None:
            command += ["--decode_step_size", str(settings.decode_step)]
        if model_config is not None:
            command += ["--model_config", model_config]
    if settings.post_topk:
        command += ["--post_topk", str(settings.post_topk)]
    target = TARGETS[settings.target]
    # Older versions lack the option, and take all cores.
    if settings.npu_mode not in (None, target.default_npu_mode):
        command += ["--npu_mode", str(settings.npu_mode)]
    return [
        *command,
        *("--chip", target.chip),
        *("--check_level", str(settings.check_level)),
        *("--parallel", str(settings.parallel)),
    ]


def docker_command(image: str, arguments: Sequence[str], directory: str, name: str) -> list[str]:
    """Return what runs ``pulsar2`` in a container that sees one directory of this machine.

    It runs as the image's own user, root: the compiler's licence is in root's home. What it writes
    is given back afterwards, by `give_back_command`.

    Args:
        image: such as ``pulsar2:5.1``.
        arguments: for ``pulsar2``; paths are relative to ``directory``.
        directory: absolute path.
        name: of the container, to stop it by.
    """
    environment = [f"--env={name}={value}" for name, value in ENVIRONMENT.items()]
    where = [mount(directory), f"--workdir={MOUNTED}"]
    return [
        *("docker", "run", "--rm", f"--name={name}"),
        *environment,
        *where,
        image,
        "pulsar2",
        *arguments,
    ]


def mount(directory: str) -> str:
    """Return Docker's option that shows a directory of this machine in a container.

    The shorter ``--volume`` would split the path at a colon. The value is a line of CSV, so that
    commas may be in it, too.
    """
    source = directory.replace('"', '""')
    return f'--mount=type=bind,"source={source}",target={MOUNTED}'


def give_back_command(image: str, directory: str, user: int, group: int) -> list[str]:
    """Return what makes a user the owner of all that a container has written to ``directory``."""
    return [
        *("docker", "run", "--rm", mount(directory), "--entrypoint=chown"),
        *(image, "-R", f"{user}:{group}", MOUNTED),
    ]


def shell(command: Sequence[str]) -> str:
    """Return a command line for a POSIX shell, one option a line."""
    lines: list[list[str]] = [[]]
    for argument in command:
        if argument.startswith("--"):
            lines.append([])
        lines[-1].append(shlex.quote(argument))
    return " \\\n    ".join(" ".join(line) for line in lines if line)


def _shape_1(shape: BoardShape) -> list[str]:
    lengths = [
        word for history in shape.histories()[1:] for word in ("--last_kv_cache_len", str(history))
    ]
    return ["--prefill_len", str(shape.chunk), "--kv_cache_len", str(shape.context), *lengths]


def _shape_2(shape: BoardShape) -> list[str]:
    return [
        *("--prefill_len", str(shape.max_prefill + shape.chunk)),
        *("--prefill_step_size", str(shape.chunk)),
        *("--max_context", str(shape.context + 1)),
    ]
