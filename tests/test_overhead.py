"""What the objective adds to the engine: launches, counted as a GPU would make them."""

from typing import Any

import pytest
import torch

from benchmarks import overhead
from nvamp import NVAMPLoss
from tests.parameters import with_path

ONES = 1  # what PyTorch itself launches to begin a backward

COUNTED = {
    backend: {c.name: overhead.launches(c.loss, c.inputs) for c in overhead.contenders("cpu", backend)}
    for backend in ("triton", "chunked")
}


@pytest.mark.parametrize("name", overhead.LOSSES)
@with_path
def test_on_a_gpu_the_objective_is_one_launch(path: str, name: str) -> None:
    forward, backward = COUNTED["triton"][f"{path}, {name}"]
    assert forward.objective == 1
    assert backward.objective <= ONES + (2 if path == "linear" else 1)


def test_on_a_gpu_a_loss_of_logits_is_two_launches_and_so_is_its_backward() -> None:
    for name in overhead.LOSSES:
        forward, backward = COUNTED["triton"][f"logits, {name}"]
        assert (forward.engine, backward.engine) == (1, 1)


@pytest.mark.parametrize("given", [{"num_items_in_batch": 7}, {"num_items_in_batch": torch.tensor(7)}])
def test_the_number_of_items_launches_nothing(given: dict[str, Any]) -> None:
    logits, labels = torch.randn(2, 5, 7, requires_grad=True), torch.zeros(2, 5).long()
    loss = NVAMPLoss(shift=False, backend="triton")
    forward, _ = overhead.launches(lambda: loss(logits, labels, **given), [logits])
    assert forward.objective == 1


def test_the_shift_takes_two_launches() -> None:
    """It fills and copies; what it makes is contiguous, so that nobody copies it again."""
    logits, labels = torch.randn(2, 5, 7, requires_grad=True), torch.zeros(2, 5).long()
    loss = NVAMPLoss(backend="triton")
    forward, backward = overhead.launches(lambda: loss(logits, labels), [logits])
    assert (forward.engine, forward.objective) == (1, 3)
    assert (backward.engine, backward.objective) == (1, 2)


@pytest.mark.parametrize(
    ("name", "most"), [("cross-entropy", 25), ("scalar", 65), ("token", 71), ("full", 83), ("detached", 59)]
)
def test_the_objective_in_operations_of_pytorch(name: str, most: int) -> None:
    forward, backward = COUNTED["chunked"][f"logits, {name}"]
    assert forward.objective <= most
    assert backward.objective <= ONES + 1


def test_what_is_counted() -> None:
    """Views and fresh memory are no launches, in-place operations are, operators are looked into."""
    x = torch.randn(3, 4, requires_grad=True)

    def loss() -> torch.Tensor:
        torch.empty(3).view(3, 1).expand(3, 2)
        return torch.nn.functional.pad(x.detach(), (0, 1)).sum() + (2 * x).add_(1).sum()

    assert overhead.launches(loss, [x]) == (
        overhead.Launches(0, 2 + 1 + 4),
        overhead.Launches(0, ONES + 1),
    )


def test_the_benchmark_runs(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["overhead"])
    monkeypatch.setattr(overhead, "host_seconds", lambda *_: 1e-4)
    overhead.main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 2 * (2 + len(overhead.LOSSES))
    assert all(line.endswith("100") for line in lines[2:])
