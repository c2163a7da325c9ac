"""The internals of the library in which the benchmark looks at sizes and tries others."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

from torch import Tensor

from nvamp.engine import chunked, linear, linear_nll_sum, triton
from nvamp.engine.options import Options
from nvamp.engine.parts import token_nll as part_nll

__all__ = ["Options", "chunks_of", "counted", "linear_nll_sum", "part_nll", "sizes_of", "triton"]


@contextmanager
def sizes_of(block: int, num_warps: int) -> Iterator[None]:
    """A context in which every launch of the Triton backend has these sizes."""

    def sizes(*args: Any, **kwargs: Any) -> Any:
        return triton.Launch(block, num_warps)

    with (
        mock.patch.object(triton, "reading", sizes),
        mock.patch.object(triton, "streaming", sizes),
        mock.patch.object(triton, "revisiting", sizes),
    ):
        yield


@contextmanager
def chunks_of(rows: int) -> Iterator[None]:
    """A context in which the linear path takes this many rows at a time."""
    with mock.patch.object(linear, "chunk_rows", return_value=rows):
        yield


@contextmanager
def counted() -> Iterator[list[int]]:
    """A context in which the one pass of the linear path records the bytes of each chunk of logits."""
    found: list[int] = []

    def counting(original: Any) -> Any:
        def unit_gradient_(logits: Tensor, *args: Any, **kwargs: Any) -> Any:
            found.append(len(logits) * logits.stride(0) * logits.itemsize)
            return original(logits, *args, **kwargs)

        return unit_gradient_

    with ExitStack() as stack:
        for backend in (chunked, triton):
            new = counting(backend.unit_gradient_)
            stack.enter_context(mock.patch.object(backend, "unit_gradient_", new))
        yield found
