"""The configuration of ``pulsar2 build`` for the vision encoder, typed and validated.

Defaults of the fields are Pulsar2's own, as its documentation has them; `default_config` sets what
an InternViT needs. Fields of Pulsar2 that have nothing to do with vision encoders are not here.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from edgevl.checkpoint import ModelConfig
from edgevl.errors import BoardError
from edgevl.files import read_text
from edgevl.json_input import shown
from edgevl.optional import needs
from edgevl.preprocess.tiles import byte_statistics

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

    tensor_name: str = Field(description="Input of the ONNX file; `DEFAULT`: all of them.")
    calibration_dataset: str = Field(
        description="Archive (tar, tar.gz, zip) of samples, as Pulsar2 sees its path."
    )
    calibration_format: Literal["Image", "Numpy", "Binary", "NumpyObject"] = Field(
        "Image", description="What the archive's files are."
    )
    calibration_size: int = Field(32, ge=-1, description="Most samples that are used; -1: all.")
    calibration_mean: Statistics = Field(
        [], description="Subtracted from each channel of a picture, in units of 0 … 255."
    )
    calibration_std: Statistics = Field(
        [], description="Divides each channel of a picture after that."
    )


class LayerConfig(_Strict):
    """The precision of some layers: by name, by operator, or of the graph between tensors."""

    layer_name: str | None = Field(None, description="One layer, by name.")
    layer_names: Names = Field([], description="Several layers, by name.")
    op_type: str | None = Field(None, description="All layers of one operator.")
    op_types: Names = Field([], description="All layers of several operators.")
    start_tensor_names: Names = Field(
        [], description="Where a part of the graph begins; `DEFAULT`: at the inputs."
    )
    end_tensor_names: Names = Field(
        [], description="Where that part ends; `DEFAULT`: at the outputs."
    )
    data_type: DataType = Field("U8", description="Activations.")
    weight_data_type: Literal["S8", "FP32"] = Field("S8", description="Weights of Conv.")
    output_data_type: DataType = Field("U8", description="Outputs of Conv.")

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

    input_configs: list[InputConfig] = Field(
        description="A calibration set for each input.", min_length=1, max_length=64
    )
    layer_configs: list[LayerConfig] = Field(
        [], description="Layers with a precision of their own.", max_length=4096
    )
    calibration_method: Literal["MinMax", "Percentile", "MSE", "KL"] = Field(
        "MinMax", description="How the range of a tensor is found."
    )
    precision_analysis: bool = Field(
        False, description="Compare the quantized network with the original after the build."
    )
    precision_analysis_method: Literal["PerLayer", "EndToEnd"] = Field(
        "PerLayer",
        description="What is compared: each layer on exact inputs, or the network as a whole.",
    )
    precision_analysis_mode: Literal["Reference", "NPUBackend"] = Field(
        "Reference", description="What computes the quantized network: a model of the NPU, exact "
        "to a step, or one that gives the same bits."
    )  # fmt: skip
    highest_mix_precision: bool = Field(
        False, description="Let Pulsar2 choose higher precisions by itself."
    )
    enable_smooth_quant: bool = Field(
        False, description="SmoothQuant: move outliers of activations into the weights."
    )
    smooth_quant_strength: float = Field(
        0.6, ge=0, le=1, description="How much of an outlier is moved."
    )
    smooth_quant_threshold: float = Field(
        0.2, ge=0, le=1, description="The larger, the more operators are smoothed."
    )
    conv_bias_data_type: Literal["S32", "FP32"] = Field("S32", description="Biases of Conv.")
    ln_scale_data_type: Literal["FP32", "S32", "U32"] = Field(
        "FP32", description="Scales of LayerNormalization."
    )
    disable_auto_refine_scale: bool = Field(
        False, description="Leave the scales of weights and inputs as calibration found them."
    )
    transformer_opt_level: int = Field(
        0, ge=0, le=2, description="Level of the optimizations for transformers."
    )
    device: str = Field(
        "cpu",
        pattern=r"^(cpu|cuda:[0-7])$",
        description="Where calibration computes: `cpu`, `cuda:0` … `cuda:7`.",
    )


class InputProcessor(_Strict):
    """What the board hands over (`src_…`), and what the network was trained on (`tensor_…`)."""

    tensor_name: str = Field(description="Input of the ONNX file; `DEFAULT`: all of them.")
    tensor_format: Literal["AutoColorSpace", "BGR", "RGB", "GRAY"] = Field(
        "AutoColorSpace", description="Order of colours that the network takes."
    )
    tensor_layout: Literal["NCHW", "NHWC"] = Field(
        "NCHW", description="Order of axes that the network takes."
    )
    src_format: Literal[
        "AutoColorSpace", "GRAY", "BGR", "RGB", "YUYV422", "UYVY422", "YUV420SP", "YVU420SP", "RAW"
    ] = Field("AutoColorSpace", description="Order of colours that the board hands over.")
    src_layout: Literal["NCHW", "NHWC"] = Field(
        "NCHW", description="Order of axes that the board hands over."
    )
    src_dtype: Literal["U8", "S8", "U16", "S16", "U32", "S32", "FP16", "FP32"] = Field(
        "FP32", description="Type of the values that the board hands over."
    )
    mean: Statistics = Field(
        [], description="Subtracted on the NPU from what the board hands over; none: "
        "`calibration_mean`."
    )  # fmt: skip
    std: Statistics = Field(
        [], description="Divides on the NPU after that; none: `calibration_std`."
    )
    csc_mode: Literal["NoCSC", "Matrix", "FullRange", "LimitedRange"] = Field(
        "NoCSC", description="Conversion from YUV."
    )


class CompilerConfig(_Strict):
    """How the quantized network is compiled."""

    check: int = Field(
        0, ge=0, le=3, description="Check of the result: 0 none, 1 close, 2 equal, 3 by cosine."
    )
    check_mode: Literal["CheckOutput", "CheckPerLayer"] = Field(
        "CheckOutput", description="What is checked: the outputs, or every layer."
    )
    check_cosine_simularity: float = Field(
        0.999, ge=-1, le=1, description="Least cosine of check 3 (spelt as Pulsar2 spells it)."
    )
    npu_perf: bool = Field(False, description="Write what each operator takes on the NPU.")


class Pulsar2Config(_Strict):
    """The whole configuration. What is given on Pulsar2's command line goes before it."""

    model_type: Literal["ONNX"] = Field("ONNX", description="What is compiled.")
    npu_mode: Literal["NPU1", "NPU2", "NPU3"] = Field(
        "NPU1", description="NPU cores that work as one; AX620E has no NPU3."
    )
    target_hardware: Literal["AX650", "AX620E"] = Field("AX650", description="The chip.")
    quant: QuantConfig = Field(description="How the network is quantized.")
    input_processors: list[InputProcessor] = Field(
        [], description="What the board hands over for each input.", max_length=64
    )
    compiler: CompilerConfig = Field(
        CompilerConfig.model_validate({}), description="How the quantized network is compiled."
    )

    @model_validator(mode="after")
    def _chip_has_mode(self) -> Pulsar2Config:
        if self.target_hardware == "AX620E" and self.npu_mode == "NPU3":
            raise ValueError("npu_mode is NPU3; AX620E has NPU1 and NPU2")
        return self

    def to_json(self) -> str:
        """Return the file's text: the fields that were set, others are left to Pulsar2."""
        return self.model_dump_json(indent=2, exclude_unset=True) + "\n"


def default_config(
    config: ModelConfig,
    dataset: str,
    *,
    uint8_input: bool = False,
    chip: str = "AX650",
    npu_mode: str = "NPU3",
) -> Pulsar2Config:
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
        dataset: the archive of `write_calibration`, as Pulsar2 will see its path.
        uint8_input: whether the board is to take bytes.
        chip: what Pulsar2 calls the target.
        npu_mode: NPU cores that work as one.
    """
    mean, std = byte_statistics(config.image_mean, config.image_std)
    if uint8_input:
        source = {"src_dtype": "U8", "src_layout": "NHWC", "mean": mean, "std": std}
    else:
        # Left out, they would be calibration's, and normalise what is normalised already.
        identity = {"mean": [0.0] * 3, "std": [1.0] * 3}
        source = {"src_dtype": "FP32", "src_layout": "NCHW", **identity}
    return Pulsar2Config.model_validate(
        {
            "model_type": "ONNX",
            "npu_mode": npu_mode,
            "target_hardware": chip,
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
        known = ", ".join(_model_at(place[:-1]).model_fields)
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


def _model_at(place: tuple[int | str, ...]) -> type[BaseModel]:
    """Return the model of the object at a field's path."""
    model: type[BaseModel] = Pulsar2Config
    for part in place:
        if isinstance(part, str):
            model = _inner(model.model_fields[part].annotation) or model
    return model


def _inner(annotation: Any) -> type[BaseModel] | None:
    """Return the model that a field's type is, or is a list of; None if there is none."""
    candidates = (annotation, *get_args(annotation))
    return next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), None)


def field_table() -> str:
    """Return a Markdown table of all fields: path, type, default, what it is."""
    rows = ["| field | type | default | |", "|---|---|---|---|", *_rows(Pulsar2Config, "")]
    return "\n".join(rows) + "\n"


def _rows(model: type[BaseModel], prefix: str) -> Iterator[str]:
    for name, field in model.model_fields.items():
        inner = _inner(field.annotation)
        is_list = get_origin(field.annotation) is list
        default = "required" if field.is_required() else _code(field.default)
        if inner is not None and not field.is_required():
            default = ""
        kind = "list of objects" if inner and is_list else "object" if inner else None
        yield (
            f"| `{prefix}{name}` | {kind or _kind(field.annotation)} | {default} "
            f"| {field.description} |"
        )
        if inner is not None:
            yield from _rows(inner, f"{prefix}{name}{'[]' if is_list else ''}.")


def _kind(annotation: Any) -> str:
    """Return a type in the words of JSON."""
    if get_origin(annotation) is Literal:
        return ", ".join(f"`{choice}`" for choice in get_args(annotation))
    if get_origin(annotation) is list:
        return {str: "strings", float: "numbers"}[get_args(annotation)[0]]
    names = {str: "string", bool: "true, false", int: "integer", float: "number"}
    return names.get(annotation, "string")


def _code(default: Any) -> str:
    if default is None or default == []:
        return ""
    if isinstance(default, bool):
        return f"`{str(default).lower()}`"
    return f"`{default}`"
