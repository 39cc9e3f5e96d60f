"""The configuration of Pulsar2: the default, files of users, and what is wrong with them."""

import json
import subprocess
import sys
from typing import Literal, get_args, get_origin

import pytest
from pydantic import BaseModel

from edgevl.boards.pulsar2_config import (
    MAX_CONFIG_BYTES,
    Pulsar2Config,
    default_config,
    load_config,
)
from edgevl.boards.settings import CompileSettings
from edgevl.errors import BoardError
from edgevl.synth.presets import PRESETS
from repository import ROOT

CONFIG = PRESETS["internvl3_5-1b"].config
MEAN, STD = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]

# In the manner of the files that people have.
COMMENTED = """
{
  "model_type": "ONNX", // of the vendor's demo
  "npu_mode": "NPU2",
  "quant": {
    "input_configs": [
      {
        "tensor_name": "DEFAULT",
        "calibration_dataset": "./tiles.tar",
        "calibration_size": 8,
        // "calibration_mean": [0, 0, 0],
        "calibration_format": "Image",
      },
    ],
    /* a comment
       of two lines */
    "calibration_method": "MSE",
    "transformer_opt_level": 1,
    "layer_configs": [{"op_types": ["Softmax"], "data_type": "FP32"}],
  },
  "compiler": {"check": 3, "check_cosine_simularity": 0.9},
}
"""


@pytest.fixture
def load(tmp_path):
    def load(content):
        path = tmp_path / "config.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return load_config(path)

    return load


def default(target="ax650", **options):
    settings = CompileSettings(target, **options)
    return json.loads(default_config(CONFIG, settings, "/data/tiles.tar").to_json())


def test_the_default_is_the_demos():
    values = default()
    quant = values["quant"]
    assert quant["input_configs"] == [
        {
            "tensor_name": "DEFAULT",
            "calibration_dataset": "/data/tiles.tar",
            "calibration_format": "Image",
            "calibration_size": -1,
            "calibration_mean": MEAN,
            "calibration_std": STD,
        }
    ]
    layers = {"start_tensor_names": ["DEFAULT"], "end_tensor_names": ["DEFAULT"]}
    assert quant["layer_configs"] == [{**layers, "data_type": "U16"}]
    assert quant["calibration_method"] == "MinMax"
    assert quant["conv_bias_data_type"] == "FP32"
    assert quant["enable_smooth_quant"]
    assert quant["disable_auto_refine_scale"]
    assert quant["precision_analysis"]
    assert quant["precision_analysis_method"] == "EndToEnd"
    (source,) = values["input_processors"]
    assert (source["src_dtype"], source["src_layout"]) == ("FP32", "NCHW")
    assert (source["mean"], source["std"]) == ([0, 0, 0], [1, 1, 1])
    assert (values["npu_mode"], values["target_hardware"]) == ("NPU3", "AX650")


def test_bytes_are_normalised_on_the_npu():
    values = default("ax630c", uint8_input=True)
    (source,) = values["input_processors"]
    assert (source["src_dtype"], source["src_layout"]) == ("U8", "NHWC")
    assert (source["tensor_format"], source["tensor_layout"]) == ("RGB", "NCHW")
    assert (source["mean"], source["std"]) == (MEAN, STD)
    assert values["quant"] == default()["quant"]
    assert (values["npu_mode"], values["target_hardware"]) == ("NPU2", "AX620E")


@pytest.mark.parametrize("uint8_input", [False, True])
def test_a_configuration_survives_its_file(load, uint8_input):
    settings = CompileSettings("ax650", uint8_input=uint8_input)
    config = default_config(CONFIG, settings, "/data/图/tiles.tar")
    assert load(config.to_json()) == config
    assert load(config.to_json()).to_json() == config.to_json()


def test_comments_and_trailing_commas_are_read_and_nothing_is_added(load):
    config = load(COMMENTED)
    assert config.quant.calibration_method == "MSE"
    assert config.quant.input_configs[0].calibration_mean == []
    assert config.target_hardware == "AX650"
    values = json.loads(config.to_json())
    assert values["compiler"] == {"check": 3, "check_cosine_simularity": 0.9}
    assert "target_hardware" not in values
    assert "calibration_mean" not in values["quant"]["input_configs"][0]


def changed(place, value):
    """The default with one field set, or removed if the value is ..."""
    values = at = default()
    for part in place[:-1]:
        at = at[part]
    if value is ...:
        del at[place[-1]]
    else:
        at[place[-1]] = value
    return values


INPUT, LAYER = ("quant", "input_configs", 0), ("quant", "layer_configs", 0)
ONE_OF = "give one of layer_name, layer_names, op_type, op_types, or start_tensor_names"
WRONG = [
    (
        ("quant", "calibration_method"), "Mean",
        "field quant.calibration_method is 'Mean'; allowed: MinMax, Percentile, MSE, KL",
    ),
    (
        (*INPUT, "calibration_sise"), 3,
        "field quant.input_configs[0].calibration_sise is unknown; known here: tensor_name, "
        "calibration_dataset, calibration_format, calibration_size, calibration_mean",
    ),
    (("compilers",), {}, "field compilers is unknown; known here: model_type, npu_mode"),
    (
        ("compiler", "speed"), 3,
        "field compiler.speed is unknown; known here: check, check_mode",
    ),
    (
        (*INPUT, "calibration_dataset"), ...,
        "field quant.input_configs[0].calibration_dataset is missing",
    ),
    (("quant",), ..., "field quant is missing"),
    (("quant", "input_configs"), [], "field quant.input_configs is a list of 0: list should have"),
    (
        ("quant", "transformer_opt_level"), 3,
        "field quant.transformer_opt_level is 3: input should be less than or equal to 2",
    ),
    (
        ("quant", "enable_smooth_quant"), "yes",
        "field quant.enable_smooth_quant is 'yes': input should be a valid boolean",
    ),
    (
        (*INPUT, "calibration_mean"), [1, "2"],
        "field quant.input_configs[0].calibration_mean[1] is '2': input should be a valid number",
    ),
    (("quant", "device"), "gpu", "field quant.device is 'gpu': string should match pattern"),
    ((*LAYER, "op_type"), "Add", f"field quant.layer_configs[0] is an object of 4: {ONE_OF}"),
    ((*LAYER, "end_tensor_names"), ..., f"quant.layer_configs[0] is an object of 2: {ONE_OF}"),
    (("target_hardware",), "AX620E", "config.json: npu_mode is NPU3; AX620E has NPU1 and NPU2"),
    (("compiler",), 3, "field compiler is 3, expected an object"),
]  # fmt: skip


@pytest.mark.parametrize(("place", "value", "message"), WRONG)
def test_what_is_wrong_is_named_in_one_line(load, tmp_path, place, value, message):
    with pytest.raises(BoardError) as raised:
        load(changed(place, value))
    assert message in str(raised.value)
    assert str(raised.value).startswith(f"{tmp_path / 'config.json'}: ")
    assert "\n" not in str(raised.value)


def test_more_errors_are_counted(load):
    with pytest.raises(BoardError, match=r"unknown; .* \(and 1 more errors\)$"):
        load({"quant": changed(("a",), 1)["quant"], "a": 1, "b": 2})


BROKEN = {
    "syntax": ('{"a" 1}', r'not JSON with comments \(line 1 Unexpected "1" at column 6\)'),
    "nothing": ("", "not JSON with comments"),
    "hash": ("# a comment\n{}", r'line 1 Unexpected "#"'),
    "twice": ('{"quant": {}, "quant": {}}', 'Duplicate key "quant"'),
    "list": ("[]", "the whole is a list of 0, expected an object"),
    "deep": ("[" * 20_000, "nested too deep"),
    "digits": ('{"npu_mode": ' + "1" * 5000 + "}", "not JSON with comments|npu_mode is 1"),
    "not a number": (COMMENTED.replace("0.9", "NaN"), "check_cosine_simularity is nan"),
    "large": (" " * (MAX_CONFIG_BYTES + 1), f"larger than the limit of {MAX_CONFIG_BYTES} bytes"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_files_are_refused(load, kind):
    content, message = BROKEN[kind]
    with pytest.raises(BoardError, match=message) as raised:
        load(content)
    assert len(str(raised.value)) < 500


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(BoardError, match=r"none\.json: no such file"):
        load_config(tmp_path / "none.json")


def rows(model, prefix=""):
    """Path, type and default of each field, as docs/boards.md has them."""
    names = {str: "string", bool: "true, false", int: "integer", float: "number"}
    for name, field in model.model_fields.items():
        kind = field.annotation
        is_list, inner = get_origin(kind) is list, [kind, *get_args(kind)][-1]
        is_object = isinstance(inner, type) and issubclass(inner, BaseModel)
        if is_object:
            said = "list of objects" if is_list else "object"
        elif get_origin(kind) is Literal:
            said = ", ".join(f"`{choice}`" for choice in get_args(kind))
        else:
            said = f"{names[inner]}s" if is_list else names.get(kind, "string")
        default = "required" if field.is_required() else ""
        if field.default is False:
            default = "`false`"
        elif not field.is_required() and not is_object and field.default not in (None, []):
            default = f"`{field.default}`"
        yield [f"`{prefix}{name}`", said, default]
        if is_object:
            yield from rows(inner, f"{prefix}{name}{'[]' if is_list else ''}.")


def test_every_field_is_documented():
    text = (ROOT / "docs" / "boards.md").read_text("utf-8")
    table = text.partition("<!-- field-table -->\n")[2].partition("<!-- /field-table -->")[0]
    documented = [line.strip("| ").split(" | ") for line in table.splitlines()[2:]]
    assert [[cell.strip() for cell in row[:3]] for row in documented] == [*rows(Pulsar2Config)]
    assert all(len(row) == 4 and row[3].endswith(".") for row in documented)


@pytest.mark.parametrize("library", ["pydantic", "json5"])
def test_a_missing_library_says_what_to_install(library):
    code = f"import sys; sys.modules[{library!r}] = None; import edgevl.boards.pulsar2_config"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert f"BoardError: {library} is missing: pip install 'edgevl[axera]'" in done.stderr
