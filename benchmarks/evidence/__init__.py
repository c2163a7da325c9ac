"""The claims made for NVAMP, as questions with an experiment each: `python -m benchmarks.evidence NAME`."""
