"""The text model alone and the embedding, as a board's compiler and programs read them."""

import json

import numpy as np
import pytest

from edgevl.boards.text_checkpoint import (
    check_weights,
    text_bytes,
    write_embeddings,
    write_text_checkpoint,
)
from edgevl.checkpoint import Checkpoint
from edgevl.checkpoint.architecture import EMBEDDING, LM_HEAD, TEXT
from edgevl.checkpoint.safetensors import SafetensorsFile
from edgevl.checkpoint.writer import to_bfloat16
from edgevl.engine import ReferenceEngine
from edgevl.errors import BoardError
from gptq_checkpoints import change_quantization, write_gptq

LAYOUTS = pytest.mark.parametrize("layout", ["internvl_chat", "hf"])
IDS = np.array([5, 17, 3, 200, 41, 8])


def reference_logits(checkpoint):
    """Logits after each of `IDS`: float32 [T, V]."""
    engine = ReferenceEngine(checkpoint)
    return engine.extend(engine.new_sequence(), IDS.tolist())


def written(checkpoint, path, **options):
    path.mkdir()
    write_text_checkpoint(checkpoint, path, **options)
    return path


@LAYOUTS
@pytest.mark.parametrize("bits", [4, 8])
def test_gptq_weights_are_the_same_model(tmp_path, layout, bits):
    with Checkpoint.open(write_gptq(tmp_path / "gptq", layout=layout, bits=bits)) as checkpoint:
        assert check_weights(checkpoint).bits == bits
        out = written(checkpoint, tmp_path / "text")
        with Checkpoint.open(out) as text:
            assert text.layout == "gptq_text"
            assert text.config.text == checkpoint.config.text
            assert np.array_equal(reference_logits(text), reference_logits(checkpoint))
            names = {name for name in checkpoint.names() if name.startswith((TEXT, LM_HEAD))}
            assert set(text.names()) == names
            # What comes out goes in again.
            again = written(text, tmp_path / "again")
            assert (again / "model.safetensors").read_bytes() == (
                out / "model.safetensors"
            ).read_bytes()


@pytest.mark.parametrize("model", ["mini-qwen3", "mini-qwen2", "mini-llama"])
def test_plain_weights_are_transformers_model(mini_checkpoint, tmp_path, model):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    with Checkpoint.open(mini_checkpoint(model, dtype="fp32")) as checkpoint:
        out = written(checkpoint, tmp_path / "text")
        expected = reference_logits(checkpoint)
        tied = LM_HEAD not in checkpoint.names()
    loaded = transformers.AutoModelForCausalLM.from_pretrained(out).eval()
    assert loaded.config.architectures[0].lower().startswith(loaded.config.model_type)
    assert loaded.config.tie_word_embeddings is tied
    with torch.no_grad():
        logits = loaded(torch.from_numpy(IDS)[None]).logits[0].float().numpy()
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)


def test_a_tied_head_is_not_written(mini_checkpoint, tmp_path):
    with Checkpoint.open(mini_checkpoint("mini-qwen2")) as checkpoint:
        assert LM_HEAD not in checkpoint.names()
        out = written(checkpoint, tmp_path / "text")
    file = SafetensorsFile(out / "model.safetensors")
    assert all(name.startswith("model.") for name in file)
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is True


@LAYOUTS
def test_stored_bytes_stay_in_shards_too(mini_checkpoint, tmp_path, layout):
    counts = []
    with Checkpoint.open(mini_checkpoint(layout=layout)) as checkpoint:
        out = written(
            checkpoint,
            tmp_path / "text",
            shard_bytes=50_000,
            progress=lambda *done: counts.append(done),
        )
        index = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
        files = {name: SafetensorsFile(out / name) for name in set(index.values())}
        assert len(files) > 1
        for name, file in index.items():
            stored = checkpoint.stored(f"language_model.{name}")
            assert files[file][name].dtype == stored.dtype
            assert np.array_equal(files[file][name].data, stored.data)
        assert counts[-1] == (text_bytes(checkpoint),) * 2
    side = {path.name for path in out.iterdir() if path.suffix != ".safetensors"}
    assert {"config.json", "tokenizer.json", "generation_config.json"} <= side
    assert "preprocessor_config.json" not in side
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_other_gptq_is_refused(tmp_path):
    directory = write_gptq(tmp_path / "gptq")
    change_quantization(directory, checkpoint_format="gptq_v2")
    message = 'checkpoint_format of its GPTQ weights is "gptq_v2"'
    with Checkpoint.open(directory) as checkpoint, pytest.raises(BoardError, match=message):
        check_weights(checkpoint)


def test_what_shows_in_the_weights_is_not_asked_of_the_configuration(tmp_path):
    directory = write_gptq(tmp_path / "gptq")
    change_quantization(directory, sym=False, desc_act=True)  # neither of which they are
    with Checkpoint.open(directory) as checkpoint:
        assert check_weights(checkpoint).bits == 4
        out = written(checkpoint, tmp_path / "text")
    written_config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert (written_config["sym"], written_config["desc_act"]) == (True, False)


@pytest.mark.parametrize(
    ("bits", "group_size", "state"),
    [
        (8, 128, "quantized otherwise than others"),
        (4, 32, "quantized otherwise than others"),
        (None, 128, "is not quantized, others are"),
    ],
)
def test_layers_of_several_kinds_are_refused_by_name(tmp_path, bits, group_size, state):
    """`dynamic` of GPTQModel: Pulsar2 takes one setting for all layers."""

    def rule(name):
        return (bits, group_size) if "down_proj" in name else (4, 128)

    directory = write_gptq(tmp_path / "gptq", rule=rule)
    dynamic = {".*down_proj": {"bits": bits, "group_size": group_size}}
    change_quantization(directory, dynamic=dynamic)
    with (
        Checkpoint.open(directory) as checkpoint,
        pytest.raises(BoardError, match=rf"layers\.0\.mlp\.down_proj\.weight .*{state}"),
    ):
        check_weights(checkpoint)


def test_other_groups_are_refused_with_the_mend(tmp_path):
    with (
        Checkpoint.open(write_gptq(tmp_path / "gptq", group_size=32)) as checkpoint,
        pytest.raises(
            BoardError, match=r"group_size of .* is 32, .* takes 128: .*--group-size 128"
        ),
    ):
        check_weights(checkpoint)


@pytest.mark.parametrize(
    ("part", "message"), [("qzeros", "zero points"), ("g_idx", "its inputs out of order")]
)
def test_weights_that_are_not_as_the_configuration_says_are_named(tmp_path, part, message):
    directory = write_gptq(tmp_path / "gptq")
    path = directory / "model.safetensors"
    file = SafetensorsFile(path)
    name = f"{TEXT}layers.1.mlp.down_proj.{part}"
    old = file[name].data.tobytes()
    data = bytearray(path.read_bytes())
    # The one place where these bytes are this tensor's: by the header.
    begin = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])[name]["data_offsets"][0]
    begin += 8 + int.from_bytes(data[:8], "little")
    assert data[begin : begin + len(old)] == old
    data[begin : begin + 4] = (1).to_bytes(4, "little")
    path.write_bytes(data)
    with (
        Checkpoint.open(directory) as checkpoint,
        pytest.raises(BoardError, match=rf"layers\.1\.mlp\.down_proj\.weight has {message}"),
    ):
        check_weights(checkpoint)


def test_plain_weights_are_taken_as_they_are(mini_checkpoint):
    with Checkpoint.open(mini_checkpoint()) as checkpoint:
        assert check_weights(checkpoint) is None


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_embeddings_in_three_forms(mini_checkpoint, tmp_path, monkeypatch, dtype):
    # No divisor of the vocabulary.
    monkeypatch.setattr("edgevl.boards.text_checkpoint._ROWS", 100)
    with Checkpoint.open(mini_checkpoint(dtype=dtype)) as checkpoint:
        write_embeddings(checkpoint, tmp_path)
        expected, stored = checkpoint.tensor(EMBEDDING), checkpoint.stored(EMBEDDING)
        sizes = sum(path.stat().st_size for path in tmp_path.iterdir())
        assert sizes == 10 * expected.size + 128  # the header of NumPy's format
    loaded = np.load(tmp_path / "model.embed_tokens.weight.npy")
    assert loaded.dtype == np.float32
    assert np.array_equal(loaded, expected)
    plain = np.fromfile(tmp_path / "model.embed_tokens.weight.float32.bin", "<f4")
    assert np.array_equal(plain.reshape(expected.shape), expected)
    half = np.fromfile(tmp_path / "model.embed_tokens.weight.bfloat16.bin", "<u2")
    rounded = stored.data if dtype == "bf16" else to_bfloat16(expected)
    assert np.array_equal(half.reshape(expected.shape), rounded)
