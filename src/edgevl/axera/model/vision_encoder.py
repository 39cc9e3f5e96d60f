"""The vision encoder on the NPU: a tile in, features out."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edgevl.axera.npu.base import FLOATS, STORED, NpuModel, Runtime, from_device, to_device
from edgevl.checkpoint.config import ModelConfig
from edgevl.errors import BoardError

Floats = NDArray[np.float32]


class NpuVisionEncoder:
    """Encodes a tile a call. Where the model takes bytes, it normalises them itself."""

    def __init__(self, runtime: Runtime, model: NpuModel, config: ModelConfig) -> None:
        """Prepare the call.

        Raises:
            BoardError: the model does not fit ``config``.
        """
        [group, *others] = model.groups
        if others or len(group.inputs) != 1 or len(group.outputs) != 1:
            raise BoardError(f"{model.path}: a vision encoder has one input and one output")
        self._input, self._output = group.inputs[0], group.outputs[0]
        size = config.vision.image_size
        nchw, nhwc = (1, 3, size, size), (1, size, size, 3)
        fits = {"U8": (nchw, nhwc)}.get(self._input.dtype, (nchw,))
        if self._input.dtype not in (*FLOATS, "U8") or self._input.shape not in fits:
            raise BoardError(
                f"{model.path}: input is {self._input.dtype} {list(self._input.shape)}, expected "
                f"F32 {list(nchw)}, or U8 {list(nchw)} or {list(nhwc)}: the model and config.json "
                "do not belong together"
            )
        self._features = (config.image_tokens, config.text.hidden_size)
        if self._output.dtype not in FLOATS or self._output.shape not in (
            (1, *self._features),
            self._features,
        ):
            raise BoardError(
                f"{model.path}: output is {self._output.dtype} {list(self._output.shape)}, "
                f"expected F32 {[1, *self._features]} as config.json says: the files do not belong "
                "together"
            )
        self._channels_last = self._input.shape == nhwc
        statistics = (config.image_mean, config.image_std)
        self._mean, self._std = (np.array(s, np.float32).reshape(3, 1, 1) for s in statistics)
        self._tile = runtime.allocate(self._input.nbytes)
        self._result = runtime.allocate(self._output.nbytes)
        self._call = model.bind(0, [(self._tile, 0)], [(self._result, 0)])

    def encode(self, pixels: Floats) -> Floats:
        """Encode a tile: normalised float32 [3, tile, tile] -> features float32 [T, H].

        Raises:
            BoardError: the NPU reports an error.
        """
        if self._input.dtype == "U8":
            levels = np.rint((pixels * self._std + self._mean) * 255).clip(0, 255)
            levels = levels.transpose(1, 2, 0) if self._channels_last else levels
            self._tile.write(0, np.ascontiguousarray(levels, np.uint8))
        else:
            self._tile.write(0, to_device(pixels, self._input.dtype))
        self._call.run()
        stored = self._result.read(0, self._output.nbytes).view(STORED[self._output.dtype])
        return from_device(stored, self._output.dtype).reshape(self._features)
