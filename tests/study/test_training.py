from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

import nvamp.study.held_out
import nvamp.study.training
from nvamp.integrations.transformers.alignment import OwnLoss
from nvamp.study import StudyError
from nvamp.study.corpus import Corpus
from nvamp.study.held_out import score
from nvamp.study.losses import parse_loss
from nvamp.study.models import build_model, load_model
from nvamp.study.packing import noisy, plain
from nvamp.study.settings import Lora
from nvamp.study.training import Recipe, Run, install, train, training_arguments
from tests.study.conftest import dropping

CPU = torch.device("cpu")


def recipe(model_dir: Any, **changes: Any) -> Recipe:
    return Recipe(**{"steps": 12, "batch_size": 8, "lr": 1e-2, "model": str(model_dir), **changes})


def run(spec: str, recipe: Recipe, corpus: Corpus, seed: int = 0) -> tuple[Run, list[float]]:
    values: list[float] = []
    result = train(parse_loss(spec), seed, recipe, corpus, lambda step, value: values.append(value))
    return result, values


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the model is called with in training."""
    seen: list[dict[str, Any]] = []

    def watched(*args: Any) -> Any:
        model = build_model(*args)
        model.register_forward_pre_hook(
            lambda module, _, batch: seen.append({**batch}) if torch.is_grad_enabled() else None,
            with_kwargs=True,
        )
        return model

    monkeypatch.setattr(nvamp.study.training, "build_model", watched)
    return seen


def test_ce_is_what_the_trainer_does_by_itself(corpus: Corpus, model_dir: Any) -> None:
    ours, values = run("ce", recipe(model_dir), corpus)
    assert ours.logits_because is None

    transformers.set_seed(0)
    model = build_model(str(model_dir), corpus)
    arguments = training_arguments(recipe(model_dir), 0, CPU, "unused")
    arguments.logging_strategy, arguments.logging_steps = "steps", 1
    trainer = transformers.Trainer(model, arguments, train_dataset=corpus.training)
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()

    by_itself = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    np.testing.assert_allclose(values, by_itself, rtol=1e-5)
    assert values[-1] < values[0] - 0.1
    expected = score(model, corpus.evaluation).nll
    np.testing.assert_allclose(ours.nll, expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(ours.scores.labels, corpus.held_out[:, 1:].reshape(-1))


def test_no_logits_exist_in_a_run(corpus: Corpus, model_dir: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    classes = len(corpus.tokenizer)
    linear, seen = torch.nn.functional.linear, []

    def recorded(hidden: Tensor, weight: Tensor, *rest: Any) -> Tensor:
        seen.append(len(weight))
        return linear(hidden, weight, *rest)

    def built(*args: Any) -> Any:
        model = build_model(*args)  # which looks at logits of its own
        seen.clear()
        return model

    monkeypatch.setattr(torch.nn.functional, "linear", recorded)
    monkeypatch.setattr(nvamp.study.training, "build_model", built)
    monkeypatch.setattr(nvamp.study.training, "own_loss", lambda model: OwnLoss(True, True))  # the same
    result, _ = run("nvamp", recipe(model_dir, steps=2), corpus)
    assert seen
    assert classes not in seen
    assert type(result.model).__module__.startswith("transformers.")
    result.model(input_ids=corpus.held_out[:1])
    assert classes in seen


def test_a_model_that_needs_its_logits_trains_with_them(
    corpus: Corpus, model_dir: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def odd(*args: Any) -> Any:
        model = build_model(*args)
        layer = model.lm_head

        class Softened(torch.nn.Linear):
            def forward(self, hidden: Tensor) -> Tensor:
                return super().forward(hidden) + 0 * hidden.sum()

        layer.__class__ = Softened
        return model

    linear, values = run("nvamp:gradient=token", recipe(model_dir), corpus)
    monkeypatch.setattr(nvamp.study.training, "build_model", odd)
    logits, others = run("nvamp:gradient=token", recipe(model_dir), corpus)
    assert logits.logits_because is not None
    assert logits.logits_because.startswith("the output layer of LlamaForCausalLM must be a plain torch.nn.")
    assert logits.logits_because.endswith(".Softened")
    np.testing.assert_allclose(values, others, rtol=1e-4)
    np.testing.assert_allclose(linear.nll, logits.nll, rtol=1e-3, atol=1e-3)
    assert 0 < logits.loss_share < 1


def test_a_model_whose_labels_are_not_the_next_tokens_is_not_patched(corpus: Corpus) -> None:
    config = transformers.BartConfig(
        vocab_size=len(corpus.tokenizer), d_model=16, decoder_layers=1, decoder_attention_heads=2,
        decoder_ffn_dim=16, max_position_embeddings=32, is_decoder=True, is_encoder_decoder=False,
    )  # fmt: skip
    model = transformers.BartForCausalLM(config)
    assert install(parse_loss("ce"), model) == "the loss of BartForCausalLM is not that of the next token"
    assert type(model) is transformers.BartForCausalLM


def test_held_out_scores_by_definition(corpus: Corpus, model_dir: Any) -> None:
    model = build_model(str(model_dir), corpus)
    blocks = corpus.held_out.clone()
    labels = blocks.clone()
    labels[:, 5:9] = -100
    examples = [{"input_ids": x, "labels": y} for x, y in zip(blocks, labels, strict=True)]
    with torch.no_grad():
        log_p = model(input_ids=blocks).logits[:, :-1].double().log_softmax(-1)
    counted = labels[:, 1:] != -100
    log_p, expected = log_p[counted], labels[:, 1:][counted]
    for patched in (False, True):
        if patched:
            assert install(parse_loss("dft:label_smoothing=0.1"), model) is None
        found = score(model, examples)
        np.testing.assert_allclose(found.nll, -log_p.gather(1, expected[:, None])[:, 0], rtol=1e-5)
        np.testing.assert_array_equal(found.prediction, log_p.argmax(-1))
        np.testing.assert_array_equal(found.correct, log_p.argmax(-1) == expected)
        np.testing.assert_array_equal(found.labels, expected)
        np.testing.assert_allclose(found.confidence, log_p.exp().amax(-1), rtol=1e-5)
        np.testing.assert_allclose(found.entropy, -(log_p.exp() * log_p).sum(-1), rtol=1e-5)


def test_held_out_blocks_longer_than_a_batch(
    corpus: Corpus, model_dir: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_model(str(model_dir), corpus)
    expected = score(model, corpus.evaluation)
    monkeypatch.setattr(nvamp.study.held_out, "BATCH_TOKENS", 8)
    found = score(model, corpus.evaluation)
    np.testing.assert_allclose(found.nll, expected.nll, rtol=1e-5)
    np.testing.assert_array_equal(found.labels, expected.labels)


def test_held_out_scores_in_bfloat16(corpus: Corpus, model_dir: Any) -> None:
    model = build_model(str(model_dir), corpus)
    exact, rounded = (score(model, corpus.evaluation, bf16).nll for bf16 in (False, True))
    assert 0 < np.abs(rounded - exact).max() < 0.1
    assert rounded.dtype == np.float32


def test_position_ids_reach_the_model(corpus: Corpus, model_dir: Any) -> None:
    model = build_model(str(model_dir), corpus)
    block = corpus.held_out[0]
    twice = {"input_ids": torch.cat((block[:8], block[:8])), "labels": torch.cat((block[:8], block[:8]))}
    packed = {**twice, "position_ids": torch.arange(8).repeat(2)}
    alone = score(model, plain(block[None, :8])).nll
    np.testing.assert_allclose(score(model, [packed]).nll[8:], alone, rtol=1e-5)
    assert np.abs(score(model, [twice]).nll[8:] - alone).max() > 1e-4


def test_scoring_leaves_random_numbers_and_modes_alone(corpus: Corpus) -> None:
    model = dropping(len(corpus.tokenizer))
    before = torch.random.get_rng_state()
    found = score(model, corpus.evaluation).nll
    assert torch.equal(before, torch.random.get_rng_state())
    assert model.training
    np.testing.assert_array_equal(found, score(model.eval(), corpus.evaluation).nll)
    model.train()
    assert install(parse_loss("ce"), model) is None
    assert torch.equal(before, torch.random.get_rng_state())


def test_the_recipe(tmp_path: Path) -> None:
    arguments = training_arguments(Recipe(105, 8, 1e-3), 7, CPU, str(tmp_path))
    assert (arguments.optim, arguments.weight_decay) == ("adamw_torch_fused", 0)
    assert (arguments.lr_scheduler_type, arguments.warmup_steps) == ("cosine", 10)
    assert (arguments.learning_rate, arguments.max_grad_norm) == (1e-3, 1.0)
    assert (arguments.max_steps, arguments.per_device_train_batch_size, arguments.seed) == (105, 8, 7)
    assert arguments.gradient_accumulation_steps == 1
    assert not arguments.bf16


def test_held_out_losses_are_plain_whatever_the_training(corpus: Corpus, model_dir: Any) -> None:
    ours, values = run("ce:label_smoothing=0.5", recipe(model_dir), corpus)
    plain, _ = run("ce", recipe(model_dir), corpus)
    expected = score(ours.model, corpus.evaluation).nll
    np.testing.assert_allclose(ours.nll, expected, rtol=1e-5)
    assert ours.curve[0] == plain.curve[0]  # before the first step
    assert ours.curve[-1] != plain.curve[-1]
    assert values[0] != pytest.approx(ours.curve[0][1], abs=1e-3)


def test_the_same_run_twice_is_the_same(corpus: Corpus, model_dir: Any) -> None:
    (first, values), (again, values_again) = (
        run("nvamp:gradient=token", recipe(model_dir, noise=0.3), corpus) for _ in range(2)
    )
    assert values == values_again
    assert first.curve == again.curve
    np.testing.assert_array_equal(first.nll, again.nll)
    assert [step for step, _ in first.curve] == [0, 1, 2, 4, 5, 6, 7, 8, 10, 11, 12]


def test_another_seed_is_another_run(corpus: Corpus, model_dir: Any) -> None:
    assert run("ce", recipe(model_dir), corpus, seed=0)[1] != run("ce", recipe(model_dir), corpus, seed=1)[1]


def test_only_the_loss_differs_between_losses(
    corpus: Corpus, model_dir: Any, batches: list[dict[str, Any]]
) -> None:
    # Enough steps for a second pass over the blocks, where a drifting random state would show.
    epoch = len(corpus.train) // 8
    for spec in ("ce", "nvamp:gradient=token"):
        run(spec, recipe(model_dir, steps=2 * epoch, noise=0.5), corpus, seed=3)
    labels = torch.stack([batch["labels"] for batch in batches])
    assert len(labels) == 4 * epoch
    assert torch.equal(labels[: 2 * epoch], labels[2 * epoch :])
    assert not torch.equal(labels[0], labels[epoch])


def test_the_built_in_model_starts_from_the_seed(corpus: Corpus) -> None:
    short = Recipe(1, 8, 1e-3)
    starts = [run(spec, short, corpus, seed)[0].curve[0] for spec, seed in (("ce", 0), ("dft", 0), ("ce", 1))]
    assert starts[0] == starts[1] != starts[2]


@pytest.mark.parametrize("noise", [0.0, 0.25, 1.0])
def test_noise_replaces_its_share_of_labels_and_no_input(noise: float) -> None:
    blocks = plain(torch.full((400, 50), 7))
    data = noisy(blocks, 1000, noise, seed=1)
    labels = torch.stack([data[i]["labels"] for i in range(len(data))])
    assert torch.equal(labels, noisy(blocks, 1000, noise, seed=1).labels)
    inputs = torch.stack([data[i]["input_ids"] for i in range(len(data))])
    assert torch.equal(inputs, torch.full((400, 50), 7))
    replaced = labels[labels != 7]
    # Four standard errors of 20,000 draws.
    assert (
        abs(len(replaced) / labels.numel() - noise * 0.999)
        <= 4 * (noise * (1 - noise * 0.999) / 20_000) ** 0.5
    )
    if noise:
        assert abs(replaced.double().mean().item() - 499.5) < 4 * 289 / len(replaced) ** 0.5
        assert not torch.equal(labels, noisy(blocks, 1000, noise, seed=2).labels)


def test_a_diverged_run_stops_and_says_so(corpus: Corpus, model_dir: Any) -> None:
    huge = recipe(model_dir, lr=1e30)
    result, values = run("ce", huge, corpus)
    assert result.diverged
    assert 1 < result.steps < 12
    assert len(values) == result.steps
    assert not np.isfinite(values[-1])
    assert not run("ce", recipe(model_dir), corpus)[0].diverged


def test_accumulated_batches_are_one_step(corpus: Corpus, model_dir: Any) -> None:
    _, expected = run("ce", recipe(model_dir), corpus)
    result, values = run("ce", recipe(model_dir, batch_size=4, accumulate=2), corpus)
    np.testing.assert_allclose(values, expected, rtol=1e-4)
    assert result.steps == 12
    assert 0 < result.loss_share < 1


def test_checkpointed_activations_are_computed_again(
    corpus: Corpus, model_dir: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def counted(*args: Any) -> Any:
        model = build_model(*args)
        model.model.layers[0].mlp.register_forward_pre_hook(
            lambda module, *_: calls.append(1) if module.training else None
        )
        return model

    monkeypatch.setattr(nvamp.study.training, "build_model", counted)
    _, expected = run("nvamp", recipe(model_dir, steps=3), corpus)
    without = len(calls)
    _, values = run("nvamp", recipe(model_dir, steps=3, gradient_checkpointing=True), corpus)
    np.testing.assert_allclose(values, expected, rtol=1e-5)
    assert len(calls) - without == without + 3


def test_a_model_that_cannot_checkpoint(
    corpus: Corpus, model_dir: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transformers.LlamaForCausalLM, "supports_gradient_checkpointing", False)
    with pytest.raises(StudyError, match=r"^--gradient-checkpointing: LlamaForCausalLM does not support it$"):
        run("ce", recipe(model_dir, gradient_checkpointing=True), corpus)


def test_adapters_are_trained_alone_and_merged(corpus: Corpus, model_dir: Any, tmp_path: Path) -> None:
    result, values = run("nvamp", recipe(model_dir, steps=30, lora=Lora(2, 8)), corpus)
    assert result.logits_because is None
    assert values[-1] < values[0]
    before = build_model(str(model_dir), corpus).state_dict()
    changed = {name for name, x in result.model.state_dict().items() if not torch.equal(x, before[name])}
    assert {name.split(".")[-2] for name in changed} == {
        *("q_proj", "k_proj", "v_proj", "o_proj"),
        *("gate_proj", "up_proj", "down_proj"),
    }
    difference = result.model.model.layers[0].mlp.up_proj.weight - before["model.layers.0.mlp.up_proj.weight"]
    assert torch.linalg.matrix_rank(difference.detach(), rtol=1e-3) == 2
    result.model.save_pretrained(tmp_path)
    saved = score(load_model(str(tmp_path)), corpus.evaluation).nll
    np.testing.assert_allclose(saved, result.nll, rtol=1e-5, atol=1e-6)
    assert result.curve[-1][1] == pytest.approx(saved.mean(), rel=1e-4)  # adapters, before they were merged


def test_adapters_start_from_the_seed(corpus: Corpus, model_dir: Any) -> None:
    lora = recipe(model_dir, lora=Lora(2, 4))
    first, again, other = (run("ce", lora, corpus, seed)[1] for seed in (0, 0, 1))
    assert first == again != other


@pytest.mark.parametrize(
    ("text", "lora"), [("8", Lora(8, 16)), ("8,4", Lora(8, 4)), ("16, 16", Lora(16, 16))]
)
def test_adapters_from_text(text: str, lora: Lora) -> None:
    assert Lora.parse(text) == lora == Lora.parse(str(lora))


@pytest.mark.parametrize("text", ["", "0", "-1", "8,", "8,0", "a", "8,8,8", "1.5"])
def test_no_adapters(text: str) -> None:
    with pytest.raises(StudyError, match=rf"^--lora {text}: expected r or r,alpha, such as 8 or 8,16$"):
        Lora.parse(text)


def test_a_learning_rate_of_the_losses_own(corpus: Corpus, model_dir: Any) -> None:
    _, expected = run("dft", recipe(model_dir), corpus)
    _, values = run("dft@0.01", recipe(model_dir, lr=1.0), corpus)
    assert values == expected


def test_a_criterion_of_ones_own(corpus: Corpus, model_dir: Any) -> None:
    loss = parse_loss("dft")
    _, expected = run("dft", recipe(model_dir), corpus)
    values: list[float] = []
    own = replace(loss, own=loss.criterion)
    result = train(own, 0, recipe(model_dir), corpus, lambda step, value: values.append(value))
    assert result.logits_because == "the criterion is one of logits"
    np.testing.assert_allclose(values, expected, rtol=1e-5)
