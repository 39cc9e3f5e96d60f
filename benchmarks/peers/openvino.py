"""OpenVINO: both parts in the plain runtime, quantized with NNCF."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from peers.base import Peer

#: As OpenVINO's documentation advises for one user.
COMPILE = {
    "PERFORMANCE_HINT": "LATENCY",
    "NUM_STREAMS": "1",
    "DYNAMIC_QUANTIZATION_GROUP_SIZE": "128",
}


class OpenVINO(Peer):
    """A stateful decoder with fused attention and logits of the last position; NNCF's encoder."""

    name = "openvino"
    requirements = (
        "openvino==2026.4.1",
        "openvino-tokenizers==2026.4.1.0",
        "nncf==3.4.0",
        "torch==2.13.0",
        "transformers==5.5.4",
        "requests>=2.33,<3",
        "pillow==13.0.0",
    )
    # They ask for torchvision, which is not used, and whose wheels clash with CPU builds of torch.
    requirements_alone = ("optimum==2.3.0", "optimum-intel==2.2.0")

    @classmethod
    def build(cls, checkpoint: Path, directory: Path) -> None:
        """Build both parts in all variants."""
        _build_text(checkpoint, directory)
        _build_vision(checkpoint, directory)

    def __init__(self, directory: Path, text: str | None, vision: str | None, threads: int) -> None:
        """Compile what is asked for."""
        import openvino

        core = openvino.Core()
        options = {**COMPILE, "INFERENCE_NUM_THREADS": str(threads)}
        if text:
            path = directory / f"text-{text}.xml"
            self._text = core.compile_model(path, "CPU", options).create_infer_request()
        if vision:
            if vision == "bf16":
                options["INFERENCE_PRECISION_HINT"] = "bf16"
            path = directory / f"vision-{vision}.xml"
            self._vision = core.compile_model(path, "CPU", options).create_infer_request()
        self._length = 0

    def prefill(self, token_ids: NDArray[np.int64]) -> None:
        """Reset the state and infer the prompt."""
        self._text.reset_state()
        self._length = 0
        self._infer(token_ids[None])

    def decode(self, tokens: int) -> None:
        """Decode greedily."""
        for _ in range(tokens):
            self._infer(np.array([[self._view().argmax()]], np.int64))

    def _infer(self, token_ids: NDArray[np.int64]) -> None:
        new = token_ids.shape[1]
        self._text.infer(
            {
                "input_ids": token_ids,
                "attention_mask": np.ones((1, self._length + new), np.int64),
                "position_ids": np.arange(self._length, self._length + new, dtype=np.int64)[None],
                "beam_idx": np.zeros(1, np.int32),
            },
            share_inputs=True,
        )
        self._length += new

    def _view(self) -> NDArray[np.float32]:
        return self._text.get_output_tensor(0).data[0, -1]

    def logits(self) -> NDArray[np.float32]:
        """Return a copy."""
        return self._view().copy()

    def encode_tile(self, pixels: NDArray[np.float32]) -> NDArray[np.float32]:
        """Encode a tile."""
        self._vision.infer({0: pixels}, share_inputs=True)
        return self._vision.get_output_tensor(0).data[0]


def _build_text(checkpoint: Path, directory: Path) -> None:
    """Export with optimum-intel, which makes the cache a state; compress weights to INT4."""
    import nncf
    import openvino
    from optimum.exporters.openvino import main_export

    from peers.transformers_model import write_text_model

    source, exported = directory / "text-hf", directory / "text-exported"
    write_text_model(checkpoint, source)
    main_export(
        str(source),
        exported,
        task="text-generation-with-past",
        library_name="transformers",
        convert_tokenizer=False,
    )
    shutil.rmtree(source)
    for variant, all_layers in (("int4", True), ("int4_head8", False)):
        model = openvino.Core().read_model(exported / "openvino_model.xml")
        _keep_last_position(model)
        model = nncf.compress_weights(
            model,
            mode=nncf.CompressWeightsMode.INT4_SYM,
            group_size=128,
            ratio=1.0,
            all_layers=all_layers,
        )
        openvino.save_model(model, directory / f"text-{variant}.xml")
    shutil.rmtree(exported)


def _build_vision(checkpoint: Path, directory: Path) -> None:
    """Convert the encoder; quantize it after training, as NNCF advises for transformers."""
    import nncf
    import openvino
    import torch

    from peers.calibration import tiles
    from peers.transformers_model import load_model, vision_module

    model = load_model(checkpoint, torch.float32)
    size = model.config.vision_config.image_size[0]
    example = torch.zeros(1, 3, size, size)
    vision = openvino.convert_model(vision_module(model), example_input=example)
    vision.reshape([1, 3, size, size])
    openvino.save_model(vision, directory / "vision-bf16.xml")
    quantized = nncf.quantize(
        vision, nncf.Dataset(tiles(size)), model_type=nncf.ModelType.TRANSFORMER
    )
    openvino.save_model(quantized, directory / "vision-int8.xml")


def _keep_last_position(model: Any) -> None:
    """Put a slice before the head, so that a prompt computes one position's logits."""
    from openvino import opset13 as ops

    node = model.output("logits").get_node().input(0).get_source_output().get_node()
    while node.get_type_name() != "MatMul":
        node = node.input(0).get_source_output().get_node()
    hidden = node.input(0)
    last = ops.slice(hidden.get_source_output(), [-1], [np.iinfo(np.int64).max], [1], [1])
    hidden.replace_source_output(last.output(0))
