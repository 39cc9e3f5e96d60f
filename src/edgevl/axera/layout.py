"""The files of a compiled model and the shape groups in them, as Pulsar2 makes them.

A layer's file holds several *groups*, the same weights compiled for several shapes. With H hidden
size, W = num_key_value_heads * head_dim, P chunk and C cache length:

======  ============  =======  =======  ============  ====================  =========
group   K/V_cache     indices  input    mask          K/V_cache_out         output
======  ============  =======  =======  ============  ====================  =========
0       [1, C, W]     [1, 1]   [1,1,H]  [1, 1, C+1]   [1, 1, W]             [1, 1, H]
1       [1, 1, H]     [1, P]   [1,P,H]  [1, P, P]     [1, P, W]             [1, P, H]
g >= 2  [1, P(g-1),W] [1, P]   [1,P,H]  [1, P, P*g]   [1, P, W]             [1, P, H]
======  ============  =======  =======  ============  ====================  =========

Everything is bfloat16 but indices, which are 32-bit integers. A mask is 0 where attention is
allowed and `MASKED` elsewhere; its last columns are those of the new tokens. Group 1 has no history
and does not look at its caches: that they are of the hidden size is Pulsar2's choice.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgevl.errors import BoardError

if TYPE_CHECKING:
    from edgevl.checkpoint.config import TextConfig

#: What is added to the score of a position that is not attended to.
MASKED = -65536.0
#: Names of a layer's tensors, in the order in which Pulsar2 writes them.
LAYER_INPUTS = ("K_cache", "V_cache", "indices", "input", "mask")
LAYER_OUTPUTS = ("K_cache_out", "V_cache_out", "output")
#: How the files begin that only the emulator can run.
EMULATED_MAGIC = b"edgevl emulated axmodel\n"
#: What a model was compiled for, beside its layers.
BOARD_FILE = "board.json"
#: Stands in a directory that is no board's model yet.
NOT_BUILT = "NOT-BUILT-YET.txt"
#: The embedding [V, H] in the three forms that boards' programs read.
EMBEDDING_NPY = "model.embed_tokens.weight.npy"
EMBEDDING_F32 = "model.embed_tokens.weight.float32.bin"
EMBEDDING_BF16 = "model.embed_tokens.weight.bfloat16.bin"

#: Chunks that the compiler has shapes for are multiples of this many tokens, and at most so many.
CHUNK_STEP, MAX_CHUNK = 16, 1024
#: Most shape groups for prefill in one file.
MAX_PREFILL_GROUPS = 64

#: So many tokens, and one more for every so many positions of history, are computed one by one in
#: less time than a chunk, which takes as long whatever part of it is used (as published).
SINGLE_STEPS, HISTORY_A_STEP = 2, 384


@dataclass(frozen=True)
class BoardShape:
    """The shapes that a text model is compiled for.

    Attributes:
        context: positions of the key/value cache, C; with the token at hand one more is seen.
        chunk: positions that a prefill computes at once, P.
        max_prefill: longest history that a prefill may continue; a multiple of ``chunk``.
    """

    context: int = 2047
    chunk: int = 128
    max_prefill: int = 1024

    def histories(self) -> tuple[int, ...]:
        """Return the length of the history of each prefill group: 0, P, 2P … max_prefill."""
        return tuple(range(0, self.max_prefill + 1, self.chunk))


def check_shape(shape: BoardShape, text: TextConfig) -> None:
    """Refuse shapes that contradict one another or the model.

    Raises:
        BoardError: names the option, its value and the fix.
    """
    chunk, context, longest = shape.chunk, shape.context, shape.max_prefill
    if not 0 < chunk <= MAX_CHUNK or chunk % CHUNK_STEP:
        raise BoardError(
            f"--chunk {chunk}: must be a multiple of {CHUNK_STEP} up to {MAX_CHUNK}, such as 128"
        )
    limit = text.max_position_embeddings - 1
    if not chunk <= context <= limit:
        raise BoardError(
            f"--context {context}: must be from {chunk} (--chunk) to {limit}, one less than the "
            "positions that the model was trained for"
        )
    if longest < 0 or longest % chunk:
        raise BoardError(
            f"--max-prefill {longest}: must be a multiple of --chunk {chunk}, such as "
            f"{max(longest, 0) // chunk * chunk}"
        )
    if longest + chunk > context + 1:
        raise BoardError(
            f"--max-prefill {longest}: with one more chunk of {chunk} it exceeds --context "
            f"{context}; at most {(context + 1) // chunk * chunk - chunk} fits"
        )
    if len(shape.histories()) > MAX_PREFILL_GROUPS:
        raise BoardError(
            f"--max-prefill {longest}: takes {len(shape.histories())} shape groups of --chunk "
            f"{chunk}, at most {MAX_PREFILL_GROUPS} are built: use a larger --chunk"
        )


def group_shapes(text: TextConfig, tokens: int, history: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a layer's tensors, by name, in a group; see the table above."""
    hidden, width = text.hidden_size, text.num_key_value_heads * text.head_dim
    states, new = (1, tokens, hidden), (1, tokens, width)
    cache = (1, history, width) if history else (1, 1, hidden)
    return {
        "input": states,
        "output": states,
        "mask": (1, tokens, history + tokens),
        "indices": (1, tokens),
        "K_cache": cache,
        "V_cache": cache,
        "K_cache_out": new,
        "V_cache_out": new,
    }


def prefill_group(histories: Sequence[int], cached: int, tokens: int) -> int | None:
    """Choose the prefill group that the next chunk of a prompt goes through.

    Args:
        histories: positions of the cache that each group reads, the fewest first.
        cached: positions that the cache holds.
        tokens: that are left to compute.

    Returns:
        The number of the one that reads the least and yet all of the cache. None where none does,
        or where a chunk with so few tokens takes longer than these one by one.
    """
    group = bisect_left(histories, cached)
    if group == len(histories) or tokens <= SINGLE_STEPS + histories[group] // HISTORY_A_STEP:
        return None
    return group


def layer_file(prefix: str, chunk: int, layer: int) -> str:
    """Return the name of a layer's file; ``prefix`` is the text model's type, such as qwen3."""
    return f"{prefix}_p{chunk}_l{layer}_together.axmodel"


def post_file(prefix: str) -> str:
    """Return the name of the file with the final norm and the head."""
    return f"{prefix}_post.axmodel"


def vision_file(image_size: int) -> str:
    """Return the name of the vision encoder's file."""
    return f"internvl_vit_model_1x3x{image_size}x{image_size}.axmodel"
