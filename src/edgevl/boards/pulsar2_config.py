"""The configuration of ``pulsar2 build`` for the vision encoder, typed and validated.

docs/boards.md says what each field does. Defaults are Pulsar2's own, as its documentation has them;
`default_config` sets what an InternViT needs. Fields of Pulsar2 that have nothing to do with vision
encoders are not here.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal, get_args

from edgevl.boards.settings import CompileSettings
from edgevl.checkpoint import ModelConfig
from edgevl.errors import BoardError, needs
from edgevl.files import read_text
from edgevl.json_input import shown
from edgevl.preprocess.picture import byte_statistics

with needs("axera", BoardError):
    import json5
    from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

#: Largest configuration file, bytes: the parser is slow.
MAX_CONFIG_BYTES = 64 << 10
#: Stands for all inputs of a model, or for its ends.
DEFAULT = "DEFAULT"

DataType = Literal["U8", "S8", "U16", "S16", "FP32"]
Statistics = Annotated[list[float], Field(max_length=16)]
Names = Annotated[list[str], Field(max_length=4096)]


class _Strict(BaseModel):
    """No unknown fields, no guessing of types, no NaN."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class InputConfig(_Strict):
    """What an input is calibrated on."""

    tensor_name: str
    calibration_dataset: str
    calibration_format: Literal["Image", "Numpy", "Binary", "NumpyObject"] = "Image"
    calibration_size: int = Field(32, ge=-1)
    calibration_mean: Statistics = []
    calibration_std: Statistics = []


class LayerConfig(_Strict):
    """The precision of some layers: by name, by operator, or of the graph between tensors."""

    layer_name: str | None = None
    layer_names: Names = []
    op_type: str | None = None
    op_types: Names = []
    start_tensor_names: Names = []
    end_tensor_names: Names = []
    data_type: DataType = "U8"
    weight_data_type: Literal["S8", "FP32"] = "S8"
    output_data_type: DataType = "U8"

    @model_validator(mode="after")
    def _names_layers_once(self) -> LayerConfig:
        between = (self.start_tensor_names, self.end_tensor_names)
        ways = (self.layer_name, self.layer_names, self.op_type, self.op_types, any(between))
        if sum(map(bool, ways)) != 1 or any(between) != all(between):
            raise ValueError(
                "give one of layer_name, layer_names, op_type, op_types, or start_tensor_names "
                "with end_tensor_names"
            )
        return self


class QuantConfig(_Strict):
    """How the network is quantized."""

    input_configs: list[InputConfig] = Field(min_length=1, max_length=64)
    layer_configs: list[LayerConfig] = Field([], max_length=4096)
    calibration_method: Literal["MinMax", "Percentile", "MSE", "KL"] = "MinMax"
    precision_analysis: bool = False
    precision_analysis_method: Literal["PerLayer", "EndToEnd"] = "PerLayer"
    precision_analysis_mode: Literal["Reference", "NPUBackend"] = "Reference"
    highest_mix_precision: bool = False
    enable_smooth_quant: bool = False
    smooth_quant_strength: float = Field(0.6, ge=0, le=1)
    smooth_quant_threshold: float = Field(0.2, ge=0, le=1)
    conv_bias_data_type: Literal["S32", "FP32"] = "S32"
    ln_scale_data_type: Literal["FP32", "S32", "U32"] = "FP32"
    disable_auto_refine_scale: bool = False
    transformer_opt_level: int = Field(0, ge=0, le=2)
    device: str = Field("cpu", pattern=r"^(cpu|cuda:[0-7])$")


class InputProcessor(_Strict):
    """What the board hands over (`src_…`), and what the network was trained on (`tensor_…`)."""

    tensor_name: str
    tensor_format: Literal["AutoColorSpace", "BGR", "RGB", "GRAY"] = "AutoColorSpace"
    tensor_layout: Literal["NCHW", "NHWC"] = "NCHW"
    src_format: Literal[
        "AutoColorSpace", "GRAY", "BGR", "RGB", "YUYV422", "UYVY422", "YUV420SP", "YVU420SP", "RAW"
    ] = "AutoColorSpace"
    src_layout: Literal["NCHW", "NHWC"] = "NCHW"
    src_dtype: Literal["U8", "S8", "U16", "S16", "U32", "S32", "FP16", "FP32"] = "FP32"
    mean: Statistics = []
    std: Statistics = []
    csc_mode: Literal["NoCSC", "Matrix", "FullRange", "LimitedRange"] = "NoCSC"


class CompilerConfig(_Strict):
    """How the quantized network is compiled."""

    check: int = Field(0, ge=0, le=3)
    check_mode: Literal["CheckOutput", "CheckPerLayer"] = "CheckOutput"
    check_cosine_simularity: float = Field(0.999, ge=-1, le=1)  # spelt as Pulsar2 spells it
    npu_perf: bool = False


class Pulsar2Config(_Strict):
    """The whole configuration. What is given on Pulsar2's command line goes before it."""

    model_type: Literal["ONNX"] = "ONNX"
    npu_mode: Literal["NPU1", "NPU2", "NPU3"] = "NPU1"
    target_hardware: Literal["AX650", "AX620E"] = "AX650"
    quant: QuantConfig
    input_processors: list[InputProcessor] = Field([], max_length=64)
    compiler: CompilerConfig = CompilerConfig.model_validate({})

    @model_validator(mode="after")
    def _chip_has_mode(self) -> Pulsar2Config:
        if self.target_hardware == "AX620E" and self.npu_mode == "NPU3":
            raise ValueError("npu_mode is NPU3; AX620E has NPU1 and NPU2")
        return self

    def to_json(self) -> str:
        """Return the file's text: the fields that were set, others are left to Pulsar2."""
        return self.model_dump_json(indent=2, exclude_unset=True) + "\n"


def default_config(config: ModelConfig, settings: CompileSettings, dataset: str) -> Pulsar2Config:
    """Return what the vendor's demo compiles InternViT with.

    Activations are U16 throughout, ranges are MinMax over the whole archive, SmoothQuant is on, and
    the result is compared with the original as a whole. Where the demo says nothing, Pulsar2's
    defaults hold: ``transformer_opt_level`` 0, no check by the compiler. Only ``src_format`` is
    named besides, since EdgeVL hands over RGB.

    With ``uint8_input`` the board takes bytes in NHWC order, a quarter of the size, and the NPU
    normalises them. Calibration has the same mean and std, so that it sees the same values, as
    Pulsar2's documentation has it; the demo's configuration for bytes leaves them out there.

    Args:
        config: of the model: the statistics of its pictures.
        settings: chip and NPU mode, and whether the board is to take bytes.
        dataset: the archive of `write_calibration`, as Pulsar2 will see its path.
    """
    mean, std = byte_statistics(config.image_mean, config.image_std)
    if settings.uint8_input:
        source = {"src_dtype": "U8", "src_layout": "NHWC", "mean": mean, "std": std}
    else:
        # Left out, they would be calibration's, and normalise what is normalised already.
        identity = {"mean": [0.0] * 3, "std": [1.0] * 3}
        source = {"src_dtype": "FP32", "src_layout": "NCHW", **identity}
    return Pulsar2Config.model_validate(
        {
            "model_type": "ONNX",
            "npu_mode": settings.cores,
            "target_hardware": settings.chip.chip,
            "quant": {
                "input_configs": [
                    {
                        "tensor_name": DEFAULT,
                        "calibration_dataset": dataset,
                        "calibration_format": "Image",
                        "calibration_size": -1,
                        "calibration_mean": mean,
                        "calibration_std": std,
                    }
                ],
                "layer_configs": [
                    {
                        "start_tensor_names": [DEFAULT],
                        "end_tensor_names": [DEFAULT],
                        "data_type": "U16",
                    }
                ],
                "calibration_method": "MinMax",
                "precision_analysis": True,
                "precision_analysis_method": "EndToEnd",
                "enable_smooth_quant": True,
                "conv_bias_data_type": "FP32",
                "disable_auto_refine_scale": True,
            },
            "input_processors": [
                {
                    "tensor_name": DEFAULT,
                    "tensor_format": "RGB",
                    "tensor_layout": "NCHW",
                    "src_format": "RGB",
                    **source,
                }
            ],
            "compiler": {"npu_perf": False},
        }
    )


def load_config(path: Path) -> Pulsar2Config:
    """Read a configuration: JSON with ``//`` and ``/* */`` comments and trailing commas.

    Raises:
        BoardError: the file cannot be read, is too large, or is no such JSON; or a field is
            unknown, missing, or has a value that is not allowed.
    """
    text = read_text(path, MAX_CONFIG_BYTES, BoardError)
    try:
        values = json5.loads(text, allow_duplicate_keys=False)
    except RecursionError:
        raise BoardError(f"{path}: nested too deep") from None
    except ValueError as error:
        reason = str(error).replace("<string>:", "line ")
        raise BoardError(f"{path}: not JSON with comments ({reason})") from None
    try:
        return Pulsar2Config.model_validate(values)
    except ValidationError as error:
        raise BoardError(f"{path}: {_explain(error)}") from None


def _explain(error: ValidationError) -> str:
    """Return the first error as a line: the field's path, its value, what is allowed."""
    first, more = error.errors()[0], error.error_count() - 1
    place, value = first["loc"], first["input"]
    name, problem = _path(place), first["msg"].removeprefix("Value error, ")
    if first["type"] == "missing":
        line = f"field {name} is missing"
    elif first["type"] == "extra_forbidden":
        known = ", ".join(_fields_at(place[:-1]))
        line = f"field {name} is unknown; known here: {known}"
    elif first["type"] == "literal_error":
        allowed = first["ctx"]["expected"].replace("'", "").replace(" or ", ", ")
        line = f"field {name} is {shown(value)}; allowed: {allowed}"
    elif first["type"] == "model_type":
        line = f"{f'field {name}' if name else 'the whole'} is {shown(value)}, expected an object"
    elif not name:
        line = problem
    else:
        line = f"field {name} is {shown(value)}: {problem[0].lower()}{problem[1:]}"
    return line + (f" (and {more} more errors)" if more else "")


def _path(place: tuple[int | str, ...]) -> str:
    """Return a field's path such as ``quant.input_configs[0].tensor_name``."""
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place)
    return path.removeprefix(".")


def _fields_at(place: tuple[int | str, ...]) -> Iterable[str]:
    """Return the fields of the object at a field's path."""
    model: type[BaseModel] = Pulsar2Config
    for part in place:
        if isinstance(part, str):  # a field with an object, or with a list of them
            annotation = model.model_fields[part].annotation
            [model] = get_args(annotation) or (annotation,)
    return model.model_fields
