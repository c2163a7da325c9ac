"""Any objective as the loss of TRL's `SFTTrainer`."""

from typing import Any, cast

import trl
from torch import Tensor

from nvamp.apply import TokenInputs
from nvamp.distributed import ranks_of
from nvamp.integrations.columns import TOKEN_INPUTS, check_inputs, token_inputs
from nvamp.integrations.transformers.patching import installed_loss
from nvamp.losses import TokenLoss

__all__ = ["SFTTrainer"]


class SFTTrainer(trl.SFTTrainer):  # type: ignore[misc]  # trl is untyped here
    """TRL's `SFTTrainer` with a criterion.

    TRL's own forward computes the losses and entropies of the tokens without holding the logits, and the
    criterion takes them from there: TRL logs its metrics as always, and there is no second forward. TRL
    applies a model's softcap and scale of the logits, finds the scored tokens in each layout of a batch, and
    adds the auxiliary loss of a mixture of experts.

    Micro-batches and ranks add up as in `nvamp.integrations.transformers.compute_loss_func`.

    An objective may need columns of the batch: `token_weight`, `advantage`, `old_logprob`, `ref_logprob`,
    [B, S] like the labels. They are shifted together with `labels`, and must be shifted already if there are
    `shift_labels`. TRL's own collator and packing drop them, so they need `remove_unused_columns=False` in
    `args` and a `data_collator` that pads them.

    Args:
        criterion: computes the loss from the losses of the tokens.

    The other arguments are those of `trl.SFTTrainer`.

    Raises:
        TypeError: the criterion is no `TokenLoss`; or, from `compute_loss`, a column that it needs is not in
            the batch.
        ValueError: `args.loss_type` is not "nll", the loss of a token that the criterion needs; or another
            option would replace the criterion, such as sequence parallelism (Ulysses); or the model has a
            criterion of its own, from `patch` or `loss_function`.
        RuntimeError: from `compute_loss`, TRL computed a loss without the criterion.

    Example:
        SFTTrainer(model, args=config, train_dataset=data, criterion=TokenLoss(DFT()))
    """

    def __init__(self, *args: Any, criterion: TokenLoss, **kwargs: Any) -> None:
        given: object = criterion
        if not isinstance(given, TokenLoss):
            got = f"the class {given.__name__}" if isinstance(given, type) else type(given).__name__
            raise TypeError(f"criterion must be a TokenLoss, such as TokenLoss(NVAMP()), got {got}")
        super().__init__(*args, **kwargs)
        if installed_loss(self.model) is not None:
            raise ValueError(
                "the model has a criterion of its own, from patch or loss_function, which TRL would not "
                "call: give this trainer a model without one"
            )
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
        """TRL's, except that the losses of the tokens which it sums add up to the criterion."""
        own = token_inputs(inputs)
        check_inputs(self.criterion, own)
        if "shift_labels" not in inputs:  # TRL scores position t of the logits with label t+1
            own = cast(TokenInputs, {name: cast(Tensor, x)[..., 1:] for name, x in own.items()})
        called = False

        def with_criterion(**kwargs: Any) -> Any:
            nonlocal called
            outputs = model(**kwargs)
            if kwargs.get("fused_lm_head"):
                outputs.log_probs = self._adding_up_to_the_criterion(outputs, own, num_items_in_batch)
                called = True
            return outputs

        batch = {name: x for name, x in inputs.items() if name not in TOKEN_INPUTS}
        loss = super().compute_loss(with_criterion, batch, return_outputs, num_items_in_batch)
        if not called:
            raise RuntimeError(f"TRL {trl.__version__} computed a loss without calling the criterion")
        return loss

    def _adding_up_to_the_criterion(
        self, outputs: Any, inputs: TokenInputs, num_items_in_batch: Any
    ) -> Tensor:
        """What replaces `log_probs`: TRL divides its negative sum by the number of tokens."""
        tokens = num_items_in_batch
        if tokens is None:
            tokens = outputs.label_mask.sum()
        elif self.criterion.process_group is not None:
            tokens = tokens / ranks_of(self.criterion.process_group).size  # TRL multiplies by it
        loss = self.criterion(
            -outputs.log_probs,
            outputs.label_mask,
            num_items_in_batch,
            entropy=outputs.entropy,
            **inputs,
        )
        total: Tensor = -loss * tokens
        return total
