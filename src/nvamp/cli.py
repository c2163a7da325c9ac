"""The command line: arguments in, study out."""

import io
import shlex
import sys
import threading
from _thread import interrupt_main
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

from nvamp import __version__
from nvamp.study import StudyError
from nvamp.study.extra import install_command
from nvamp.study.model_files import check_model
from nvamp.study.peers import Peers, join
from nvamp.study.settings import Settings

_INSTALL = "the command line needs {}, which is not installed: " + install_command("study")
_REPEAT = "; for several values repeat the option: --loss ce --loss nvamp"

try:
    import typer
    from rich.console import Console
except ModuleNotFoundError as error:
    print(f"nvamp: {_INSTALL.format(error.name or error)}", file=sys.stderr)
    raise SystemExit(2) from None
except KeyboardInterrupt:
    raise SystemExit(130) from None

# Spelled out: asking the library would import PyTorch, and a wrong option would wait for it.
_LOSSES = (
    "One of ce, nvamp, tail, tilted, truncated, focal, gce, dft, entropy, "
    "with options after a colon: focal:gamma=3, ce:label_smoothing=0.1."
)

app = typer.Typer(
    name="nvamp",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """The `nvamp` program. Exit codes: 0; 2 for a user's mistake, reported in one line; 130 for Ctrl-C."""
    peers = Peers()
    try:
        peers = join()
        if peers.rank > 0:
            sys.stdout = io.StringIO()  # only the first rank prints
        elif isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="replace")  # not every console knows ± and the names of all files
        _check_encoding(sys.argv[1:])
        with _no_interrupt_lost():
            code = app(prog_name="nvamp", standalone_mode=False, obj=peers)
    except typer.TyperException as error:
        # Without arguments the help is shown, and the error has no message.
        if message := error.format_message():
            _say(message + (_REPEAT if "unexpected extra argument" in message else ""), peers)
        code = 2
    except StudyError as error:
        _say(str(error), peers)
        code = 2
    except ModuleNotFoundError as error:
        _say(_INSTALL.format(error.name or error), peers)
        code = 2
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    raise SystemExit(code if isinstance(code, int) else 0)


@contextmanager
def _no_interrupt_lost() -> Iterator[None]:
    """Interrupts once more where Python drops a Ctrl-C: in `__del__` and in callbacks of weak references."""
    told = sys.unraisablehook

    def again(dropped: "sys.UnraisableHookArgs") -> None:
        if issubclass(dropped.exc_type, KeyboardInterrupt):
            later = threading.Timer(0.1, interrupt_main)
            later.daemon = True  # what has ended by then needs none
            later.start()
        else:
            told(dropped)

    sys.unraisablehook = again
    try:
        yield
    finally:
        sys.unraisablehook = told


def _say(message: str, peers: Peers) -> None:
    """Report what ended the study, once for all ranks."""
    if peers.first_to_fail():
        print(f"nvamp: {message}", file=sys.stderr)


def _check_encoding(arguments: list[str]) -> None:
    """Raise a `StudyError` if one, a file name, is not UTF-8: no page and no JSON could name it."""
    for argument in arguments:
        try:
            argument.encode()
        except UnicodeEncodeError:
            raise StudyError(f"{argument!r}: expected UTF-8") from None


def _named(value: str | Path) -> Path:
    """A path from its name; the empty name, which would be the working directory, is none."""
    if value == "":
        raise typer.BadParameter("expected a name, got an empty one")
    return Path(value)


def _read_config(context: typer.Context, path: Path | None) -> None:
    """Make the values of a file the defaults of the other options."""
    if path is None:
        return
    from nvamp.study.config import read_config

    options = {
        name.removeprefix("--"): option
        for option in context.command.params
        for name in option.opts
        if name not in ("--config", "--help", "-h")
    }
    context.default_map = {
        options[key].name: _as_typed(value, options[key]) for key, value in read_config(path, options).items()
    }


def _as_typed(value: Any, option: Any) -> Any:
    """A value of a file as on the command line, where all but flags are text."""
    if option.multiple:
        return [str(one) for one in (value if isinstance(value, list) else [value])]
    return value if option.is_flag and isinstance(value, bool) else str(value)


def _chosen(context: typer.Context, name: str, rival: str) -> Any:
    """The value of an option, or `None` if it is from a file and its rival is on the command line."""
    given = {
        option
        for option in (name, rival)
        if (source := context.get_parameter_source(option)) is not None and source.name == "COMMANDLINE"
    }
    return None if given == {rival} else context.params[name]


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
    """Loss functions for language models: whether another one helps, and what it does to a text."""


@app.command()
def compare(
    context: typer.Context,
    loss: Annotated[
        list[str],
        typer.Option(
            help="A loss to train with; can be repeated, the first one is the baseline. " + _LOSSES,
            show_default="ce, nvamp, nvamp:gamma=0.04,tail=0.05",
        ),
    ] = ["ce", "nvamp", "nvamp:gamma=0.04,tail=0.05"],  # noqa: B006  # typer copies it
    seeds: Annotated[int, typer.Option(help="How many seeds, at least 1; they are 0, 1, 2, ...")] = 3,
    steps: Annotated[
        int | None, typer.Option(help="Optimizer steps of each run.", show_default="240")
    ] = None,
    epochs: Annotated[
        float | None, typer.Option(help="Instead of --steps: how often each run sees the training text.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Blocks of tokens in a batch.")] = 8,
    accumulate: Annotated[
        int, typer.Option(help="Batches in a step, which has so many times as many blocks.")
    ] = 1,
    sequence: Annotated[
        int | None,
        typer.Option(help="Tokens in a block.", show_default="64; with --model, chats or completions 256"),
    ] = None,
    lr: Annotated[
        float | None,
        typer.Option(
            help="Peak learning rate of the losses without one of their own.",
            show_default="0.002; with --model 5e-05; with --lora 0.0002",
        ),
    ] = None,
    lora: Annotated[
        str | None,
        typer.Option(
            help="Train adapters of rank r instead of all weights, scaled by alpha/r.",
            metavar="R[,ALPHA]",
            show_default="off; alpha is 2r",
        ),
    ] = None,
    bf16: Annotated[bool, typer.Option("--bf16", help="Compute matrix products in bfloat16.")] = False,
    gradient_checkpointing: Annotated[
        bool,
        typer.Option("--gradient-checkpointing", help="Compute activations twice instead of keeping them."),
    ] = False,
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
            help="A file or directory of text; can be repeated.",
            show_default="Python's own standard library source",
        ),
    ] = None,
    dataset: Annotated[
        list[str] | None,
        typer.Option(
            help="Instead of --text: chats (messages), prompt and completion, or text. The name or "
            "name:configuration of a dataset, one saved with save_to_disk, or a local file, which can be "
            "repeated. Append #column to name the one to read."
        ),
    ] = None,
    loss_on: Annotated[
        str | None,
        typer.Option(
            help="What is learned of chats, prompts and completions: all, or completions alone, which are "
            "the assistant's turns.",
            show_default="completions",
        ),
    ] = None,
    special_tokens: Annotated[
        bool,
        typer.Option(
            "--special-tokens", help="Read special tokens that are spelled out in the text as such."
        ),
    ] = False,
    also: Annotated[
        str | None,
        typer.Option(
            help="A file or directory of another text, to see what is forgotten: its losses before and after."
        ),
    ] = None,
    generate: Annotated[
        int,
        typer.Option(help="How many held-out prompts, at most, to complete and compare with their answers."),
    ] = 0,
    out: Annotated[
        Path, typer.Option(help="Directory for results, report and models.", parser=_named, metavar="PATH")
    ] = Path("runs/compare"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Delete the study in --out first.")] = False,
    config: Annotated[
        Path | None,
        typer.Option(
            help="A TOML file of options, such as the study.toml of an earlier study; those given here win.",
            is_eager=True,
            callback=_read_config,
            parser=_named,
            metavar="PATH",
        ),
    ] = None,
) -> None:
    """Train the same model from the same seeds under several losses, and report what differs.

    Finished runs are kept: after Ctrl-C, the same command continues. Under torchrun the ranks share the runs.
    """
    peers: Peers = context.obj
    settings = Settings(
        losses=tuple(loss),
        seeds=seeds,
        steps=_chosen(context, "steps", "epochs"),
        batch_size=batch_size,
        lr=lr,
        noise=noise,
        model=model,
        text=tuple(_chosen(context, "text", "dataset") or ()),
        dataset=tuple(_chosen(context, "dataset", "text") or ()),
        epochs=_chosen(context, "epochs", "steps"),
        accumulate=accumulate,
        sequence=sequence,
        lora=lora,
        bf16=bf16,
        gradient_checkpointing=gradient_checkpointing,
        loss_on=loss_on,
        special_tokens=special_tokens,
        also=also,
        generate=generate,
    )
    settings.check()  # mistakes of options and of a model's directory do not wait for PyTorch
    if model is not None:
        check_model(model)
    from nvamp.study.losses import parse_losses

    parse_losses(loss)  # nor do those of losses wait for the other libraries
    from nvamp.study.compare import compare
    from nvamp.study.report import write_report
    from nvamp.study.store import Store, kept_runs
    from nvamp.study.terminal import Terminal, show_results

    console = Console()
    try:
        with Store(out) as store:
            with Terminal(console) as terminal:
                command = shlex.join(["nvamp", *sys.argv[1:]])
                results = compare(settings, store, command, terminal, overwrite, peers)
            if results is None:  # gathered by another rank
                return
            try:  # the report first: a console can fail
                page = write_report(results, out / "report.html")
            finally:
                show_results(console, results)
    except KeyboardInterrupt:
        kept = kept_runs(out)
        _say(f"interrupted: {kept} finished runs are kept in {out}; the same command continues", peers)
        raise typer.Exit(130) from None
    console.print(f"Report: {page}", highlight=False, markup=False)


@app.command()
def inspect(
    model: Annotated[
        list[str],
        typer.Option(
            help="A causal language model: a directory or hub id; can be repeated, the first one is what the "
            "others are compared to. A study's directory means the first model of each of its losses."
        ),
    ],
    text: Annotated[Path, typer.Option(help="A UTF-8 file.", parser=_named, metavar="PATH")],
    loss: Annotated[
        list[str] | None,
        typer.Option(
            help="A loss whose weights the page shows; can be repeated. " + _LOSSES,
            show_default="the loss that the model was trained with, and nvamp in each gradient mode",
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="The page to write.", parser=_named, metavar="PATH")] = Path(
        "inspect.html"
    ),
    special_tokens: Annotated[
        bool,
        typer.Option(
            "--special-tokens", help="Read special tokens that the text spells out as such, not as text."
        ),
    ] = False,
) -> None:
    """Show a text on one page, each token coloured by its loss or by the weight a loss function gives it."""
    from nvamp.study.inspect.inputs import read_inputs

    inputs = read_inputs(model, text, out, special_tokens)  # its mistakes do not wait for PyTorch
    from nvamp.study.inspect.page import inspect_models
    from nvamp.study.terminal import counting

    console = Console()
    with counting(console, "windows of the text") as progress:
        inspected = inspect_models(inputs, loss or [], progress)
    for it in inspected:
        s = it.found.statistics
        console.print(
            f"{it.name}: {s.num_tokens:,.0f} tokens: mean {s.mean:.3f} nats, sigma {s.std:.3f}, "
            f"max {s.max:.2f}, dispersion {s.dispersion:.3f}",
            highlight=False,
            markup=False,
        )
    size = out.stat().st_size / 1e6
    console.print(f"Page ({size:.1f} MB): {out}", highlight=False, markup=False)
