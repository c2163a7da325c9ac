"""The examples of the documentation, as a user runs them."""

import importlib
import re
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from examples import exact_accumulation, grpo, lightning_module, trainer
from nvamp import LinearNVAMPLoss
from nvamp.objectives import NVAMP, Gradient
from tests.parameters import with_gradient
from tests.processes import python
from tests.study.conftest import documents, text_dir

__all__ = ["documents", "text_dir"]


@pytest.fixture
def problem() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(19, (2, 9), generator=g)
    labels[0, :4] = -100
    return torch.randn(2, 9, 5, dtype=torch.float64, generator=g), labels


@with_gradient
def test_two_passes_are_the_whole_batch(gradient: Gradient, problem: tuple[Tensor, Tensor]) -> None:
    x, labels = problem
    x, labels = x.flatten(0, 1), labels.flatten()
    body, head = nn.Linear(5, 5, dtype=torch.float64), nn.Linear(5, 19, bias=False, dtype=torch.float64)
    parameters = [*body.parameters(), *head.parameters()]
    criterion = LinearNVAMPLoss(gradient=gradient, gamma=0.5, shift=False)
    whole = torch.autograd.grad(criterion(body(x), head.weight, labels), parameters)
    batch = list(zip(x.split(5), labels.split(5), strict=True))  # of unequal size
    exact_accumulation.accumulate(body, head, batch, NVAMP(gradient=gradient, gamma=0.5))
    torch.testing.assert_close([p.grad for p in parameters], list(whole), rtol=1e-10, atol=1e-12)


def test_the_example_of_accumulation_runs(capsys: pytest.CaptureFixture[str]) -> None:
    exact_accumulation.main()
    one_pass, two_passes = (float(line.split("off by ")[1]) for line in capsys.readouterr().out.splitlines())
    assert two_passes < 1e-5 < one_pass


@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated")
@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize(
    "name",
    [
        "accelerate_loop",
        "lightning_module",
        pytest.param(
            "torchtitan_loss",
            marks=pytest.mark.skipif(sys.version_info < (3, 11), reason="torchtitan needs Python 3.11"),
        ),
        "trl_sft",
    ],
)
def test_examples_of_trainers_run(
    name: str,
    text_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    command = [f"examples/{name}.py", "--steps", "10", "--text", str(text_dir)]
    monkeypatch.setattr(sys, "argv", command + (["--out", str(tmp_path)] if name == "trl_sft" else []))
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", "set by the example")  # and put back afterwards
    importlib.import_module(f"examples.{name}").main()
    losses = [
        float(x)
        for x in re.findall(r"^(?:step \d+: loss |{'loss': ')([\d.]+)", capsys.readouterr().out, re.M)
    ]
    assert len(losses) == (2 if name == "trl_sft" else 10)
    assert losses[-1] < losses[0]
    if name == "trl_sft":
        assert any((tmp_path / "events").iterdir())


def test_the_reward_rises(
    text_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["", "--steps", "5", "--text", str(text_dir)])
    grpo.main()
    rewards = [float(line.split("reward ")[1]) for line in capsys.readouterr().out.splitlines()]
    assert len(rewards) == 5
    assert rewards[-1] > rewards[0] + 0.2


def test_what_follows_the_end_of_a_text_is_not_scored() -> None:
    tokens = torch.arange(24).repeat(2, 1)
    tokens[0, 20:22] = 99
    labels = grpo.labels_of(tokens, end=99)
    assert labels[0].tolist() == [-100] * 16 + [16, 17, 18, 19, 99, -100, -100, -100]
    assert labels[1].tolist() == [-100] * 16 + list(range(16, 24))


def curve(text: Path, *command: str) -> Tensor:
    """What an example prints: loss and another number of each step, [steps, 2]."""
    ran = python(*command, "--steps", "6", "--text", str(text), OMP_NUM_THREADS="1")
    assert ran.returncode == 0, ran.stderr
    return printed(ran.stdout.splitlines())


def printed(lines: list[str]) -> Tensor:
    """The numbers of the lines of six steps."""
    numbers = [re.findall(r"\d+\.\d+", line) for line in lines]
    assert [line.partition(":")[0] for line in lines] == [f"step {step}" for step in range(1, 7)]
    return torch.tensor([[float(number) for number in row] for row in numbers])


def test_ddp_is_one_process(text_dir: Path) -> None:
    alone = curve(text_dir, "examples/ddp.py")
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    together = curve(text_dir, *launcher, "examples/ddp.py")
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
    assert alone[-1, 0] < alone[0, 0]


@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated")
@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")
def test_lightning_on_two_processes_is_one(
    text_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    together = curve(text_dir, "examples/lightning_module.py", "--devices", "2")
    monkeypatch.setattr(sys, "argv", ["", "--steps", "6", "--text", str(text_dir)])
    lightning_module.main()
    alone = printed(capsys.readouterr().out.splitlines())
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


def test_every_path_of_the_trainer_is_one(
    text_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    curves = []
    for path in trainer.PATHS:
        monkeypatch.setattr(sys, "argv", ["", "--path", path, "--steps", "4", "--text", str(text_dir)])
        trainer.main()
        lines = [line.split(" ") for line in capsys.readouterr().out.splitlines()]
        assert [name for _, _, name, _ in lines] == ["loss"] * 4 + ["eval_loss"]
        curves.append([float(number) for *_, number in lines])
    assert curves[0][3] < curves[0][0]
    for curve in curves[1:]:
        assert curve == pytest.approx(curves[0], abs=2e-4)
