"""NVAMP as the loss of TRL's `SFTTrainer`."""

from typing import Any

import trl
from torch import Tensor

from nvamp.distributed import ranks_of
from nvamp.losses import TokenNVAMPLoss

__all__ = ["SFTTrainer"]


class SFTTrainer(trl.SFTTrainer):  # type: ignore[misc]  # trl is untyped here
    """TRL's `SFTTrainer` with a criterion.

    TRL's own forward gives the losses of the tokens without holding their logits, and what its metrics are
    computed from: entropy and accuracy are logged as always, and no forward comes in addition. That forward
    applies a model's softcap and scale of the logits, finds the scored tokens in each layout of a batch, and
    adds the auxiliary loss of a mixture of experts.

    Micro-batches and ranks add up as in `nvamp.integrations.transformers.compute_loss_func`.

    Args:
        criterion: what to compute of the losses of the tokens.

    The other arguments are those of `trl.SFTTrainer`.

    Raises:
        ValueError: `args.loss_type` is not "nll", the loss of a token that the criterion is of; or another
            option that would replace the criterion, sequence parallelism (Ulysses) among them.
        RuntimeError: from `compute_loss`, where TRL computed a loss without the criterion.

    Example:
        SFTTrainer(model, args=config, train_dataset=data, criterion=TokenNVAMPLoss())
    """

    def __init__(self, *args: Any, criterion: TokenNVAMPLoss, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.args.loss_type != "nll":
            raise ValueError(f"loss_type must be 'nll' with a criterion, got {self.args.loss_type!r}")
        if self.compute_loss_func is not None:
            raise ValueError("compute_loss_func and criterion exclude each other")
        if self.label_smoother is not None:
            raise ValueError(
                f"label_smoothing_factor must be 0 with a criterion, got {self.args.label_smoothing_factor}"
            )
        parallelism: Any = getattr(self.accelerator, "parallelism_config", None)
        if getattr(parallelism, "sp_enabled", False):  # TRL then trains the model's own loss
            raise ValueError(f"sp_size must be 1 with a criterion, got {parallelism.sp_size}")
        self.criterion = criterion

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """TRL's, with a model whose losses of tokens are made to add up to the criterion."""
        called = False

        def with_criterion(**kwargs: Any) -> Any:
            nonlocal called
            outputs = model(**kwargs)
            if kwargs.get("fused_lm_head"):
                outputs.log_probs = self._summing_up_to_the_criterion(outputs, num_items_in_batch)
                called = True
            return outputs

        loss = super().compute_loss(with_criterion, inputs, return_outputs, num_items_in_batch)
        if not called:
            raise RuntimeError(f"TRL {trl.__version__} computed a loss without calling the criterion")
        return loss

    def _summing_up_to_the_criterion(self, outputs: Any, num_items_in_batch: Any) -> Tensor:
        """What stands for `log_probs`, of which TRL divides the negative sum by the number of tokens."""
        tokens = num_items_in_batch
        if tokens is None:
            tokens = outputs.label_mask.sum()
        elif self.criterion.process_group is not None:
            tokens = tokens / ranks_of(self.criterion.process_group).size  # TRL multiplies by it
        loss = self.criterion(-outputs.log_probs, outputs.label_mask, num_items_in_batch=num_items_in_batch)
        total: Tensor = -loss * tokens
        return total
