"""Synthetic checkpoints: real shapes and files, random weights."""
