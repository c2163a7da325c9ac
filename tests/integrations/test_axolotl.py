"""The Axolotl plugin, called as `axolotl.train` calls it; on Axolotl's own base class where that is installed."""

import importlib
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import peft
import pydantic
import pytest
import transformers

from nvamp import Loss, NVAMPLoss
from nvamp.integrations.transformers import compute_loss_func
from nvamp.objectives import parse
from tests.integrations.tiny import (
    LOGGED,
    SEQ,
    Rows,
    V,
    assert_same,
    logged_losses,
    tiny,
    trainer_of,
    weights_of,
)

PLUGIN = "nvamp.integrations.axolotl.NVAMPPlugin"


class BasePlugin:
    """Of `axolotl.integrations.base`: what this plugin overrides, and a hook that it does not."""

    def get_input_args(self) -> str | None: ...

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None: ...

    def post_model_load(self, cfg: Any, model: Any) -> None: ...


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Loaded by its name, as Axolotl does."""
    try:
        importlib.import_module("axolotl.integrations.base")
    except ModuleNotFoundError:
        for name in ("axolotl", "axolotl.integrations", "axolotl.integrations.base"):
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
        monkeypatch.setattr(sys.modules["axolotl.integrations.base"], "BasePlugin", BasePlugin, raising=False)
    module_name, class_name = PLUGIN.rsplit(".", 1)
    return getattr(importlib.import_module(module_name), class_name)()


def configuration(plugin: Any, nvamp_loss: str | None = "nvamp", **options: Any) -> Any:
    """Axolotl's, which derives from its own schema and from those of all plugins."""
    module_name, class_name = plugin.get_input_args().rsplit(".", 1)
    own = pydantic.create_model("AxolotlInputConfig", base_model=(str, ...), rl=(str | None, None))
    merged = type("Merged", (own, getattr(importlib.import_module(module_name), class_name)), {})
    given = options if nvamp_loss is None else {"nvamp_loss": nvamp_loss, **options}
    return SimpleNamespace(**merged(base_model="tiny", **given).model_dump(exclude_none=True))


def trainer(folder: Path, loss: Any = None, model: Any = None, **options: Any) -> Any:
    arguments = {"max_steps": 3, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    arguments |= LOGGED | options
    return trainer_of(model or tiny(), Rows(unequal=True), folder, arguments, compute_loss_func=loss)


# What the configuration may say, and the criterion that this is.
LOSSES = {
    "nvamp:alpha=0.5,beta=0.3,gamma=0.1,gradient=token": NVAMPLoss(0.5, 0.3, 0.1, gradient="token"),
    "tail:share=0.2": Loss(parse("tail:share=0.2")),
    "dft:label_smoothing=0.1": Loss(parse("dft"), label_smoothing=0.1),
    "ce": None,  # the trainer's own
}


@pytest.mark.parametrize("text", LOSSES)
def test_the_plugin_trains(text: str, plugin: Any, tmp_path: Path) -> None:
    criterion = LOSSES[text]
    ours, theirs = trainer(tmp_path), trainer(tmp_path, criterion and compute_loss_func(criterion))
    plugin.post_model_load(configuration(plugin), ours.model)  # a hook it leaves to Axolotl
    plugin.post_trainer_create(configuration(plugin, nvamp_loss=text), ours)
    start = weights_of(ours.model)
    ours.train()
    theirs.train()
    assert_same(weights_of(ours.model) - start, weights_of(theirs.model) - start)
    assert_same(logged_losses(ours), logged_losses(theirs))
    assert "nvamp_dispersion" in ours.state.log_history[0]


def mixture() -> Any:
    """A mixture of experts with a router's loss as large as the cross-entropy."""
    transformers.set_seed(1)
    return transformers.MixtralForCausalLM(
        transformers.MixtralConfig(
            vocab_size=V,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            num_local_experts=4,
            max_position_embeddings=SEQ,
            output_router_logits=True,
            router_aux_loss_coef=1.0,
        )
    )


@pytest.mark.parametrize("adapted", [False, True])
def test_a_mixture_of_experts_keeps_the_loss_of_its_router(
    adapted: bool, plugin: Any, tmp_path: Path
) -> None:
    def made() -> Any:
        lora = peft.LoraConfig(target_modules=["q_proj", "v_proj"])
        return trainer(tmp_path, model=peft.get_peft_model(mixture(), lora) if adapted else mixture())

    ours, theirs = made(), made()
    plugin.post_trainer_create(configuration(plugin, nvamp_loss="ce"), ours)
    start = weights_of(ours.model)
    ours.train()
    theirs.train()
    assert_same(weights_of(ours.model) - start, weights_of(theirs.model) - start)
    assert_same(logged_losses(ours), logged_losses(theirs))
    assert "nvamp_dispersion" in ours.state.log_history[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nvmap", "unknown objective 'nvmap'"),
        ("nvamp:gradient=tokens", "gradient must be one of"),
        ("nvamp:alpha=-1", "alpha must be finite and at least 0, got -1"),
        ("focal:label_smoothing=2", "label_smoothing must be in"),
        ("token_weighted", "needs token_weight, but a Trainer gives compute_loss_func the labels"),
    ],
)
def test_a_wrong_text_is_an_error_of_the_configuration(text: str, message: str, plugin: Any) -> None:
    with pytest.raises(pydantic.ValidationError, match=f"(?s)nvamp_loss.*{message}"):
        configuration(plugin, nvamp_loss=text)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nvamp_alfa": 0.5}, "unknown options nvamp_alfa: the plugin's only one is nvamp_loss"),
        ({"nvamp_alpha": -1.0}, "unknown options nvamp_alpha"),
        ({"NVAMP_loss": "ce"}, "unknown options NVAMP_loss"),
        ({"nvamp_loss": None, "nvmap_loss": "ce"}, "nvamp_loss\n  Field required"),
        ({"rl": "dpo"}, "rl: dpo trains a loss of its own"),
        ({"reward_model": True}, "reward_model: True trains a loss of its own"),
    ],
)
def test_a_wrong_key_is_an_error_of_the_configuration(
    options: dict[str, Any], message: str, plugin: Any
) -> None:
    with pytest.raises(pydantic.ValidationError, match=message):
        configuration(plugin, **options)


def test_label_smoothing_of_the_trainer_is_refused(plugin: Any, tmp_path: Path) -> None:
    made = trainer(tmp_path, label_smoothing_factor=0.1)
    with pytest.raises(ValueError, match="already has a label_smoother"):
        plugin.post_trainer_create(configuration(plugin), made)


def test_a_second_loss_is_refused(plugin: Any, tmp_path: Path) -> None:
    made = trainer(tmp_path, loss=compute_loss_func(NVAMPLoss()))
    with pytest.raises(ValueError, match="already has a compute_loss_func"):
        plugin.post_trainer_create(configuration(plugin), made)


def test_the_example_is_a_configuration(plugin: Any) -> None:
    lines = Path("examples/axolotl.yml").read_text().splitlines()
    (text,) = (line.removeprefix("nvamp_loss: ") for line in lines if line.startswith("nvamp_"))
    assert configuration(plugin, nvamp_loss=text).nvamp_loss == text
