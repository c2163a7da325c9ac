"""How to install the packages that the command line needs."""

import json
import shlex
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

NAME = "nvamp-loss"
ROOT = Path(__file__).parents[3]  # the checkout, if this file is in one


def install_command(extra: str) -> str:
    """The command that installs an extra of this package from where the package itself came."""
    if (ROOT / "pyproject.toml").exists():
        return f"pip install -e {shlex.quote(f'{ROOT}[{extra}]')}"
    return f"pip install {shlex.quote(f'{NAME}[{extra}]{_origin()}')}"


def _origin() -> str:
    """The origin of the installed package, as a requirement spells it; empty if that is an index."""
    try:
        text = distribution(NAME).read_text("direct_url.json")
    except PackageNotFoundError:
        return ""
    if text is None:
        return ""
    source = json.loads(text)
    vcs = source.get("vcs_info")
    return f" @ {vcs['vcs']}+{source['url']}@{vcs['commit_id']}" if vcs else f" @ {source['url']}"
