"""What is observed of a run while it is trained: times, memory, the curve, and whether it diverges."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from transformers import TrainerCallback

from nvamp.integrations.transformers import LossFunction
from nvamp.integrations.transformers.patching import base_model

CURVE_POINTS = 10  # evaluations during a run, in addition to one before it

# (optimizer steps done, value of the loss)
Progress = Callable[[int, float], None]


class Clock:
    """Marks points in time on the device's own timeline, and waits for the device only in `seconds`."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"

    def mark(self) -> Any:
        if not self._cuda:
            return perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def seconds(self, start: Any, end: Any) -> float:
        if not self._cuda:
            return cast(float, end - start)
        end.synchronize()
        return cast(float, start.elapsed_time(end) / 1000)


class PeakMemory:
    """The most memory in use at once, in bytes.

    On a GPU it is what PyTorch has allocated there, on Linux without one the resident set of the process.
    Both include what is always there: weights, the optimizer's moments. Elsewhere there is no value.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"

    def reset(self) -> None:
        """Forget what was in use before."""
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
            return
        try:
            Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        except OSError:
            self.read = lambda: None  # type: ignore[method-assign]

    def read(self) -> int | None:
        """The most since the last reset; `None` if the system does not say."""
        if self._cuda:
            return torch.cuda.max_memory_allocated()
        status = Path("/proc/self/status").read_text().splitlines()
        peak = [int(line.split()[1]) for line in status if line.startswith("VmHWM:")]
        return 1024 * peak[0] if peak else None


@dataclass
class Step:
    """When an optimizer step begins and ends.

    Attributes:
        passes: of each pass through the model four points in time: the output layer begins, the loss is
            there, its gradient begins, and the gradient of what the layer got is there.
    """

    begin: Any
    end: Any = None
    passes: list[list[Any]] = field(default_factory=list)


class LossTimes:
    """Records in `step` when a model computes its loss and the gradient; both include the output layer."""

    def __init__(self, model: Any, clock: Clock) -> None:
        base = base_model(model)
        self.step: Step | None = None
        self._mark = clock.mark
        self._hooks = (
            base.get_output_embeddings().register_forward_pre_hook(self._before_layer),
            base.register_forward_hook(self._after_model),
        )

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def of(self, function: LossFunction) -> LossFunction:
        """The loss function recorded, which the `Trainer` calls with the outputs of the model."""

        def recorded(outputs: Any, labels: Tensor | None, *rest: Any, **options: Any) -> Tensor:
            loss = function(outputs, labels, *rest, **options)
            self._after_loss(loss)
            return loss

        return recorded

    def _before_layer(self, layer: Any, args: tuple[Tensor, ...]) -> None:
        hidden = args[0]
        if self.step is not None:  # not in evaluation
            marks = [self._mark()]
            self.step.passes.append(marks)
            _on_gradient(hidden, lambda: marks.append(self._mark()))

    def _after_model(self, model: Any, args: Any, outputs: Any) -> None:
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs[0]
        if isinstance(loss, Tensor) and loss.dim() == 0:
            self._after_loss(loss)

    def _after_loss(self, loss: Tensor) -> None:
        if self.step is not None:
            marks = self.step.passes[-1]
            marks.append(self._mark())
            _on_gradient(loss, lambda: marks.append(self._mark()))


def _on_gradient(tensor: Tensor, action: Callable[[], None]) -> None:
    """Call `action` in the backward pass as soon as the gradient of `tensor` is computed."""
    tensor.register_hook(lambda _: action())  # type: ignore[no-untyped-call]


class Watch(TrainerCallback):  # type: ignore[misc]  # transformers is untyped here
    """Follows a run: its steps, its memory, its curve and its progress; stops it if it diverges.

    Args:
        evaluate: the held-out cross-entropy of a model in nats.

    Attributes:
        steps: the optimizer steps that are done.
        curve: (step, held-out cross-entropy).
        peak_memory: the most bytes in use during a step; `None` if the system does not say.
    """

    def __init__(
        self,
        steps: int,
        loss_times: LossTimes,
        device: torch.device,
        evaluate: Callable[[Any], float],
        progress: Progress,
    ) -> None:
        self._loss_times = loss_times
        self._clock, self._memory = Clock(device), PeakMemory(device)
        self._evaluate, self._progress = evaluate, progress
        self._look_every = max(1, steps // 100)  # because reading the loss waits for the device
        self._evaluate_at = {round(steps * i / CURVE_POINTS) for i in range(CURVE_POINTS + 1)}
        self.steps: list[Step] = []
        self.curve: list[tuple[int, float]] = []
        self.peak_memory: int | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._draw(0, kwargs["model"])

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._memory.reset()
        self._loss_times.step = Step(self._clock.mark())

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step, self._loss_times.step = cast(Step, self._loss_times.step), None
        step.end = self._clock.mark()
        self.steps.append(step)
        if (peak := self._memory.read()) is not None:
            self.peak_memory = max(peak, self.peak_memory or 0)
        done = state.global_step
        control.should_log = control.should_log or done % self._look_every == 0 or done == state.max_steps
        self._draw(done, kwargs["model"])

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        if "loss" in logs:  # the last entry has none
            self._progress(state.global_step, logs["loss"])
            if not np.isfinite(logs["loss"]):
                control.should_training_stop = True

    def _draw(self, step: int, model: Any) -> None:
        if step in self._evaluate_at:
            self.curve.append((step, self._evaluate(model)))

    def times(self) -> tuple[float, float]:
        """Medians over the steps: the seconds of a step, and the share spent in the loss and its gradient."""
        seconds = [self._clock.seconds(step.begin, step.end) for step in self.steps]
        in_loss = [
            sum(self._clock.seconds(*marks[:2]) + self._clock.seconds(*marks[2:]) for marks in step.passes)
            for step in self.steps
        ]
        return median(seconds), median(a / b for a, b in zip(in_loss, seconds, strict=True))
