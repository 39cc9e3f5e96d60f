"""The tiny tokenizer: byte-level BPE like Qwen's, with InternVL's special tokens."""

import random
import re

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, trainers
from tokenizers import pre_tokenizers as pre

from pictures import DRAWERS
from prompts import SYSTEM_MESSAGES
from questions import picture_turns, several_turn, small_talk
from scenes import Style

VOCABULARY = 1024
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
NOT_SPECIAL = ("<think>", "</think>")
IMAGE = (
    "<img>",
    "</img>",
    "<IMG_CONTEXT>",
    "<quad>",
    "</quad>",
    "<ref>",
    "</ref>",
    "<box>",
    "</box>",
)
END_OF_TURN = "<|im_end|>"

# Qwen2's: contractions, words with one leading mark, single digits, punctuation, blanks.
_PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _corpus(seed: int = 0) -> list[str]:
    """Questions and answers of the generator; words in pictures are left to single letters."""
    rng = random.Random(seed)
    texts = list(SYSTEM_MESSAGES) * 200
    for _ in range(20_000):
        kind = rng.choice(("display", "label", "handwriting", "word", "shapes", "shapes"))
        scene = DRAWERS[kind](rng, Style(0.0), size=(96, 96))
        for turn in picture_turns(rng, scene):
            texts.append(turn.question)
            if kind != "word":
                texts.append(turn.answer)
        turn = small_talk(rng)
        texts += [turn.question, turn.answer]
        texts.append(several_turn(rng, [scene, scene], rng.choice(("en", "zh"))).question)
    texts += ["user\n", "assistant\n", "system\n"] * 1000
    # Chinese characters apart: a token for each, none for whole phrases of the generator.
    return [piece for text in texts for piece in re.split("([\u4e00-\u9fff])", text) if piece]


def build() -> Tokenizer:
    """Trains the tokenizer, every byte in it, so that any text can be encoded."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre.Sequence(
        [
            pre.Split(Regex(_PIECES), "isolated"),
            pre.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    added = len(SPECIAL) + len(NOT_SPECIAL) + len(IMAGE)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - added,
        min_frequency=20,
        initial_alphabet=pre.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in NOT_SPECIAL])
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in IMAGE])
    return tokenizer


def tokenizer_config(tokenizer: Tokenizer) -> dict:
    """`tokenizer_config.json`, as Qwen's has it."""
    decoder = {
        str(token_id): {
            "content": token.content,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": token.special,
        }
        for token_id, token in sorted(tokenizer.get_added_tokens_decoder().items())
    }
    return {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": decoder,
        "additional_special_tokens": list(IMAGE),
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": END_OF_TURN,
        "errors": "replace",
        "model_max_length": 2048,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
