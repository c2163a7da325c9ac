from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nvamp.study.watching
from nvamp.integrations.transformers import compute_loss_func
from nvamp.study.corpus import Corpus
from nvamp.study.losses import parse_loss
from nvamp.study.training import Recipe, install, train
from nvamp.study.watching import LossTimes, PeakMemory, Step, Watch
from tests.study.conftest import small_llama

CPU = torch.device("cpu")


class Counting:
    """A clock that knows nothing but the order of its marks."""

    def __init__(self) -> None:
        self.now = 0

    def mark(self) -> int:
        self.now += 1
        return self.now


@pytest.mark.parametrize("linear", [True, False])
def test_the_loss_and_its_gradient_are_counted_once_each(linear: bool, tokenizer: Any) -> None:
    order: list[str] = []

    class Backbone(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            order.append(f"model backward at {clock.now}")
            return grad

    class Norm(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            order.append(f"model forward at {clock.now}")
            return Backbone.apply(x)  # type: ignore[no-any-return, no-untyped-call]

    clock = Counting()
    model = small_llama(tokenizer, 16)
    model.model.norm = Norm()
    loss = parse_loss("nvamp")
    tokens = torch.arange(6)[None]
    if linear:
        assert install(loss, model) is None
    times = LossTimes(model, clock)  # type: ignore[arg-type]
    function = times.of(compute_loss_func(loss.criterion))
    order.clear()
    with torch.no_grad():
        model(input_ids=tokens)
    times.step = Step(0)
    for _ in range(2):
        if linear:
            model(input_ids=tokens, labels=tokens).loss.backward()
        else:
            function(model(input_ids=tokens), tokens).backward()
    assert times.step.passes == [[1, 2, 3, 4], [5, 6, 7, 8]]
    # The model's own work lies outside.
    of_model = [
        f"model {way} at {at}" for at in (0, 4) for way, at in (("forward", at), ("backward", at + 4))
    ]
    assert order == ["model forward at 0", *of_model]
    times.remove()
    model(input_ids=tokens, labels=tokens if linear else None)
    assert clock.now == 8


def test_peak_memory_is_that_since_the_reset() -> None:
    peak = PeakMemory(CPU)
    peak.reset()
    before = peak.read()
    if before is None:
        pytest.skip("the system does not say")
    held = torch.ones(2**24)
    during = peak.read()
    del held
    assert during is not None
    assert 0.9 * 2**26 < during - before < 2 * 2**26
    assert peak.read() == pytest.approx(during, abs=2**20)
    peak.reset()
    after = peak.read()
    assert after is not None
    assert after < during - 2**25


@pytest.fixture
def watch() -> Watch:
    """It looks at every second of 251 steps."""
    times: Any = SimpleNamespace(step=None)
    return Watch(251, times, CPU, lambda model: 1.0, lambda step, value: None)


def test_times_are_medians_over_the_steps(watch: Watch) -> None:
    watch.steps = [
        Step(0, 10, [[1, 1.5, 4, 4.5]]),  # a tenth of it
        Step(10, 30, [[11, 13, 14, 16], [20, 22, 23, 25]]),  # 8 of 20 in two passes
        Step(30, 130, [[31, 71, 72, 122]]),
    ]
    assert watch.times() == (20, 0.4)


def test_the_last_step_is_looked_at(watch: Watch) -> None:
    looked = []
    for step in (1, 2, 3, 250, 251):
        control = SimpleNamespace(should_log=False)
        watch.on_step_begin(None, None, control)
        watch.on_step_end(None, SimpleNamespace(global_step=step, max_steps=251), control, model=None)
        if control.should_log:
            looked.append(step)
    assert looked == [2, 250, 251]


def test_the_peak_is_the_highest_of_the_steps_alone(watch: Watch) -> None:
    peak = PeakMemory(CPU)
    peak.reset()
    before = peak.read()
    if before is None:
        pytest.skip("the system does not say")
    torch.ones(2**26)
    for size in (2**24, 1):
        watch.on_step_begin(None, None, None)
        torch.ones(size)
        watch.on_step_end(
            None, SimpleNamespace(global_step=1, max_steps=2), SimpleNamespace(should_log=True), model=None
        )
    assert watch.peak_memory is not None
    assert 0.9 * 2**26 < watch.peak_memory - before < 2 * 2**26


def test_where_the_system_does_not_say(monkeypatch: pytest.MonkeyPatch, corpus: Corpus) -> None:
    class Nowhere:
        def __init__(self, path: str) -> None:
            pass

        def write_text(self, text: str) -> None:
            raise FileNotFoundError

    monkeypatch.setattr(nvamp.study.watching, "Path", Nowhere)
    assert train(parse_loss("ce"), 0, Recipe(1, 2, 1e-3), corpus, lambda *_: None).peak_memory is None


def test_measured_numbers_are_sane(corpus: Corpus) -> None:
    result = train(parse_loss("ce"), 0, Recipe(12, 8, 1e-3), corpus, lambda *_: None)
    assert 0 < result.loss_share < 1
    assert 0 < 12 * 8 * 16 / result.tokens_per_second < result.seconds
    if result.peak_memory is not None:
        assert result.peak_memory > 4 * 4 * result.model.num_parameters()
