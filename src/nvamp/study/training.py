"""One run: the `Trainer` trains a model with one loss from one seed; held-out text gives its token losses."""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import Any, cast

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.data import Dataset
from transformers import TrainerCallback

from nvamp.functional import token_nll
from nvamp.integrations.transformers import LossFunction, compute_loss_func, logits_of
from nvamp.study.corpus import Corpus
from nvamp.study.losses import Loss
from nvamp.study.models import build_model, quiet
from nvamp.study.packing import IGNORED, Blocks

CURVE_POINTS = 10  # evaluations during a run, in addition to one before it
CURVE_TOKENS = 4096  # held-out tokens in each of these evaluations

# (optimizer steps done, value of the loss)
Progress = Callable[[int, float], None]


@dataclass(frozen=True)
class Recipe:
    """How a model is trained; the same for every loss.

    Attributes:
        noise: share of the training labels that are replaced by random tokens.
        model: a directory or hub id; `None` for the built-in model.
        bf16: run forward, backward and evaluation under bfloat16 autocast; weights and losses stay float32.
        scale: factor on the built-in model's width, heads and layers.
    """

    steps: int
    batch_size: int
    lr: float
    noise: float = 0.0
    model: str | None = None
    bf16: bool = False
    scale: int = 1


@dataclass(frozen=True)
class Run:
    """The outcome of a run.

    Attributes:
        model: the trained model.
        nll: held-out token losses in nats, [tokens] float32.
        correct: whether the likeliest token is the label, [tokens] bool.
        labels: the held-out labels, [tokens] int64.
        curve: (step, plain cross-entropy in nats on a slice of the held-out text).
        steps: optimizer steps done; fewer than requested if the run diverged.
        tokens_per_second: throughput of the median step.
        loss_share: share of a step's time spent in the loss and its gradient; the median over steps.
        seconds: training time, evaluations included.
    """

    model: Any
    nll: NDArray[np.float32]
    correct: NDArray[np.bool_]
    labels: NDArray[np.int64]
    curve: list[tuple[int, float]]
    steps: int
    tokens_per_second: float
    loss_share: float
    seconds: float

    @property
    def diverged(self) -> bool:
        return not bool(np.isfinite(self.nll).all())


class LabelledBlocks(Dataset[dict[str, Tensor]]):
    """Blocks [blocks, sequence] as inputs and as labels; random tokens replace some of the labels.

    `noise` is the probability that a label is replaced: one number, or a tensor [blocks, sequence]. The new
    token is uniform over the vocabulary. Labels of -100 stay, and positions are those to give to the model.
    """

    def __init__(
        self,
        blocks: Tensor,
        vocabulary: int,
        noise: float | Tensor,
        seed: int,
        labels: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> None:
        labels = blocks if labels is None else labels
        generator = torch.Generator().manual_seed(seed)
        replaced = torch.rand(blocks.shape, generator=generator) < noise
        tokens = torch.randint(vocabulary, blocks.shape, generator=generator)
        self.inputs = blocks
        self.labels = torch.where(replaced & (labels != IGNORED), tokens, labels)
        self.positions = positions

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        item = {"input_ids": self.inputs[index], "labels": self.labels[index]}
        return item if self.positions is None else {**item, "position_ids": self.positions[index]}


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


class TimedLoss:
    """A loss function that records when it and its gradient begin and end.

    Attributes:
        forward: (begin, end) of each call.
        backward: (begin, end) of each gradient: from the gradient of the loss to the gradient of the logits.
        last: the latest value, on its device.
    """

    def __init__(self, function: LossFunction, clock: Clock) -> None:
        self._function = function
        self._clock = clock
        self.forward: list[tuple[Any, Any]] = []
        self.backward: list[tuple[Any, Any]] = []
        self.last: Tensor | None = None

    def __call__(
        self, outputs: Any, labels: Tensor | None, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        begin = self._clock.mark()
        loss = self._function(outputs, labels, num_items_in_batch)
        self.forward.append((begin, self._clock.mark()))
        self.last = loss.detach()
        backward_begin: list[Any] = []
        _on_gradient(loss, lambda: backward_begin.append(self._clock.mark()))
        _on_gradient(
            logits_of(outputs), lambda: self.backward.append((backward_begin[0], self._clock.mark()))
        )
        return loss


def _on_gradient(tensor: Tensor, action: Callable[[], None]) -> None:
    """Call `action` in the backward pass as soon as the gradient of `tensor` is computed."""
    tensor.register_hook(lambda _: action())  # type: ignore[no-untyped-call]


class _Watch(TrainerCallback):  # type: ignore[misc]  # transformers is untyped here
    """Follows a run: times its steps, draws its curve, shows its progress, and stops it if it diverges."""

    def __init__(
        self, loss: TimedLoss, clock: Clock, steps: int, held_out: Blocks, progress: Progress
    ) -> None:
        self._loss = loss
        self._clock = clock
        self._held_out = held_out
        self._progress = progress
        self._look_every = max(1, steps // 100)  # because reading the loss waits for the device
        self._evaluate_at = {round(steps * i / CURVE_POINTS) for i in range(CURVE_POINTS + 1)}
        self._begin: Any = None
        self.steps: list[tuple[Any, Any]] = []
        self.curve: list[tuple[int, float]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._evaluate(0, kwargs["model"])
        self._begin = self._clock.mark()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step = state.global_step
        self.steps.append((self._begin, self._clock.mark()))
        if step % self._look_every == 0 or step == state.max_steps:
            value = cast(Tensor, self._loss.last).item()
            self._progress(step, value)
            if not np.isfinite(value):
                control.should_training_stop = True
        self._evaluate(step, kwargs["model"])
        self._begin = self._clock.mark()

    def _evaluate(self, step: int, model: Any) -> None:
        if step in self._evaluate_at:
            nll, _ = held_out_nll(model, self._held_out.inputs, self._held_out)
            self.curve.append((step, nll.mean(dtype=np.float64).item()))

    def times(self) -> tuple[float, float]:
        """Medians over the steps: the seconds of a step, and the share spent in the loss and its gradient."""
        seconds = [self._clock.seconds(*span) for span in self.steps]
        shares = [
            (self._clock.seconds(*forward) + self._clock.seconds(*backward)) / step
            for forward, backward, step in zip(self._loss.forward, self._loss.backward, seconds, strict=True)
        ]
        return median(seconds), median(shares)


def train(
    loss: Loss,
    seed: int,
    recipe: Recipe,
    corpus: Corpus,
    progress: Progress,
    noise: Tensor | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> Run:
    """Train a fresh model with `loss`; `seed` and `recipe` alone determine everything else.

    Args:
        noise: the probability that each label is replaced, [blocks, sequence]; the recipe's if `None`.
        callbacks: further callbacks for the `Trainer`, to watch the run.
    """
    quiet()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    transformers.set_seed(seed)
    model = build_model(recipe.model, corpus, recipe.scale)
    vocabulary = min(len(corpus.tokenizer), model.config.get_text_config().vocab_size)
    data = LabelledBlocks(
        corpus.train,
        vocabulary,
        recipe.noise if noise is None else noise,
        seed,
        corpus.training.labels,
        corpus.training.positions,
    )
    clock = Clock(device)
    timed = TimedLoss(compute_loss_func(loss.criterion), clock)
    sequence = corpus.train.shape[1]
    watch = _Watch(timed, clock, recipe.steps, corpus.evaluation.spread(CURVE_TOKENS // sequence), progress)
    start = perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        trainer = transformers.Trainer(
            model,
            training_arguments(recipe, seed, device, scratch),
            train_dataset=data,
            compute_loss_func=timed,
            callbacks=[watch, *callbacks],
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
    seconds = perf_counter() - start
    step_seconds, share = watch.times()
    nll, correct = held_out_nll(model, corpus.held_out, corpus.evaluation)
    return Run(
        model=model,
        nll=nll,
        correct=correct,
        labels=corpus.evaluation.learned.numpy(),
        curve=watch.curve,
        steps=len(watch.steps),
        tokens_per_second=recipe.batch_size * sequence / step_seconds,
        loss_share=share,
        seconds=seconds,
    )


def training_arguments(recipe: Recipe, seed: int, device: torch.device, scratch: str) -> Any:
    """`TrainingArguments`: AdamW on float32 weights, 10% warm-up, then a cosine; clipping at norm 1."""
    return transformers.TrainingArguments(
        output_dir=scratch,
        max_steps=recipe.steps,
        per_device_train_batch_size=recipe.batch_size,
        learning_rate=recipe.lr,
        lr_scheduler_type="cosine",
        warmup_steps=recipe.steps // 10,
        max_grad_norm=1.0,
        seed=seed,
        dataloader_drop_last=True,  # every step has the same number of tokens
        dataloader_pin_memory=device.type == "cuda",
        use_cpu=device.type == "cpu",
        bf16=recipe.bf16,
        logging_strategy="no",
        logging_nan_inf_filter=False,  # it would wait for the device at every step
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


@torch.no_grad()
def held_out_nll(
    model: Any, blocks: Tensor, marks: Blocks | None = None
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """The plain losses of the tokens of `blocks` [blocks, sequence], except the first token of each block.

    Args:
        marks: which of the tokens count, and their positions; all of them if `None`.

    Returns:
        The losses in nats, [tokens] float32; and whether the likeliest token was right, [tokens] bool.
    """
    model.eval()
    device = next(model.parameters()).device
    losses: list[Tensor] = []
    hits: list[Tensor] = []
    marks = marks or Blocks(blocks, blocks)
    for begin in range(0, len(marks), 16):
        batch = {name: value.to(device) for name, value in marks[begin : begin + 16].items()}
        labels = pad(batch.pop("labels")[:, 1:], (0, 1), value=-100)  # of the next position
        nll, metrics = token_nll(model(**batch, use_cache=False).logits, labels, return_metrics=True)
        losses.append(nll[labels != IGNORED].float().cpu())
        hits.append(metrics.correct[labels != IGNORED].cpu())
    return torch.cat(losses).numpy(), torch.cat(hits).numpy()
