"""Models whose own loss scores a position against the label at the same place, as encoder-decoders do."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from nvamp import LinearLoss, LinearNVAMPLoss, Loss, NVAMPLoss
from nvamp.integrations.transformers import compute_loss_func, loss_function, patch, patching, unpatch
from nvamp.integrations.transformers.alignment import OwnLoss, loss_shifts, own_loss
from nvamp.integrations.transformers.deferred import DeferredLogits, Product
from nvamp.objectives import NVAMP, CrossEntropy, TokenWeighted
from nvamp.study.models import quiet
from tests.integrations.architectures import CONFIG, Architecture, batch_of, build
from tests.integrations.tiny import (
    CROSS_ENTROPY,
    DESCENT,
    Rows,
    assert_same,
    logged_losses,
    trainer_of,
    weights_of,
)
from tests.study.conftest import one_thread

__all__ = ["one_thread"]


def model_of(name: str, dtype: torch.dtype = torch.float64) -> Any:
    return build(Architecture(name, CONFIG.get(name, {}))).to(dtype)


# The probe ---------------------------------------------------------------------------------------------

# What the own loss of each does, and whether model.loss_function computes it.
OWN = {
    "LlamaForCausalLM": OwnLoss(shifts=True, is_loss_function=True),
    "MixtralForCausalLM": OwnLoss(shifts=True, is_loss_function=True),
    "CohereForCausalLM": OwnLoss(shifts=True, is_loss_function=True),
    "Qwen2AudioForConditionalGeneration": OwnLoss(shifts=True, is_loss_function=False),
    "T5GemmaForConditionalGeneration": OwnLoss(shifts=False, is_loss_function=True),
    "ModernBertForMaskedLM": OwnLoss(shifts=False, is_loss_function=True),
    **{
        name: OwnLoss(shifts=False, is_loss_function=False)
        for name in (
            "T5ForConditionalGeneration", "BartForConditionalGeneration", "BartForCausalLM",
            "MBartForConditionalGeneration", "WhisperForConditionalGeneration", "MarianMTModel",
            "PegasusForConditionalGeneration", "BlenderbotForConditionalGeneration", "XLMWithLMHeadModel",
            "XLNetLMHeadModel", "TrOCRForCausalLM", "BertForMaskedLM", "CpmAntForCausalLM", "VisionEncoderDecoderModel",
        )
    },
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OWN)
def test_the_probe(name: str, dtype: torch.dtype) -> None:
    assert own_loss(model_of(name, dtype)) == OWN[name]


def test_the_probe_leaves_the_model_as_it_was() -> None:
    model = model_of("T5ForConditionalGeneration")
    model.encoder.eval()
    model.loss_function = own = loss_function(NVAMPLoss(), None)
    modes = [module.training for module in model.modules()]
    before = torch.get_rng_state()
    own_loss(model)
    assert [module.training for module in model.modules()] == modes
    assert model.loss_function is own
    assert not model.lm_head._forward_hooks
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), before)
    del model._loss_function
    own_loss(model)
    assert "_loss_function" not in vars(model)


def test_a_loss_of_neither_is_refused() -> None:
    model = model_of("ProphetNetForCausalLM")
    with pytest.raises(
        TypeError, match="ProphetNetForCausalLM has a loss that is the mean cross-entropy nei"
    ):
        compute_loss_func(NVAMPLoss(), model)
    classifier = model_of("BertForSequenceClassification")
    with pytest.raises(TypeError, match="has the loss ForSequenceClassificationLoss, which cannot be probed"):
        patch(classifier, LinearNVAMPLoss())
    with pytest.raises(TypeError, match="neither of the next label nor of the label at the same place"):
        loss_shifts(Summed())


class Summed:
    """A model with a `loss_function` that sums."""

    @staticmethod
    def loss_function(logits: Tensor, labels: Tensor, vocab_size: int) -> Tensor:
        return nn.functional.cross_entropy(logits.mT, labels, reduction="sum")


# patch -------------------------------------------------------------------------------------------------

SAME = ["T5ForConditionalGeneration", "BartForConditionalGeneration", "T5GemmaForConditionalGeneration"]


@pytest.mark.parametrize("backend", ["chunked", "reference"])
@pytest.mark.parametrize("name", SAME)
def test_evaluation_has_the_loss_of_training(name: str, backend: str) -> None:
    """Before any training, and after."""
    model = model_of(name)
    if name.startswith("Bart"):
        model.final_logits_bias.copy_(torch.randn(99, generator=torch.Generator().manual_seed(0)))
    batch = batch_of(model)
    expected = {}
    for training in (True, False):  # T5Gemma's logits differ
        logits = model.train(training)(**batch).logits
        expected[training] = NVAMPLoss(shift=False)(logits, batch["labels"])
    for trained_first in (False, True):
        patch(model, LinearNVAMPLoss(backend=backend))
        for training in (True, False) if trained_first else (False, True):
            outputs = model.train(training)(**batch)
            torch.testing.assert_close(outputs.loss, expected[training], rtol=1e-12, atol=0)
            assert (outputs.logits is None) == training
        unpatch(model)


class WithAnother(LlamaForCausalLM):
    """A model with a second loss, which is a cross-entropy of something else."""

    def forward(self, labels: Any = None, **kwargs: Any) -> Any:
        outputs = super().forward(labels=labels, **kwargs)
        outputs.loss = outputs.loss + nn.functional.cross_entropy(torch.zeros(3, 5), torch.arange(3))
        return outputs


def test_another_cross_entropy_stays() -> None:
    config = model_of("LlamaForCausalLM").config
    model = WithAnother(config).double()
    batch = batch_of(model)
    logits = LlamaForCausalLM.forward(model, batch["input_ids"]).logits
    expected = NVAMPLoss()(logits, batch["labels"]) + torch.tensor(5.0).log()
    patch(model, LinearNVAMPLoss())
    for training in (False, True):
        loss = model.train(training)(**batch).loss
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)


def test_the_number_of_tokens_and_their_weights_reach_the_criterion() -> None:
    model = model_of("T5ForConditionalGeneration")
    batch = batch_of(model)
    labels = batch["labels"]
    weight = torch.rand(labels.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    nll = nn.functional.cross_entropy(model(**batch).logits.mT, labels, reduction="none")
    patch(model, LinearLoss(TokenWeighted()))
    for training in (True, False):
        loss = model.train(training)(**batch, token_weight=weight, num_items_in_batch=50).loss
        torch.testing.assert_close(loss, (weight * nll).sum() / 50, rtol=1e-12, atol=0)
    with pytest.raises(TypeError, match="a column 'token_weight' in the batch"):
        model(**batch)


def test_columns_go_with_the_labels_that_the_model_has_made() -> None:
    """Those of all places, or without the first if it shifts them."""
    column = torch.arange(6.0).view(2, 3)
    assert patching._like(torch.zeros(6), column).tolist() == [0, 1, 2, 3, 4, 5]
    assert patching._like(torch.zeros(4), column).tolist() == [1, 2, 4, 5]


def test_a_bias_is_of_the_layer_and_of_the_model() -> None:
    """Added before the logits are scaled and capped."""
    torch.manual_seed(0)
    layer, added, hidden = nn.Linear(4, 7).double(), torch.randn(1, 7).double(), torch.randn(2, 5, 4).double()
    labels = torch.randint(7, (2, 5))

    def loss_of(logits: Any) -> Tensor:
        logits = torch.tanh((logits + added) * 2 / 4) * 3
        return nn.functional.cross_entropy(logits[:, 1:].reshape(-1, 7), labels[:, 1:].flatten())

    criterion = patching._LinearModelLoss(LinearLoss(CrossEntropy()), True, False, None, True)
    run = patching._Call("a model", criterion, [layer], {})
    torch.testing.assert_close(
        loss_of(DeferredLogits((Product(hidden, layer),), run)), loss_of(layer(hidden)), rtol=1e-12, atol=0
    )


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["T5ForConditionalGeneration", "LlamaForCausalLM"])
def test_compiled(name: str, training: bool) -> None:
    """The graph breaks only if the model computes the loss itself."""
    model = model_of(name).train(training)
    batch = batch_of(model)
    causal = name == "LlamaForCausalLM"
    expected = NVAMPLoss(shift=causal)(model(**batch).logits, batch["labels"])
    patch(model, LinearNVAMPLoss())
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=causal)
    for _ in range(2):
        torch.testing.assert_close(compiled(**batch).loss, expected, rtol=1e-12, atol=0)
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("of", "operation"),
    [
        (lambda x, y: nn.functional.cross_entropy(x.view(-1, 99), y, label_smoothing=0.1), "cross_entropy"),
        (lambda x, y: nn.functional.cross_entropy(x.view(-1, 99), y, reduction="sum"), "cross_entropy"),
        (lambda x, y: nn.functional.cross_entropy(x.view(-1, 99), y, torch.ones(99)), "cross_entropy"),
        (lambda x, y: nn.functional.cross_entropy(x, y.view(2, 9)), "cross_entropy"),
        (lambda x, y: x.view(2, -1).sum(), r"view to \(2, -1\)"),
        (lambda x, y: x[..., :5].sum(), "getitem"),
        (lambda x, y: x[:, :, 3].sum(), "getitem"),
        (lambda x, y: (x * 2 + torch.ones(99)).sum(), "add"),
        (lambda x, y: (x + torch.ones(9, 1)).sum(), "add"),
        (lambda x, y: nn.functional.cross_entropy((x.tanh() * 0).view(-1, 99), y), r"\* 0"),
        (lambda x, y: nn.functional.cross_entropy(x.tanh().tanh().view(-1, 99), y), "tanh after tanh"),
    ],
)
def test_what_is_no_plain_cross_entropy_is_refused(of: Any, operation: str) -> None:
    model = model_of("LlamaForCausalLM")
    batch = batch_of(model)
    patch(model, LinearNVAMPLoss())
    with pytest.MonkeyPatch.context() as m:
        m.setattr(
            type(model.loss_function),
            "__call__",
            lambda self, logits, labels, **_: of(logits, labels.view(-1)),
        )
        with pytest.raises(NotImplementedError, match=f"needs its logits for '{operation}'"):
            model(**batch)


# The Trainer -------------------------------------------------------------------------------------------


def trained(
    name: str, way: str, folder: Path, criterion: dict[str, Any], accumulate: int = 1
) -> tuple[Tensor, Tensor, float]:
    """By how much three steps move the model, the losses they log, and the loss in evaluation."""
    quiet()
    model = model_of(name, torch.float32)
    start = weights_of(model)
    rows = Rows(unequal=True)
    loss = None
    match way:
        case "patch":
            patch(model, LinearNVAMPLoss(**criterion))
        case "loss_function":
            model.loss_function = loss_function(NVAMPLoss(**criterion), model)
        case "compute_loss_func":
            loss = compute_loss_func(NVAMPLoss(**criterion), model)
        case "compute_loss_func, without the model":
            loss = compute_loss_func(NVAMPLoss(**criterion))
    arguments = {
        "max_steps": 3, "per_device_train_batch_size": 8 // accumulate,
        "gradient_accumulation_steps": accumulate, **DESCENT,
    }  # fmt: skip

    def collate(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        # What the decoder reads: without labels, as under compute_loss_func, the model does not make it of them.
        if model.config.is_encoder_decoder:
            batch["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(batch["labels"])
        return batch

    trainer = trainer_of(
        model, rows, folder, arguments, eval_dataset=rows, compute_loss_func=loss, data_collator=collate
    )
    trainer.train()
    evaluated: float = trainer.evaluate()["eval_loss"]
    return weights_of(model) - start, logged_losses(trainer), evaluated


WAYS = [
    ("T5ForConditionalGeneration", "patch"),
    ("T5ForConditionalGeneration", "compute_loss_func"),
    ("T5ForConditionalGeneration", "compute_loss_func, without the model"),
    ("BartForConditionalGeneration", "patch"),
    ("BartForConditionalGeneration", "compute_loss_func, without the model"),
    ("XLNetLMHeadModel", "compute_loss_func"),
    ("ModernBertForMaskedLM", "loss_function"),
    ("BertForMaskedLM", "compute_loss_func, without the model"),
    ("T5GemmaForConditionalGeneration", "patch"),
    ("T5GemmaForConditionalGeneration", "loss_function"),
]


@pytest.mark.parametrize(("name", "way"), WAYS)
def test_cross_entropy_is_the_models_own(name: str, way: str, tmp_path: Path) -> None:
    moved, logged, evaluated = trained(name, way, tmp_path, CROSS_ENTROPY)
    expected, expected_log, expected_evaluated = trained(name, "own", tmp_path, CROSS_ENTROPY)
    assert_same(moved, expected)
    assert_same(logged, expected_log)
    assert evaluated == pytest.approx(expected_evaluated, rel=1e-5)


def test_a_decoder_alone_has_to_be_given() -> None:
    """Its outputs are those of a causal model. The Trainer would count its tokens as a causal model's."""
    model = model_of("BartForCausalLM")
    batch = batch_of(model)
    outputs = model(**batch)
    loss = compute_loss_func(NVAMPLoss(**CROSS_ENTROPY), model)(outputs, batch["labels"])
    torch.testing.assert_close(loss, outputs.loss, rtol=1e-12, atol=0)


def test_every_way_and_number_of_micro_batches_trains_the_same(tmp_path: Path) -> None:
    """T5's own loss does not divide by the number of tokens of the step."""
    whole = trained("T5ForConditionalGeneration", "patch", tmp_path, CROSS_ENTROPY)
    for way in ("patch", "compute_loss_func"):
        parts = trained("T5ForConditionalGeneration", way, tmp_path, CROSS_ENTROPY, accumulate=2)
        assert_same(parts[0], whole[0])
        assert_same(parts[1], whole[1])


# What cannot train -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["T5ForConditionalGeneration", "XLMWithLMHeadModel", "BartForCausalLM"])
def test_loss_function_of_a_model_that_does_not_call_it_is_refused(name: str) -> None:
    with pytest.raises(TypeError, match=f"{name} computes its loss itself and ignores model.loss_function"):
        loss_function(NVAMPLoss(), model_of(name))


def test_a_criterion_that_shifts_by_itself_is_refused() -> None:
    model = model_of("T5ForConditionalGeneration")
    batch = batch_of(model)
    outputs = model(**batch)

    def shifting(logits: Tensor, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        return NVAMPLoss()(logits, labels)

    for given in (None, model):
        with pytest.raises(TypeError, match=r"need a Loss, got <function .*shifting"):
            compute_loss_func(shifting, given)(outputs, batch["labels"])
    loss = compute_loss_func(Loss(NVAMP()))(outputs, batch["labels"], 30)
    expected = Loss(NVAMP(), shift=False)(outputs.logits, batch["labels"], num_items_in_batch=30)
    assert loss == expected
    assert loss != Loss(CrossEntropy())(outputs.logits, batch["labels"], 30)
