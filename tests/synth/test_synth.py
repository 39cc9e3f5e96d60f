"""Synthetic checkpoints: the files are what others read, the weights what the seed says."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import deserialize
from tokenizers import Tokenizer

from edgevl.checkpoint import Checkpoint, expected_tensors
from edgevl.checkpoint.writer import TensorSpec, encode, plan_shards, to_bfloat16
from edgevl.cli import main
from edgevl.errors import CheckpointError
from edgevl.synth import writer as synth_module
from edgevl.synth.presets import PRESETS
from edgevl.synth.tokenizer import build_tokenizer
from edgevl.synth.writer import LAYOUTS, random_values, stored_bytes, write_checkpoint

MINI = PRESETS["mini-qwen3"].config

# InternVL's published ids: internvl.md of OpenGVLab's tokenizers, Qwen3 and Qwen2.5.
QWEN3_IDS = {
    "<|endoftext|>": 151643,
    "<|im_start|>": 151644,
    "<|im_end|>": 151645,
    "<|video_pad|>": 151656,
    "</tool_call>": 151658,
    "<|file_sep|>": 151664,
    "<think>": 151667,
    "</think>": 151668,
    "<img>": 151669,
    "</img>": 151670,
    "<IMG_CONTEXT>": 151671,
    "<quad>": 151672,
    "<ref>": 151674,
    "<box>": 151676,
    "</box>": 151677,
}
QWEN2_IDS = {
    "<|im_end|>": 151645,
    "<|file_sep|>": 151664,
    "<img>": 151665,
    "<IMG_CONTEXT>": 151667,
    "</box>": 151673,
}


def tensors(path):
    """Read a file of weights with the safetensors library; bfloat16 comes as float32."""
    read = {}
    for name, entry in deserialize(path.read_bytes()):
        shape, data = entry["shape"], entry["data"]
        if entry["dtype"] == "BF16":
            wide = np.frombuffer(data, "<u2").astype(np.uint32) << 16
            read[name] = wide.view(np.float32).reshape(shape)
        else:
            kind = {"F16": "<f2", "F32": "<f4"}[entry["dtype"]]
            read[name] = np.frombuffer(data, kind).reshape(shape)
    return read


@pytest.fixture(scope="module")
def full_tokenizers():
    return {thinking: build_tokenizer(151643, thinking) for thinking in (True, False)}


# --- weights ---------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_opens_with_the_preset_configuration(preset, layout, mini_checkpoint):
    config = PRESETS[preset].config
    with Checkpoint.open(mini_checkpoint(preset, layout)) as checkpoint:
        assert checkpoint.layout == {"hf": "internvl"}.get(layout, layout)
        assert replace(checkpoint.config, eos_token_ids=()) == config
        end, pad = 562, 560
        assert checkpoint.config.eos_token_ids == (end, pad)
        assert sorted(checkpoint.names()) == sorted(expected_tensors(config))


@pytest.mark.parametrize("seed", [0, 7])
def test_both_layouts_hold_the_same_model(preset, seed, mini_checkpoint):
    with (
        Checkpoint.open(mini_checkpoint(preset, "internvl_chat", seed=seed)) as ours,
        Checkpoint.open(mini_checkpoint(preset, "hf", seed=seed)) as theirs,
    ):
        for name in ours.names():
            np.testing.assert_array_equal(ours.tensor(name), theirs.tensor(name), err_msg=name)


def test_earlier_names_of_the_modules():
    from edgevl.checkpoint import architecture, layouts, presets, synth
    from edgevl.synth.writer import write_checkpoint

    assert layouts.TEXT is architecture.TEXT
    assert presets.PRESETS is PRESETS
    assert synth.write_checkpoint is write_checkpoint


def test_seeds_differ(mini_checkpoint):
    name = "language_model.model.embed_tokens.weight"
    with (
        Checkpoint.open(mini_checkpoint(seed=0)) as first,
        Checkpoint.open(mini_checkpoint(seed=1)) as second,
    ):
        correlation = np.corrcoef(first.tensor(name).ravel(), second.tensor(name).ravel())[0, 1]
    assert abs(correlation) < 0.05


@pytest.mark.parametrize("layout", LAYOUTS)
def test_threads_and_blocks_do_not_matter(layout, tmp_path, monkeypatch, mini_checkpoint):
    # Blocks so small that q, k and v begin and end inside of them; a whole tensor in one go.
    monkeypatch.setattr(synth_module, "_BLOCK", 1000)
    one = write_checkpoint(MINI, tmp_path / "one", layout=layout, threads=1, base_vocabulary=560)
    five = write_checkpoint(MINI, tmp_path / "five", layout=layout, threads=5, base_vocabulary=560)
    first, second = (path / "model.safetensors" for path in (one, five))
    assert first.read_bytes() == second.read_bytes()
    name, shape = "vision_model.encoder.layers.0.attn.qkv.weight", (144, 48)
    whole = random_values(name, shape, 0)
    keys = whole[48 * 48 : 2 * 48 * 48]
    np.testing.assert_array_equal(random_values(name, shape, 0, 48 * 48, 2 * 48 * 48), keys)
    if layout == "hf":
        stored = Checkpoint.open(one).tensor(name)
        np.testing.assert_array_equal(to_bfloat16(stored[48:96].ravel()), to_bfloat16(keys))


@pytest.mark.parametrize(
    ("name", "shape", "mean", "deviation"),
    [
        ("language_model.model.layers.3.mlp.down_proj.weight", (512, 4096), 0, 1 / 64),
        ("vision_model.embeddings.patch_embedding.weight", (1024, 3, 14, 14), 0, 588**-0.5),
        ("language_model.model.norm.weight", (40000,), 1, 0.1),
        ("vision_model.encoder.layers.0.ls1", (40000,), 0.1, 0.02),
        ("mlp1.1.bias", (40000,), 0, 0.05),
    ],
)
def test_distributions(name, shape, mean, deviation):
    values = random_values(name, shape, 3)
    assert values.shape == (math.prod(shape),)
    assert values.mean() == pytest.approx(mean, abs=deviation / 30)
    assert values.std() == pytest.approx(deviation, rel=0.02)
    # No stretch is repeated, and neighbours are independent: across the block boundary too.
    assert len(np.unique(values)) > 0.9 * len(values)
    assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 0.03


def test_dtypes_store_the_same_numbers(tmp_path):
    written = {
        dtype: tensors(write_checkpoint(MINI, tmp_path / dtype, dtype=dtype) / "model.safetensors")
        for dtype in ("bf16", "fp16", "fp32")
    }
    for name, exact in written["fp32"].items():
        assert exact.dtype == np.float32
        assert written["fp16"][name].dtype == np.float16
        np.testing.assert_array_equal(written["fp16"][name], exact.astype(np.float16))
        np.testing.assert_allclose(written["bf16"][name], exact, rtol=2**-8, err_msg=name)


def test_shards_and_index(tmp_path, mini_checkpoint):
    directory = write_checkpoint(MINI, tmp_path / "d", shard_bytes=100_000, base_vocabulary=560)
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in directory.glob("*.safetensors"))
    count = len(files)
    assert count > 3
    assert files[0] == f"model-00001-of-{count:05}.safetensors"
    assert not (directory / "model.safetensors").exists()
    assert set(index["weight_map"].values()) == set(files)
    assert index["metadata"]["total_size"] == stored_bytes(MINI)
    single = tensors(mini_checkpoint("mini-qwen3") / "model.safetensors")
    assert set(index["weight_map"]) == set(single)
    for file in files:
        for name, values in tensors(directory / file).items():
            assert index["weight_map"][name] == file
            np.testing.assert_array_equal(values, single[name])
    with Checkpoint.open(directory) as checkpoint:
        assert len(checkpoint.names()) == len(single)


def test_plan_shards_keeps_order_and_limit():
    specs = [TensorSpec(str(i), "U8", (size,)) for i, size in enumerate([4, 6, 1, 30, 2, 8])]
    shards = plan_shards(specs, 10)
    assert [[tensor.name for tensor in shard] for shard in shards] == [
        ["0", "1"],
        ["2"],
        ["3"],
        ["4", "5"],
    ]


# --- bfloat16 --------------------------------------------------------------------------------


@given(st.lists(st.floats(width=32), min_size=1, max_size=50))
def test_bfloat16_is_nearest_even(values):
    values = np.array(values, np.float32)
    stored = to_bfloat16(values)
    back = (stored.astype(np.uint32) << 16).view(np.float32)
    np.testing.assert_array_equal(np.isnan(back), np.isnan(values))
    below = (stored - np.uint16(1)).astype(np.uint32) << 16
    above = (stored + np.uint16(1)).astype(np.uint32) << 16
    for value, bits, got, low, high in zip(
        values, stored, back, below.view(np.float32), above.view(np.float32), strict=True
    ):
        if not np.isfinite(value) or not np.isfinite(got) or got == 0:
            continue
        for other in (low, high):
            if np.isfinite(other) and np.sign(other) in (0, np.sign(got)):
                mine, its = abs(float(got) - float(value)), abs(float(other) - float(value))
                assert mine < its or (mine == its and bits % 2 == 0)


@pytest.mark.parametrize(
    ("bits", "expected"),
    [
        (0x3F800000, 0x3F80),  # 1
        (0x3F808000, 0x3F80),  # halfway, even below
        (0x3F818000, 0x3F82),  # halfway, even above
        (0x3F808001, 0x3F81),  # just over half
        (0x7F7FFFFF, 0x7F80),  # the largest float32 overflows
        (0xFF800000, 0xFF80),  # -inf stays
        (0x7F800001, 0x7FC0),  # a NaN whose upper half would be inf
        (0x80000000, 0x8000),  # -0
    ],
)
def test_bfloat16_cases(bits, expected):
    assert to_bfloat16(np.array([bits], np.uint32).view(np.float32))[0] == expected
    assert encode(np.array([bits], np.uint32).view(np.float32), "BF16") == expected.to_bytes(
        2, "little"
    )


# --- tokenizer -------------------------------------------------------------------------------


@pytest.mark.parametrize(("thinking", "ids"), [(True, QWEN3_IDS), (False, QWEN2_IDS)])
def test_special_tokens_have_the_real_ids(thinking, ids, full_tokenizers):
    tokenizer = full_tokenizers[thinking]
    assert tokenizer.get_vocab_size(with_added_tokens=False) == 151643
    assert {text: tokenizer.token_to_id(text) for text in ids} == ids
    assert tokenizer.get_vocab_size() == max(ids.values()) + 1
    for text, number in ids.items():
        assert tokenizer.encode(f"a{text}b").ids.count(number) == 1
    assert tokenizer.get_added_tokens_decoder()[151657].special is False  # <tool_call>
    assert tokenizer.get_added_tokens_decoder()[ids["<img>"]].special is True
    if not thinking:
        assert tokenizer.token_to_id("<think>") is None


@given(st.text(max_size=40))
def test_any_text_round_trips(full_tokenizers, text):
    tokenizer = full_tokenizers[True]
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    expected = tokenizer.normalizer.normalize_str(text)
    assert tokenizer.decode(ids, skip_special_tokens=False) == expected
    assert max(ids, default=0) < 151678


def test_words_share_tokens(full_tokenizers):
    english = "Please describe the picture in as much detail as you can, and read every number."
    chinese = "请描述这幅图片里的内容数字是多少"
    encode = full_tokenizers[True].encode
    assert len(encode(english).ids) < 0.6 * len(english)
    assert len(encode(chinese).ids) == len(chinese)
    # Digits are never joined, as in Qwen's tokenizers.
    assert len(encode("12345").ids) == 5


def test_every_byte_and_merge_is_used():
    tokenizer = build_tokenizer(400, thinking=True)
    entries = sorted(tokenizer.get_vocab(with_added_tokens=False).items(), key=lambda item: item[1])
    assert [number for _, number in entries] == list(range(400))
    assert len({text for text, _ in entries}) == 400
    for text, number in entries[256:]:  # here all of them letters, or a space and a letter
        assert tokenizer.encode(text.replace("Ġ", " ")).ids == [number]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tokenizer_file_and_configuration_agree(preset, layout, mini_checkpoint):
    directory = mini_checkpoint(preset, layout)
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    stored = json.loads((directory / "tokenizer_config.json").read_text())
    for number, token in stored["added_tokens_decoder"].items():
        assert tokenizer.token_to_id(token["content"]) == int(number)
    assert tokenizer.get_vocab_size() <= PRESETS[preset].config.text.vocab_size
    config = json.loads((directory / "config.json").read_text())
    if layout == "hf":
        assert config["image_token_id"] == tokenizer.token_to_id("<IMG_CONTEXT>")
        assert stored["context_image_token"] == "<IMG_CONTEXT>"
    else:
        vocabulary = json.loads((directory / "vocab.json").read_text())
        assert vocabulary == tokenizer.get_vocab(with_added_tokens=False)
        assert not list(directory.glob("*.py"))


# --- presets and sizes -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        # What transformers counts for InternVL3_5-1B; the rest rounded as on the model cards.
        ("internvl3_5-1b", 1.061e9),
        ("internvl3_5-2b", 2.3e9),
        ("internvl3_5-4b", 4.7e9),
        ("internvl3_5-8b", 8.5e9),
        ("internvl3-1b", 0.94e9),
        ("internvl3-2b", 2.09e9),
        ("internvl2_5-1b", 0.94e9),
        ("internvl2_5-4b", 3.71e9),
    ],
)
def test_parameters_of_the_full_presets(name, parameters):
    assert stored_bytes(PRESETS[name].config) / 2 == pytest.approx(parameters, rel=0.03)


def test_vision_encoder_and_text_model_of_the_1b():
    shapes = expected_tensors(PRESETS["internvl3_5-1b"].config)
    vision = sum(math.prod(s) for n, s in shapes.items() if n.startswith("vision_model"))
    text = sum(math.prod(s) for n, s in shapes.items() if n.startswith("language_model"))
    assert vision == pytest.approx(0.304e9, rel=0.002)
    assert text == pytest.approx(0.7516e9, rel=0.001)
    assert shapes["language_model.lm_head.weight"] == (151936, 1024)
    assert shapes["language_model.model.layers.0.self_attn.q_proj.weight"] == (2048, 1024)


def test_every_preset_has_room_for_its_tokenizer():
    for name, preset in PRESETS.items():
        added = 35 if preset.config.text.model_type == "qwen3" else 31
        assert preset.base_vocabulary + added <= preset.config.text.vocab_size, name


# --- files and failures ----------------------------------------------------------------------


def test_refuses_a_directory_in_use(tmp_path):
    target = tmp_path / "model"
    target.mkdir()
    (target / "mine.txt").write_text("keep")
    with pytest.raises(CheckpointError, match=r"model: exists and is not an empty directory"):
        write_checkpoint(MINI, target)
    assert [path.name for path in tmp_path.rglob("*")] == ["model", "mine.txt"]


def test_an_empty_directory_is_filled_and_parents_are_made(tmp_path):
    target = tmp_path / "a" / "b"
    target.mkdir(parents=True)
    assert write_checkpoint(MINI, target) == target
    assert (write_checkpoint(MINI, tmp_path / "c" / "d") / "model.safetensors").is_file()


@pytest.mark.parametrize("failure", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_run_leaves_nothing(tmp_path, failure):
    def stop(_):
        raise failure

    with pytest.raises(failure):
        write_checkpoint(MINI, tmp_path / "model", progress=stop)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_an_error_and_leaves_nothing(tmp_path):
    def full(_):
        raise OSError(28, "No space left on device")

    with pytest.raises(CheckpointError, match=r"model: cannot be written \(No space left"):
        write_checkpoint(MINI, tmp_path / "model", progress=full)
    assert not list(tmp_path.iterdir())


def test_disk_space_is_checked_before_anything_is_written(tmp_path, monkeypatch):
    def usage(path):
        assert path == tmp_path
        return type("Usage", (), {"free": 10**9})()

    monkeypatch.setattr(synth_module.shutil, "disk_usage", usage)
    config = PRESETS["internvl3_5-8b"].config
    with pytest.raises(CheckpointError, match=r"17\.1 GB needed, 1\.0 GB free"):
        write_checkpoint(config, tmp_path / "not" / "yet" / "model")
    assert not list(tmp_path.iterdir())


def test_places_that_cannot_be_a_directory(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("keep")
    with pytest.raises(CheckpointError, match="file: exists and is not an empty directory"):
        write_checkpoint(MINI, tmp_path / "file")
    with pytest.raises(CheckpointError, match="file: cannot be made"):
        write_checkpoint(MINI, tmp_path / "file" / "model")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(CheckpointError, match="is the working directory"):
        write_checkpoint(MINI, ".")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "here"]


def test_a_second_run_beside_is_refused(tmp_path):
    (tmp_path / "model.partial").mkdir()
    with pytest.raises(CheckpointError, match=r"model\.partial: exists; another run"):
        write_checkpoint(MINI, tmp_path / "model")
    assert (tmp_path / "model.partial").is_dir()


def test_a_vocabulary_without_room_is_refused(tmp_path):
    small = replace(MINI, text=replace(MINI.text, vocab_size=280))
    with pytest.raises(CheckpointError, match="vocab_size is 280"):
        write_checkpoint(small, tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_progress_adds_up(tmp_path):
    seen = []
    write_checkpoint(MINI, tmp_path / "model", progress=seen.append)
    assert sum(seen) == stored_bytes(MINI)


# --- command line ----------------------------------------------------------------------------


def test_command_writes_and_prints_the_directory(tmp_path, capsys):
    target = tmp_path / "model"
    arguments = ["synth", "--preset", "mini-llama", "--layout", "hf", "--seed", "5"]
    assert main([*arguments, "--dtype", "fp16", "--shard-size", "200KB", "-o", str(target)]) == 0
    output = capsys.readouterr()
    assert output.out == f"{target}\n"
    assert output.err == ""  # no progress bar: not a terminal
    assert len(list(target.glob("model-*.safetensors"))) > 1
    with Checkpoint.open(target) as checkpoint:
        assert checkpoint.layout == "internvl"
        assert checkpoint.stored("mlp1.3.weight").dtype == "F16"
        values = checkpoint.tensor("mlp1.3.weight").ravel()
        exact = random_values("mlp1.3.weight", (64, 64), 5)
        np.testing.assert_array_equal(values, exact.astype(np.float16).astype(np.float32))
    assert main(["synth", "--preset", "mini-llama", "-o", str(target)]) == 1
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["--preset", "internvl9"],
        ["--preset", "mini-6b", "--seed", "-1"],
        ["--preset", "mini-6b", "--layout", "gguf"],
        ["--preset", "mini-6b", "--shard-size", "five"],
        ["--preset", "mini-6b", "--shard-size", "0GB"],
    ],
)
def test_wrong_usage(arguments, tmp_path, capsys):
    assert main(["synth", *arguments, "-o", str(tmp_path / "model")]) == 2
    assert not list(tmp_path.iterdir())
    assert "Usage: edgevl synth" in capsys.readouterr().err


# --- transformers ----------------------------------------------------------------------------


def test_transformers_loads_every_tensor(preset, mini_checkpoint):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers", minversion="5")
    directory = mini_checkpoint(preset, "hf")
    model, loading = transformers.InternVLForConditionalGeneration.from_pretrained(
        directory, dtype=torch.float32, output_loading_info=True
    )
    assert {name: found for name, found in loading.items() if found} == {}
    text = PRESETS[preset].config.text
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert (head is embedding) == text.tie_word_embeddings
    with Checkpoint.open(directory) as checkpoint:
        layer = model.model.vision_tower.encoder.layer[1]
        qkv = checkpoint.tensor("vision_model.encoder.layers.1.attn.qkv.weight")
        projections = (layer.attention.q_proj, layer.attention.k_proj, layer.attention.v_proj)
        found = torch.cat([linear.weight for linear in projections]).detach().numpy()
        np.testing.assert_array_equal(found, qkv)
        name = "language_model.model.embed_tokens.weight"
        np.testing.assert_array_equal(embedding.detach().numpy(), checkpoint.tensor(name))


def test_transformers_activations_are_sane(preset, mini_checkpoint):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers", minversion="5")
    model = transformers.InternVLForConditionalGeneration.from_pretrained(
        mini_checkpoint(preset, "hf"), dtype=torch.float32
    )
    config = PRESETS[preset].config
    pixels = torch.randn(
        1, 3, config.vision.image_size, config.vision.image_size,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    ids = torch.arange(300, 340)[None]
    ids[0, 4 : 4 + config.image_tokens] = model.config.image_token_id
    with torch.no_grad():
        output = model(input_ids=ids, pixel_values=pixels, output_hidden_states=True)
    assert all(0.1 < hidden.std() < 10 for hidden in output.hidden_states)
    assert 0.5 < output.logits.std() < 2
    assert output.logits[0].argmax(-1).unique().numel() > 10


@pytest.mark.parametrize("layout", LAYOUTS)
def test_transformers_tokenizes_alike(preset, layout, mini_checkpoint):
    transformers = pytest.importorskip("transformers", minversion="5")
    directory = mini_checkpoint(preset, layout)
    if layout == "hf":
        tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
        assert tokenizer.context_image_token_id == tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
    else:  # AutoTokenizer would ask to run the code that auto_map names
        tokenizer = transformers.Qwen2Tokenizer.from_pretrained(directory)
    ours = Tokenizer.from_file(str(directory / "tokenizer.json"))
    text = "<|im_start|>user\n<img><IMG_CONTEXT></img>请看 the dial: 42°C\n<|im_end|>"
    assert tokenizer(text).input_ids == ours.encode(text).ids
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert rendered == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


def test_transformers_processor_reads_pictures(preset, mini_checkpoint):
    transformers = pytest.importorskip("transformers", minversion="5")
    pytest.importorskip("torchvision")  # transformers wants it for the processor's video part
    from PIL import Image

    config = PRESETS[preset].config
    processor = transformers.AutoProcessor.from_pretrained(mini_checkpoint(preset, "hf"))
    picture = Image.effect_mandelbrot((200, 90), (-2, -1, 1, 1), 50).convert("RGB")
    content = [{"type": "image", "image": picture}, {"type": "text", "text": "What?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
    )
    size = config.vision.image_size
    assert inputs.pixel_values.shape == (9, 3, size, size)  # 4 x 2 tiles and the thumbnail
    assert (inputs.input_ids == processor.image_token_id).sum() == 9 * config.image_tokens
