"""Answer the questions: `python -m benchmarks.evidence NAME`, or `all`.

Runs that are missing from the store (`python -m benchmarks.evidence.training` trains them) are trained first,
their numbers go to benchmarks/evidence/results, and figure and page to docs/evidence. `--draw` does without
training, from the results on record.
"""

import argparse
from collections import Counter
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib import rc_context

from benchmarks.evidence import fronts, plan
from benchmarks.evidence import training as train
from benchmarks.evidence.drawing import STYLE, save
from benchmarks.evidence.formats import around, mean_only, plain, signed, size, starred
from benchmarks.evidence.fronts import Group
from benchmarks.evidence.gather import gather
from benchmarks.evidence.held_out import MIXES, TEMPERATURES
from benchmarks.evidence.store import Runs

HERE = Path(__file__).parent
RESULTS = HERE / "results"
DOCS = HERE.parents[1] / "docs" / "evidence"
NAMES = ("front", "extremes", "noise", "types", "finetuning")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evidence", description=__doc__)
    parser.add_argument("name", choices=[*NAMES, "all"])
    parser.add_argument("--out", type=Path, default=train.STORE, help="the store of runs")
    parser.add_argument("--workers", type=int, default=2, help="processes that train, of one thread each")
    parser.add_argument("--draw", action="store_true", help="from the results on record, without any run")
    args = parser.parse_args(arguments)
    names = NAMES if args.name == "all" else (args.name,)
    if not args.draw:
        wanted = list(dict.fromkeys(group for name in names for group in question(name).GROUPS))
        train.main(["--out", str(args.out), "--workers", str(args.workers), "--only", *wanted])
        gather([job for job in plan.plan() if job.group in wanted], Runs(args.out, train.TEXT), RESULTS)
    for name in names:
        draw(name, DOCS)
        (DOCS / f"{name}.md").write_text(page(name), encoding="utf-8")
    (DOCS / "recipe.md").write_text(recipe(), encoding="utf-8")
    (DOCS / "README.md").write_text(index(), encoding="utf-8")


def question(name: str) -> ModuleType:
    return import_module(f"benchmarks.evidence.{name}")


def groups(name: str) -> dict[str, Group]:
    """The groups of a question that are on record."""
    found = on_record()
    return {group: found[group] for group in question(name).GROUPS if group in found}


def draw(name: str, directory: Path) -> None:
    """The figure of a question, from the results on record."""
    with rc_context(STYLE):
        figure = question(name).figure(groups(name))
    save(figure, directory / f"{name}.svg")


def page(name: str) -> str:
    """The page of a question: written by hand, its numbers from the results on record."""
    return _render(f"{name}.md", name=name, groups=groups(name), question=question(name))


def index() -> str:
    """The table of questions and answers: the titles of the pages and their first paragraphs."""
    rows = []
    for name in NAMES:
        title, answer = page(name).split("\n\n")[1:3]
        rows.append((name, title.removeprefix("# "), " ".join(answer.split("\n"))))
    return _render("README.md", rows=rows, missing=missing())


def missing() -> str:
    """How many runs of the plan are not on record, by group, in words."""
    jobs = plan.plan()
    of_plan = Counter(job.group for job in jobs)
    kept = {(name, *run) for name, group in on_record().items() for run in group.runs}
    left = Counter(job.group for job in jobs if (job.group, job.loss, job.lr, job.seed) not in kept)
    told = [f"{count} of {of_plan[group]} runs of `{group}`" for group, count in left.items()]
    return ", ".join(told) or "none"


def recipe() -> str:
    """The page that says which setting to use for what."""
    return _render("recipe.md", groups=on_record())


def on_record() -> dict[str, Group]:
    """All groups on record."""
    return {path.stem: Group.read(path) for path in RESULTS.glob("*.json")}


def _render(template: str, **values: Any) -> str:
    environment = Environment(
        loader=FileSystemLoader(HERE / "pages"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.globals |= {"plan": plan, "fronts": fronts, "TEMPERATURES": TEMPERATURES, "MIXES": MIXES}
    filters = (around, mean_only, plain, signed, size, starred)
    environment.filters |= {function.__name__: function for function in filters}
    return environment.get_template(template).render(**values)


if __name__ == "__main__":
    main()
