"""What holds before a release: the archives build, hold what they should, and work beside PyTorch alone.

python .ci/release_check.py     leaves them in runs/dist
"""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
DIST = ROOT / "runs" / "dist"
# Nothing but what is pinned may come, neither into the environment of the build nor beside the wheel.
ENV = {**os.environ, "PIP_CONSTRAINT": str(ROOT / "constraints.txt"), "PIP_DISABLE_PIP_VERSION_CHECK": "1"}

# What the first example of the README takes for granted.
PRELUDE = """
import torch
logits, labels = torch.randn(2, 8, 32, requires_grad=True), torch.randint(32, (2, 8))
hidden, lm_head = torch.randn(2, 8, 16, requires_grad=True), torch.nn.Linear(16, 32)
"""
POSTLUDE = """
assert loss.isfinite() and hidden.grad.any()
"""


def run(*command: str | Path, quiet: bool = False) -> None:
    subprocess.run(command, check=True, env=ENV, stdout=subprocess.DEVNULL if quiet else None)


def build() -> tuple[Path, Path]:
    """Wheel and sdist, the one made of the other, checked as an index would."""
    shutil.rmtree(DIST, ignore_errors=True)
    run(sys.executable, "-m", "build", "--outdir", DIST, ROOT, quiet=True)
    (wheel,), (sdist,) = DIST.glob("*.whl"), DIST.glob("*.tar.gz")
    run(sys.executable, "-m", "twine", "check", "--strict", wheel, sdist)
    return wheel, sdist


def check_contents(wheel: Path, sdist: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (metadata,) = (archive.read(name).decode() for name in names if name.endswith("/METADATA"))
    source = {
        str(path.relative_to(ROOT / "src")) for path in (ROOT / "src" / "nvamp").rglob("*") if path.is_file()
    }
    source = {name for name in source if "__pycache__" not in name}
    assert {"nvamp/py.typed", "nvamp/study/report.html", "nvamp/study/inspect/page.js"} <= source
    assert source <= names, f"not in the wheel: {source - names}"
    dead = re.findall(r"\]\((?!https?://)[^)]*\)", metadata)
    assert not dead, f"links that lead nowhere on a package index: {dead}"
    others = {name.rpartition("/")[2] for name in names - source}
    assert others == {"METADATA", "WHEEL", "RECORD", "entry_points.txt", "LICENSE", "NOTICE"}, names - source
    with tarfile.open(sdist) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "NOTICE", "tests/test_losses.py"} <= inside
    assert not [name for name in inside if name.startswith(("runs/", ".venv/", "dist/"))]


def check_installed(wheel: Path) -> None:
    """The wheel in an environment of its own, where nothing is but PyTorch and what that needs."""
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        python = Path(folder, "bin", "python")
        run(python, "-m", "pip", "install", "--quiet", "--no-compile", wheel)
        readme = (ROOT / "README.md").read_text(encoding="utf-8")
        example = re.search(r"^```python\n(.*?)^```", readme, re.DOTALL | re.MULTILINE)
        assert example, "README.md has no example"
        # PyTorch, imported where no NumPy is, says so in a warning of its own.
        env = {**ENV, "PYTHONWARNINGS": "error,ignore:Failed to initialize NumPy"}
        subprocess.run([python, "-c", PRELUDE + example[1] + POSTLUDE], check=True, cwd=folder, env=env)
        said = subprocess.run(
            [python.with_name("nvamp")], capture_output=True, text=True, cwd=folder, env=env
        )
        assert said.returncode == 2, said
        assert said.stdout == "", said.stdout
        assert said.stderr.count("\n") == 1, said.stderr
        assert f"pip install 'nvamp-loss[study] @ {wheel.resolve().as_uri()}'" in said.stderr, said.stderr


if __name__ == "__main__":
    print("building wheel and sdist", flush=True)
    wheel, sdist = build()
    check_contents(wheel, sdist)
    print("installing the wheel and PyTorch in an environment of their own: some minutes", flush=True)
    check_installed(wheel)
    print(f"{wheel.name} and {sdist.name} are fit for release")
