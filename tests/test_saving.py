"""A criterion inside a model: saved, loaded, copied, and sent to another process."""

import copy
import inspect
import multiprocessing
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nvamp import LinearNVAMPLoss, NVAMPLoss
from tests.models import HeadAndLoss

OPTIONS: dict[str, Any] = {
    "alpha": 0.5,
    "beta": 0.1,
    "gamma": 0.2,
    "eps": 1e-3,
    "ignore_index": -1,
    "gradient": "token",
    "shift": False,
    "label_smoothing": 0.1,
    "z_loss": 1e-3,
    "softcap": 5.0,
    "logit_scale": 0.5,
    "class_weight": torch.linspace(0, 3, 7),
    "backend": "chunked",
    "tail": 0.4,
}
OF_CLASS: dict[type, dict[str, Any]] = {
    NVAMPLoss: OPTIONS | {"inplace_backward": True},
    LinearNVAMPLoss: OPTIONS | {"accum_dtype": torch.float32},
}
HIDDEN = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([[3, -1, 0, 6, 2], [1, 1, 5, -1, 4]])


def trained(model: HeadAndLoss) -> list[Tensor]:
    """The loss and the gradients of the parameters."""
    loss = model(HIDDEN, LABELS)
    return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]


def in_another_process(model: HeadAndLoss) -> list[Tensor]:
    """What a new process, to which the model is sent, computes."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return [torch.from_numpy(x) for x in pool.apply(arrays, (model,))]


def arrays(model: HeadAndLoss) -> list[Any]:
    return [x.numpy() for x in trained(model)]


@pytest.fixture(params=OF_CLASS)
def model(request: pytest.FixtureRequest) -> HeadAndLoss:
    torch.manual_seed(0)
    return HeadAndLoss(request.param(**OF_CLASS[request.param]), 4, 7)


def test_a_state_dict_holds_nothing_of_a_criterion(model: HeadAndLoss, tmp_path: Path) -> None:
    """So that of a model with any criterion, or none, fits."""
    torch.save(model.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert set(state) == {"head.weight", "head.bias"}
    other = HeadAndLoss(type(model.criterion)(**OF_CLASS[type(model.criterion)]), 4, 7)
    nn.init.zeros_(other.head.weight)
    assert trained(other)[0] != trained(model)[0]
    other.load_state_dict(state, strict=True)
    torch.testing.assert_close(trained(other), trained(model), rtol=0, atol=0)


def through_a_file(model: HeadAndLoss, path: Path) -> HeadAndLoss:
    torch.save(model, path)
    loaded: HeadAndLoss = torch.load(path, weights_only=False)
    return loaded


@pytest.mark.parametrize(
    "copied",
    [
        lambda model, path: copy.deepcopy(model),
        lambda model, path: pickle.loads(pickle.dumps(model)),
        through_a_file,
    ],
    ids=["deepcopy", "pickle", "torch.save"],
)
def test_a_copy_is_the_same_model(
    copied: Callable[[HeadAndLoss, Path], HeadAndLoss], model: HeadAndLoss, tmp_path: Path
) -> None:
    model.criterion.gamma = 0.3  # as a schedule does
    twin = copied(model, tmp_path / "model.pt")
    assert repr(twin) == repr(model)
    torch.testing.assert_close(trained(twin), trained(model), rtol=0, atol=0)
    twin.criterion.gamma = 0.0
    assert trained(twin)[0] != trained(model)[0]


@pytest.mark.parametrize("option", ["z_loss", "backend", "on_stats"])
def test_a_criterion_saved_before_an_option_existed(option: str, model: HeadAndLoss, tmp_path: Path) -> None:
    del model.criterion.__dict__[option]
    loaded = through_a_file(model, tmp_path / "model.pt").criterion
    assert getattr(loaded, option) == getattr(NVAMPLoss(), option)
    assert "gradient='token'" in repr(loaded)
    assert loaded.softcap == 5.0


def test_another_process_computes_the_same(model: HeadAndLoss) -> None:
    torch.testing.assert_close(in_another_process(model), trained(model), rtol=0, atol=1e-7)


@pytest.mark.parametrize("kind", OF_CLASS)
def test_options_are_all_of_them(kind: type) -> None:
    """All but those that name groups of processes or a function."""
    names = set(inspect.signature(kind).parameters)
    assert names - {"process_group", "vocab_group", "reduce_grad_hidden"} == set(OF_CLASS[kind])
