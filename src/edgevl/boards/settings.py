"""What a user decides about a compilation."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from edgevl.axera.layout import BoardShape

WeightType = Literal["s4", "s8"]

#: The weight type of a text model that is not quantized, where nothing else is asked for.
DEFAULT_WEIGHT_TYPE: WeightType = "s8"


@dataclass(frozen=True)
class CompileSettings:
    """How to compile.

    Attributes:
        target: a name in `edgevl.boards.targets.TARGETS`.
        shape: the shapes of the text model.
        npu_mode: NPU1, NPU2 or NPU3; None is all cores of the target.
        calibration_images: a directory or tar file of pictures for the vision encoder; None draws
            some.
        samples: pictures to calibrate on.
        uint8_input: whether the vision model takes pixels as bytes and normalises them itself.
        weight_type: what plain text weights are rounded to, None is `DEFAULT_WEIGHT_TYPE`; GPTQ
            weights stay as they are.
        post_topk: return this many of the most probable tokens in place of the logits; 0 returns
            the logits.
        llm_build: generation of Pulsar2's command for text models, 1 or 2; None is what the
            installed one has.
        decode_step: with generation 2, a decode group for each so many positions of context; None
            leaves it to Pulsar2.
        parallel: layers that Pulsar2 builds at once.
        check_level: 0 checks nothing, 1 a layer against floats, 2 generates, which takes hours.
        pulsar2: ``docker:IMAGE``, or the path of the program or its package; None looks on PATH.
        pulsar2_config: the configuration of the vision build; None is the default.
        dry_run: write everything and a script that does the rest on another machine.
        emulate: write a model for the emulator; needs no Pulsar2.
    """

    target: str
    shape: BoardShape = field(default_factory=BoardShape)
    npu_mode: str | None = None
    calibration_images: Path | None = None
    samples: int = 32
    uint8_input: bool = False
    weight_type: WeightType | None = None
    post_topk: int = 0
    llm_build: Literal[1, 2] | None = None
    decode_step: int | None = None
    parallel: int = 4
    check_level: int = 1
    pulsar2: str | None = None
    pulsar2_config: Path | None = None
    dry_run: bool = False
    emulate: bool = False
