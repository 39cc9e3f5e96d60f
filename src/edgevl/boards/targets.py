"""The chips that models are compiled for."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """A chip, as the toolchain and its boards know it.

    Attributes:
        name: what ``--target`` calls it.
        chip: what Pulsar2 calls it (``--chip``, ``--target_hardware``).
        boards: the names on the package.
        npu_modes: how many of its NPU cores may work as one: NPU1, NPU2, NPU3.
        default_npu_mode: all of them.
        memory_bytes: NPU memory (CMM) of a typical board. How much of a board's memory belongs to
            the NPU is its image's choice, so this is no limit of the chip.
        memory_source: which board that is: of public listings of an AX8850 board and of M5Stack's
            Module LLM. Cards may have more: M5Stack's LLM-8850 shows 7040 MiB.
    """

    name: str
    chip: str
    boards: tuple[str, ...]
    npu_modes: tuple[str, ...]
    default_npu_mode: str
    memory_bytes: int
    memory_source: str


AX650 = Target(
    name="ax650",
    chip="AX650",
    boards=("AX650N", "AX650A", "AX8850"),
    npu_modes=("NPU1", "NPU2", "NPU3"),
    default_npu_mode="NPU3",
    memory_bytes=6 << 30,
    memory_source="a board of 8 GiB, 2 of them Linux's",
)
AX630C = Target(
    name="ax630c",
    chip="AX620E",
    boards=("AX630C", "AX620Q"),
    npu_modes=("NPU1", "NPU2"),
    default_npu_mode="NPU2",
    memory_bytes=3 << 30,
    memory_source="a module of 4 GiB, 1 of them Linux's",
)

#: By name.
TARGETS: dict[str, Target] = {target.name: target for target in (AX650, AX630C)}
