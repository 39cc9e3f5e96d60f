"""Checkpoints: what is on disk. Nothing that is read here is ever executed."""

from edgevl.checkpoint.architecture import expected_tensors
from edgevl.checkpoint.checkpoint import Checkpoint
from edgevl.checkpoint.config import (
    GPTQConfig,
    ModelConfig,
    TextConfig,
    VisionConfig,
)
from edgevl.checkpoint.config_parser import parse_config
from edgevl.checkpoint.directory import ModelDirectory
from edgevl.checkpoint.gptq import GPTQWeight
from edgevl.checkpoint.safetensors import StoredTensor

__all__ = [
    "Checkpoint",
    "GPTQConfig",
    "GPTQWeight",
    "ModelConfig",
    "ModelDirectory",
    "StoredTensor",
    "TextConfig",
    "VisionConfig",
    "expected_tensors",
    "parse_config",
]
