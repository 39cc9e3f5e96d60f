"""ONNX Runtime: the text model by ONNX Runtime GenAI, the vision encoder by the plain runtime."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from peers.base import Peer

#: Positions the cache holds.
CONTEXT = 2048


class ONNXRuntime(Peer):
    """INT4 in blocks of 128 with accuracy level 4 (int8 activations), shared key/value buffers."""

    name = "onnxruntime"
    requirements = (
        "onnxruntime-genai==0.18.0",
        "onnxruntime==1.32.0",
        "onnx==1.21.0",
        "onnx-ir==1.1.0",
        "onnxscript==0.7.2",
        "torch==2.13.0",
        "transformers==5.23.0",
        "pillow==13.0.0",
    )

    @classmethod
    def build(cls, checkpoint: Path, directory: Path) -> None:
        """Run GenAI's model builder; export the encoder and quantize it."""
        import torch

        from peers.transformers_model import load_model, vision_module, write_text_model

        source = directory / "text-bf16"
        write_text_model(checkpoint, source)
        builder = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-p", "int4"]
        paths = [
            "-i",
            str(source),
            "-o",
            str(directory / "text-int4"),
            "-c",
            str(directory / "cache"),
        ]
        options = ["--extra_options", "block_size=128", "accuracy_level=4"]
        subprocess.run([*builder, *paths, "-e", "cpu", *options], check=True)
        shutil.rmtree(source)

        model = load_model(checkpoint, torch.float32)
        size = model.config.vision_config.image_size[0]
        plain = directory / "vision-fp32.onnx"
        torch.onnx.export(
            vision_module(model),
            (torch.zeros(1, 3, size, size),),
            plain,
            input_names=["pixels"],
            output_names=["features"],
            dynamo=True,
            external_data=False,
        )
        _quantize(plain, directory / "vision-int8.onnx")

    def __init__(self, directory: Path, text: str | None, vision: str | None, threads: int) -> None:
        """Load what is asked for."""
        self._generator: Any = None
        if text:
            import onnxruntime_genai as genai

            config = genai.Config(str(directory / f"text-{text}"))
            options = {"intra_op_num_threads": threads}
            config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
            model = genai.Model(config)
            parameters = genai.GeneratorParams(model)
            parameters.set_search_options(
                do_sample=False,
                max_length=CONTEXT,
                min_length=CONTEXT,
                past_present_share_buffer=True,
            )
            self._generator = genai.Generator(model, parameters)
        if vision:
            import onnxruntime

            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = threads
            self._vision = onnxruntime.InferenceSession(
                directory / f"vision-{vision}.onnx", options, providers=["CPUExecutionProvider"]
            )

    def prefill(self, token_ids: NDArray[np.int64]) -> None:
        """Rewind to nothing and append the prompt."""
        self._generator.rewind_to(0)
        self._generator.append_tokens(token_ids[None].astype(np.int32))

    def decode(self, tokens: int) -> None:
        """Generate; a call chooses a token and the next one computes it."""
        for _ in range(tokens + 1):
            self._generator.generate_next_token()

    def logits(self) -> NDArray[np.float32]:
        """Return the last position's."""
        return np.asarray(self._generator.get_output("logits"), np.float32)[0, -1]

    def encode_tile(self, pixels: NDArray[np.float32]) -> NDArray[np.float32]:
        """Encode a tile."""
        return self._vision.run(None, {"pixels": pixels})[0][0]


def _quantize(plain: Path, target: Path) -> None:
    """Quantize dynamically, as the runtime's guide advises for transformers; weights by channel."""
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.shape_inference import quant_pre_process

    prepared = target.with_suffix(".prepared")
    quant_pre_process(plain, prepared, skip_symbolic_shape=True)
    quantize_dynamic(prepared, target, per_channel=True, weight_type=QuantType.QInt8)
    prepared.unlink()
