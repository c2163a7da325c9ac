"""What many tests are run with, one at a time."""

import pytest

from nvamp.objectives import GRADIENTS

with_gradient = pytest.mark.parametrize("gradient", GRADIENTS)
with_path = pytest.mark.parametrize("path", ["logits", "linear"])
with_backend = pytest.mark.parametrize("backend", ["reference", "chunked", "triton"])
with_fused = pytest.mark.parametrize("backend", ["chunked", "triton"])  # "reference" is their oracle
