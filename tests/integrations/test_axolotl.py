"""The Axolotl plugin, called as `axolotl.train` calls it; on Axolotl's own base class where that is installed."""

import importlib
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pydantic
import pytest
import torch

from nvamp import Loss, NVAMPLoss
from nvamp.integrations.transformers import compute_loss_func
from nvamp.objectives import parse
from tests.integrations.tiny import LOGGED, Rows, assert_same, logged_losses, tiny, trainer_of, weights_of

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


def configuration(plugin: Any, **options: Any) -> Any:
    """Axolotl's, which derives from its own schema and from those of all plugins."""
    module_name, class_name = plugin.get_input_args().rsplit(".", 1)
    own = pydantic.create_model("AxolotlInputConfig", base_model=(str, ...))
    merged = type("Merged", (own, getattr(importlib.import_module(module_name), class_name)), {})
    return SimpleNamespace(**merged(base_model="tiny", **options).model_dump(exclude_none=True))


def trainer(folder: Path, loss: Any = None) -> Any:
    arguments = {"max_steps": 3, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    return trainer_of(tiny(), Rows(unequal=True), folder, arguments | LOGGED, compute_loss_func=loss)


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


def test_the_default_is_nvamp(plugin: Any, tmp_path: Path) -> None:
    made = trainer(tmp_path)
    plugin.post_trainer_create(configuration(plugin), made)
    g = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(2, 5, 7, generator=g), torch.randint(7, (2, 5), generator=g)
    assert made.compute_loss_func({"logits": logits}, labels) == NVAMPLoss()(logits, labels)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nvmap", "unknown objective 'nvmap'"),
        ("nvamp:gradient=tokens", "gradient must be one of"),
        ("focal:label_smoothing=2", "label_smoothing must be in"),
        ("token_weighted", "needs token_weight, but a Trainer gives compute_loss_func the labels"),
    ],
)
def test_a_wrong_text_is_an_error_of_the_configuration(text: str, message: str, plugin: Any) -> None:
    with pytest.raises(pydantic.ValidationError, match=f"(?s)nvamp_loss.*{message}"):
        configuration(plugin, nvamp_loss=text)


def test_a_second_loss_is_refused(plugin: Any, tmp_path: Path) -> None:
    made = trainer(tmp_path, loss=compute_loss_func(NVAMPLoss()))
    with pytest.raises(ValueError, match="already has a compute_loss_func"):
        plugin.post_trainer_create(configuration(plugin), made)


def test_the_example_is_a_configuration(plugin: Any) -> None:
    lines = Path("examples/axolotl.yml").read_text().splitlines()
    (text,) = (line.removeprefix("nvamp_loss: ") for line in lines if line.startswith("nvamp_"))
    assert configuration(plugin, nvamp_loss=text).nvamp_loss == text
