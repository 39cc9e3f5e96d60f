"""Log-probabilities of tokens, as OpenAI's two endpoints give them."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer, decoders

from edgevl.generate.sampling import TokenLogprobs
from edgevl.generate.text import hidden_ids
from edgevl.serve.responses import ChatLogprobs, CompletionLogprobs, TokenLogprob, TopLogprob

#: In place of minus infinity, which JSON lacks.
LEAST = -9999.0


class TokenTexts:
    """Says what tokens are, one at a time: text and bytes."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Take a tokenizer."""
        self._tokenizer = tokenizer
        self._added = tokenizer.get_added_tokens_decoder()
        self._hidden = hidden_ids(tokenizer)
        byte_level = isinstance(tokenizer.decoder, decoders.ByteLevel)
        self._byte_of = _byte_of_character() if byte_level else {}

    def text(self, token_id: int) -> str:
        """Return the text of a token; parts of characters show as U+FFFD."""
        text: str = self._tokenizer.decode([token_id], skip_special_tokens=False)
        return text

    def bytes(self, token_id: int) -> bytes:
        """Return the bytes of a token; those of several together may be one character."""
        token = self._tokenizer.id_to_token(token_id)
        if token_id not in self._added and token and all(map(self._byte_of.__contains__, token)):
            return bytes(map(self._byte_of.__getitem__, token))
        return self.text(token_id).encode()

    def characters(self, token_id: int) -> int:
        """Return how many characters of the answer begin in a token."""
        if token_id in self._hidden:
            return 0
        data = self.bytes(token_id)
        return len(data) - _continues(data)

    def chat(self, tokens: Sequence[TokenLogprobs]) -> ChatLogprobs:
        """Return the log-probabilities of an answer's tokens for chat completions."""
        return ChatLogprobs(
            content=[
                TokenLogprob(
                    **self._top(token.token_id, token.logprob).model_dump(),
                    top_logprobs=[self._top(*top) for top in token.top],
                )
                for token in tokens
            ]
        )

    def completion(self, tokens: Sequence[TokenLogprobs], offset: int) -> CompletionLogprobs:
        """Return the same for completions.

        Args:
            tokens: of a piece of the answer.
            offset: characters of the answer that begin before it.
        """
        offsets = []
        for token in tokens:
            # A token in the middle of a character is where that begins.
            offsets.append(max(offset - _continues(self.bytes(token.token_id)[:1]), 0))
            offset += self.characters(token.token_id)
        return CompletionLogprobs(
            tokens=[self.text(token.token_id) for token in tokens],
            token_logprobs=[max(token.logprob, LEAST) for token in tokens],
            top_logprobs=[
                {self.text(token_id): max(logprob, LEAST) for token_id, logprob in token.top}
                for token in tokens
            ],
            text_offset=offsets,
        )

    def _top(self, token_id: int, logprob: float) -> TopLogprob:
        return TopLogprob(
            token=self.text(token_id),
            logprob=max(logprob, LEAST),
            bytes=list(self.bytes(token_id)),
        )


def _continues(data: bytes) -> int:
    """Return how many bytes go on with a character of UTF-8 that began before."""
    return sum(byte & 0xC0 == 0x80 for byte in data)


def _byte_of_character() -> dict[str, int]:
    """Return the bytes that GPT-2's byte-level alphabet writes as characters.

    As ``bytes_to_unicode`` in its code: printable Latin-1 stands for itself, and the rest, in
    order, for the characters from 256 on.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + number): byte for number, byte in enumerate(others)
    }
