"""Tensors on disk that the model of ``config.json`` does not have.

Run without them, a checkpoint of another kind would answer as a model that nobody trained.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from edgevl.checkpoint.config import FLASH_REFUSED
from edgevl.checkpoint.safetensors import FLOAT_TYPES, Weights
from edgevl.errors import CheckpointError
from edgevl.json_input import shown

_MERGE = (
    "a LoRA adapter, which is not applied here: merge it into the model (merge_and_unload of "
    "peft), save that and give its directory"
)
#: Tensors of kinds whose other weights may be those of an InternVL, and what is to be said of them.
_OTHER_KINDS = (
    (re.compile(r"(model\.)?(mlp2|gating|pooling_before_gating)\."), FLASH_REFUSED),
    (re.compile(r".*(\.lora_|\.base_layer\.)"), _MERGE),
)
#: Buffers that old versions of libraries stored, a token for training only, heads for rewards.
_HARMLESS = re.compile(
    r".*\.(rotary_emb\.(inv_freq|cos_cached|sin_cached)|position_ids|masked_bias|mask_token"
    r"|num_batches_tracked)|v_head\..*"
)


def refuse_other_kinds(weights: Weights) -> None:
    """Refuse models that are known and not supported, by their tensors.

    Raises:
        CheckpointError: names the tensor, the kind, and the fix.
    """
    adapter = weights.directory / "adapter_model.safetensors"
    if adapter.exists() and adapter not in weights.paths:
        raise CheckpointError(f"{adapter}: {_MERGE}; or remove it, where that has been done")
    for kind, reason in _OTHER_KINDS:
        name = next(filter(kind.match, weights), None)
        if name is not None:
            raise CheckpointError(f"{weights.path(name)}: has {shown(name, 150)}: {reason}")


def refuse_surplus(weights: Weights, known: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse tensors that the model does not have, unless they change nothing that it computes.

    Args:
        weights: all tensors on disk.
        known: shapes of the model's tensors, by what these are called on disk.

    Raises:
        CheckpointError: names the first of them.
    """
    packed = ("qweight", "qzeros", "scales", "g_idx")
    linears = [name for name, shape in known.items() if len(shape) == 2]
    bases = {name.removesuffix("weight") for name in linears}
    expected = {*known, *(base + part for base in bases for part in packed)}
    surplus = [
        name
        for name in weights
        if name not in expected
        and not _HARMLESS.fullmatch(name)
        # Tools for GPTQ give every layer a bias.
        and not (name.removesuffix("bias") in bases and _is_zero(weights, name))
    ]
    if surplus:
        more = f" and {len(surplus) - 1} more tensors" if len(surplus) > 1 else ""
        raise CheckpointError(
            f"{weights.path(surplus[0])}: has {shown(surplus[0], 150)}{more}, which the model that "
            "config.json describes does not have; without them it would answer as another model: "
            "get the config.json that belongs to the weights, or a model of a kind that is "
            "supported"
        )


def _is_zero(weights: Weights, name: str) -> bool:
    return weights.dtype(name) in FLOAT_TYPES and not weights[name].to_float32().any()
