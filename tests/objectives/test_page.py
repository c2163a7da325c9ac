"""What the documentation of objectives says: the page on adding one, its example, and the docstrings."""

import ast
import inspect
import textwrap
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import nvamp
from examples import custom_losses
from examples.custom_losses import Hinge, Spread
from nvamp import TokenLoss, objectives
from nvamp.objectives import OBJECTIVES, Objective, parse
from tests.objectives.problems import KINDS
from tests.processes import ROOT


@pytest.fixture(autouse=True)
def registry() -> Iterator[None]:
    """The registry as it was, afterwards."""
    before = dict(OBJECTIVES)
    yield
    OBJECTIVES.clear()
    OBJECTIVES.update(before)


def test_the_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    custom_losses.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["hinge:margin=1", "spread"]
    for line in lines:
        _, first, _, last = line.split()
        assert float(last) < 0.1 * float(first)
    assert parse("hinge:margin=0.25") == Hinge(0.25)
    assert str(Spread(1.0)) == "spread:strength=1"


def exact(o: Objective, ell: Tensor) -> Tensor:
    if isinstance(o, Hinge):
        return (ell - o.margin).clamp(min=0).mean()
    assert isinstance(o, Spread)
    return ell.mean() + o.strength * ell.var(correction=0)


@pytest.mark.parametrize("o", [Hinge(), Hinge(0.0), Spread(), Spread(3.0)], ids=str)
def test_the_derivatives_of_the_example(o: Objective) -> None:
    ell = 2 * torch.rand(30, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ell.requires_grad_()
    ours, truth = TokenLoss(o)(ell), exact(o, ell)
    torch.testing.assert_close(ours, truth)
    torch.testing.assert_close(torch.autograd.grad(ours, ell), torch.autograd.grad(truth, ell))


def body(tree: ast.AST) -> str:
    """Code without docstrings."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and ast.get_docstring(node):
            node.body = node.body[1:]
    return ast.dump(tree)


@pytest.mark.parametrize("kind", [Hinge, Spread])
def test_the_page_has_the_classes_of_the_example(kind: type[Objective]) -> None:
    page = (ROOT / "docs" / "custom-losses.md").read_text()
    code = page.split(f"class {kind.__name__}")[1].split("```")[0]
    written = ast.parse(f"@dataclass(frozen=True)\nclass {kind.__name__}{code}")
    assert body(written) == body(ast.parse(inspect.getsource(kind)))


@pytest.mark.parametrize("name", KINDS)
def test_docstrings(name: str) -> None:
    """Each has a formula, units, and an example that runs."""
    doc = inspect.getdoc(KINDS[name])
    assert doc is not None
    assert "L = " in doc
    assert "nats" in doc
    labels, hidden, lm_head = (
        torch.randint(7, (2, 5)),
        torch.randn(2, 5, 4),
        torch.nn.Linear(4, 7, bias=False),
    )
    names: dict[str, Any] = {
        **vars(objectives),
        "nvamp": nvamp,
        "labels": labels,
        "hidden": hidden,
        "lm_head": lm_head,
        "logits": lm_head(hidden),
        **{name: torch.randn(2, 5) for name in nvamp.functional.TokenInputs.__annotations__},
    }
    lines = textwrap.dedent(doc.split("Example:")[1]).strip().splitlines()
    exec("\n".join(line.removeprefix(">>> ") for line in lines), names)
    names["loss"].backward()
    assert lm_head.weight.grad is not None
    assert lm_head.weight.grad.isfinite().all()
