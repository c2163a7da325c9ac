"""Run an experiment, or only draw it: `python -m benchmarks.evidence NAME [--draw] [--preset gpu]`.

Finished runs are kept in --out: the same command continues. At the preset that is on record ("cpu") the
results go to benchmarks/evidence/results/NAME.json, figure and page to docs/evidence; at others all goes to
--out.
"""

import argparse
import json
import os
import shutil
from importlib import import_module
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib import rc_context

from benchmarks.evidence.drawing import STYLE, save
from benchmarks.evidence.running import PRESETS
from benchmarks.evidence.summary import Results, mean_only, plain, signed, size
from nvamp.study import StudyError
from nvamp.study.metrics import estimate, verdict
from nvamp.study.peers import hide
from nvamp.study.store import write_json

HERE = Path(__file__).parent
NAMES = ("tail", "types", "stability", "tuning", "finetuning")
RECORDED = "cpu"
DOCS = HERE.parents[1] / "docs" / "evidence"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evidence", description=__doc__)
    parser.add_argument("name", choices=[*NAMES, "all"])
    parser.add_argument("--preset", choices=PRESETS, default=RECORDED)
    parser.add_argument("--out", type=Path, default=Path("runs/evidence"))
    parser.add_argument("--draw", action="store_true", help="from the results on record, without any run")
    parser.add_argument("--overwrite", action="store_true", help="drop the runs that --out holds")
    args = parser.parse_args(arguments)
    directory = args.out / args.preset
    if args.overwrite:
        shutil.rmtree(directory, ignore_errors=True)
    on_record = args.preset == RECORDED
    for name in NAMES if args.name == "all" else (args.name,):
        path = (HERE / "results" if on_record else directory) / f"{name}.json"
        if not args.draw:
            experiment = import_module(f"benchmarks.evidence.{name}")
            try:
                write_json(path, experiment.run(PRESETS[args.preset], directory))
            except StudyError as error:
                parser.error(str(error))
        draw(name, path, DOCS if on_record else directory)
        if on_record:
            (DOCS / f"{name}.md").write_text(page(name, path), encoding="utf-8")
            (DOCS / "README.md").write_text(index(), encoding="utf-8")


def draw(name: str, results: Path, directory: Path) -> None:
    """The figure of an experiment, from its results."""
    with rc_context(STYLE):
        figure = import_module(f"benchmarks.evidence.{name}").figure(load(results))
    save(figure, directory / f"{name}.svg")


def load(path: Path) -> Results:
    return Results(json.loads(path.read_text(encoding="utf-8")))


def page(name: str, results: Path) -> str:
    """The page of an experiment: written by hand, its numbers from the results."""
    loaded = load(results)
    return _render(f"{name}.md", name=name, results=loaded, json=loaded.json)


def index() -> str:
    """The table of questions and answers: the titles of the pages and their first paragraphs."""
    rows = []
    recorded = {name: HERE / "results" / f"{name}.json" for name in NAMES}
    for name, path in recorded.items():
        if not path.exists():
            continue
        title, answer = page(name, path).split("\n\n")[:2]
        rows.append((name, title.removeprefix("# "), " ".join(answer.split("\n"))))
    return _render("README.md", rows=rows)


def _render(template: str, **values: object) -> str:
    environment = Environment(
        loader=FileSystemLoader(HERE / "pages"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.globals |= {"estimate": estimate, "judge": verdict}
    environment.filters |= {"plain": plain, "signed": signed, "mean_only": mean_only, "size": size}
    return environment.get_template(template).render(**values)


if __name__ == "__main__":
    hide(os.environ)  # of several GPUs the Trainer would make larger batches
    main()
