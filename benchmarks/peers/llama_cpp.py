"""llama.cpp, through llama-cpp-python, built from source for this machine; vision by its mtmd."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from peers.base import Peer

#: Variant -> llama.cpp's name of the file type.
FILE_TYPES = {"q4_0": "LLAMA_FTYPE_MOSTLY_Q4_0", "q4_k_m": "LLAMA_FTYPE_MOSTLY_Q4_K_M"}
#: Positions the cache holds.
CONTEXT = 2048


class LlamaCpp(Peer):
    """Flash attention, whole prompts in one batch, logits of the last position only."""

    name = "llama_cpp"
    requirements = ("llama-cpp-python==0.3.36", "gguf==0.19.0", "numpy==2.4.6")
    # Without pip's cache: it would hand the wheel of one build to the other.
    pip_options = ("--no-binary", "llama-cpp-python", "--no-cache-dir")
    pip_environment: ClassVar[dict[str, str]] = {"CMAKE_ARGS": "-DGGML_NATIVE=ON"}

    @classmethod
    def build(cls, checkpoint: Path, directory: Path) -> None:
        """Write GGUF files in bfloat16 and quantize the text model as ``llama-quantize`` does."""
        import llama_cpp

        from edgevl.checkpoint import Checkpoint
        from peers.gguf_model import write_text, write_vision

        plain = directory / "text-bf16.gguf"
        with Checkpoint.open(checkpoint) as opened:
            write_text(opened, plain)
            for variant in ("f16", "q8_0"):
                write_vision(opened, directory / f"vision-{variant}.gguf", variant)
        for variant, file_type in FILE_TYPES.items():
            parameters = llama_cpp.llama_model_quantize_default_params()
            parameters.ftype = getattr(llama_cpp, file_type)
            target = directory / f"text-{variant}.gguf"
            status = llama_cpp.llama_model_quantize(
                bytes(plain), bytes(target), ctypes.byref(parameters)
            )
            if status:
                raise RuntimeError(f"llama_model_quantize to {variant} failed with {status}")
        plain.unlink()

    def __init__(self, directory: Path, text: str | None, vision: str | None, threads: int) -> None:
        """Load both parts; mtmd needs the text model for its vocabulary."""
        import llama_cpp

        self._llama_cpp = llama_cpp
        self._llama = llama_cpp.Llama(
            str(directory / f"text-{text}.gguf"),
            n_ctx=CONTEXT,
            n_batch=2048,
            n_ubatch=512,
            n_threads=threads,
            n_threads_batch=threads,
            flash_attn=True,
            verbose=False,
        )
        self._context = self._llama.ctx
        self._vocabulary = self._llama.n_vocab()
        if vision:
            self._mtmd = Mtmd(self._llama, directory / f"vision-{vision}.gguf", threads)

    def prefill(self, token_ids: NDArray[np.int64]) -> None:
        """Clear the cache and compute the prompt."""
        memory = self._llama_cpp.llama_get_memory(self._context)
        self._llama_cpp.llama_memory_clear(memory, True)
        self._compute(token_ids)

    def decode(self, tokens: int) -> None:
        """Decode greedily."""
        for _ in range(tokens):
            self._compute(np.array([self._view().argmax()]))

    def _compute(self, token_ids: NDArray[np.int64]) -> None:
        ids = (self._llama_cpp.llama_token * len(token_ids))(*token_ids.tolist())
        batch = self._llama_cpp.llama_batch_get_one(ids, len(token_ids))
        status = self._llama_cpp.llama_decode(self._context, batch)
        if status:
            raise RuntimeError(f"llama_decode failed with {status}")
        self._llama_cpp.llama_synchronize(self._context)

    def _view(self) -> NDArray[np.float32]:
        pointer = self._llama_cpp.llama_get_logits_ith(self._context, -1)
        return np.ctypeslib.as_array(pointer, (self._vocabulary,))

    def logits(self) -> NDArray[np.float32]:
        """Return a copy."""
        return self._view().copy()

    def encode_tile(self, pixels: NDArray[np.float32]) -> NDArray[np.float32]:
        """Encode a tile, which is turned back to 8-bit RGB the first time: mtmd takes pictures."""
        return self._mtmd.encode(pixels)


class LlamaCppAVX2(LlamaCpp):
    """The same, built for processors without AVX-512 and AVX-VNNI."""

    name = "llama_cpp_avx2"
    models_of = "llama_cpp"
    pip_environment: ClassVar[dict[str, str]] = {
        "CMAKE_ARGS": "-DGGML_NATIVE=OFF -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DGGML_BMI2=ON"
    }


class Mtmd:
    """llama.cpp's vision encoder, bound to a loaded text model."""

    def __init__(self, llama: Any, path: Path, threads: int) -> None:
        """Load the encoder."""
        import llama_cpp.mtmd_cpp as mtmd

        self._mtmd = mtmd
        parameters = mtmd.mtmd_context_params_default()
        parameters.use_gpu = False
        parameters.print_timings = False
        parameters.n_threads = threads
        parameters.warmup = False
        self._context = mtmd.mtmd_init_from_file(bytes(path), llama.model, parameters)
        if not self._context:
            raise RuntimeError(f"mtmd_init_from_file cannot load {path}")
        self._hidden = llama.n_embd()
        self._chunk: Any = None

    def encode(self, pixels: NDArray[np.float32]) -> NDArray[np.float32]:
        """Encode a tile; preparing the picture is done once and belongs to no step."""
        if self._chunk is None:
            self._chunk = self._image_chunk(pixels)
        if status := self._mtmd.mtmd_encode_chunk(self._context, self._chunk):
            raise RuntimeError(f"mtmd_encode_chunk failed with {status}")
        tokens = self._mtmd.mtmd_input_chunk_get_n_tokens(self._chunk)
        features = self._mtmd.mtmd_get_output_embd(self._context)
        return np.ctypeslib.as_array(features, (tokens, self._hidden)).copy()

    def _image_chunk(self, pixels: NDArray[np.float32]) -> Any:
        mtmd = self._mtmd
        mean = np.array((0.485, 0.456, 0.406), np.float32)
        deviation = np.array((0.229, 0.224, 0.225), np.float32)
        rgb = np.round((pixels[0].transpose(1, 2, 0) * deviation + mean) * 255)
        rgb = np.ascontiguousarray(rgb.clip(0, 255), np.uint8)
        rows, columns, _ = rgb.shape  # of one tile's size: it is not cut or scaled
        data = rgb.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        bitmap = mtmd.mtmd_bitmap_init(columns, rows, data)
        text = mtmd.mtmd_input_text()
        marker = mtmd.mtmd_default_marker()
        text.text, text.text_len = marker, len(marker)
        text.add_special, text.parse_special = False, True
        chunks = mtmd.mtmd_input_chunks_init()
        bitmaps = (mtmd.mtmd_bitmap_p_ctypes * 1)(bitmap)
        if status := mtmd.mtmd_tokenize(self._context, chunks, ctypes.byref(text), bitmaps, 1):
            raise RuntimeError(f"mtmd_tokenize failed with {status}")
        found = [
            mtmd.mtmd_input_chunks_get(chunks, index)
            for index in range(mtmd.mtmd_input_chunks_size(chunks))
        ]
        images = [
            chunk
            for chunk in found
            if mtmd.mtmd_input_chunk_get_type(chunk) == mtmd.MTMD_INPUT_CHUNK_TYPE_IMAGE
        ]
        if len(images) != 1:
            raise RuntimeError(f"mtmd made {len(images)} pictures of one tile")
        return images[0]
