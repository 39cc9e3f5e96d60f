"""What a model can do on a board and how long it takes, before anything is compiled."""

from __future__ import annotations

from contextlib import closing
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from edgevl.axera.layout import BOARD_FILE, BoardShape, check_shape, prefill_group
from edgevl.boards.estimates import (
    MemoryPlan,
    group_times_ms,
    is_published,
    plan_memory,
    post_time_ms,
    vision_time_ms,
)
from edgevl.boards.settings import Target
from edgevl.checkpoint.config import MAX_POSITIONS, ModelConfig
from edgevl.errors import BoardError
from edgevl.json_input import Fields
from edgevl.loading import locate, open_model
from edgevl.preprocess import Message, PromptEncoder
from edgevl.preprocess.template import chatml_template
from edgevl.synth.presets import PRESETS
from edgevl.synth.tokenizer import build_tokenizer

#: Tokens of the question that a second turn is assumed to ask.
NEXT_QUESTION = 32
#: ``<img>`` and ``</img>`` around a picture and the line break after it.
TOKENS_AROUND_PICTURE = 3


@dataclass(frozen=True)
class PlannedModel:
    """A model to plan.

    Attributes:
        config: its configuration.
        has_vision: whether it has a vision encoder.
        weight_bits: of its layers' linear weights as they are compiled, 4 or 8.
        template_tokens: what its chat template adds to a question without a system message.
        shape: what it was compiled for, or the default.
    """

    config: ModelConfig
    has_vision: bool
    weight_bits: int
    template_tokens: int
    shape: BoardShape = field(default_factory=BoardShape)


def planned_model(model: str) -> PlannedModel:
    """Describe a model by name; no weights are read.

    Args:
        model: a preset's name, which stands for that model with INT4 layers, or what `locate`
            takes: a checkpoint's or a board's directory, a Hub id, ``tiny``.

    Raises:
        CheckpointError: it is none of these, incomplete, or not supported.
        BoardError: it was compiled, and is incomplete or ambiguous.
        DownloadError: it could not be fetched.
    """
    if model in PRESETS:
        preset = PRESETS[model]
        thinking = preset.config.text.model_type == "qwen3"
        # Stands in for the real tokenizer, which has longer tokens, so this is at least enough.
        tokenizer = build_tokenizer(preset.base_vocabulary, thinking)
        template = chatml_template("<|im_end|>\n", preset.config.system_message)
        text = template.render([{"role": "user", "content": ""}])
        return PlannedModel(preset.config, True, 4, len(tokenizer.encode(text).ids))
    with closing(open_model(locate(model))) as opened:
        prompt = PromptEncoder(opened).encode([Message.user("x")])
        board = Fields(opened.read_json(BOARD_FILE) or {}, str(opened.path / BOARD_FILE))
    bits = max((setting.bits for setting in opened.config.quantization), default=8)
    weights = board.text("weights", f"gptq-{bits}")
    return PlannedModel(
        opened.config,
        opened.has_vision,
        4 if weights.endswith("4") else 8,
        len(prompt.token_ids) - 1,
        BoardShape(
            *(board.integer(f.name, 0, MAX_POSITIONS, f.default) for f in fields(BoardShape))
        ),
    )


@dataclass(frozen=True)
class PrefillSteps:
    """How a prompt is computed.

    Attributes:
        groups: the prefill group of each chunk, 0 being the one without history.
        tokens: what is left when no group reaches, or too few to be worth a chunk: these go one by
            one, as when decoding.
    """

    groups: tuple[int, ...]
    tokens: int


@dataclass(frozen=True)
class BoardPlan:
    """Times in ms, bytes and limits of one model on one target.

    Attributes:
        basis: "published times" or "estimate"; nothing is measured here.
        prompt_tokens: of the prompt that the times are of.
        cached_tokens: what the cache held before it.
        prefill: how the prompt is computed.
        prefill_ms: until the first token of the answer, without vision.
        decode_ms: for each further token.
        vision_ms: for each tile, where a time is published for the encoder.
        generate: tokens of the answer, or None.
        next_question: tokens of a second question.
        next_turn_ms: until the first token of its answer; None where it does not fit the context.
        memory: what the model takes.
        available_bytes: NPU memory there is.
        max_prompt_tokens: what the prefill groups take; longer prompts end token by token.
        max_images: pictures of one tile each that fit a prompt of that length.
        max_context: tokens of prompt and answer together.
    """

    basis: str
    prompt_tokens: int
    cached_tokens: int
    prefill: PrefillSteps
    prefill_ms: float
    decode_ms: float
    vision_ms: float | None
    generate: int | None
    next_question: int
    next_turn_ms: float | None
    memory: MemoryPlan
    available_bytes: int
    max_prompt_tokens: int
    max_images: int
    max_context: int

    @property
    def total_ms(self) -> float | None:
        """Prompt and answer; the answer's first token comes with the prompt."""
        if self.generate is None:
            return None
        return self.prefill_ms + (self.generate - 1) * self.decode_ms

    def to_dict(self) -> dict[str, Any]:
        """Return what ``edgevl plan --json`` prints; times in ms, memory in bytes."""
        memory = {f"{part}_bytes": size for part, size in asdict(self.memory).items()}
        return {
            "basis": self.basis,
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": self.cached_tokens,
            "prefill_chunks": len(self.prefill.groups),
            "prefill_single_tokens": self.prefill.tokens,
            "prefill_ms": self.prefill_ms,
            "decode_ms_per_token": self.decode_ms,
            "decode_tokens_per_s": 1000 / self.decode_ms,
            "vision_ms_per_tile": self.vision_ms,
            "generate": self.generate,
            "total_ms": self.total_ms,
            "next_turn": {"prompt_tokens": self.next_question, "prefill_ms": self.next_turn_ms},
            "memory": {
                **memory,
                "npu_bytes": self.memory.npu,
                "available_bytes": self.available_bytes,
                "fits": self.memory.npu <= self.available_bytes,
            },
            "limits": {
                "max_prompt_tokens": self.max_prompt_tokens,
                "max_images": self.max_images,
                "max_context": self.max_context,
            },
        }


def make_plan(
    config: ModelConfig,
    target: Target,
    shape: BoardShape,
    *,
    template_tokens: int,
    prompt_tokens: int | None = None,
    cached_tokens: int = 0,
    generate: int | None = None,
    weight_bits: int = 4,
    vision: bool = True,
    memory_bytes: int | None = None,
) -> BoardPlan:
    """Plan a model on a target.

    Args:
        config: the model.
        target: the chip.
        shape: what the model is compiled for.
        template_tokens: what the chat template adds to a question without a system message.
        prompt_tokens: of the prompt, template and pictures included; default is the longest that
            the prefill groups take.
        cached_tokens: what the cache holds before the prompt: earlier turns.
        generate: tokens to answer with.
        weight_bits: of the layers' linear weights, 4 or 8.
        vision: whether the model has its vision encoder.
        memory_bytes: NPU memory of the board; default is the target's.

    Raises:
        BoardError: the shape is none that can be compiled, or the tokens exceed the context.
    """
    text = config.text
    check_shape(shape, text)
    groups = group_times_ms(text, shape, target=target.name, weight_bits=weight_bits)
    post = post_time_ms(text, target=target.name)
    layers = text.num_hidden_layers
    max_context = min(shape.context + 1, text.max_position_embeddings)
    max_prompt = min(shape.max_prefill + shape.chunk, max_context)
    if prompt_tokens is None:
        room = max_context - cached_tokens - (generate or 0)
        longest = max_prompt - cached_tokens
        prompt_tokens = max(1, min(longest if longest > 0 else NEXT_QUESTION, room))
    for name, value, least in (
        ("--prompt-tokens", prompt_tokens, 1),
        ("--cached-tokens", cached_tokens, 0),
        ("--generate", generate or 0, 0),
    ):
        if value < least:
            raise BoardError(f"{name} {value}: out of range; take {least} or more")
    if cached_tokens + prompt_tokens + (generate or 0) > max_context:
        raise BoardError(
            f"{cached_tokens} cached, {prompt_tokens} prompt and {generate or 0} generated tokens "
            f"exceed the context of {max_context}; ask for fewer, or for a larger --context"
        )

    def prefill_ms(steps: PrefillSteps) -> float:
        chunks = sum(groups[1 + group] for group in steps.groups)
        return layers * (chunks + steps.tokens * groups[0]) + post

    steps = prefill_steps(shape, prompt_tokens, cached_tokens)
    # The answer's last token never goes through the layers, so it is not in the cache.
    answered = cached_tokens + prompt_tokens + (generate or 1) - 1
    next_turn = (
        prefill_ms(prefill_steps(shape, NEXT_QUESTION, answered))
        if answered + NEXT_QUESTION <= max_context
        else None
    )
    picture = config.image_tokens + TOKENS_AROUND_PICTURE
    published = is_published(text, shape, target=target.name, weight_bits=weight_bits)
    return BoardPlan(
        basis="published times" if published else "estimate",
        prompt_tokens=prompt_tokens,
        cached_tokens=cached_tokens,
        prefill=steps,
        prefill_ms=prefill_ms(steps),
        decode_ms=layers * groups[0] + post,
        vision_ms=vision_time_ms(config.vision, target=target.name) if vision else None,
        generate=generate,
        next_question=NEXT_QUESTION,
        next_turn_ms=next_turn,
        memory=plan_memory(config, shape, weight_bits=weight_bits, vision=vision),
        available_bytes=target.memory_bytes if memory_bytes is None else memory_bytes,
        max_prompt_tokens=max_prompt,
        max_images=max(0, max_prompt - template_tokens) // picture if vision else 0,
        max_context=max_context,
    )


def prefill_steps(shape: BoardShape, tokens: int, cached: int = 0) -> PrefillSteps:
    """Cut a prompt into chunks as the engine does, each with the shortest history that suffices.

    Args:
        shape: what the model is compiled for.
        tokens: of the prompt.
        cached: what the cache holds already, of any length.
    """
    histories = shape.histories()
    groups = []
    while tokens and (group := prefill_group(histories, cached, tokens)) is not None:
        groups.append(group)
        done = min(tokens, shape.chunk)
        cached += done
        tokens -= done
    return PrefillSteps(tuple(groups), tokens)
