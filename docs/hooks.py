"""Hooks of `mkdocs build`: the site out of Markdown that is also read where it lies in the repository.

README.md is the landing page, and a few other files outside docs/ are pages. Links to any other file of the
repository lead to copies in the site, of Python as a page, and links to folders to a list of their files: no
address of a code host is needed.
"""

import logging
import re
from pathlib import Path
from posixpath import dirname, normpath, relpath
from typing import Any

from mkdocs.structure.files import File, Files, InclusionLevel

LOG = logging.getLogger("mkdocs.plugins.nvamp")
ROOT = Path(__file__).parents[1]
FROM_ROOT = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "benchmarks/README.md": "benchmarks.md",
}
LINK = re.compile(r"(\]\()(?!\w+:|#)([^)#\s]+)")  # of [text](target#anchor), the target


def in_repository(page: str) -> str:
    """The path of a page of the site in the repository."""
    return next((path for path, name in FROM_ROOT.items() if name == page), f"docs/{page}")


def in_site(path: str) -> str:
    """The path of a file or folder of the repository in the site."""
    if path in FROM_ROOT:
        return FROM_ROOT[path]
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return f"{path}.md" if path.endswith(".py") or (ROOT / path).is_dir() else path


def targets(path: str, text: str) -> set[str]:
    """The files and folders of the repository that a file of it links to."""
    linked = {normpath(f"{dirname(path)}/{match[2]}".lstrip("/")) for match in LINK.finditer(text)}
    return {target for target in linked if (ROOT / target).exists()}


def files_of(folder: str) -> list[str]:
    return sorted(f"{folder}/{path.name}" for path in (ROOT / folder).iterdir() if path.is_file())


def on_config(config: Any) -> Any:
    """Nothing shows the theme's page for what is not found: the site is opened from a disk."""
    config.theme.static_templates.discard("404.html")
    return config


def on_files(files: Files, *, config: Any) -> Files:
    for path, page in FROM_ROOT.items():
        files.append(File.generated(config, page, content=(ROOT / path).read_text(encoding="utf-8")))
    linked = {
        target
        for file in files.documentation_pages()
        for target in targets(in_repository(file.src_uri), file.content_string)
    }
    folders = {path for path in linked if (ROOT / path).is_dir()}
    linked |= {path for folder in folders for path in files_of(folder)}
    for path in sorted(linked):
        if path in FROM_ROOT or path.startswith("docs/"):
            continue
        source: dict[str, str] = {"abs_src_path": str(ROOT / path)}
        if path in folders:
            names = [
                f"- [{file.rpartition('/')[2]}]({relpath(in_site(file), dirname(path))})"
                for file in files_of(path)
            ]
            source = {"content": f"# {path}\n\n" + "\n".join(names)}
        elif path.endswith(".py"):
            code = (ROOT / path).read_text(encoding="utf-8")
            source = {"content": f"# {path}\n\n````python\n{code}````\n"}
        files.append(File.generated(config, in_site(path), inclusion=InclusionLevel.NOT_IN_NAV, **source))
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    here = page.file.src_uri
    if page.file.generated_by and here not in FROM_ROOT.values():
        return markdown
    path = in_repository(here)
    found = targets(path, markdown)

    def rewritten(match: re.Match[str]) -> str:
        target = normpath(f"{dirname(path)}/{match[2]}".lstrip("/"))
        return match[1] + relpath(in_site(target), dirname(here) or ".") if target in found else match[0]

    return LINK.sub(rewritten, markdown)


def on_page_content(html: str, *, page: Any, **_: Any) -> str:
    """A cell without a heading is no heading. In the reference, pages and names become links."""
    html = html.replace("<th></th>", "<td></td>")
    if page.file.src_uri != "api.md":
        return html
    html = re.sub(r"\bdocs/([\w-]+)\.md\b", r'<a href="\1.html">docs/\1.md</a>', html)

    ids = re.findall(r'<h\d id="(nvamp[\w.]*)"', html)
    places = {name: name for name in ids} | {name.rpartition(".")[2]: name for name in ids}

    def linked(match: re.Match[str]) -> str:
        place = places.get(match[1])
        return f'<a href="#{place}">{match[0]}</a>' if place else match[0]

    return re.sub(r"<code>([\w.]+)</code>", linked, html)


def on_post_page(output: str, *, page: Any, **_: Any) -> str:
    """A page loads nothing from another host. What the theme hides cannot be reached by the keyboard."""
    for tag in re.findall(r'<(?:script|link|img|iframe)\b[^>]*="(?:https?:)?//[^>]*>', output):
        LOG.warning("%s loads from elsewhere: %s", page.file.src_uri, tag)
    return output.replace('<input class="md-option"', '<input tabindex="-1" class="md-option"')
