"""Requests of one length for servers: random words, the same for every server, no two alike."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np

#: Side of the pictures: one tile.
PICTURE_SIZE = 448


class Workload:
    """Makes requests whose prompts have a given number of tokens.

    The words are tokens of their own in the checkpoint's tokenizer, so that as many words are as
    many tokens, in whatever program has that tokenizer. Requests have the text and not the tokens:
    not every server takes those.
    """

    def __init__(
        self, tokenizer: Path, prompt_tokens: int, shared_tokens: int, output_tokens: int
    ) -> None:
        """Find the words.

        Args:
            tokenizer: tokenizer.json of the checkpoint.
            prompt_tokens: of each prompt.
            shared_tokens: as many of them, from the first on, are the same in all prompts, as a
                system message would be.
            output_tokens: of each answer.
        """
        from tokenizers import Tokenizer

        loaded = Tokenizer.from_file(str(tokenizer))
        # "Ġ" stands for a space where tokens are byte-level, "▁" where they are SentencePiece's.
        words = sorted(
            " " + token[1:]
            for token in loaded.get_vocab()
            if token[0] in "Ġ▁" and token[1:].isascii() and token[1:].isalpha()
        )
        encoded = loaded.encode_batch(words, add_special_tokens=False)
        self._words = [
            word for word, tokens in zip(words, encoded, strict=True) if len(tokens.ids) == 1
        ]
        self._prompt_tokens = prompt_tokens
        self._output_tokens = output_tokens
        self._shared = self._draw(np.random.default_rng(0), shared_tokens)

    def _draw(self, random: np.random.Generator, count: int) -> str:
        chosen = random.integers(len(self._words), size=count)
        return "".join(self._words[number] for number in chosen)

    def bodies(
        self, model: str, count: int, seed: list[int], temperature: float
    ) -> list[dict[str, Any]]:
        """Return requests for ``/v1/completions``: the prompts of a seed are always the same.

        Args:
            model: name by which the server knows its model.
            count: of requests.
            seed: numbers that no other call has.
            temperature: 0 takes the likeliest token.
        """
        random = np.random.default_rng([1, *seed])
        own_tokens = self._prompt_tokens - len(self._shared.split())
        return [
            {
                "model": model,
                "prompt": self._shared + self._draw(random, own_tokens),
                "max_tokens": self._output_tokens,
                "temperature": temperature,
                "seed": number,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
            for number in range(count)
        ]

    def with_picture(self, body: dict[str, Any], seed: list[int]) -> dict[str, Any]:
        """Return a request for ``/v1/chat/completions``: a picture of one tile, then the prompt."""
        chat = {key: value for key, value in body.items() if key != "prompt"}
        parts = [
            {"type": "image_url", "image_url": {"url": picture_url([*seed, body["seed"]])}},
            {"type": "text", "text": body["prompt"]},
        ]
        return {**chat, "messages": [{"role": "user", "content": parts}]}


def picture_url(seed: list[int]) -> str:
    """Return a PNG picture of large random patches, 448 by 448, as a ``data:`` URL."""
    from PIL import Image

    random = np.random.default_rng(seed)
    patches = Image.fromarray(random.integers(256, size=(7, 7, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    patches.resize((PICTURE_SIZE, PICTURE_SIZE), Image.Resampling.NEAREST).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
