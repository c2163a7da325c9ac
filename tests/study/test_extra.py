import json
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace

import pytest

import nvamp.study.extra
from nvamp.study.extra import install_command

VCS = {"url": "https://example.org/it", "vcs_info": {"vcs": "git", "commit_id": "abc"}}


@pytest.mark.parametrize(
    ("origin", "command"),
    [
        (None, "pip install 'nvamp-loss[study]'"),
        ({"url": "file:///a/nvamp.whl"}, "pip install 'nvamp-loss[study] @ file:///a/nvamp.whl'"),
        (VCS, "pip install 'nvamp-loss[study] @ git+https://example.org/it@abc'"),
    ],
)
def test_an_extra_is_installed_from_where_the_package_came(
    origin: dict[str, object] | None, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = SimpleNamespace(read_text=lambda name: json.dumps(origin) if origin else None)
    monkeypatch.setattr(nvamp.study.extra, "distribution", lambda name: installed)
    monkeypatch.setattr(nvamp.study.extra, "ROOT", tmp_path)
    assert install_command("study") == command
    (tmp_path / "pyproject.toml").touch()
    assert install_command("study") == f"pip install -e '{tmp_path}[study]'"


def test_a_package_that_is_not_installed_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(nvamp.study.extra, "distribution", missing)
    monkeypatch.setattr(nvamp.study.extra, "ROOT", tmp_path)
    assert install_command("study") == "pip install 'nvamp-loss[study]'"
