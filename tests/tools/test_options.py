"""The count of the places that list the library's options."""

from pathlib import Path

import pytest

from tools import options
from tools.options import Place, places

LISTS = [
    ("parameters of f", "def f(x, alpha, /, beta, *, gamma=1.0): ..."),
    ("parameters of g", "async def g(alpha, beta, gamma): ..."),
    ("parameters of a lambda", "f = lambda alpha, beta, gamma: 0"),
    ("fields of A", "class A:\n    alpha: float\n    beta: float = 1.0\n    gamma = 0.1"),
    ("fields of B", "class B:\n    nvamp_alpha: float\n    nvamp_beta: float\n    nvamp_gamma: float"),
    (
        "assignments of __init__",
        "def __init__(self):\n    self.alpha = self.beta\n    self.beta = 0\n    self.gamma = 1",
    ),
    ("arguments of f", "f(alpha, c.beta, 'gamma')"),
    ("arguments of x.f", "x.f(1, a, alpha=1, beta=2, **kwargs, gamma=3)"),
    ("keys of a dict", "{'alpha': 0, **others, 'beta': 1, 'gamma': 2}"),
    ("tuple", "names = 'alpha', beta, c.gamma, number(x)"),
    ("list", "['alpha', 'beta', 'gamma']"),
    ("set", "{alpha, beta, gamma}"),
    ("unpacking", "alpha, (eps, shift), beta, *rest, c.gamma = x"),
    ("unpacking", "[alpha, beta, gamma] = x"),
    ("string", "schema = f'float alpha, {others}, float beta, ' 'int? gamma, int alpha'"),
]


@pytest.mark.parametrize(("kind", "source"), LISTS)
def test_what_lists_three(kind: str, source: str) -> None:
    assert places(source) == [Place(1, kind, ("alpha", "beta", "gamma"))]


@pytest.mark.parametrize(
    "source",
    [
        "def f(alpha, beta, lr): ...",
        "def f(alpha, beta, *gamma): ...",
        "f(alpha, f(beta, x), gamma=2)",
        "f(alpha, 2 * beta, float(gamma))",
        "f(alpha, alpha=alpha, beta=beta)",
        "x = alpha + beta + gamma",
        "{'alpha': beta, 'gamma': {'eps': 0, 'shift': 1}}",
        "[alpha, beta, [gamma]]",
        "'alphabet beta_1 gamma eps'",
        "def f():\n    'alpha, beta and gamma'\n    if x:\n        alpha = 1\n    beta = gamma = 2",
    ],
)
def test_what_does_not(source: str) -> None:
    assert places(source) == []


def test_every_list_counts_in_the_order_of_the_lines() -> None:
    found = places(
        "def f(eps, tail, shift):\n    g(\n        eps, tail, (eps, tail, shift), shift)\n(eps, tail, shift)\n"
    )
    assert [(place.line, place.kind) for place in found] == [
        (1, "parameters of f"),
        (2, "arguments of g"),
        (3, "tuple"),
        (4, "tuple"),
    ]


@pytest.mark.parametrize(("most", "code"), [("1", 1), ("2", 0)])
def test_too_many_are_an_error(
    most: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "src"
    (source / "deep").mkdir(parents=True)
    (source / "a.py").write_text("x = 1\n(eps, tail, shift)\n")
    (source / "deep" / "b.py").write_text("f(eps=1, backend=2, z_loss=3)\n")
    monkeypatch.setattr(options, "SOURCE", source)
    monkeypatch.setattr("sys.argv", ["options", "--most", most])
    assert options.main() == code
    assert capsys.readouterr().out.splitlines() == [
        "src/a.py:2: tuple: eps, tail, shift",
        "src/deep/b.py:1: arguments of f: eps, backend, z_loss",
        "2 places list 3 or more options",
    ]
