"""Settings that have to be made before anything imports Triton or compiles."""

import gc
import os

os.environ["TRITON_INTERPRET"] = "1"  # kernels run on CPU tensors
# A cached graph outlives a change to the operators that it calls.
os.environ["TORCHINDUCTOR_FX_GRAPH_CACHE"] = "0"
os.environ["TORCHINDUCTOR_AUTOGRAD_CACHE"] = "0"


def pytest_collection_finish() -> None:
    """What is imported by now stays: each `gc.collect` of a `Trainer` need not look at it again."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()
