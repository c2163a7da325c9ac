"""The command line: arguments in, study out."""

import io
import shlex
import sys
from pathlib import Path
from typing import Annotated

from nvamp import __version__
from nvamp.study.ranks import Peers, join

_INSTALL = "nvamp: the command line needs more packages: pip install 'nvamp-loss[study]'"

try:
    import typer
    from rich.console import Console
except ModuleNotFoundError:
    print(_INSTALL, file=sys.stderr)
    raise SystemExit(2) from None

app = typer.Typer(name="nvamp", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


def main() -> None:
    """The `nvamp` program. Exit codes: 0; 2 for a mistake of the user, told in one line; 130 for Ctrl-C."""
    peers = join()
    if peers.rank > 0:
        sys.stdout = io.StringIO()  # the first rank shows it all
    try:
        code = app(standalone_mode=False, obj=peers)
    except typer.TyperException as error:
        # Without arguments the help is shown, and the error has no message.
        if message := error.format_message():
            _say(message, peers)
        code = 2
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    raise SystemExit(code if isinstance(code, int) else 0)


def _say(message: str, peers: Peers) -> None:
    """Tell what ended the study, once for all ranks."""
    if peers.first_to_fail():
        print(f"nvamp: {message}", file=sys.stderr)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"nvamp {__version__}")
        raise typer.Exit


@app.callback()
def _program(
    version: Annotated[
        bool,
        typer.Option("--version", help="Show the version and exit.", is_eager=True, callback=_show_version),
    ] = False,
) -> None:
    """NVAMP: a variance-aware, max-penalized loss for language models."""


@app.command()
def compare(
    context: typer.Context,
    loss: Annotated[
        list[str],
        typer.Option(
            help="A loss to train with; repeat it, the first is the baseline. "
            "ce, nvamp, nvamp:gamma=0.05,gradient=token, focal:gamma=2, dft.",
            show_default="ce, nvamp, nvamp:gradient=token",
        ),
    ] = ["ce", "nvamp", "nvamp:gradient=token"],  # noqa: B006  # typer copies it
    seeds: Annotated[int, typer.Option(help="How many seeds: 0, 1, ...")] = 3,
    steps: Annotated[int, typer.Option(help="Optimizer steps of each run.")] = 240,
    batch_size: Annotated[int, typer.Option(help="Blocks of tokens in a step.")] = 8,
    lr: Annotated[
        float | None, typer.Option(help="Peak learning rate.", show_default="0.002; with --model 5e-05")
    ] = None,
    noise: Annotated[float, typer.Option(help="Share of training labels replaced at random.")] = 0.0,
    model: Annotated[
        str | None,
        typer.Option(
            help="A causal language model to fine-tune: a directory or hub id.",
            show_default="a Llama of about 2M parameters, from scratch",
        ),
    ] = None,
    text: Annotated[
        list[str] | None,
        typer.Option(
            help="A file or directory of text; repeat it.",
            show_default="Python's own standard library source",
        ),
    ] = None,
    dataset: Annotated[
        list[str] | None,
        typer.Option(
            help="Instead of --text: name or name:configuration of a dataset, or a local file of one; "
            "repeat it for files."
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Directory of results, report and models.")] = Path(
        "runs/compare"
    ),
    overwrite: Annotated[bool, typer.Option(help="Drop the runs that --out holds.")] = False,
) -> None:
    """Train the same model from the same seeds under several losses, and report what differs.

    Finished runs are kept: after Ctrl-C the same command continues. Under torchrun the ranks share the runs.
    """
    peers: Peers = context.obj
    try:
        from nvamp.study import StudyError
        from nvamp.study.compare import Settings, compare, kept_runs
        from nvamp.study.report import write_report
        from nvamp.study.terminal import Terminal, show_results
    except ModuleNotFoundError:
        print(_INSTALL, file=sys.stderr)
        raise typer.Exit(2) from None
    settings = Settings(
        tuple(loss), seeds, steps, batch_size, lr, noise, model, tuple(text or ()), tuple(dataset or ())
    )
    console = Console()
    try:
        with Terminal(console, steps) as terminal:
            results = compare(settings, out, shlex.join(["nvamp", *sys.argv[1:]]), terminal, overwrite, peers)
    except StudyError as error:
        _say(str(error), peers)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        kept = kept_runs(out)
        _say(f"interrupted: {kept} finished runs are kept in {out}, the same command continues", peers)
        raise typer.Exit(130) from None
    if results is None:  # gathered by another rank
        return
    show_results(console, results)
    console.print(f"Report: {write_report(results, out / 'report.html')}", highlight=False, markup=False)


@app.command()
def inspect(
    context: typer.Context,
    model: Annotated[str, typer.Option(help="A causal language model: a directory or hub id.")],
    text: Annotated[Path, typer.Option(help="A UTF-8 file.")],
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("inspect.html"),
) -> None:
    """Show a text token by token, coloured by its loss or by the weight NVAMP gives it, on one page."""
    try:
        from nvamp.study import StudyError
        from nvamp.study.inspect import inspect_file
        from nvamp.study.terminal import counting
    except ModuleNotFoundError:
        print(_INSTALL, file=sys.stderr)
        raise typer.Exit(2) from None
    console = Console()
    try:
        with counting(console, "windows of the text") as progress:
            found = inspect_file(model, text, out, progress)
    except StudyError as error:
        _say(str(error), context.obj)
        raise typer.Exit(2) from None
    s = found.statistics
    console.print(
        f"{s.num_tokens:,.0f} tokens: mean {s.mean:.3f} nats, sigma {s.std:.3f}, max {s.max:.2f}, "
        f"dispersion {s.dispersion:.3f}",
        highlight=False,
    )
    size = out.stat().st_size / 1e6
    console.print(f"Page ({size:.1f} MB): {out}", highlight=False, markup=False)
