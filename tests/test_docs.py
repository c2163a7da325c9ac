"""The documentation is true: its code runs, its commands are those that exist, its figures are of this code."""

import argparse
import ast
import gc
import importlib
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from textwrap import dedent
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
import trl
import typer
import yaml
from accelerate.commands.launch import launch_command_parser
from datasets import Dataset
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.run import get_args_parser

from docs import figures
from nvamp.cli import app
from nvamp.objectives import OBJECTIVES
from nvamp.study.losses import parse_loss
from tests.engine.problems import gradients
from tests.integrations.architectures import AGREEING, REFUSED
from tests.study.conftest import documents, one_thread, tokenizer

__all__ = ["documents", "one_thread", "tokenizer"]

ROOT = Path(__file__).parents[1]
PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in (
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *ROOT.glob("docs/**/*.md"),
        ROOT / "benchmarks" / "README.md",
        ROOT / "benchmarks" / "gpu" / "README.md",
    )
}
FENCE = re.compile(r"^```(.*)\n((?s:.*?))^```$", re.MULTILINE)

# What the code of a page takes for granted; of any other page it runs as it stands.
GIVEN = {
    "README.md": "logits labels hidden lm_head model Trainer args data",
    "docs/coming-from.md": "logits labels hidden lm_head",
    "docs/custom-losses.md": "logits hidden lm_head labels",
    "docs/distributed-reference.md": "logits labels",
    "docs/distributed.md": "logits labels mesh logits_of_this_rank hidden weight_of_this_rank",
    "docs/recipes.md": "logits labels hidden lm_head",
    "docs/reinforcement-learning.md": "model tokens labels reward",
    "docs/trainers.md": "model Trainer args config data tokenizer",
    "docs/transformers.md": "model Trainer TrainingArguments args data tokens labels token_weight torch",
}


def blocks(text: str) -> Iterator[tuple[str, int, str]]:
    """Language, line and content of the fenced blocks."""
    for match in FENCE.finditer(text):
        yield match[1], text[: match.start()].count("\n") + 1, match[2]


@pytest.fixture
def given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: Any) -> Iterator[dict[str, Any]]:
    """Everything that a page may take for granted, on the one rank of a group."""
    monkeypatch.chdir(tmp_path)
    registry = dict(OBJECTIVES)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        torch.manual_seed(0)
        tokens = torch.randint(64, (2, 8))
        hidden, lm_head = torch.randn(2, 8, 16, requires_grad=True), torch.nn.Linear(16, 64, bias=False)
        model = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                vocab_size=64,
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=1,
                num_attention_heads=2,
            )
        )
        yield {
            "hidden": hidden,
            "lm_head": lm_head,
            "weight_of_this_rank": lm_head.weight,
            "logits": lm_head(hidden),
            "logits_of_this_rank": lm_head(hidden),
            "labels": tokens,
            "tokens": tokens,
            "reward": torch.rand(2),
            "token_weight": torch.rand(2, 8),
            "M": 14,
            "model": model,
            "data": Dataset.from_list([{"input_ids": row, "labels": row} for row in tokens.tolist()]),
            "tokenizer": tokenizer,
            "config": trl.SFTConfig("out", report_to="none", use_cpu=True, bf16=False),
            "args": transformers.TrainingArguments(
                "out", max_steps=1, report_to="none", disable_tqdm=True, use_cpu=True
            ),
            "Trainer": transformers.Trainer,
            "TrainingArguments": transformers.TrainingArguments,
            "mesh": init_device_mesh("cpu", (1, 1), mesh_dim_names=("data", "tensor")),
            "dist": dist,
            "torch": torch,
        }
    finally:
        OBJECTIVES.clear()
        OBJECTIVES.update(registry)
        gc.collect()
        dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")  # TRL's default
@pytest.mark.parametrize("page", [page for page, text in PAGES.items() if "```python" in text])
def test_code_runs(page: str, given: dict[str, Any]) -> None:
    names = {name: given[name] for name in GIVEN.get(page, "").split()}
    code = [(line, content) for language, line, content in blocks(PAGES[page]) if language == "python"]
    for name in names:
        assert any(re.search(rf"\b{name}\b", content) for _, content in code), f"{name} is not used"
    for line, content in code:
        exec(compile("\n" * line + content, str(ROOT / page), "exec"), names)


def test_the_number_of_architectures() -> None:
    for page, text in PAGES.items():
        numbers = set(re.findall(r"\b(\w+)\s+architectures\b", text)) - {"of"}
        assert numbers <= {str(len(AGREEING))}, page
    assert "and six that `patch` refuses" in PAGES["docs/transformers.md"]
    assert len(REFUSED) == 6


def test_settings_are_of_the_plugin() -> None:
    """The YAML of the pages configures Axolotl, as the file of the example does."""
    written = [
        content for text in PAGES.values() for language, _, content in blocks(text) if language == "yaml"
    ]
    example = yaml.safe_load((ROOT / "examples" / "axolotl.yml").read_text())
    for content in written:
        settings = yaml.safe_load(content)
        assert settings["plugins"] == example["plugins"]
        assert settings.keys() <= example.keys()


@pytest.mark.parametrize("page", PAGES)
def test_no_code_is_left_out(page: str) -> None:
    """Every fence is Python, a shell's, YAML or TOML, and what is merely indented is no Python: formulas are in Greek."""
    text = PAGES[page]
    assert {language for language, _, _ in blocks(text)} <= {"python", "sh", "yaml", "toml"}
    assert text.count("```") == 2 * len(list(blocks(text)))
    for block in re.findall(r"(?<=\n\n)(?:    .*\n|\n)+", FENCE.sub("", text)):
        if block.isascii() and block.strip():
            with pytest.raises(SyntaxError):
                ast.parse(dedent(block))


@pytest.mark.parametrize("page", PAGES)
def test_code_is_no_wider_than_a_page(page: str) -> None:
    text = PAGES[page]
    fenced = [line for _, _, content in blocks(text) for line in content.splitlines()]
    for line in fenced + re.findall(r"^    (.*)", FENCE.sub("", text), re.MULTILINE):
        assert len(line) <= 102, line


# Commands -----------------------------------------------------------------------------------------------

PROGRAMS = ("nvamp", "python", "torchrun", "accelerate", "make", "pip")


def commands(text: str) -> Iterator[list[str]]:
    """The commands of a page: of `sh` blocks all, of indented blocks and in running text those of our programs."""
    shell = "\n".join(content for language, _, content in blocks(text) if language == "sh")
    rest = FENCE.sub("", text)
    indented = "\n".join(re.findall(r"^    (.*)", rest, re.MULTILINE))
    spans = "\n".join(span.replace("\n", " ") for span in re.findall(r"`([^`]+)`", rest))
    for source, all_of_them in ((shell, True), (indented, False), (spans, False)):
        for line in re.split(r"\n|&&", source.replace("\\\n", " ")):
            try:
                words = shlex.split(re.sub(r"\s>\s.*", "", line), comments=True)
            except ValueError:
                assert not all_of_them, line
                continue  # a formula
            while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
                words.pop(0)
            if words:
                words[0] = words[0].removeprefix(".venv/bin/")
            if len(words) > 1 and (all_of_them or words[0] in PROGRAMS):
                yield words


class _Parsed(Exception):  # noqa: N818  # not an error: it ends a program that has understood its arguments
    pass


def check_script(module: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A program of this repository understands its arguments; it is run no further than that."""
    path = ROOT / f"{module.replace('.', '/')}.py"
    if not path.exists():
        path = path.with_suffix("") / "__main__.py"
        module = f"{module}.__main__"
    if "argparse" not in path.read_text():
        assert not arguments
        return
    parse = argparse.ArgumentParser.parse_args

    def parse_and_end(*args: Any, **kwargs: Any) -> None:
        parse(*args, **kwargs)
        raise _Parsed

    main = importlib.import_module(module).main
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", [str(path), *arguments])
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_and_end)
        with pytest.raises(_Parsed):
            main()


def check(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    program, *arguments = words
    match program:
        case "nvamp":
            name, *options = arguments
            command = typer.main.get_command(app).commands[name]  # type: ignore[attr-defined]
            if options:
                monkeypatch.setattr("nvamp.study.config.read_config", lambda path, known: {})
                found = command.make_context(name, options).params
                for spec in found.get("loss", ()):
                    parse_loss(spec)
        case "python" if arguments[0] == "-c":
            compile(arguments[1], "-c", "exec")
        case "python" if arguments[:2] == ["-m", "pytest"]:
            paths = [ROOT / word for word in arguments[2:] if not word.startswith("-")]
            assert paths
            assert all(path.exists() for path in paths)
        case "python" if arguments[0] == "-m":
            check_script(arguments[1], arguments[2:], monkeypatch)
        case "python":
            check_script(arguments[0].removesuffix(".py").replace("/", "."), arguments[1:], monkeypatch)
        case "torchrun":
            found = get_args_parser().parse_args(arguments)
            script = [found.training_script, *found.training_script_args]
            check(script if found.no_python else ["python", *script], monkeypatch)
        case "accelerate":
            assert arguments.pop(0) == "launch"
            found = launch_command_parser().parse_args(arguments)
            check(["python", found.training_script, *found.training_script_args], monkeypatch)
        case "make":
            assert re.search(rf"^{arguments[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
        case "pip":
            project = (ROOT / "pyproject.toml").read_text()
            others = project + (ROOT / "Makefile").read_text()
            install, *names = [word for word in arguments if not word.startswith("--")]
            assert install == "install"
            for name in names:
                extra = re.fullmatch(r"(?:nvamp-loss|\.)(?:\[([\w,]+)\])?", name)
                if extra is None:
                    assert re.search(rf"[\"']{re.escape(name)}[\"';>=\[]", others), name
                else:
                    for one in filter(None, (extra[1] or "").split(",")):
                        assert re.search(rf"^{one} = \[", project, re.MULTILINE)
        case _:
            raise AssertionError(f"a command that no test knows: {words}")


@pytest.mark.parametrize("page", PAGES)
def test_commands_are_understood(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for words in commands(PAGES[page]):
        try:
            check(words, monkeypatch)
        except (Exception, SystemExit) as error:
            raise AssertionError(f"{shlex.join(words)}: {error!r}") from error


def test_files_of_options_are_understood(tmp_path: Path) -> None:
    contents = [
        content for text in PAGES.values() for language, _, content in blocks(text) if language == "toml"
    ]
    assert contents
    for content in contents:
        path = tmp_path / "study.toml"
        path.write_text(content)
        command = typer.main.get_command(app).commands["compare"]  # type: ignore[attr-defined]
        found = command.make_context("compare", ["--config", str(path)]).params
        assert [parse_loss(loss) for loss in found["loss"]]
        assert found["epochs"] or found["steps"]


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("[!_]*.py")), ids=lambda path: path.stem)
def test_examples_say_what_they_need(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands of their docstrings are understood, and install what they import."""
    tree = ast.parse(path.read_text())
    said = list(commands(ast.get_docstring(tree) or ""))
    for words in said:
        check(words, monkeypatch)
    needed = {word for words in said if words[0] == "pip" for word in words}
    installed = {re.split(r"[\[=]", word)[0] for word in needed} | {"torch"}
    if "nvamp-loss[study]" in needed:
        installed |= {"nvamp.study", "accelerate", "datasets", "transformers"}
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
    imported |= {a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names}
    for name in imported:
        top = ".".join(name.split(".")[: 2 if name.startswith("nvamp.study") else 1])
        assert top in {*sys.stdlib_module_names, *installed, "nvamp"}, f"{path.name} needs {top}"


def test_wrong_commands_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "`nvamp compare --sneeds 3` and\n\n    torchrun examples/ddp.py --step-count 3\n\n`make documents`"
    text += "\n`nvamp compare\n--loss nvamp:delta=1`, `python -m benchmarks.cpu --report`, `pip install 'nvamp-loss[x]'`, `pip install tlr`\n"
    text += "\n`python -m pytest tests/documents`\n"
    wrong = list(commands(text))
    assert len(wrong) == 8
    for words in wrong:
        with pytest.raises((Exception, SystemExit)):
            check(words, monkeypatch)


# Recipes: functions as they stand on a page, against autograd through all logits ------------------------


def defined(name: str) -> Callable[..., Tensor]:
    """A function of docs/reinforcement-learning.md."""
    (block,) = (
        text for _, _, text in blocks(PAGES["docs/reinforcement-learning.md"]) if f"def {name}(" in text
    )
    names: dict[str, Any] = {}
    exec(block, names)
    return cast(Callable[..., Tensor], names[name])


@pytest.fixture
def linear() -> tuple[Tensor, Tensor]:
    """Hidden states [4, 7, 6] and a weight [17, 6]."""
    torch.manual_seed(0)
    return torch.randn(4, 7, 6, dtype=torch.float64), torch.randn(17, 6, dtype=torch.float64)


def test_dpo(linear: tuple[Tensor, Tensor]) -> None:
    labels, ref = torch.randint(17, (4, 7)), torch.randn(4, dtype=torch.float64) - 9
    labels[0, :3] = labels[2, 5:] = -100

    def exact(hidden: Tensor, weight: Tensor) -> Tensor:
        logprob = (hidden @ weight.T).log_softmax(-1)[:, :-1]
        scored = labels[:, 1:] != -100
        own = logprob.gather(-1, labels[:, 1:, None].clamp(min=0))[..., 0]
        chosen, rejected = ((own * scored).sum(-1) - ref).split(2)
        return torch.log1p((-0.3 * (chosen - rejected)).exp()).mean()

    dpo_loss = defined("dpo_loss")
    ours = gradients(lambda h, w: dpo_loss(h, w, labels, ref, beta=0.3), *linear)
    torch.testing.assert_close(ours, gradients(exact, *linear))


def test_distillation(linear: tuple[Tensor, Tensor]) -> None:
    hidden, weight = linear[0].flatten(0, 1), linear[1]
    teacher, ids = torch.randn(len(hidden), 17, dtype=torch.float64).log_softmax(-1).topk(4)

    def exact(hidden: Tensor, weight: Tensor) -> Tensor:
        logits = hidden @ weight.T
        return F.cross_entropy(logits, torch.zeros_like(logits).scatter(1, ids, teacher.exp()))

    distillation_loss = defined("distillation_loss")
    ours = gradients(lambda h, w: distillation_loss(h, w, ids, teacher), hidden, weight)
    torch.testing.assert_close(ours, gradients(exact, hidden, weight))


# Figures ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", figures.FIGURES)
def test_figures_are_of_this_code(name: str) -> None:
    assert figures.svg(name) == (ROOT / "docs" / "figures" / f"{name}.svg").read_text(), (
        "run python -m docs.figures"
    )


# Makefile -----------------------------------------------------------------------------------------------


def test_a_commit_is_checked_as_by_make_lint() -> None:
    (recipe,) = re.findall(r"^lint:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    commands = [line.strip().replace("$(BIN)", ".venv/bin") for line in recipe.splitlines()]
    assert [hook["entry"] for hook in hooks] == commands


def test_help_lists_every_target() -> None:
    makefile = (ROOT / "Makefile").read_text()
    (phony,) = re.findall(r"^\.PHONY: (.*)", makefile, re.MULTILINE)
    helped = re.findall(r"^([a-z-]+):.* ## \w", makefile, re.MULTILINE)
    assert helped == [target for target in phony.split() if target != "browser"]
