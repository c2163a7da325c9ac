"""One run: the `Trainer` trains a model with one loss from one seed; held-out text gives its token losses."""

import gc
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from time import perf_counter
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from transformers import TrainerCallback

from nvamp.integrations.modes import in_mode
from nvamp.integrations.transformers import compute_loss_func, patch, unpatch
from nvamp.integrations.transformers.alignment import own_loss
from nvamp.study import StudyError
from nvamp.study.corpus import Corpus
from nvamp.study.generation import generation_metrics
from nvamp.study.held_out import Examples, TokenScores, score
from nvamp.study.losses import Loss
from nvamp.study.models import build_model, quiet
from nvamp.study.packing import noisy
from nvamp.study.settings import Lora
from nvamp.study.watching import Clock, LossTimes, Progress, Watch

CURVE_TOKENS = 4096  # held-out tokens in each evaluation during a run


@dataclass(frozen=True)
class Recipe:
    """How a model is trained; the same for every loss.

    Attributes:
        noise: share of the training labels that are replaced by random tokens.
        generate: the most held-out prompts to complete after training.
        model: a directory or hub id; `None` for the built-in model.
        bf16: run forward, backward and evaluation under bfloat16 autocast; weights and losses stay float32.
        scale: factor on the built-in model's width, heads and layers.
        accumulate: how many batches, each with a forward and a backward of its own, make a step.
        gradient_checkpointing: compute activations again in the backward instead of keeping them.
        lora: train adapters instead of all weights, and merge them at the end.
    """

    steps: int
    batch_size: int
    lr: float
    noise: float = 0.0
    model: str | None = None
    bf16: bool = False
    scale: int = 1
    accumulate: int = 1
    gradient_checkpointing: bool = False
    lora: Lora | None = None
    generate: int = 0


@dataclass(frozen=True)
class Run:
    """The outcome of a run.

    Attributes:
        model: the trained model.
        scores: of the held-out text under it.
        asked: the metrics of completions and of another text, if these were asked for.
        curve: (step, plain cross-entropy in nats on a slice of the held-out text).
        steps: optimizer steps done; fewer than requested if the run diverged.
        tokens_per_second: throughput of the median step.
        loss_share: share of a step's time spent in the output layer, the loss and their gradients; the
            median over steps.
        seconds: training time, evaluations included.
        peak_memory: the most bytes in use during a step, as `nvamp.study.watching.PeakMemory` says.
        logits_because: why the model computed its logits; `None` if it did not.
    """

    model: Any
    scores: TokenScores
    asked: dict[str, float]
    curve: list[tuple[int, float]]
    steps: int
    tokens_per_second: float
    loss_share: float
    seconds: float
    peak_memory: int | None
    logits_because: str | None

    @property
    def nll(self) -> NDArray[np.float32]:
        """Held-out token losses in nats, [tokens]."""
        return self.scores.nll

    @property
    def diverged(self) -> bool:
        return not bool(np.isfinite(self.nll).all())


def train(
    loss: Loss,
    seed: int,
    recipe: Recipe,
    corpus: Corpus,
    progress: Progress,
    callbacks: Sequence[TrainerCallback] = (),
) -> Run:
    """Train a fresh model with `loss`; `seed` and `recipe` alone determine everything else.

    A learning rate of the loss's own takes the place of the recipe's.

    Args:
        callbacks: further callbacks for the `Trainer`, to watch the run.
    """
    quiet()
    gc.collect()  # what is left of an earlier run would count as memory of this one
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    transformers.set_seed(seed)
    model = base = build_model(recipe.model, corpus, recipe.scale)
    if recipe.gradient_checkpointing:
        _checkpoint(base)
    if recipe.lora:
        model = recipe.lora.adapt(base)
    vocabulary = min(len(corpus.tokenizer), model.config.get_text_config().vocab_size)
    data = noisy(corpus.training, vocabulary, recipe.noise, seed)
    logits_because = install(loss, base)
    loss_times = LossTimes(base, Clock(device))
    sequence = corpus.train.shape[1]
    few = corpus.evaluation.spread(CURVE_TOKENS // sequence)
    evaluate = partial(_cross_entropy, few, recipe.bf16)
    watch = Watch(recipe.steps, loss_times, device, evaluate, progress)
    before = _cross_entropy(corpus.also, recipe.bf16, base.to(device)) if corpus.also else None
    start = perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        trainer = transformers.Trainer(
            model,
            training_arguments(replace(recipe, lr=loss.lr or recipe.lr), seed, device, scratch),
            train_dataset=data,
            compute_loss_func=logits_because and loss_times.of(compute_loss_func(loss.criterion)),
            callbacks=[watch, *callbacks],
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
    seconds = perf_counter() - start
    loss_times.remove()
    step_seconds, share = watch.times()
    trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)  # autocast is `score`'s from here on
    if recipe.lora:
        model.merge_and_unload()
    scores = score(base, corpus.evaluation, recipe.bf16)
    asked: dict[str, float] = {}
    if corpus.also and before is not None:
        after = _cross_entropy(corpus.also, recipe.bf16, base)
        asked |= {"also": after, "forgotten": after - before}
    unpatch(base)
    if recipe.generate:
        asked |= generation_metrics(base, corpus.tokenizer, corpus.prompts[: recipe.generate])
    return Run(
        model=base,
        scores=scores,
        asked=asked,
        curve=watch.curve,
        steps=len(watch.steps),
        tokens_per_second=recipe.accumulate * recipe.batch_size * sequence / step_seconds,
        loss_share=share,
        seconds=seconds,
        peak_memory=watch.peak_memory,
        logits_because=logits_because,
    )


def _checkpoint(model: Any) -> None:
    """Let the model compute activations again in the backward."""
    if not model.supports_gradient_checkpointing:
        raise StudyError(f"--gradient-checkpointing: {type(model).__name__} does not support it")
    # Its name now, and in earlier versions of transformers.
    names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
    enable = next(getattr(model, name) for name in names if hasattr(model, name))
    enable({"use_reentrant": False})


def install(loss: Loss, model: Any) -> str | None:
    """Let the model compute `loss` without logits; if it cannot, leave it as it is, and say why."""
    if loss.own:
        return "the criterion is one of logits"
    try:
        if not own_loss(model).shifts:
            raise TypeError(f"the loss of {type(model).__name__} is not that of the next token")
        patch(model, loss.linear)
        tokens = torch.arange(3, 9, device=model.device)[None]
        with torch.random.fork_rng(), torch.no_grad(), in_mode(model, True):
            model(input_ids=tokens, labels=tokens)
    except (NotImplementedError, TypeError, ValueError) as error:
        unpatch(model)
        return re.split(r": (?:use|unpatch) ", str(error))[0]  # the rest is for training loops
    return None


def _cross_entropy(examples: Examples, bf16: bool, model: Any) -> float:
    return float(score(model, examples, bf16).nll.mean(dtype=np.float64))


def training_arguments(recipe: Recipe, seed: int, device: torch.device, scratch: str) -> Any:
    """`TrainingArguments`: AdamW on float32 weights, 10% warm-up, then a cosine; clipping at norm 1."""
    return transformers.TrainingArguments(
        output_dir=scratch,
        max_steps=recipe.steps,
        per_device_train_batch_size=recipe.batch_size,
        gradient_accumulation_steps=recipe.accumulate,
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
