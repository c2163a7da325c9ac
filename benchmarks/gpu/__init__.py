"""Correctness, speed and memory of the losses on a GPU: `python -m benchmarks.gpu`. The README says how."""
