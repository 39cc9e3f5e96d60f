"""The plan of a packed model: every weight once, in the right format."""

import dataclasses

import numpy as np
import pytest

from edgevl.checkpoint import Checkpoint, GPTQConfig, GPTQWeight, StoredTensor
from edgevl.checkpoint.architecture import EMBEDDING, LM_HEAD, vision_layers
from edgevl.engine.plan import exact_group, make_plan
from edgevl.options import PRECISIONS
from stored_gptq import gptq_checkpoint, quantized


@pytest.fixture
def checkpoint(mini_checkpoint, preset):
    with Checkpoint.open(mini_checkpoint(preset)) as opened:
        yield opened


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_linear_weight_is_in_one_matrix(checkpoint, precision):
    plan = make_plan(checkpoint, precision)
    used = [part.weight for matrix in plan.matrices for part in matrix.parts]
    assert len(used) == len(set(used))
    matrices = {name for name in checkpoint.names() if len(checkpoint.shape(name)) in (2, 4)}
    tied = checkpoint.config.text.tie_word_embeddings
    assert set(used) == (matrices if tied else matrices - {EMBEDDING})
    assert len({matrix.name for matrix in plan.matrices}) == len(plan.matrices)


@pytest.mark.parametrize(
    ("precision", "head"),
    [("auto", "bf16"), ("int4", "bf16"), ("int8", "int8"), ("bf16", "bf16")],
)
def test_exact_logits(checkpoint, precision, head):
    """Only a head that approximates most logits is another."""
    usual, exact = (make_plan(checkpoint, precision, wanted) for wanted in (False, True))
    changed = [m.name for m in usual.matrices if m not in exact.matrices]
    assert changed == (["text.head"] if usual.exact_head else [])
    assert {m.name: m.format for m in exact.matrices}["text.head"] == head
    assert not exact.exact_head


@pytest.mark.parametrize(
    ("precision", "text", "head", "vision", "exact"),
    [
        ("auto", "int8", "int4", "int8", True),
        ("int4", "int4", "split", "int8", True),
        ("int8", "int8", "int8", "int8", False),
        ("bf16", "bf16", "bf16", "bf16", False),
    ],
)
def test_formats(checkpoint, precision, text, head, vision, exact):
    plan = make_plan(checkpoint, precision)
    formats = {matrix.name: matrix.format for matrix in plan.matrices}
    assert formats.pop("vision.patch") == "bf16"
    assert formats.pop("text.head") == head
    assert plan.exact_head == exact
    for name, kind in formats.items():
        assert kind == (text if name.startswith("text.") else vision), name


@pytest.mark.parametrize("precision", PRECISIONS)
def test_what_vision_keeps_is_bfloat16(checkpoint, precision):
    checkpoint.config = dataclasses.replace(checkpoint.config, vision_keep=())
    before = make_plan(checkpoint, precision).matrices
    keep = ("vision_model.encoder.layers.1.attn.qkv.weight", "mlp1.3.weight")
    checkpoint.config = dataclasses.replace(checkpoint.config, vision_keep=keep)
    for matrix, other in zip(make_plan(checkpoint, precision).matrices, before, strict=True):
        kept = matrix.name in ("vision.layers.1.qkv", "vision.projector.fc2")
        assert matrix == (dataclasses.replace(other, format="bf16") if kept else other)


def test_parts_fill_panels_without_meeting(checkpoint):
    for matrix in make_plan(checkpoint).matrices:
        panels = [
            part.first_panel + panel * part.panel_step
            for part in matrix.parts
            for panel in range(-(-part.rows // 16))
        ]
        assert sorted(panels) == list(range(-(-matrix.rows // 16)))


def test_groups_suit_the_layout(checkpoint):
    for matrix in make_plan(checkpoint).matrices:
        unit = 16 if matrix.format == "split" else 8
        assert matrix.group % unit == 0
        assert matrix.group < matrix.cols + unit
        if matrix.name.endswith("fc2") or matrix.name.startswith("text."):
            assert matrix.group <= 128
        else:
            assert matrix.group >= matrix.cols


def test_layers_after_the_selected_one_are_left_out(mini_checkpoint):
    with Checkpoint.open(mini_checkpoint("mini-qwen3")) as checkpoint:
        layers = checkpoint.config.vision.num_hidden_layers
        for select, expected in ((-1, layers), (-2, layers - 1), (0, 0), (1, 1)):
            config = dataclasses.replace(checkpoint.config, select_layer=select)
            assert vision_layers(config) == expected


@pytest.mark.parametrize(
    ("config", "inputs", "group", "how"),
    [
        (GPTQConfig(4, 128, "gptq"), 256, 128, {}),
        (GPTQConfig(4, 256, "gptq"), 512, 128, {}),
        (GPTQConfig(4, -1, "gptq_v2"), 256, 128, {}),
        (GPTQConfig(4, -1, "gptq"), 48, 48, {}),
        (GPTQConfig(4, 32, "gptq"), 48, 32, {}),
        (GPTQConfig(4, 16, "gptq"), 48, 16, {}),
        (GPTQConfig(4, 12, "gptq"), 48, None, {}),  # no whole line
        (GPTQConfig(8, 16, "gptq"), 48, None, {}),
        (GPTQConfig(4, 16, "gptq"), 48, None, {"sym": False}),
        (GPTQConfig(4, 16, "gptq"), 48, None, {"desc_act": True}),
    ],
)
def test_what_int4_can_hold(config, inputs, group, how):
    stored, _ = quantized(16, inputs, config, **how)
    packed = GPTQWeight(
        StoredTensor("I32", stored["qweight"]),
        StoredTensor("I32", stored["qzeros"]),
        StoredTensor("F16", stored["scales"].astype(np.float16)),
        StoredTensor("I32", stored["g_idx"]),
        config,
    )
    assert exact_group(packed) == group


def test_scales_that_float16_does_not_hold():
    config = GPTQConfig(4, 16, "gptq")
    stored, _ = quantized(16, 48, config)
    for scale, group in ((0.5, 16), (1 / 3, None), (1e6, None)):
        packed = GPTQWeight(
            StoredTensor("I32", stored["qweight"]),
            StoredTensor("I32", stored["qzeros"]),
            StoredTensor("F32", np.full((3, 16), scale, np.float32)),
            None,
            config,
        )
        assert exact_group(packed) == group


@pytest.mark.parametrize(
    ("precision", "text"), [("auto", "int4"), ("int4", "int4"), ("int8", "int8"), ("bf16", "bf16")]
)
def test_gptq_is_taken_as_it_is(tmp_path, precision, text):
    with gptq_checkpoint(tmp_path, GPTQConfig(4, 16, "gptq")) as checkpoint:
        plan = make_plan(checkpoint, precision)
        assert plan.notes == ()
        assert [matrix.name for matrix in plan.matrices][-1] == "text.head"
        for matrix in plan.matrices[:-1]:
            assert matrix.format == text
            assert matrix.gptq == (text == "int4")
            assert matrix.group == (16 if matrix.gptq else min(128, matrix.cols))


def test_gptq_whose_layers_differ(tmp_path):
    """Parts that are joined in one matrix stay as they are only if they have the same groups."""
    eight, finer = GPTQConfig(8, 16, "gptq"), GPTQConfig(4, 8, "gptq")

    def rule(name):
        if "k_proj" in name or "layers.1.mlp.gate" in name:
            return eight
        if "layers.0.mlp.gate" in name or "layers.0.mlp.up" in name:
            return finer
        return None if "down_proj" in name else GPTQConfig(4, 16, "gptq")

    dynamic = {".*k_proj": {"bits": 8}, ".*gate": {"group_size": 8}, "-:.*down": {}}
    config = GPTQConfig(4, 16, "gptq")
    with gptq_checkpoint(tmp_path, config, dynamic=dynamic, rule=rule) as checkpoint:
        plan = make_plan(checkpoint)
        formats = {matrix.name: (matrix.format, matrix.gptq) for matrix in plan.matrices}
        for layer in "01":
            assert formats[f"text.layers.{layer}.qkv"] == ("int8", False)  # one of the three
            assert formats[f"text.layers.{layer}.o"] == ("int4", True)
            assert formats[f"text.layers.{layer}.down"] == ("int8", False)
        assert formats["text.layers.0.gate_up"] == ("int4", True)
        assert formats["text.layers.1.gate_up"] == ("int8", False)
        [gate_up] = [m for m in plan.matrices if m.name == "text.layers.0.gate_up"]
        assert gate_up.group == 8
        assert plan.notes[0].startswith("3 GPTQ matrices are not")


def test_gptq_with_act_order_is_rounded_and_said(tmp_path):
    with gptq_checkpoint(tmp_path, GPTQConfig(4, 16, "gptq"), desc_act=True) as checkpoint:
        plan = make_plan(checkpoint)
        assert {m.format for m in plan.matrices} == {"int8", "int4"}  # int4: the head
        assert not any(matrix.gptq for matrix in plan.matrices)
        assert plan.notes == (
            "8 GPTQ matrices are not symmetric 4-bit in groups that follow each other: they are "
            "rounded to INT8",
        )


def test_the_head_of_a_tied_model_is_its_embedding(mini_checkpoint):
    heads = {}
    for preset in ("mini-qwen2", "mini-qwen3"):
        with Checkpoint.open(mini_checkpoint(preset)) as checkpoint:
            heads[preset] = make_plan(checkpoint).matrices
    head = {p: next(m for m in ms if m.name == "text.head") for p, ms in heads.items()}
    assert head["mini-qwen2"].parts[0].weight == EMBEDDING
    assert head["mini-qwen3"].parts[0].weight == LM_HEAD
