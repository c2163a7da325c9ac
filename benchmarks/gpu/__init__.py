"""Correctness, speed and memory of the losses on a GPU: `python -m benchmarks.gpu`. See the README."""
