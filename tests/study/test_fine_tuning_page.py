"""The commands of docs/fine-tuning.md one after the other: a smaller model, fewer steps, less text."""

import json
import shlex
from itertools import pairwise
from pathlib import Path

import pytest
from transformers import LlamaConfig

from tests.test_cli import run
from tests.test_docs import PAGES, ROOT, blocks

SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
SHORT = {"--steps": "2", "--epochs": "0.1"}


def test_the_commands_of_the_page(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, text_dir: Path
) -> None:
    monkeypatch.setattr("nvamp.study.models.LlamaConfig", lambda **sizes: LlamaConfig(**{**sizes, **SMALL}))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    lines = [
        shlex.split(line)
        for language, _, content in blocks(PAGES["docs/fine-tuning.md"])
        if language == "sh"
        for line in content.replace("\\\n", "").splitlines()
    ]
    studies = [words for words in lines if words[:2] == ["nvamp", "compare"]]
    assert len(studies) == 4
    for words in studies:
        options = [SHORT.get(before, word) for before, word in pairwise(words)]
        if "--model" not in options and "--config" not in options:
            options += ["--text", str(text_dir)]
        code = run(monkeypatch, *options)
        captured = capsys.readouterr()
        assert (code, captured.err) == (0, "")
    results = json.loads(Path("runs/chat/results.json").read_text())
    assert [len([run for run in results["runs"] if run["seed"] == seed]) for seed in range(3)] == [2, 2, 2]
    assert results["text"]["examples"] + results["text"]["held_out_examples"] == 320
    for path in ("report.html", "study.toml", "models/ce-seed2/model.safetensors"):
        assert (Path("runs/chat") / path).is_file()
    rates = json.loads(Path("runs/rates/results.json").read_text())
    names = [loss["name"] for loss in rates["losses"]]
    assert names == ["ce", "ce@0.0004", "nvamp:gamma=0.04,tail=0.05@0.0004"]
