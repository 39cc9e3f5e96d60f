"""Quantization: a checkpoint in, a smaller one and a report of what it cost out."""
