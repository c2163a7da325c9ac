"""What `tools.trainers` concludes from trainings, and that docs/trainers-reference.md lists what it recorded."""

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tools.trainers import __main__ as trainers
from tools.trainers.comparing import Outcome, compare
from tools.trainers.recipes import RECIPES

CURVES = {None: [3.0, 2.0], "ce": [3.0, 2.0], "nvamp": [2.0, 1.0]}


def outcome(objective: str | None, **instead: list[float]) -> Outcome:
    losses = torch.tensor(instead.get(str(objective), CURVES[objective]))
    return Outcome(losses, losses.cumsum(0))


@pytest.mark.parametrize(
    ("instead", "agrees"),
    [
        ({}, True),
        ({"ce": [3.0, 2.00001]}, True),
        ({"ce": [3.0, 2.001]}, False),
        ({"ce": [3.0, float("nan")]}, False),
        ({"nvamp": [3.0, 2.0]}, False),  # whatever it is given, it trains its own loss
    ],
)
def test_what_agrees(instead: dict[str, list[float]], agrees: bool) -> None:
    assert compare("", lambda objective: outcome(objective, **instead)).agrees is agrees


def test_weights_count_too() -> None:
    def train(objective: str | None) -> Outcome:
        return outcome(objective)._replace(moved=torch.tensor([1.0, float(objective is None)]))

    assert not compare("", train).agrees


@pytest.mark.parametrize(("agrees", "code"), [(True, 0), (False, 1), (None, 1)])
def test_the_exit_code_and_the_record(
    agrees: bool | None, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def run(name: str) -> dict[str, Any]:
        if agrees is None:
            raise subprocess.CalledProcessError(1, "pip")
        result = {"what": "a way", "losses": 1e-7, "weights": None, "nvamp": 0.2, "limit": 1e-5}
        return {"versions": {"wandb": "1.2"}, "results": [{**result, "agrees": agrees}]}

    record = tmp_path / "record.json"
    record.write_text(json.dumps({"torchtune": "as it was"}))
    monkeypatch.setattr(trainers, "run", run)
    monkeypatch.setattr(trainers, "RECORD", record)
    monkeypatch.setattr(sys, "argv", ["trainers", "wandb"])
    assert trainers.main() == code
    assert ("wandb 1.2: a way: agrees; losses to 1e-07" in capsys.readouterr().out) is (agrees is True)
    kept = json.loads(record.read_text())
    assert list(kept) == (["wandb", "torchtune"] if agrees else ["torchtune"])


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_has_a_module(name: str) -> None:
    """One that can be imported without the trainer."""
    assert callable(importlib.import_module(f"tools.trainers.{name}").results)


def test_the_page_lists_the_record() -> None:
    record = json.loads(trainers.RECORD.read_text())
    page = Path("docs/trainers-reference.md").read_text()
    (listed,) = re.findall(r"^\| command \| version(?:.*\n)+?(?=\n)", page, re.MULTILINE)
    assert listed.strip() == trainers.table(record)
    assert all(result["agrees"] for found in record.values() for result in found["results"])
