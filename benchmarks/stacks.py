"""What is compared: a peer with a variant of its text model and of its vision encoder."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Stack:
    """A line of the table.

    Attributes:
        name: in the table.
        peer: name in ``peers.PEERS``.
        text: variant of the text model; None: it is not loaded and not measured.
        vision: variant of the vision encoder; None likewise.
        environment: of its process.
    """

    name: str
    peer: str
    text: str | None
    vision: str | None
    environment: dict[str, str] = field(default_factory=dict)


STACKS = (
    Stack("EdgeVL INT4, vision INT8", "edgevl", "int4", "int8"),
    Stack("OpenVINO INT4, head INT8, vision INT8", "openvino", "int4_head8", "int8"),
    Stack("OpenVINO INT4, vision bf16", "openvino", "int4", "bf16"),
    Stack("ONNX Runtime GenAI INT4, vision INT8", "onnxruntime", "int4", "int8"),
    Stack("ONNX Runtime, vision fp32", "onnxruntime", None, "fp32"),
    Stack("llama.cpp Q4_0, vision Q8_0", "llama_cpp", "q4_0", "q8_0"),
    Stack("llama.cpp Q4_K_M, vision F16", "llama_cpp", "q4_k_m", "f16"),
    Stack("transformers bf16", "pytorch", "bf16", "bf16"),
    Stack("PyTorch, vision fp32", "pytorch", None, "fp32"),
    # The same machine without AVX-512.
    Stack("EdgeVL INT4, vision INT8, AVX2", "edgevl", "int4", "int8", {"EDGEVL_ISA": "avx2"}),
    Stack("llama.cpp Q4_0, vision Q8_0, AVX2", "llama_cpp_avx2", "q4_0", "q8_0"),
)
#: What the others' numbers are compared with; it is not timed.
EXACT = Stack("transformers fp32", "pytorch", "fp32", "fp32")
