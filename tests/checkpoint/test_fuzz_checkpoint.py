"""Damaged checkpoints: a CheckpointError of one line or success, and no memory beyond a limit."""

import copy
import json
import re
import shutil
import tempfile
import tracemalloc
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import edgevl
from edgevl.checkpoint import Checkpoint, expected_tensors, parse_config
from edgevl.checkpoint.safetensors import SafetensorsFile, Weights
from edgevl.errors import CheckpointError
from edgevl.json_input import parse_object
from edgevl.loading import locate
from edgevl.preprocess import Message, PromptEncoder
from storage import CONFIGS, hf_names, random_tensors, safetensors_bytes, write_directory

#: Most memory that reading the small files here may take, in bytes. The table of tensors of the
#: largest configuration that is accepted (512 layers in each half) takes some 6 MB of it.
PEAK_BYTES = 16 << 20

FUZZ = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(10**19), 10**19)
    | st.sampled_from([0, 1, 2, -1, 1 << 20, 1 << 31, 1 << 62, 1 << 63])
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["qwen2", "llama", "internvl", "internvl_chat", "gptq", "rms_norm", "F32"])
)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=8,
)


@contextmanager
def bounded():
    """Let nothing but CheckpointError out, with a message of one line, and watch the memory."""
    tracemalloc.start()
    try:
        yield
    except CheckpointError as error:
        message = str(error)
        assert "\n" not in message
        assert len(message) < 1000
        message.encode()  # printable, no lone surrogates
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < PEAK_BYTES


def nodes(value, path=()):
    """The paths of all fields in nested objects and lists."""
    children = value.items() if isinstance(value, dict) else enumerate(value)
    for key, child in children:
        yield (*path, key)
        if isinstance(child, (dict, list)):
            yield from nodes(child, (*path, key))


@st.composite
def mutations(draw, original):
    """An object with one to four of its fields replaced, removed, or new ones put beside."""
    result = copy.deepcopy(original)
    for _ in range(draw(st.integers(1, 4))):
        places = sorted(nodes(result), key=str)
        if not places:
            break
        *parents, key = draw(st.sampled_from(places))
        at = result
        for parent in parents:
            at = at[parent]
        action = draw(st.sampled_from(["replace", "replace", "replace", "remove", "add"]))
        if action == "replace":
            at[key] = draw(values)
        elif action == "remove":
            del at[key]
        elif isinstance(at, dict):
            at[draw(st.text(max_size=8) | st.just("quantization_config"))] = draw(values)
    return result


PROCESSOR = {
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "max_patches": 12,
    "min_patches": 1,
    "size": {"height": 28, "width": 28},
}
GENERATION = {"eos_token_id": [1, 2], "temperature": 0.6}
QUANTIZE = {"bits": 4, "group_size": 32, "quant_method": "gptq", "sym": True}


@pytest.mark.parametrize("layout", CONFIGS)
def test_mutated_configurations(layout):
    accepted = 0

    @FUZZ
    @given(
        mutations(
            {"config": CONFIGS[layout], "p": PROCESSOR, "g": GENERATION, "q": QUANTIZE}
        ).filter(lambda files: isinstance(files.get("config"), dict))
    )
    def check(files):
        nonlocal accepted
        beside = {key: files.get(key) for key in "pgq"}
        with bounded():
            _, config = parse_config(
                files["config"],
                "config.json",
                **{
                    name: value
                    for name, value in zip(
                        ("preprocessor", "generation", "quantize"), beside.values(), strict=True
                    )
                    if isinstance(value, dict)
                },
            )
            assert all(size > 0 for shape in expected_tensors(config).values() for size in shape)
            assert config.image_tokens >= 1
            accepted += 1

    check()
    assert accepted > 20  # else nothing but the first check was tried


def test_the_largest_configuration_that_is_accepted_is_bounded():
    config = copy.deepcopy(CONFIGS["internvl_chat"])
    config["llm_config"]["num_hidden_layers"] = config["vision_config"]["num_hidden_layers"] = 512
    with bounded():
        tensors = expected_tensors(parse_config(config, "config.json")[1])
        assert len(tensors) > 10_000


@FUZZ
@given(values | st.dictionaries(st.text(max_size=8), values))
def test_arbitrary_json_as_configuration(value):
    with bounded():
        parse_config(parse_object(json.dumps(value, allow_nan=True), "config.json"), "config.json")


HEADER = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
}


def read_all(path):
    file = SafetensorsFile(path)
    for name in file:
        assert file[name].shape == file.shape(name)
        assert file[name].data.nbytes <= path.stat().st_size
    file.close()


@pytest.fixture(scope="module")
def path():
    with tempfile.TemporaryDirectory() as directory:
        yield Path(directory) / "model.safetensors"


@FUZZ
@given(mutations(HEADER), st.integers(0, 40))
@example(HEADER, 32)
def test_mutated_headers(path, header, length):
    path.write_bytes(safetensors_bytes(header, b"\1" * length))
    with bounded():
        read_all(path)


@FUZZ
@given(st.binary(max_size=200) | st.binary(max_size=100).map(safetensors_bytes))
@example(safetensors_bytes(b"[" * 200_000))
@example(safetensors_bytes(b'{"a":' * 100_000))
@example(b"\xff" * 8 + b"{}")
def test_arbitrary_bytes(path, content):
    path.write_bytes(content)
    with bounded():
        read_all(path)


@FUZZ
@given(
    mutations({"metadata": {}, "weight_map": {"a": "x.safetensors", "b": "y.safetensors"}}),
)
def test_mutated_index(index):
    with tempfile.TemporaryDirectory() as directory:
        directory = Path(directory)
        for name in "xy":
            entry = {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}
            content = safetensors_bytes({name: entry}, b"\1")
            (directory / f"{name}.safetensors").write_bytes(content)
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))
        with bounded():
            weights = Weights(directory)
            assert set(weights) <= {"x", "y"}
            weights.close()


@pytest.mark.parametrize("layout", CONFIGS)
def test_flipped_and_cut_files(tmp_path, layout):
    tensors = random_tensors(expected_tensors(parse_config(CONFIGS[layout], "")[1]))
    names = hf_names if layout == "internvl" else dict
    write_directory(tmp_path, CONFIGS[layout], names(tensors), "BF16", generation_config=GENERATION)
    files = {path: path.read_bytes() for path in sorted(tmp_path.iterdir())}
    # Of the weights, damage is aimed at the header: of the data, any value is a value.
    reach = {
        path: len(data) if path.suffix == ".json" else data.rindex(b"}") + 9
        for path, data in files.items()
    }
    opened = 0

    @FUZZ
    @given(st.data())
    def check(data):
        nonlocal opened
        path = data.draw(st.sampled_from(list(files)))
        content = bytearray(files[path])
        at = data.draw(st.integers(0, reach[path] - 1))
        if data.draw(st.booleans()):
            content[at] ^= data.draw(st.integers(1, 255))
        else:
            del content[at : at + data.draw(st.integers(1, 50))]
        path.write_bytes(content)
        try:
            with bounded():
                checkpoint = Checkpoint.open(tmp_path)
                for name in checkpoint.names():
                    assert checkpoint.tensor(name).shape == checkpoint.shape(name)
                checkpoint.close()
                opened += 1
        finally:
            path.write_bytes(files[path])

    check()
    assert opened < 150
    Checkpoint.open(tmp_path).close()


LONG = "9" * 5000  # digits; Python's int() takes 4300
#: Members of an object, as JSON text, that nobody needs.
JUNK = {
    "no limit": '"junk": 1000000000000000019884624838656',  # transformers' model_max_length
    "long": f'"junk": {LONG}, "less": -{LONG}, "fraction": 0.{LONG}, "exponent": 1e{LONG}',
    "too large": '"junk": 1e999, "less": -1e999, "small": 1e-999, "zero": -0.0',
    "not finite": '"junk": NaN, "more": Infinity, "less": -Infinity',
    "plain": '"junk": null, "yes": true, "list": [], "object": {"a": [{}]}, "text": "x"',
    "deep": f'"junk": {"[" * 200}{"]" * 200}, "object": {"{" + chr(34) + "a" + chr(34) + ":"}1}}',
    "deeper": f'"junk": {"[" * 400}{"]" * 400}',
    "text": f'"junk": "{"x" * 100_000}", "control": "\\u0000", "pair": "\\ud83d\\ude00"',
    "surrogates": '"junk": "\\ud800", "\\udfff": "\\udc00\\ud800"',
    "keys": '"": 1, " ": 2, "\\u0000": 3, "__class__": 4, "a.b": 5',
    "twice": '"junk": 1, "junk": {"a": 1, "a": [2]}, "junk": 3',
}
#: Objects of which every entry means something by its key.
MAPS = ("vocab", "pattern", "weight_map")


def with_junk(text, junk, maps=MAPS):
    """JSON text with members put first and last into every object, and a key of it given twice."""

    def placed(value):
        if isinstance(value, list):
            return [placed(item) for item in value]
        if not isinstance(value, dict):
            return value
        first = {f"JUNK{next(iter(value), '')}": 0}
        inner = {k: v if k in maps else placed(v) for k, v in value.items()}
        return {**first, **inner, "JUNK": 0}

    text = json.dumps(placed(json.loads(text)))
    text = re.sub(r'"JUNK([^"]+)": 0', lambda key: f'{junk}, "{key[1]}": "junk"', text)
    return text.replace('"JUNK": 0', junk)


def copied(source, directory):
    directory.mkdir()
    for path in source.iterdir():
        if path.is_file():
            shutil.copyfile(path, directory / path.name)
    return directory


def prompt_of(directory):
    """All that a checkpoint's side files make: configuration and the ids of a prompt."""
    with Checkpoint.open(directory) as checkpoint:
        encoder = PromptEncoder(checkpoint)
        return checkpoint.config, encoder.encode([Message.user("Hi <img> 你好")]).token_ids.tolist()


def test_junk_is_put_where_it_belongs():
    text = with_junk('{"a": {"b": [{"c": 1}]}, "vocab": {"d": 2}}', '"junk": NaN')
    assert text == (
        '{"junk": NaN, "a": "junk", "a": {"junk": NaN, "b": "junk", "b": [{"junk": NaN, '
        '"c": "junk", "c": 1, "junk": NaN}], "junk": NaN}, "vocab": {"d": 2}, "junk": NaN}'
    )


@pytest.mark.parametrize(
    "name", [path.name for path in sorted(locate("tiny").iterdir()) if path.suffix == ".json"]
)
@pytest.mark.parametrize("kind", JUNK)
def test_junk_in_any_file_of_a_checkpoint(tmp_path, name, kind):
    directory = copied(locate("tiny"), tmp_path / "tiny")
    expected = prompt_of(directory)
    text = (directory / name).read_text()
    (directory / name).write_text(with_junk(text, JUNK[kind]))
    assert prompt_of(directory) == expected


def test_junk_everywhere_changes_no_answer(tmp_path):
    directory = copied(locate("tiny"), tmp_path / "tiny")
    question, picture = "What number is on the display?", "examples/meter.png"
    expected = edgevl.load(directory, threads=1).ask(question, [picture]).text
    for path in directory.glob("*.json"):
        path.write_text(with_junk(path.read_text(), ", ".join(JUNK.values())))
    answer = edgevl.load(directory, threads=1).ask(question, [picture])
    assert answer.text == expected == "7305"


@pytest.mark.parametrize("kind", JUNK)
def test_junk_in_the_files_that_others_have(tmp_path, kind):
    """Files of Qwen's tokenizer, of shards, of the HF layout's processor and of AutoGPTQ."""
    directory = copied(locate("tiny"), tmp_path / "tiny")
    tokenizer = json.loads((directory / "tokenizer.json").read_text())
    (directory / "tokenizer.json").unlink()
    config = json.loads((directory / "tokenizer_config.json").read_text())
    del config["added_tokens_decoder"]
    merges = [
        pair if isinstance(pair, str) else " ".join(pair) for pair in tokenizer["model"]["merges"]
    ]
    (directory / "merges.txt").write_text("\n".join(merges))
    (directory / "model.safetensors").rename(directory / "a.safetensors")
    (directory / "preprocessor_config.json").unlink()
    files = {
        "tokenizer_config.json": config,
        "vocab.json": tokenizer["model"]["vocab"],
        "added_tokens.json": {t["content"]: t["id"] for t in tokenizer["added_tokens"]},
        "model.safetensors.index.json": {"metadata": {}, "weight_map": {"x": "a.safetensors"}},
        "processor_config.json": {"image_processor": {"image_std": [1, 1, 1], "size": {}}},
        "quantize_config.json": {"bits": 4, "group_size": 64, "dynamic": {"x": {"bits": 8}}},
    }
    for name, content in files.items():
        (directory / name).write_text(json.dumps(content))
    expected = prompt_of(directory)
    assert expected[0].image_std == (1, 1, 1)
    assert len(expected[0].quantization) == 2
    for name in files:
        text = (directory / name).read_text()
        whole = name not in ("vocab.json", "added_tokens.json")
        if whole or kind in ("no limit", "long", "too large", "not finite", "surrogates"):
            junk = JUNK[kind] if whole else JUNK[kind].partition(", ")[0]
            (directory / name).write_text(
                with_junk(text, junk) if whole else f"{{{junk}, {text[1:]}"
            )
    assert prompt_of(directory) == expected
