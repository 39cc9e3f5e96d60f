"""An NPU in NumPy behind `edgevl.axera.npu`: what compiled models would compute, bfloat16 between.

Memory is filled with NaN when it is taken, masks are added to scores, and new keys and values are
written before the cached ones are read: whatever the engine leaves to chance shows.
"""

import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import numpy as np

from edgevl.axera import layout
from edgevl.axera.npu.base import (
    STORED,
    Call,
    Group,
    Memory,
    NpuModel,
    Runtime,
    TensorInfo,
    from_device,
    to_device,
)
from edgevl.checkpoint import Checkpoint
from edgevl.engine.reference import (
    ReferenceEngine,
    inverse_frequencies,
    rms_norm,
    rotate,
    silu,
    softmax,
)


@dataclass
class Compiled:
    """What a model was compiled for.

    ``history_first`` is the shape of the first prefill group's cache, which is not used; by default
    it is that of Pulsar2, a row of the hidden size.
    """

    contexts: tuple = (2047,)
    chunk: int = 128
    max_prefill: int = 1024
    history_first: tuple = ()
    logits: str = "BF16"
    top_k: int = 0
    pixels: str = "F32"
    channels_last: bool = False
    wrong: dict = field(default_factory=dict)


def write_board(directory, checkpoint_path, prefix="qwen3", chunk=128, vision=True):
    """Write the files of a compiled model; those of the NPU are only names."""
    directory.mkdir(parents=True, exist_ok=True)
    for path in Path(checkpoint_path).iterdir():
        if path.is_file() and path.suffix != ".safetensors":
            shutil.copyfile(path, directory / path.name)
    with Checkpoint.open(checkpoint_path) as checkpoint:
        names = [
            layout.layer_file(prefix, chunk, layer)
            for layer in range(checkpoint.config.text.num_hidden_layers)
        ]
        table = checkpoint.tensor("language_model.model.embed_tokens.weight")
        to_device(table, "BF16").tofile(directory / layout.EMBEDDING_BF16)
        names.append(layout.post_file(prefix))
        if vision:
            names.append(layout.vision_file(checkpoint.config.vision.image_size))
    for name in names:
        (directory / name).write_bytes(b"a model for an NPU, or rather its name")
    return directory


class FakeMemory(Memory):
    def __init__(self, runtime, size):
        super().__init__(runtime, size)
        self.bytes = np.full(size, 0xFF, np.uint8)
        self.written = 0

    def write(self, offset, values):
        assert values.flags.c_contiguous
        super().write(offset, values)

    def read(self, offset, nbytes):
        return self.bytes[offset : offset + nbytes]

    def _write(self, offset, values):
        assert offset + values.size <= self.size
        self.bytes[offset : offset + values.size] = values
        self.written += values.size

    def _give_back(self):
        self.bytes = None


class FakeCall(Call):
    def __init__(self, model, group, inputs, outputs):
        self.model, self.group = model, group
        self.places = {"Input": [*inputs], "Output": [*outputs]}
        super().__init__(model, group, inputs, outputs)

    def _run(self):
        self.model.runtime.before_run(self)
        self.model.compute(self)
        return 0

    def _place(self, side, index, memory, nbytes, offset):
        self.places[side][index] = memory, offset

    def array(self, name):
        """The bytes of a tensor where it lies, in its shape."""
        group = self.model.groups[self.group]
        tensors = [*group.inputs, *group.outputs]
        number = next(i for i, tensor in enumerate(tensors) if tensor.name == name)
        memory, offset = [*self.places["Input"], *self.places["Output"]][number]
        tensor = tensors[number]
        stored = memory.bytes[offset : offset + tensor.nbytes].view(STORED[tensor.dtype])
        return stored.reshape(tensor.shape)

    def get(self, name):
        return from_device(self.array(name), "BF16")[0]

    def put(self, name, values):
        self.array(name)[...] = to_device(np.asarray(values, np.float32), "BF16")


class FakeModel(NpuModel):
    CALL = FakeCall
    DATA_TYPES: ClassVar = {name: name for name in STORED}

    def __init__(self, runtime, path, groups, compute):
        self.compiled, self.compute = groups, compute
        super().__init__(runtime, path)

    def _open(self):
        return len(self.compiled)

    def _describe(self, group):
        tensors = self.compiled[group].inputs, self.compiled[group].outputs
        return (((t.name, t.dtype, t.shape, t.nbytes) for t in side) for side in tensors)

    def _give_back(self):
        self.compute = None


class FakeRuntime(Runtime):
    """Loads what `write_board` wrote; the weights are those of the checkpoint."""

    def __init__(self, checkpoint, compiled=None):
        super().__init__()
        self.checkpoint = checkpoint
        self.reference = ReferenceEngine(checkpoint)
        self.compiled = compiled or Compiled()
        self.frequencies = inverse_frequencies(checkpoint.config.text)
        self.memories = []
        self.runs = []

    def before_run(self, call):
        self.runs.append((call.model.path.name, call.group))

    def _allocate(self, nbytes):
        self.memories.append(FakeMemory(self, nbytes))
        return self.memories[-1]

    def _load(self, path):
        match = re.search(r"_l(\d+)_together", path.name)
        if match:
            layer = int(match[1])
            groups, compute = self.layer_groups(), lambda call: self.layer(layer, call)
        elif path.name.endswith("_post.axmodel"):
            groups, compute = self.post_groups(), self.post
        else:
            groups, compute = self.vision_groups(), self.vision
        changed = self.compiled.wrong.get(path.name)
        return FakeModel(self, path, changed(groups) if changed else groups, compute)

    def _shut_down(self):
        pass

    # --- layers ------------------------------------------------------------------------------

    def layer_groups(self):
        compiled = self.compiled
        steps = [(1, context) for context in compiled.contexts]
        steps += [(compiled.chunk, h) for h in range(0, compiled.max_prefill + 1, compiled.chunk)]
        return [self.layer_group(tokens, history) for tokens, history in steps]

    def layer_group(self, tokens, history):
        text = self.checkpoint.config.text
        hidden, width = text.hidden_size, text.num_key_value_heads * text.head_dim
        cache = (1, history, width) if history else self.compiled.history_first or (1, 1, hidden)
        inputs = {
            "K_cache": ("BF16", cache),
            "V_cache": ("BF16", cache),
            "indices": ("U32", (1, tokens)),
            "input": ("BF16", (1, tokens, hidden)),
            "mask": ("BF16", (1, tokens, history + tokens)),
        }
        outputs = {
            "K_cache_out": ("BF16", (1, tokens, width)),
            "V_cache_out": ("BF16", (1, tokens, width)),
            "output": ("BF16", (1, tokens, hidden)),
        }
        return Group(*(tuple(TensorInfo(n, *t) for n, t in d.items()) for d in (inputs, outputs)))

    def layer(self, layer, call):
        text = self.checkpoint.config.text
        prefix = f"language_model.model.layers.{layer}."
        x, mask, positions = call.get("input"), call.get("mask"), call.array("indices")[0]
        assert positions.max() < text.max_position_embeddings
        angles = positions.astype(np.float32)[:, None] * self.frequencies
        cos, sin = np.cos(angles), np.sin(angles)
        y = self.norm(prefix + "input_layernorm", x)
        heads, groups = text.num_attention_heads, text.num_key_value_heads
        query = rotate(self.heads(prefix + "self_attn.q", y, heads), cos, sin)
        key = rotate(self.heads(prefix + "self_attn.k", y, groups), cos, sin)
        value = self.heads(prefix + "self_attn.v", y, groups)
        tokens, history = len(x), mask.shape[1] - len(x)
        call.put("K_cache_out", key.swapaxes(0, 1).reshape(1, tokens, -1))
        call.put("V_cache_out", value.swapaxes(0, 1).reshape(1, tokens, -1))
        key, value = (
            np.concatenate([*[call.get(name)] * bool(history), call.get(name + "_out")])
            .reshape(history + tokens, groups, -1)
            .swapaxes(0, 1)
            for name in ("K_cache", "V_cache")
        )
        repeats = heads // groups
        scores = query @ key.repeat(repeats, 0).swapaxes(1, 2) * np.float32(text.head_dim**-0.5)
        mixed = softmax(scores + mask) @ value.repeat(repeats, 0)
        x = x + self.linear(prefix + "self_attn.o_proj", mixed.swapaxes(0, 1).reshape(tokens, -1))
        y = self.norm(prefix + "post_attention_layernorm", x)
        gate = silu(self.linear(prefix + "mlp.gate_proj", y))
        y = gate * self.linear(prefix + "mlp.up_proj", y)
        call.put("output", x + self.linear(prefix + "mlp.down_proj", y))

    def norm(self, name, x):
        return rms_norm(x, self.weight(name + ".weight"), self.checkpoint.config.text.rms_norm_eps)

    def heads(self, name, y, heads):
        x = self.linear(name + "_proj", y).reshape(len(y), heads, -1)
        if name + "_norm.weight" in self.reference._weights:
            x = self.norm(name + "_norm", x)
        return x.swapaxes(0, 1)

    def linear(self, name, x):
        y = x @ self.weight(name + ".weight").T
        bias = self.reference._weights.get(name + ".bias")
        return y if bias is None else y + bias

    def weight(self, name):
        return self.reference._weights[name]

    # --- output layer and vision ---------------------------------------------------------------

    def post_groups(self):
        text = self.checkpoint.config.text
        outputs = (TensorInfo("output", self.compiled.logits, (1, 1, text.vocab_size)),)
        if top_k := self.compiled.top_k:
            outputs = (
                TensorInfo("indices", "I32", (1, 1, top_k)),
                TensorInfo("probabilities", "F32", (1, 1, top_k)),
            )
        return [Group((TensorInfo("input", "BF16", (1, 1, text.hidden_size)),), outputs)]

    def post(self, call):
        logits = self.reference._logits(call.get("input")[0])
        if not self.compiled.top_k:
            call.array("output")[...] = to_device(logits, self.compiled.logits)
            return
        best = np.argsort(-logits, kind="stable")[: self.compiled.top_k]
        call.array("indices")[...] = best
        call.array("probabilities")[...] = softmax(logits)[best]

    def vision_groups(self):
        config = self.checkpoint.config
        size = config.vision.image_size
        shape = (1, size, size, 3) if self.compiled.channels_last else (1, 3, size, size)
        features = (1, config.image_tokens, config.text.hidden_size)
        return [
            Group(
                (TensorInfo("image", self.compiled.pixels, shape),),
                (TensorInfo("output", "F32", features),),
            )
        ]

    def vision(self, call):
        config, pixels = self.checkpoint.config, call.array("image")
        if self.compiled.channels_last:
            pixels = pixels.transpose(0, 3, 1, 2)
        pixels = pixels.astype(np.float32)
        if self.compiled.pixels == "U8":
            mean, std = (
                np.float32(statistics).reshape(1, 3, 1, 1)
                for statistics in (config.image_mean, config.image_std)
            )
            pixels = (pixels / 255 - mean) / std
        call.array("output")[...] = self.reference.encode_images(pixels)
