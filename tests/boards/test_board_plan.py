"""Plans for boards: the published cases, the cutting into chunks, memory, limits, the command."""

import json
from dataclasses import replace

import pytest

from edgevl import cli
from edgevl.axera.layout import BoardShape
from edgevl.boards.estimates import (
    DECODE_FACTOR,
    PREFILL_FACTOR,
    VISION_MS,
    group_times_ms,
    is_published,
    plan_memory,
    post_time_ms,
)
from edgevl.boards.plan import PrefillSteps, make_plan, planned_model, prefill_steps
from edgevl.boards.settings import AX630C, AX650, TARGETS
from edgevl.errors import BoardError
from edgevl.synth.presets import PRESETS
from fake_npu import write_board

SHAPE = BoardShape()
MODEL = PRESETS["internvl3_5-1b"].config
GROUPS_MS = (2.208, 2.562, 2.804, 3.173, 3.517, 3.807, 4.079, 4.387, 4.713)


def plan(config=MODEL, target=AX650, shape=SHAPE, **options):
    return make_plan(config, target, shape, template_tokens=80, **options)


def test_published_times_are_returned_as_they_are():
    assert group_times_ms(MODEL.text, SHAPE) == (0.987, *GROUPS_MS)
    assert post_time_ms(MODEL.text) == 7.954
    assert is_published(MODEL.text, SHAPE)


def test_published_cases():
    longest = plan()
    assert longest.basis == "published times"
    assert longest.prompt_tokens == 1152
    # The README sums its nine groups to 31.268 and prints 883.458; they sum to 31.250.
    assert longest.prefill_ms == pytest.approx(28 * sum(GROUPS_MS) + 7.954)
    assert longest.prefill_ms == pytest.approx(883.458, abs=0.6)
    assert 1000 / longest.decode_ms == pytest.approx(28.09, abs=0.01)


@pytest.mark.parametrize(
    ("tokens", "chunks", "singles"),
    [
        (1, 0, 1),  # a chunk would take longer than so few tokens
        (2, 0, 2),
        (3, 1, 0),
        (127, 1, 0),
        (128, 1, 0),
        (129, 1, 1),
        (131, 2, 0),
        (1023, 8, 0),
        (1024, 8, 0),
        (1025, 8, 1),
        (1028, 8, 4),
        (1029, 9, 0),
        (1152, 9, 0),
        (1153, 9, 1),
        (1300, 9, 148),
    ],
)
def test_prompts_are_cut_into_chunks(tokens, chunks, singles):
    steps = prefill_steps(SHAPE, tokens)
    assert steps == PrefillSteps(tuple(range(chunks)), singles)
    expected = 28 * (sum(GROUPS_MS[:chunks]) + 0.987 * singles) + 7.954
    assert plan(prompt_tokens=tokens).prefill_ms == pytest.approx(expected)


@pytest.mark.parametrize(
    ("cached", "tokens", "groups", "singles"),
    [
        (1, 5, (1,), 0),
        (100, 128, (1,), 0),
        (100, 131, (1, 2), 0),  # the second chunk follows 228 tokens: the group with 256
        (128, 3, (1,), 0),
        (129, 3, (2,), 0),
        (129, 2, (), 2),
        (1000, 200, (8,), 72),  # after 1128 tokens no group is left
        (900, 4, (), 4),  # the longer the history, the longer a chunk takes
        (900, 5, (8,), 0),
        (1024, 128, (8,), 0),
        (1025, 3, (), 3),
    ],
)
def test_a_cache_of_any_length_is_continued(cached, tokens, groups, singles):
    assert prefill_steps(SHAPE, tokens, cached) == PrefillSteps(groups, singles)


def test_a_prompt_after_a_cache_takes_the_groups_of_its_history():
    second = plan(prompt_tokens=30, cached_tokens=300)
    assert second.prefill_ms == pytest.approx(28 * GROUPS_MS[3] + 7.954)


def test_answer_and_next_turn():
    planned = plan(prompt_tokens=300, generate=100)
    assert planned.total_ms == pytest.approx(planned.prefill_ms + 99 * planned.decode_ms)
    after = plan(prompt_tokens=32, cached_tokens=399)
    assert planned.next_turn_ms == pytest.approx(after.prefill_ms)
    # The answer's last token is not in the cache, so that 2016 are, and a question of 32 just fits.
    assert plan(prompt_tokens=1917, generate=100).next_turn_ms is not None
    assert plan(prompt_tokens=1918, generate=100).next_turn_ms is None


def test_shapes_that_are_not_published_are_estimates():
    for shape in (replace(SHAPE, context=1023, max_prefill=896), replace(SHAPE, chunk=64)):
        assert plan(shape=shape).basis == "estimate"
    assert plan(target=AX630C).basis == "estimate"
    assert plan(weight_bits=8).basis == "estimate"
    assert plan(PRESETS["internvl3_5-2b"].config).basis == "estimate"
    assert plan(shape=replace(SHAPE, max_prefill=512)).basis == "published times"


def test_estimates_grow_with_what_they_scale_with():
    full, text = group_times_ms(MODEL.text, SHAPE), MODEL.text
    short = group_times_ms(text, replace(SHAPE, context=1024))
    assert short[0] < full[0]
    assert short[1:] == full[1:]
    wide = group_times_ms(replace(text, intermediate_size=6144), SHAPE)
    assert all(more > less for more, less in zip(wide, full, strict=True))
    # History costs with queries, not with the weights.
    assert wide[9] - wide[1] == pytest.approx(full[9] - full[1], abs=1e-5)
    int8 = group_times_ms(text, SHAPE, weight_bits=8)
    assert full[0] < int8[0] < 2 * full[0]
    chunk = group_times_ms(text, replace(SHAPE, chunk=256))
    assert chunk[1] == pytest.approx(2 * 2.208)
    assert chunk[2] == pytest.approx(2 * 2.804)
    # A chunk of one token still reads all weights: as decoding less the cache.
    single = group_times_ms(text, replace(SHAPE, chunk=1, max_prefill=4))
    assert 0.4 < single[1] < 0.987
    assert post_time_ms(replace(text, vocab_size=151936 // 2)) == pytest.approx(7.954 / 2)
    beyond = group_times_ms(text, BoardShape(context=4095, chunk=128, max_prefill=2048))
    assert beyond[:10][1:] == full[1:]
    assert beyond[17] == pytest.approx(2.208 + 2 * (4.713 - 2.208))


# Rates that others published, in tokens a second: M5Stack's StackFlow pages (the first two),
# AXERA-TECH's model cards (the others).
@pytest.mark.parametrize(
    ("sizes", "bits", "target", "published"),
    [
        ((896, 4864, 24, 14, 2, 64, 151674), 8, "ax650", 26.67),
        ((896, 4864, 24, 14, 2, 64, 151674), 8, "ax630c", 9.78),
        ((896, 4864, 24, 14, 2, 64, 151674), 8, "ax650", 32.0),
        ((2048, 11008, 36, 16, 2, 128, 151936), 8, "ax650", 6.2),
        ((3584, 18944, 28, 28, 4, 128, 152064), 8, "ax650", 2.6),
        ((3584, 18944, 28, 28, 4, 128, 152064), 4, "ax650", 4.8),
    ],
)
def test_estimates_are_near_the_rates_published_of_other_models(sizes, bits, target, published):
    hidden, intermediate, layers, heads, kv_heads, head_dim, vocabulary = sizes
    text = replace(
        PRESETS["internvl3-1b"].config.text,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=vocabulary,
    )
    planned = plan(replace(MODEL, text=text), TARGETS[target], weight_bits=bits)
    assert 1000 / planned.decode_ms == pytest.approx(published, rel=0.27)


def test_every_target_has_factors():
    assert set(TARGETS) == set(DECODE_FACTOR) == set(PREFILL_FACTOR) == set(VISION_MS)
    for target in TARGETS.values():
        assert target.default_npu_mode in target.npu_modes


def test_vision_has_a_time_only_where_one_is_published():
    assert plan().vision_ms == 393.08
    assert plan(vision=False).vision_ms is None
    assert plan(PRESETS["mini-qwen3"].config).vision_ms is None


def test_memory_of_the_published_model():
    memory = plan_memory(MODEL, SHAPE)
    weights = 28 * (2 * 1024 * 2048 + 2 * 1024 * 1024 + 3 * 1024 * 3072)
    assert memory.text_layers == weights * 33 // 64  # 4 bits, and 16 for every 128 weights
    assert memory.post == 1024 * 151936
    assert memory.embeddings == 2 * memory.post
    assert memory.kv_cache == 28 * 2 * 2048 * 1024 * 2
    assert 2 * 300e6 < memory.vision < 2 * 320e6
    assert memory.npu == memory.text_layers + memory.post + memory.vision + memory.kv_cache
    assert plan_memory(MODEL, SHAPE, weight_bits=8).text_layers == weights
    assert plan_memory(MODEL, SHAPE, vision=False).vision == 0


def test_limits():
    planned = plan()
    assert (planned.max_prompt_tokens, planned.max_images, planned.max_context) == (1152, 4, 2048)
    # 80 tokens of template and four pictures of 256 + 3.
    exact = make_plan(MODEL, AX650, SHAPE, template_tokens=1152 - 4 * 259)
    short = make_plan(MODEL, AX650, SHAPE, template_tokens=1152 - 4 * 259 + 1)
    assert (exact.max_images, short.max_images) == (4, 3)
    assert plan(vision=False).max_images == 0
    assert make_plan(MODEL, AX650, SHAPE, template_tokens=5000).max_images == 0


def test_shapes_that_cannot_be_compiled_are_refused():
    with pytest.raises(BoardError, match="--max-prefill 1000"):
        plan(shape=BoardShape(max_prefill=1000))
    # The last chunk ends with the context, which is one more than the cache.
    assert plan(shape=BoardShape(143, 16, 128)).max_prompt_tokens == 144
    with pytest.raises(BoardError, match="exceeds --context 142; at most 112 fits"):
        plan(shape=BoardShape(142, 16, 128))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt_tokens": 0}, "--prompt-tokens 0"),
        ({"cached_tokens": -1}, "--cached-tokens -1"),
        ({"generate": -1}, "--generate -1"),
        ({"prompt_tokens": 2049}, "exceed the context of 2048"),
        ({"prompt_tokens": 1000, "generate": 1049}, "exceed the context of 2048"),
        ({"prompt_tokens": 48, "cached_tokens": 2001}, "exceed the context of 2048"),
    ],
)
def test_token_counts_beyond_the_context_are_refused(options, message):
    with pytest.raises(BoardError, match=message):
        plan(**options)


def test_the_default_prompt_is_the_longest_prefill_that_leaves_room():
    assert plan(generate=1000).prompt_tokens == 1048
    assert plan(cached_tokens=1000).prompt_tokens == 152
    assert plan(cached_tokens=1500).prompt_tokens == 32
    assert plan(cached_tokens=2047).prompt_tokens == 1


def test_presets_and_checkpoints_are_described(mini_checkpoint):
    published = planned_model("internvl3_5-1b")
    assert (published.weight_bits, published.has_vision) == (4, True)
    # The default system message, and the turns around it.
    assert 40 < published.template_tokens <= 80
    mini = planned_model(str(mini_checkpoint("mini-qwen3")))
    assert mini.config.text.hidden_size == 56
    assert mini.weight_bits == 8
    assert mini.template_tokens > 10


def test_a_compiled_model_is_planned_as_it_was_compiled(tmp_path, mini_checkpoint, capsys):
    board = write_board(tmp_path / "board", mini_checkpoint("mini-qwen3"), chunk=64)
    compiled = {"context": 511, "chunk": 64, "max_prefill": 256, "weights": "s4"}
    (board / "board.json").write_text(json.dumps(compiled))
    described = planned_model(str(board))
    assert described.shape == BoardShape(511, 64, 256)
    assert described.weight_bits == 4
    assert cli.main(["plan", str(board), "--max-prefill", "128", "--json"]) == 0
    limits = json.loads(capsys.readouterr().out)["limits"]
    assert (limits["max_prompt_tokens"], limits["max_context"]) == (192, 512)


def test_command_prints_json(capsys):
    assert cli.main(["plan", "--target", "ax650", "--generate", "128", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["prefill_ms"] == pytest.approx(882.954)
    assert printed["decode_ms_per_token"] == pytest.approx(35.59)
    assert printed["decode_tokens_per_s"] == pytest.approx(28.0978, abs=1e-4)
    assert printed["total_ms"] == pytest.approx(882.954 + 127 * 35.59)
    assert printed["basis"] == "published times"
    assert printed["limits"] == {"max_prompt_tokens": 1152, "max_images": 4, "max_context": 2048}
    memory = printed["memory"]
    parts = ("text_layers", "post", "vision", "kv_cache")
    assert memory["npu_bytes"] == sum(memory[f"{part}_bytes"] for part in parts)
    assert memory["available_bytes"] == 6 << 30
    assert memory["fits"] is True


def test_command_prints_a_table(capsys):
    assert cli.main(["plan", "internvl3_5-8b", "--memory", "4", "--cached-tokens", "300"]) == 0
    printed = capsys.readouterr().out
    assert "852 tokens after 300" in printed
    assert "estimate" in printed
    assert "DOES NOT FIT" in printed


def test_command_says_what_is_wrong(capsys):
    assert cli.main(["plan", "--max-prefill", "1000"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("edgevl: error: --max-prefill 1000")
    assert error.count("\n") == 1
    assert cli.main(["plan", "--target", "rk3588"]) == 2
