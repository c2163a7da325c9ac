"""torchtitan's own `Trainer`, steered to the CPU, with `TitanLoss` in its configuration."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tools.trainers.comparing import Outcome, Result, compare
from tools.trainers.ranks import on_ranks

VOCABULARY, LENGTH, STEPS = 2048, 32, 4


class Way(NamedTuple):
    """How the rows are trained on."""

    world: int
    batch: int  # of a rank
    parallelism: dict[str, int]
    chunked: bool = False


WAYS = {
    "one rank": Way(1, 4, {}),
    "one rank, `ChunkedLossWrapper`": Way(1, 4, {}, chunked=True),
    "FSDP on 2 ranks": Way(2, 2, {"data_parallel_shard_degree": 2}),
    "DDP on 2 ranks": Way(2, 2, {"data_parallel_replicate_degree": 2, "data_parallel_shard_degree": 1}),
    "TP on 2 ranks": Way(2, 4, {"tensor_parallel_degree": 2}),
}


def results() -> Iterator[Result]:
    outcomes = on_ranks(1, every, 1) | on_ranks(2, every, 2)
    for name in WAYS:
        yield compare(name, partial(_outcome, outcomes, name))


def _outcome(outcomes: Any, name: str, objective: str | None) -> Outcome:
    return Outcome(*outcomes[name, objective])


def every(world: int) -> dict[tuple[str, str | None], tuple[Tensor, Tensor]]:
    """The outcomes of all that so many ranks train."""
    return {
        (name, objective): on_rank(way, objective)
        for name, way in WAYS.items()
        if way.world == world
        for objective in (None, "ce", "nvamp")
    }


class Cpu:
    """The CPU as the accelerator that torchtitan asks for."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cpu, name)

    def get_device_name(self, device: Any) -> str:
        return "cpu"

    def current_device(self) -> int:
        return 0

    def get_device_properties(self, device: Any) -> Any:
        return SimpleNamespace(total_memory=1)

    def memory_stats(self, device: Any) -> dict[str, int]:
        return {}

    def reset_peak_memory_stats(self) -> None: ...

    def empty_cache(self) -> None: ...


def on_rank(way: Way, objective: str | None) -> tuple[Tensor, Tensor]:
    """The losses that the trainer logs and the change of the weights."""
    from torch.distributed.fsdp import FSDPModule
    from torchtitan.tools import utils

    # Before anything else of torchtitan, which copies them.
    utils.device_type, utils.device_module = "cpu", Cpu()
    from torchtitan.components.checkpoint import CheckpointManager
    from torchtitan.components.dataloader import BaseDataLoader
    from torchtitan.components.loss import ChunkedLossWrapper, CrossEntropyLoss
    from torchtitan.components.metrics import MetricsProcessor
    from torchtitan.components.optimizer import LRSchedulersContainer, default_adamw
    from torchtitan.components.tokenizer import BaseTokenizer
    from torchtitan.config import ParallelismConfig, TrainingConfig
    from torchtitan.config.configs import DebugConfig
    from torchtitan.distributed import utils as dist_utils
    from torchtitan.models.common.attention import ScaledDotProductAttention
    from torchtitan.models.llama3 import model_registry
    from torchtitan.trainer import Trainer

    from nvamp.integrations.torchtitan import TitanLoss

    class Rows(BaseDataLoader):  # type: ignore[misc]  # torchtitan is untyped here
        """Random tokens, of which every row of the batch scores another number."""

        @dataclass(kw_only=True, slots=True)
        class Config(BaseDataLoader.Config):  # type: ignore[misc]
            pass

        def __init__(self, config: Any, *, dp_rank: int, local_batch_size: int, **kwargs: Any) -> None:
            self.rows = slice(dp_rank * local_batch_size, (dp_rank + 1) * local_batch_size)

        def __iter__(self) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
            g = torch.Generator().manual_seed(0)
            while True:
                tokens = torch.randint(VOCABULARY, (4, LENGTH + 1), generator=g)
                kept = torch.randint(2, LENGTH + 1, (4, 1), generator=g)
                labels = tokens[:, 1:].where(torch.arange(LENGTH) < kept, -100)
                positions = torch.arange(LENGTH).expand(4, LENGTH)
                yield (
                    {"input": tokens[self.rows, :-1], "positions": positions[self.rows].contiguous()},
                    labels[self.rows].contiguous(),
                )

        def state_dict(self) -> dict[str, Any]:
            return {}

        def load_state_dict(self, state: dict[str, Any]) -> None: ...

    class Words(BaseTokenizer):  # type: ignore[misc]
        """Nothing reads it."""

        @dataclass(kw_only=True, slots=True)
        class Config(BaseTokenizer.Config):  # type: ignore[misc]
            pass

        def __init__(self, config: Any, **kwargs: Any) -> None:
            super().__init__()

        def encode(self, *args: Any, **kwargs: Any) -> list[int]:
            return []

        def decode(self, *args: Any, **kwargs: Any) -> str:
            return ""

        def get_vocab_size(self) -> int:
            return VOCABULARY

    spec = model_registry("debugmodel")
    spec.model.layers = spec.model.layers[:2]
    for layer in spec.model.layers:  # flex attention has no gradient on a CPU
        layer.attention.inner_attention = ScaledDotProductAttention.Config()
    loss = CrossEntropyLoss.Config() if objective is None else TitanLoss.Config(loss=objective)
    logged: list[float] = []
    with TemporaryDirectory() as folder:
        config = Trainer.Config(
            model_spec=spec,
            dump_folder=folder,
            loss=ChunkedLossWrapper.Config(loss_fn=loss) if way.chunked else loss,
            # With so large an epsilon its step is in proportion to the gradient, whose size then shows.
            optimizer=default_adamw(lr=0.3, eps=1.0, weight_decay=0.0),
            training=TrainingConfig(
                local_batch_size=way.batch,
                seq_len=LENGTH,
                steps=STEPS,
                mixed_precision_param="float32",
                disable_cuda_graphs=True,
            ),
            lr_scheduler=LRSchedulersContainer.Config(warmup_steps=1),
            tokenizer=Words.Config(),
            dataloader=Rows.Config(),
            metrics=MetricsProcessor.Config(log_freq=1),
            parallelism=ParallelismConfig(spmd_backend="partial_dtensor", **way.parallelism),
            checkpoint=CheckpointManager.Config(enable=False),
            activation_checkpoint=None,
            debug=DebugConfig(seed=1),
        )
        trainer = Trainer(config)
        for module in trainer.model_parts[0].modules():
            if isinstance(module, FSDPModule):
                module.set_force_sum_reduction_for_comms(True)  # gloo cannot scale as it sums
        start = whole(trainer.model_parts[0])
        dist_utils.set_pg_timeouts = lambda **kwargs: None  # PyTorch 2.13 has no `set_timeout`
        trainer.metrics_processor.log = lambda step, loss, *args, **kwargs: logged.append(loss)
        trainer.train()
        return torch.tensor(logged), whole(trainer.model_parts[0]) - start


def whole(model: Any) -> Tensor:
    parts = (getattr(p, "full_tensor", lambda p=p: p)() for p in model.parameters())
    return torch.cat([part.detach().flatten() for part in parts])
