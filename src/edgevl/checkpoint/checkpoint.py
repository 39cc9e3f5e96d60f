"""A checkpoint on disk: configuration and tensors, one face over all layouts."""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgevl.checkpoint.architecture import (
    EMBEDDING,
    LM_HEAD,
    TEXT,
    StoredNames,
    expected_tensors,
)
from edgevl.checkpoint.config import FLASH_REFUSED, GPTQConfig, ModelConfig
from edgevl.checkpoint.directory import ModelDirectory, is_directory, read_config
from edgevl.checkpoint.gptq import PARTS, GPTQWeight, packed_shapes, stored_config
from edgevl.checkpoint.safetensors import FLOAT_TYPES, FilePlace, StoredTensor, Weights
from edgevl.errors import CheckpointError
from edgevl.json_input import shown

#: Blocks of a weight file that its fingerprint takes, and their size in bytes.
SAMPLES = 16
SAMPLE_BYTES = 4096

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


class Checkpoint(ModelDirectory):
    """An opened checkpoint directory; every tensor has been found and has the right shape.

    Nothing in it is executed, and tensor data is read only when asked for, by memory map. Reading
    is safe from several threads. Use it as a context manager, or call ``close``.

    Attributes:
        path: the directory.
        layout: "internvl_chat", "internvl" (HF), or "gptq_text" for a quantized text model alone.
        config: what it says about itself.
        has_vision: False where the vision encoder is not there ("gptq_text").
    """

    def __init__(
        self, path: Path, layout: str, config: ModelConfig, weights: Weights, names: StoredNames
    ) -> None:
        super().__init__(path, config, names.has_vision)
        self.layout = layout
        self._weights = weights
        self._stored_names = names
        self._shapes = expected_tensors(config, vision=self.has_vision)
        #: What the names of a quantized weight's tensors begin with, and how they are stored.
        self._packed: dict[str, tuple[str, GPTQConfig]] = {}
        for name, shape in self._shapes.items():
            self._check(name, shape)
        self._refuse_surplus()

    @classmethod
    def open(cls, path: str | Path) -> Checkpoint:
        """Open a directory and check everything but the values of tensors.

        Raises:
            CheckpointError: the directory is not a checkpoint that is supported, whole and
                well-formed; the message names the file, what is wrong, and the fix.
        """
        path = Path(path)
        if not is_directory(path):
            raise CheckpointError(
                f"{path}: not a directory; give the one that holds config.json and "
                "model.safetensors"
            )
        if not (path / "config.json").exists():
            raise CheckpointError(
                f"{path / 'config.json'}: there is no such file; is this a checkpoint?"
            )
        weights = Weights(path)
        try:
            _refuse_other_kinds(weights)
            names = StoredNames(weights)
            layout, config = read_config(path, names.has_vision)
            if names.has_head:
                config = replace(config, text=replace(config.text, tie_word_embeddings=False))
            if not names.has_vision:
                if not config.quantization:
                    raise CheckpointError(
                        f"{path}: the weights have no vision encoder; get the whole checkpoint"
                    )
                layout = "gptq_text"
            elif layout == "gptq_text":
                layout = "internvl" if names.hf_vision else "internvl_chat"
            return cls(path, layout, config, weights, names)
        except CheckpointError:
            weights.close()
            raise

    def close(self) -> None:
        """Close the files. Arrays got from here before stay valid."""
        self._weights.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Checkpoint({str(self.path)!r}, layout={self.layout!r})"

    @property
    def stored_bytes(self) -> int:
        """Size of the weight files together."""
        return sum(path.stat().st_size for path in self._weights.paths)

    def fingerprint(self) -> str:
        """Return 64 hexadecimal digits that change when the configuration or the weights do.

        Of the weight files it takes size, time of change, the header, and `SAMPLES` blocks of
        data: reading all of a large model would take longer than loading it.
        """
        digest = hashlib.sha256(repr(self.config).encode())
        for path in self._weights.paths:
            with path.open("rb") as file:
                stat = os.fstat(file.fileno())
                digest.update(f"{path.name} {stat.st_size} {stat.st_mtime_ns}".encode())
                header_size = int.from_bytes(file.read(8), "little")
                digest.update(file.read(min(header_size, stat.st_size)))
                for sample in range(SAMPLES):
                    file.seek(stat.st_size * sample // SAMPLES)
                    digest.update(file.read(SAMPLE_BYTES))
        return digest.hexdigest()

    def release(self) -> None:
        """Give back the memory of tensors that have been read; they stay valid."""
        self._weights.release()

    def names(self) -> list[str]:
        """Return the canonical names of all tensors of the model."""
        return list(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor by canonical name.

        Raises:
            CheckpointError: there is no such tensor.
        """
        self._require(name)
        return self._shapes[name]

    def tensor(self, name: str, rows: Any = None) -> NDArray[np.float32]:
        """Return a tensor as float32, C-contiguous: converted, dequantized, q/k/v fused.

        It may be a read-only view of the file, where that stores just this.

        Args:
            name: canonical name.
            rows: a slice or an integer array to take of the first dimension, such as the token
                ids of an embedding.

        Raises:
            CheckpointError: there is no such tensor, or its quantization is damaged.
        """
        packed = self.gptq(name)
        if packed is None:
            return self.stored(name).to_float32(rows)
        try:
            weight = packed.dequantize()
        except CheckpointError as error:
            raise CheckpointError(f"{self.path}: tensor {name!r}: {error}") from None
        return weight if rows is None else np.ascontiguousarray(weight[rows])

    def stored(self, name: str) -> StoredTensor:
        """Return a tensor as it is on disk, without a copy (q, k and v stored apart are joined).

        Raises:
            CheckpointError: there is no such tensor, or it is quantized (see ``gptq``).
        """
        parts = list(self.parts(name).values())
        if len(parts) == 1:
            return parts[0]
        if len({part.dtype for part in parts}) == 1:
            return StoredTensor(parts[0].dtype, np.concatenate([part.data for part in parts]))
        return StoredTensor("F32", np.concatenate([part.to_float32() for part in parts]))

    def parts(self, name: str) -> dict[str, StoredTensor]:
        """Return what a tensor is made of on disk, by stored name, without a copy.

        That is one tensor, or the three of q, k and v where they are stored apart.

        Raises:
            CheckpointError: there is no such tensor, or it is quantized (see ``gptq``).
        """
        self._require(name)
        names = self._stored_names(name)
        if names[0] not in self._weights:
            raise CheckpointError(f"{self.path}: tensor {name!r} is stored quantized (GPTQ)")
        return {part: self._weights[part] for part in names}

    def place(self, name: str) -> FilePlace | None:
        """Return where a tensor lies, or None if it is stored quantized or in several parts.

        Raises:
            CheckpointError: there is no such tensor.
        """
        self._require(name)
        names = self._stored_names(name)
        if len(names) > 1 or name in self._packed:
            return None
        return self._weights.place(names[0])

    def gptq(self, name: str) -> GPTQWeight | None:
        """Return the packed form of a weight, or None if it is not quantized.

        Raises:
            CheckpointError: there is no such tensor.
        """
        self._require(name)
        if name not in self._packed:
            return None
        base, config = self._packed[name]
        qweight, qzeros, scales = (self._weights[base + part] for part in PARTS[:3])
        return GPTQWeight(qweight, qzeros, scales, self._weights.get(base + "g_idx"), config)

    def _require(self, name: str) -> None:
        """Raise unless ``name`` is a tensor of this model."""
        if name in self._shapes:
            return
        if not self.has_vision and not name.startswith((TEXT, LM_HEAD)):
            raise CheckpointError(
                f"{self.path}: no vision encoder here, this checkpoint answers text only; for "
                "pictures use the original checkpoint"
            )
        raise CheckpointError(f"{self.path}: the model has no tensor {name!r}")

    def _check(self, name: str, shape: tuple[int, ...]) -> None:
        """Raise unless a tensor is there with its shape and a type that can be converted."""
        parts = self._stored_names(name)
        base = parts[0].removesuffix("weight")
        # A plain weight beside is what a tool left dequantized; the packed one is the model.
        if base + "qweight" in self._weights:
            self._check_packed(name, base, shape)
            return
        for part in parts:
            self._check_stored(part, FLOAT_TYPES, (shape[0] // len(parts), *shape[1:]))

    def _check_packed(self, name: str, base: str, shape: tuple[int, ...]) -> None:
        """Find out how a GPTQ weight is stored, and raise unless it is there and well-formed."""
        tensors = {part: FLOAT_TYPES if part == "scales" else ("I32",) for part in PARTS}
        if base + "g_idx" not in self._weights:
            del tensors["g_idx"]
        for part, types in tensors.items():
            self._check_stored(base + part, types)
        try:
            if name == EMBEDDING or len(self._stored_names(name)) > 1 or len(shape) != 2:
                raise CheckpointError("is quantized, which is supported of linear layers only")
            config = stored_config(
                shape[1],
                self._weights[base + "qweight"].shape[0],
                self._weights[base + "scales"].shape[0],
                self.config.quantization,
                "g_idx" in tensors,
            )
            shapes = packed_shapes(shape[0], shape[1], config)
        except (CheckpointError, IndexError) as error:
            raise CheckpointError(f"{self.path}: tensor {name!r} {error}") from None
        for part, types in tensors.items():
            self._check_stored(base + part, types, shapes[part])
        self._packed[name] = base, config

    def _check_stored(
        self, name: str, types: tuple[str, ...], shape: tuple[int, ...] | None = None
    ) -> None:
        """Raise unless a tensor on disk has one of some types, and a shape if one is given."""
        weights = self._weights
        if name not in weights:
            file = weights.paths[0] if len(weights.paths) == 1 else self.path
            of_shape = f" of shape {list(shape)}" if shape else ""
            raise CheckpointError(
                f"{file}: tensor {name!r}{of_shape} is missing; config.json and the weights do "
                "not belong together, or the download is incomplete"
            )
        tensor, where = weights[name], f"{weights.path(name)}: tensor {name!r}"
        if shape is not None and tensor.shape != shape:
            raise CheckpointError(
                f"{where} has shape {list(tensor.shape)}, config.json says {list(shape)}"
            )
        if tensor.dtype not in types:
            raise CheckpointError(f"{where} has type {tensor.dtype}; supported: {', '.join(types)}")

    def _refuse_surplus(self) -> None:
        """Refuse tensors that the model does not have, unless they change nothing that it computes.

        Run without them, a checkpoint of another kind would answer as a model that nobody trained.
        """
        weights, expected, linears = self._weights, set[str](), set[str]()
        for name, shape in self._shapes.items():
            for stored in self._stored_names(name):
                expected.add(stored)
                if len(shape) == 2:
                    base = stored.removesuffix("weight")
                    linears.add(base)
                    expected.update(base + part for part in PARTS)

        def harmless(name: str) -> bool:
            if _HARMLESS.fullmatch(name):
                return True
            # Tools for GPTQ give every layer a bias.
            bias = name.removesuffix("bias") in linears and weights[name].dtype in FLOAT_TYPES
            return bias and not weights[name].to_float32().any()

        surplus = [name for name in weights if name not in expected and not harmless(name)]
        if surplus:
            more = f" and {len(surplus) - 1} more tensors" if len(surplus) > 1 else ""
            raise CheckpointError(
                f"{weights.path(surplus[0])}: has {shown(surplus[0], 150)}{more}, which the model "
                "that config.json describes does not have; without them it would answer as another "
                "model: get the config.json that belongs to the weights, or a model of a kind that "
                "is supported"
            )


def _refuse_other_kinds(weights: Weights) -> None:
    """Refuse models that are known and not supported, by their tensors."""
    adapter = weights.directory / "adapter_model.safetensors"
    if adapter.exists() and adapter not in weights.paths:
        raise CheckpointError(f"{adapter}: {_MERGE}; or remove it, where that has been done")
    for kind, reason in _OTHER_KINDS:
        name = next(filter(kind.match, weights), None)
        if name is not None:
            raise CheckpointError(f"{weights.path(name)}: has {shown(name, 150)}: {reason}")
