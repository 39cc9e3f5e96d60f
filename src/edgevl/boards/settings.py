"""What a user decides about a compilation, said once.

The fields of `CompileSettings` are what ``edgevl compile`` takes on the command line, and Pulsar2's
command lines are made from them. Nothing heavy is imported, so that ``--help`` is there at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from edgevl.axera.layout import BoardShape, vision_file
from edgevl.errors import BoardError

#: The weight type of a text model that is not quantized, where nothing else is asked for.
DEFAULT_WEIGHT_TYPE = "s8"


@dataclass(frozen=True)
class Target:
    """A chip, as the toolchain and its boards know it.

    Attributes:
        name: what ``--target`` calls it.
        chip: what Pulsar2 calls it (``--chip``, ``--target_hardware``).
        npu_modes: how many of its NPU cores may work as one: NPU1, NPU2, NPU3; the last is all.
        memory_bytes: NPU memory (CMM) of a typical board. How much of a board's memory belongs to
            the NPU is its image's choice, so this is no limit of the chip.
        memory_source: which board that is: of public listings of an AX8850 board and of M5Stack's
            Module LLM. Cards may have more: M5Stack's LLM-8850 shows 7040 MiB.
    """

    name: str
    chip: str
    npu_modes: tuple[str, ...]
    memory_bytes: int
    memory_source: str

    @property
    def default_npu_mode(self) -> str:
        """All cores as one."""
        return self.npu_modes[-1]


AX650 = Target(
    name="ax650",
    chip="AX650",
    npu_modes=("NPU1", "NPU2", "NPU3"),
    memory_bytes=6 << 30,
    memory_source="a board of 8 GiB, 2 of them Linux's",
)
AX630C = Target(
    name="ax630c",
    chip="AX620E",
    npu_modes=("NPU1", "NPU2"),
    memory_bytes=3 << 30,
    memory_source="a module of 4 GiB, 1 of them Linux's",
)

#: By name.
TARGETS: dict[str, Target] = {target.name: target for target in (AX650, AX630C)}


@dataclass(frozen=True)
class Setting:
    """What is known of a field of `CompileSettings`.

    Attributes:
        help: what it does, for ``--help``.
        default: where the user says nothing; False is that of a switch.
        required: whether the user has to say something.
        choices: the values that there are.
        low: the least number; without ``low`` and ``choices`` it is a text or a path.
        high: the largest, if there is one.
        metavar: what stands for the value in ``--help``.
        is_path: whether it is a path.
        of_pulsar2: whether it would change nothing where Pulsar2 does not run, with ``emulate``.
        name: of the field.
    """

    help: str
    default: Any = None
    required: bool = False
    choices: tuple[Any, ...] = ()
    low: int | None = None
    high: int | None = None
    metavar: str | None = None
    is_path: bool = False
    of_pulsar2: bool = False
    name: str = ""

    @property
    def flag(self) -> str:
        """What the command line calls it."""
        return f"--{self.name.replace('_', '-')}"

    def field(self) -> Any:
        """Return a dataclass's field for it."""
        metadata = {"setting": self}
        return (
            field(metadata=metadata)
            if self.required
            else field(default=self.default, metadata=metadata)
        )

    def check(self, value: Any) -> None:
        """Refuse a value that there is not, or that is out of range.

        Raises:
            BoardError: says what it must be.
        """
        if value is None and not self.required:
            return
        if self.choices and value not in self.choices:
            raise BoardError(f"{self.flag} {value}: choose {', '.join(map(str, self.choices))}")
        if self.low is not None and not self.low <= value <= (self.high or value):
            span = f"{self.low} or more" if self.high is None else f"{self.low} to {self.high}"
            raise BoardError(f"{self.flag} {value}: must be {span}")


@dataclass(frozen=True)
class CompileSettings:
    """How to compile; each field's `Setting` says what it does.

    Raises:
        BoardError: a value is out of its range, or two contradict each other.
    """

    target: str = Setting(
        "The chip; ax650 is the AX650N, AX650A and AX8850 too, ax630c the AX620Q.",
        required=True,
        choices=tuple(TARGETS),
    ).field()
    context: int = Setting(
        "Positions of the key/value cache; prompt and answer take one more at most.",
        BoardShape.context,
        low=1,
    ).field()
    chunk: int = Setting(
        "Tokens of a prompt that are computed at once.", BoardShape.chunk, low=1
    ).field()
    max_prefill: int = Setting(
        "Longest history that a chunk may follow; beyond, a prompt goes token by token.",
        BoardShape.max_prefill,
        low=0,
    ).field()
    npu_mode: str | None = Setting(
        "NPU cores that work as one.  [default: all]", choices=("NPU1", "NPU2", "NPU3")
    ).field()
    calibration_images: Path | None = Setting(  # noqa: RUF009
        "Pictures like those to be asked about.  [default: drawn ones]",
        metavar="DIR|TAR",
        is_path=True,
        of_pulsar2=True,
    ).field()
    samples: int = Setting("Pictures to calibrate vision on.", 32, low=1, high=1024).field()
    uint8_input: bool = Setting(
        "Give pictures to the NPU as bytes: a quarter of the size, normalised there.", False
    ).field()
    weight_type: Literal["s4", "s8"] | None = Setting(
        "What plain text weights are rounded to; GPTQ stays as it is.  "
        f"[default: {DEFAULT_WEIGHT_TYPE}]",
        choices=("s4", "s8"),
    ).field()
    post_topk: int = Setting(
        "Return only the K most probable tokens from the NPU, not all logits.",
        0,
        low=0,
        metavar="K",
    ).field()
    pulsar2: str | None = Setting(
        "The vendor's compiler.  [default: pulsar2 on PATH]",
        metavar="docker:IMAGE|PATH",
        of_pulsar2=True,
    ).field()
    pulsar2_config: Path | None = Setting(  # noqa: RUF009
        "Configuration of the vision build; see docs/boards.md.",
        metavar="FILE",
        is_path=True,
        of_pulsar2=True,
    ).field()
    llm_build: Literal[1, 2] | None = Setting(
        "Pulsar2's command for text: llm_build or llm_build2.  [default: the newest it has]",
        choices=(1, 2),
        of_pulsar2=True,
    ).field()
    decode_step: int | None = Setting(
        "With llm_build2: a decode group for each N positions of context; 0 makes one.",
        low=0,
        metavar="N",
        of_pulsar2=True,
    ).field()
    parallel: int = Setting(
        "Layers that Pulsar2 builds at once; each takes memory.", 4, low=1, high=256
    ).field()
    check_level: int = Setting(
        "How Pulsar2 checks text: 0 not, 1 a layer against floats, 2 by generating, for hours.",
        1,
        low=0,
        high=2,
    ).field()
    dry_run: bool = Setting(
        "Write everything but the compiled files, and a build.sh that makes them elsewhere.", False
    ).field()
    emulate: bool = Setting("Write a model for the emulator; needs no Pulsar2.", False).field()

    def __post_init__(self) -> None:
        given = {setting: getattr(self, name) for name, setting in SETTINGS.items()}
        for setting, value in given.items():
            setting.check(value)
        if self.dry_run and self.emulate:
            raise BoardError("--dry-run and --emulate: give one of the two")
        if self.npu_mode not in (None, *self.chip.npu_modes):
            modes = ", ".join(self.chip.npu_modes)
            raise BoardError(f"--npu-mode {self.npu_mode}: {self.target} has {modes}")
        if not self.emulate:
            return
        if self.weight_type is not None:
            raise BoardError(
                f"--weight-type {self.weight_type}: the emulator computes in bf16; leave it out"
            )
        for setting, value in given.items():
            if setting.of_pulsar2 and value is not None:
                raise BoardError(
                    f"{setting.flag} {value}: --emulate does without Pulsar2; leave it out"
                )

    @property
    def shape(self) -> BoardShape:
        """The shapes of the text model."""
        return BoardShape(self.context, self.chunk, self.max_prefill)

    @property
    def chip(self) -> Target:
        """The target."""
        return TARGETS[self.target]

    @property
    def cores(self) -> str:
        """The NPU mode, whether or not the user has named one."""
        return self.npu_mode or self.chip.default_npu_mode

    def vision_arguments(self, image_size: int, onnx: str, config: str, output: str) -> list[str]:
        """Return Pulsar2's arguments that compile the vision encoder.

        Args:
            image_size: side of a tile in pixels.
            onnx: the model.
            config: the build's configuration.
            output: directory that `vision_file` is written to.
        """
        return [
            "build",
            *("--input", onnx),
            *("--config", config),
            *("--output_dir", output),
            *("--output_name", vision_file(image_size)),
            *("--npu_mode", self.cores),
            *("--target_hardware", self.chip.chip),
        ]

    def text_arguments(
        self,
        generation: int,
        checkpoint: str,
        output: str,
        *,
        quantized: bool,
        model_config: str | None,
    ) -> list[str]:
        """Return Pulsar2's arguments that compile the text model.

        Args:
            generation: 1 for ``llm_build``, 2 for ``llm_build2``.
            checkpoint: directory of the text model.
            output: directory that the layers are written to.
            quantized: whether the weights are GPTQ, which fixes their type.
            model_config: for generation 2, a file that tells what else the model has, or None.

        Raises:
            BoardError: the older command has no steps of decoding.
        """
        command = ["llm_build" if generation == 1 else "llm_build2"]
        command += ["--input_path", checkpoint, "--output_path", output]
        command += ["--hidden_state_type", "bf16"]
        if generation == 1:
            if self.decode_step is not None:
                raise BoardError(
                    f"--decode-step {self.decode_step}: llm_build has none; give --llm-build 2 and "
                    "a Pulsar2 that has llm_build2, from 6.0 on"
                )
            command += ["--prefill_len", str(self.chunk), "--kv_cache_len", str(self.context)]
            for history in self.shape.histories()[1:]:
                command += ["--last_kv_cache_len", str(history)]
        else:
            command += ["--prefill_len", str(self.max_prefill + self.chunk)]
            command += ["--prefill_step_size", str(self.chunk)]
            command += ["--max_context", str(self.context + 1)]
        if not quantized:
            command += ["--weight_type", self.weight_type or DEFAULT_WEIGHT_TYPE]
        if generation == 2:
            command += ["--post_weight_type", "s8"]
            if self.decode_step is not None:
                command += ["--decode_step_size", str(self.decode_step)]
            if model_config is not None:
                command += ["--model_config", model_config]
        if self.post_topk:
            command += ["--post_topk", str(self.post_topk)]
        # Older versions lack the option, and take all cores.
        if self.cores != self.chip.default_npu_mode:
            command += ["--npu_mode", self.cores]
        command += ["--chip", self.chip.chip, "--check_level", str(self.check_level)]
        return [*command, "--parallel", str(self.parallel)]


#: By name, in the order of ``edgevl compile --help``.
SETTINGS: dict[str, Setting] = {
    each.name: replace(each.metadata["setting"], name=each.name) for each in fields(CompileSettings)
}
