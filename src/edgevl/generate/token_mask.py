"""Which tokens may come next in an answer that must be of a given form."""

from __future__ import annotations

import json
import re
import threading
from collections import deque
from collections.abc import Collection
from itertools import islice
from typing import Any
from unicodedata import is_normalized

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from edgevl.errors import EdgeVLError, PromptError, SchemaError
from edgevl.generate.constraint import Constraint, import_llguidance, limits, reason
from edgevl.generate.foresight import JsonForesight

#: Most digits of a number's integer part, as of a 64-bit integer, and of its fraction; and of its
#: exponent, so that every number is finite. A model without an idea of what comes next repeats a
#: digit until it is out of tokens, and schemas seldom say how long numbers may be.
MAX_DIGITS, MAX_EXPONENT_DIGITS = 19, 2
#: Regular expressions of a schema that are tried before it is taken, with so many tokens each.
_MAX_PATTERNS, _TRIED_TOKENS = 16, 64
#: Regular expressions that are remembered not to be tried again.
_MAX_TRIED = 256
#: Tokens before a foreseen text that may decide what tokens it comes in.
_CONTEXT = 4
#: What a token of a foreseen text's end would go on with what comes next: a part of a word, or the
#: blank before one. After a colon there may be a number, whose blank is a token.
_OPEN_END = re.compile(rb"([\w\x80-\xff]+|(?<!:) )\Z")


class _Digits:
    """Counts the digits with which a JSON text ends, outside of its strings."""

    def __init__(self) -> None:
        self._count = 0
        self._in_string = self._escaped = self._in_exponent = False

    @property
    def enough(self) -> bool:
        return self._count >= (MAX_EXPONENT_DIGITS if self._in_exponent else MAX_DIGITS)

    def add(self, text: bytes) -> None:
        for byte in text:
            if self._in_string:
                self._in_string = self._escaped or byte != ord('"')
                self._escaped = byte == ord("\\") and not self._escaped
            elif byte in b"0123456789":
                self._count += 1
            else:
                self._count = 0
                self._in_string = byte == ord('"')
                if byte not in b"+-":
                    self._in_exponent = byte in b"eE"


class TokenMask:
    """Follows one answer and masks the logits of tokens that its constraint does not allow.

    Args:
        matcher: an ``llguidance.LLMatcher``.
        vocabulary: its ``llguidance.LLTokenizer``.
        digits: where the answer has JSON, a bit for each token, set if it begins with a digit.
        foresight: where the answer is JSON of a schema, with white space as it likes.
    """

    def __init__(
        self,
        matcher: Any,
        vocabulary: Any,
        digits: NDArray[np.uint8] | None,
        foresight: JsonForesight | None = None,
    ) -> None:
        self._matcher = matcher
        self._vocabulary = vocabulary
        self._begin_with_digit = digits
        self._digits = _Digits()
        self._foresight = foresight
        self._latest: deque[int] = deque(maxlen=_CONTEXT)

    @property
    def complete(self) -> bool:
        """Whether the answer is what it must be, and nothing can follow but its end."""
        return bool(self._matcher.is_stopped()) and not self._matcher.is_error()

    def apply(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return a copy of logits float32 [V] that is -inf where a token may not come next.

        Ids that end a turn are allowed once the answer is what it must be.

        Raises:
            PromptError: no text can meet the constraint, or it is too complex to follow.
            EdgeVLError: the engine gives the logits of a few tokens only, and none of them is
                allowed.
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        masked = np.full_like(logits, -np.inf)
        if self._begin_with_digit is not None and self._digits.enough:
            _copy(logits, masked, bits & ~self._begin_with_digit)
        if masked.max() == -np.inf:  # a schema may want more digits
            _copy(logits, masked, bits)
        if masked.max() == -np.inf:
            raise EdgeVLError(
                "constraint: the engine gives only the likeliest tokens, and none of them is "
                "allowed here: ask for this form in the question, or compile without --post-topk"
            )
        return masked

    def accept(self, token_id: int) -> None:
        """Go on after a token that `apply` allowed.

        Raises:
            PromptError: the constraint is too complex to follow.
        """
        self._matcher.consume_token(token_id)
        self._check()
        if self._begin_with_digit is not None:
            text = self._vocabulary.decode_bytes([token_id])
            self._digits.add(text)
            if self._foresight is not None:
                self._foresight.add(text)
                self._latest.append(token_id)

    def allowed(self, token_ids: list[int]) -> int:
        """Return how many of these tokens, from the first on, may come next."""
        return int(self._matcher.validate_tokens(token_ids))

    def foreseen(self) -> list[int]:
        """Return the tokens that come next where the constraint leaves no choice, or likely do.

        No other is allowed then, or, where white space is free, the answer would have to be laid
        out otherwise than before.
        """
        if self._foresight is None:
            forced: list[int] = self._matcher.compute_ff_tokens()
            return forced
        text = _OPEN_END.sub(b"", self._foresight.text())
        if not text:
            return []
        before = list(self._latest)
        tokens, rest = self._vocabulary.tokenize_partial(text, recent_tokens=before)
        return [*tokens, *self._vocabulary.tokenize_bytes(rest)]

    def _check(self) -> None:
        if not self._matcher.is_error():
            return
        why = reason(self._matcher.get_error())
        if why.startswith("NoExtension"):
            raise PromptError("constraint: no text can meet it (a $ref to itself?): correct it")
        raise PromptError(f"constraint: {why}; simplify it")


def _copy(
    logits: NDArray[np.float32], masked: NDArray[np.float32], bits: NDArray[np.uint8]
) -> None:
    """Copy the logits of the tokens whose bits are set."""
    allowed = np.unpackbits(bits, bitorder="little").astype(bool)[: len(logits)]
    np.copyto(masked[: len(allowed)], logits[: len(allowed)], where=allowed)


class TokenMasks:
    """Starts the masks of one model's answers. Threads may share it; masks are one answer's."""

    def __init__(self, tokenizer: Tokenizer, stop_ids: Collection[int]) -> None:
        self._tokenizer = tokenizer
        self._stop_ids = stop_ids
        self._lock = threading.Lock()
        self._vocabulary: Any = None
        self._digits: NDArray[np.uint8] | None = None
        self._tried: set[str] = set()  # regular expressions that are not too complex
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
        matcher = self._matcher(self._fitted(constraint.grammar))
        if matcher.is_error():
            raise PromptError(f"constraint: {reason(matcher.get_error())}; correct it")
        with_json = '"json_schema":' in constraint.grammar
        foresight = None
        if constraint.dense:
            dense = self._matcher(self._fitted(constraint.dense))
            foresight = JsonForesight(dense, self._vocabulary)
        return TokenMask(matcher, self._vocabulary, self._digits if with_json else None, foresight)

    def check(self, constraint: Constraint) -> None:
        """Check what can be without a prompt; more may be found as the answer goes on.

        Whether a regular expression is too complex depends on the text: some is made up.

        Raises:
            PromptError: the constraint's grammar is malformed, or a part of it too complex.
            EdgeVLError: ``llguidance`` is not installed, or cannot read the tokenizer.
        """
        self.start(constraint)
        distinct = {grammar: where for where, grammar in reversed(constraint.patterns)}
        for grammar, where in islice(reversed(distinct.items()), _MAX_PATTERNS):
            if grammar in self._tried:
                continue
            matcher, random = self._matcher(grammar), np.random.default_rng(0)
            for _ in range(_TRIED_TOKENS):
                bits = np.frombuffer(matcher.compute_bitmask(), np.uint8)
                if matcher.is_stopped():  # also by an error
                    break
                allowed = np.flatnonzero(np.unpackbits(bits, bitorder="little"))
                matcher.consume_token(int(random.choice(allowed)))
            if matcher.is_error():
                why = reason(matcher.get_error())
                raise SchemaError(f"{where}: {why}; simplify it", where)
            if len(self._tried) < _MAX_TRIED:
                self._tried.add(grammar)

    def _matcher(self, grammar: str) -> Any:
        guidance = import_llguidance()

        def matcher(grammar: str) -> Any:
            return guidance.LLMatcher(self._vocabulary, grammar, log_level=0, limits=limits())

        with self._lock:
            if self._vocabulary is None:
                self._vocabulary = self._read(guidance.LLTokenizer)
                digits = matcher(guidance.LLMatcher.grammar_from_regex(r"[0-9](?s:.*)"))
                self._digits = np.frombuffer(digits.compute_bitmask(), np.uint8)
        return matcher(grammar)

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
