"""Which tokens may come next in an answer that must be of a given form."""

from __future__ import annotations

import json
import threading
from collections.abc import Collection
from typing import Any
from unicodedata import is_normalized

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from edgevl.errors import EdgeVLError, PromptError
from edgevl.generate.constraint import Constraint, import_llguidance, limits, reason


class TokenMask:
    """Follows one answer and masks the logits of tokens that its constraint does not allow."""

    def __init__(self, matcher: Any) -> None:
        """Start before the first token; ``matcher`` is an ``llguidance.LLMatcher``."""
        self._matcher = matcher

    @property
    def complete(self) -> bool:
        """Whether the answer is what it must be, and nothing can follow but its end."""
        return bool(self._matcher.is_stopped()) and not self._matcher.is_error()

    def apply(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return a copy of logits float32 [V] that is -inf where a token may not come next.

        Ids that end a turn are allowed once the answer is what it must be.

        Raises:
            EdgeVLError: no text can meet the constraint, it is too complex to follow, or the
                engine gives the logits of a few tokens only, and none of them is allowed.
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        allowed = np.unpackbits(bits, bitorder="little", count=8 * len(bits)).astype(bool)
        allowed = allowed[: len(logits)]
        masked = np.full_like(logits, -np.inf)
        np.copyto(masked[: len(allowed)], logits[: len(allowed)], where=allowed)
        if masked.max() == -np.inf:
            raise EdgeVLError(
                "constraint: the engine gives only the likeliest tokens, and none of them is "
                "allowed here: ask for this form in the question, or compile without --post-topk"
            )
        return masked

    def accept(self, token_id: int) -> None:
        """Go on after a token that `apply` allowed.

        Raises:
            EdgeVLError: the constraint is too complex to follow.
        """
        self._matcher.consume_token(token_id)
        self._check()

    def _check(self) -> None:
        if not self._matcher.is_error():
            return
        why = reason(self._matcher.get_error())
        if why.startswith("NoExtension"):
            raise EdgeVLError("constraint: no text can meet it (a $ref to itself?): correct it")
        raise EdgeVLError(f"constraint: {why}; simplify it")


class TokenMasks:
    """Starts the masks of one model's answers. Threads may share it; masks are one answer's."""

    def __init__(self, tokenizer: Tokenizer, stop_ids: Collection[int]) -> None:
        """Take a tokenizer and the ids that end a turn; nothing is computed yet."""
        self._tokenizer = tokenizer
        self._stop_ids = stop_ids
        self._lock = threading.Lock()
        self._vocabulary: Any = None
        added = tokenizer.get_added_tokens_decoder().items()
        self._literals = {f"start: {json.dumps(t.content)}": token_id for token_id, t in added}
        self._added = [t.content for _, t in added if len(t.content.strip()) > 1]

    def start(self, constraint: Constraint) -> TokenMask:
        """Return the mask of a new answer.

        The first one takes longer: the vocabulary is read into ``llguidance``.

        Raises:
            PromptError: the constraint's grammar is malformed.
            EdgeVLError: ``llguidance`` is not installed, or cannot read the tokenizer.
        """
        guidance = import_llguidance()
        with self._lock:
            if self._vocabulary is None:
                self._vocabulary = self._read(guidance.LLTokenizer)
        grammar = self._fitted(constraint.grammar)
        matcher = guidance.LLMatcher(self._vocabulary, grammar, log_level=0, limits=limits())
        if matcher.is_error():
            raise PromptError(f"constraint: {reason(matcher.get_error())}; correct it")
        return TokenMask(matcher)

    def _fitted(self, grammar: str) -> str:
        """Return the grammar with the tokenizer's own tokens in the places of their texts.

        ``llguidance`` encodes text that it can foresee. Where that is the text of an added token,
        or is changed by normalisation, it then refuses the tokens that it allowed. So a part that
        is nothing but such a text becomes the token; where else there is one, nothing is foreseen.
        """
        try:
            parts = json.loads(grammar)["grammars"]
        except ValueError:
            return grammar  # malformed, which is found next
        for part in parts:
            token_id = self._literals.get(part.get("lark_grammar"))
            if token_id is not None:
                part["lark_grammar"] = f"start: <[{token_id}]>"
        text = json.dumps(parts, ensure_ascii=False).replace("\\", "")  # of regular expressions
        if any(token in text for token in self._added) or not is_normalized("NFC", text):
            name = parts[0].setdefault("name", "answer")
            options = json.dumps({"no_forcing": True})
            lark = f"%llguidance {options}\nstart: @{name}"
            parts.insert(0, {"name": "unforeseen", "lark_grammar": lark})
        return json.dumps({"grammars": parts})

    def _read(self, read: Any) -> Any:
        known = [i for i in sorted(self._stop_ids) if self._tokenizer.id_to_token(i) is not None]
        if not known:
            raise EdgeVLError("constraint: the tokenizer has no token that ends a turn")
        try:
            return read(self._tokenizer.to_str(), eos_token=known)
        except ValueError as error:
            raise EdgeVLError(
                f"constraint: llguidance cannot read this model's tokenizer ({reason(str(error))})"
            ) from None
