"""What a user decides about a compilation, said once.

The fields of `CompileSettings` are what ``edgevl compile`` takes on the command line. Nothing heavy
is imported, so that ``--help`` is there at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from edgevl.axera.layout import BoardShape
from edgevl.errors import BoardError
from edgevl.options import REQUIRED, only_for, option, options_of

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
class CompileSettings:
    """How to compile; each field's `Option` says what it does.

    Raises:
        BoardError: a value is out of its range, or two contradict each other.
    """

    target: str = option(
        REQUIRED,
        "choice",
        "The chip; ax650 is the AX650N, AX650A and AX8850 too, ax630c the AX620Q.",
        choices=tuple(TARGETS),
    )
    context: int = option(
        BoardShape.context,
        "integer",
        "Positions of the key/value cache; prompt and answer take one more at most.",
        low=1,
    )
    chunk: int = option(
        BoardShape.chunk, "integer", "Tokens of a prompt that are computed at once.", low=1
    )
    max_prefill: int = option(
        BoardShape.max_prefill,
        "integer",
        "Longest history that a chunk may follow; beyond, a prompt goes token by token.",
        low=0,
    )
    npu_mode: str | None = option(
        None,
        "choice",
        "NPU cores that work as one.  [default: all]",
        choices=("NPU1", "NPU2", "NPU3"),
    )
    calibration_images: Path | None = option(
        None,
        "path",
        "Pictures like those to be asked about.  [default: drawn ones]",
        "DIR|TAR",
        only="pulsar2",
    )
    samples: int = option(32, "integer", "Pictures to calibrate vision on.", low=1, high=1024)
    uint8_input: bool = option(
        False,
        "switch",
        "Give pictures to the NPU as bytes: a quarter of the size, normalised there.",
    )
    weight_type: Literal["s4", "s8"] | None = option(
        None,
        "choice",
        "What plain text weights are rounded to; GPTQ stays as it is.  "
        f"[default: {DEFAULT_WEIGHT_TYPE}]",
        choices=("s4", "s8"),
    )
    post_topk: int = option(
        0,
        "integer",
        "Return only the K most probable tokens from the NPU, not all logits.",
        "K",
        low=0,
        show_default=False,
    )
    pulsar2: str | None = option(
        None,
        "text",
        "The vendor's compiler.  [default: pulsar2 on PATH]",
        "docker:IMAGE|PATH",
        only="pulsar2",
    )
    pulsar2_config: Path | None = option(
        None,
        "path",
        "Configuration of the vision build; see docs/boards.md.",
        "FILE",
        only="pulsar2",
    )
    llm_build: Literal[1, 2] | None = option(
        None,
        "choice",
        "Pulsar2's command for text: llm_build or llm_build2.  [default: the newest it has]",
        choices=(1, 2),
        only="pulsar2",
    )
    decode_step: int | None = option(
        None,
        "integer",
        "With llm_build2: a decode group for each N positions of context; 0 makes one.",
        "N",
        low=0,
        only="pulsar2",
    )
    parallel: int = option(
        4, "integer", "Layers that Pulsar2 builds at once; each takes memory.", low=1, high=256
    )
    check_level: int = option(
        1,
        "integer",
        "How Pulsar2 checks text: 0 not, 1 a layer against floats, 2 by generating, for hours.",
        low=0,
        high=2,
    )
    dry_run: bool = option(
        False,
        "switch",
        "Write everything but the compiled files, and a build.sh that makes them elsewhere.",
    )
    emulate: bool = option(False, "switch", "Write a model for the emulator; needs no Pulsar2.")

    def __post_init__(self) -> None:
        for name, each in options_of(CompileSettings).items():
            value = getattr(self, name)
            if not each.accepts(value):
                rule = f"choose {each.listed}" if each.choices else f"must be {each.span}"
                raise BoardError(f"{each.flag} {value}: {rule}")
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
        for each in only_for("pulsar2", self):
            value = getattr(self, each.name)
            raise BoardError(f"{each.flag} {value}: --emulate does without Pulsar2; leave it out")

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
