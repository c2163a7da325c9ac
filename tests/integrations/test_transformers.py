"""The integration with the `Trainer`."""

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutput

from nvamp import NVAMPLoss
from nvamp.integrations.transformers import compute_loss_func
from nvamp.study.corpus import Corpus
from nvamp.study.losses import parse_loss
from nvamp.study.training import LabelledBlocks, Recipe, build_model, training_arguments


@pytest.mark.parametrize(
    "wrap", [lambda x: CausalLMOutput(logits=x), lambda x: {"logits": x}, lambda x: (x, "more")]
)
def test_logits_of_every_kind_of_output(wrap: Any) -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 5, 7), torch.randint(7, (2, 5))
    criterion = NVAMPLoss(gradient="token")
    loss = compute_loss_func(criterion)(wrap(logits), labels, num_items_in_batch=torch.tensor(11))
    torch.testing.assert_close(loss, criterion(logits, labels, num_items_in_batch=11), rtol=1e-6, atol=0)


def test_missing_labels_are_named() -> None:
    with pytest.raises(ValueError, match="a column named 'labels'"):
        compute_loss_func(NVAMPLoss())({"logits": torch.zeros(1, 2, 3)}, None)


def weights_after(model_dir: Any, corpus: Corpus, criterion: Any, batch: int, accumulate: int) -> Tensor:
    model = build_model(str(model_dir), corpus)
    arguments = training_arguments(
        Recipe(3, batch, 1e-2, model=str(model_dir)), 0, torch.device("cpu"), "unused"
    )
    arguments.gradient_accumulation_steps = accumulate
    transformers.Trainer(
        model,
        arguments,
        train_dataset=LabelledBlocks(corpus.train[:24], len(corpus.tokenizer), 0.0, 0),
        compute_loss_func=compute_loss_func(criterion),
    ).train()
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def test_micro_batches_add_up_to_the_batch(model_dir: Any, corpus: Corpus) -> None:
    criterion = parse_loss("ce").criterion
    whole = weights_after(model_dir, corpus, criterion, batch=8, accumulate=1)
    parts = weights_after(model_dir, corpus, criterion, batch=2, accumulate=4)
    torch.testing.assert_close(parts, whole, rtol=1e-3, atol=1e-5)


def test_the_model_computes_no_loss_of_its_own(
    model_dir: Any, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(*args: Any, **kwargs: Any) -> Tensor:
        raise AssertionError("the model computed its loss as well")

    monkeypatch.setattr(transformers.LlamaForCausalLM, "loss_function", property(lambda self: forbidden))
    seen: list[Tensor] = []

    def criterion(logits: Tensor, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        seen.append(torch.as_tensor(num_items_in_batch))
        return NVAMPLoss()(logits, labels, num_items_in_batch=num_items_in_batch)

    weights_after(model_dir, corpus, criterion, batch=4, accumulate=2)
    # Every token of the eight blocks of 16 of a step but the first of each.
    assert [int(items) for items in seen] == [8 * 15] * 6
