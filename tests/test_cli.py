"""`nvamp` as a user runs it."""

import io
import json
import re
import signal
import sys
import time
from pathlib import Path

import pytest

import nvamp
import nvamp.study.terminal
from nvamp.cli import main
from nvamp.study.losses import KNOWN, MODES
from tests.processes import python
from tests.study.conftest import documents, model_dir, one_thread, started, text_dir, tokenizer, words

__all__ = ["documents", "model_dir", "one_thread", "text_dir", "tokenizer"]


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    """The exit code of `nvamp` with these arguments."""
    monkeypatch.setattr(sys, "argv", ["nvamp", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        main()
    assert isinstance(end.value.code, int)
    return end.value.code


def test_a_study_from_end_to_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, text_dir: Path
) -> None:
    out = tmp_path / "out"
    arguments = ["compare", "--loss", "ce", "--loss", "nvamp:gradient=token", "--seeds", "2", "--steps", "3"]
    assert run(monkeypatch, *arguments, "--noise", "0.1", "--text", text_dir, "--out", out) == 0
    captured = capsys.readouterr()
    said = " ".join(captured.out.split())
    assert captured.err == ""
    assert f"Report: {out / 'report.html'}" in "".join(captured.out.splitlines())
    assert "NVAMP with gradient token: tail " in said
    assert "ce, seed 1: held-out cross-entropy" in said

    results = json.loads((out / "results.json").read_text())
    assert results["command"].startswith("nvamp compare --loss ce --loss nvamp:gradient=token --seeds 2")
    assert results["settings"]["losses"] == ["ce", "nvamp:gradient=token"]
    assert results["settings"]["noise"] == 0.1
    assert results["settings"]["lr"] == 0.002
    assert results["versions"]["nvamp"] == nvamp.__version__
    assert [(run["loss"], run["seed"], run["steps"]) for run in results["runs"]] == [
        (loss, seed, 3) for loss in ("ce", "nvamp:gradient=token") for seed in (0, 1)
    ]
    assert "NVAMP with gradient token against cross-entropy" in (out / "report.html").read_text()

    assert run(monkeypatch, *arguments, "--noise", "0.1", "--text", text_dir, "--out", out) == 0
    assert "4 of 4 runs are already finished" in capsys.readouterr().out
    assert run(monkeypatch, *arguments, "--text", text_dir, "--out", out) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"nvamp: {out} holds runs of another study: --noise 0.1 (now 0.0); ")

    (out / "report.html").unlink()
    (out / "report.html").mkdir()
    assert run(monkeypatch, *arguments, "--noise", "0.1", "--text", text_dir, "--out", out) == 2
    captured = capsys.readouterr()
    assert captured.err == f"nvamp: {out / 'report.html'}: Is a directory\n"
    assert "NVAMP with gradient token: tail " in " ".join(captured.out.split())  # it is shown all the same


def test_a_dataset_and_a_model_of_ones_own(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    documents: list[str],
    model_dir: Path,
) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(json.dumps({"text": text}) for text in documents))
    out = tmp_path / "out"
    arguments = ["compare", "--loss", "ce", "--seeds", "1", "--steps", "2"]
    assert run(monkeypatch, *arguments, "--dataset", data, "--model", model_dir, "--out", out) == 0
    results = json.loads((out / "results.json").read_text())
    assert results["text"]["source"] == str(data)
    assert results["text"]["sequence"] == 16  # the most the model takes
    assert results["settings"]["lr"] == 5e-05
    assert results["losses"][0]["metrics"]["cross_entropy"]["half_width"] is None
    assert "±" not in capsys.readouterr().out.split("\n", 6)[-1]


def test_options_from_a_file(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    model_dir: Path,
    text_dir: Path,
) -> None:
    config, out = tmp_path / "my.toml", tmp_path / "out"
    config.write_text(
        f'loss = ["ce", "nvamp@2e-4"]\nseeds = 1\nepochs = 3\nbatch-size = 4\nlr = 1e-3\nbf16 = true\n'
        f'lora = 2\nmodel = "{model_dir}"\ntext = "{text_dir}"\n'
    )
    assert run(monkeypatch, "compare", "--config", config, "--steps", "2", "--loss", "ce", "--out", out) == 0
    settings = json.loads((out / "results.json").read_text())["settings"]
    assert (settings["losses"], settings["steps"], settings["epochs"]) == (["ce"], 2, None)
    assert (settings["batch_size"], settings["lr"], settings["lora"]) == (4, 1e-3, "2")
    assert settings["bf16"] is True
    capsys.readouterr()
    assert run(monkeypatch, "compare", "--config", out / "study.toml", "--out", out) == 0
    assert "1 of 1 runs are already finished" in capsys.readouterr().out
    assert run(monkeypatch, "compare", "--config", out / "study.toml", "--out", out, "--dataset", "x") == 2
    assert "--dataset x: " in capsys.readouterr().err  # and not that it excludes --text


def test_a_number_in_a_file_is_no_truth_value(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    config = tmp_path / "my.toml"
    config.write_text("steps = true\n")
    assert run(monkeypatch, "compare", "--config", config, "--out", tmp_path / "out") == 2
    assert "Invalid value for '--steps'" in capsys.readouterr().err


def losses_on(page: Path) -> list[str]:
    """The names of the losses whose weights a page of `nvamp inspect` has."""
    data = re.search(r'<script type="application/json" id="data">(.*)</script>', page.read_text())
    assert data
    return [loss["name"] for loss in json.loads(data[1])["models"][0]["losses"]]


def test_a_model_of_a_study_can_be_inspected(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, text_dir: Path
) -> None:
    out = tmp_path / "out"
    arguments = ["--loss", "nvamp", "--seeds", "1", "--steps", "2", "--text", text_dir, "--out", out]
    assert run(monkeypatch, "compare", *arguments) == 0
    assert '<a href="inspect/nvamp-seed0.html">nvamp</a>' in (out / "report.html").read_text()
    capsys.readouterr()
    (tmp_path / "text").write_text(words(7, 200))
    inspect = ["inspect", "--model", out / "models" / "nvamp-seed0", "--text", tmp_path / "text"]
    assert run(monkeypatch, *inspect, "--out", tmp_path / "page.html") == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    size = (tmp_path / "page.html").stat().st_size / 1e6
    said = " ".join(captured.out.split())
    assert re.match(
        r"nvamp, seed 0: \d+ tokens: mean \d\.\d{3} nats, sigma 0\.\d{3}, max \d\.\d\d, dispersion 0\.\d{3} ",
        said,
    )
    assert f"Page ({size:.1f} MB): {tmp_path / 'page.html'}" in "".join(captured.out.splitlines())
    assert losses_on(tmp_path / "page.html") == [*MODES]
    assert losses_on(out / "inspect" / "nvamp-seed0.html") == [*MODES]
    assert '<a href="out/report.html">' in (tmp_path / "page.html").read_text()
    assert '<a href="../report.html">' in (out / "inspect" / "nvamp-seed0.html").read_text()
    more = ["--loss", "focal:gamma=2", "--loss", "ce:label_smoothing=0.1", "--out", tmp_path / "page.html"]
    assert run(monkeypatch, *inspect, *more) == 0
    assert losses_on(tmp_path / "page.html") == ["focal", "ce:label_smoothing=0.1"]


def test_ctrl_c_while_a_text_is_read(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model_dir: Path
) -> None:
    from nvamp.study.inspect import score

    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(score, "_scores_of", interrupted)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").write_text(words(7, 20))
    assert run(monkeypatch, "inspect", "--model", model_dir, "--text", "text") == 130
    assert list(tmp_path.iterdir()) == [tmp_path / "text"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["compare", "--loss", "bogus"],
            "--loss bogus: unknown objective 'bogus', known are ce, nvamp, ",
        ),
        (["compare", "--loss", "ce", "--loss", "ce"], "--loss ce: named twice"),
        (
            ["compare", "--loss", "ce", "nvamp"],
            "Got unexpected extra argument(s) (nvamp); for several values repeat the option: --loss ce ",
        ),
        (["compare", "--text", "missing.txt"], "--text missing.txt: no such file or directory"),
        (["compare", "--noise", "2"], "--noise must be between 0 and 1, got 2"),
        (["compare", "--steps", "0"], "--steps must be at least 1, got 0"),
        (["compare", "--steps", "many"], "'--steps'"),
        (["compare", "--text", ""], "--text: expected a name, got an empty one"),
        (["compare", "--out", ""], "Invalid value for '--out': expected a name, got an empty one"),
        (["inspect", "--model", "x", "--text", "x", "--out", ""], "for '--out': expected a name"),
        (["inspect", "--model", "x", "--text", ""], "for '--text': expected a name, got an empty one"),
        (["compare", "--text", "\udcff.txt"], r"'\udcff.txt': expected UTF-8"),
        (["compare", "--no-overwrite"], "No such option: --no-overwrite"),
        (["compare", "--bogus"], "No such option: --bogus"),
        (["compare", "--lr"], "--lr"),
        (["compare", "--config", "no.toml"], "--config no.toml: No such file or directory"),
        (["bogus"], "No such command 'bogus'."),
        (["inspect", "--text", "x"], "--model"),
        (["inspect", "--model", "x", "--text", "missing"], "--text missing: No such file or directory"),
        (["inspect", "--model", "./x", "--text", __file__], "--model ./x: no such directory"),
        (
            ["inspect", "--model", "x", "--text", __file__, "--loss", "bogus"],
            "--loss bogus: unknown objective",
        ),
    ],
)
def test_a_mistake_is_reported_in_one_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, *arguments) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.startswith("nvamp: ")
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_a_console_that_is_not_utf_8(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model_dir: Path, text_dir: Path, encoding: str
) -> None:
    console = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", console)
    out = tmp_path / "out\N{SNOWMAN}"
    arguments = ["--loss", "ce", "--loss", "dft", "--seeds", "2", "--steps", "2", "--model", model_dir]
    assert run(monkeypatch, "compare", *arguments, "--text", text_dir, "--out", out) == 0
    console.flush()
    shown = console.buffer.getvalue().decode(encoding)  # type: ignore[attr-defined]
    assert "DFT: tail " in shown
    assert "out?" in "".join(shown.split())
    assert (out / "report.html").exists()


def test_the_report_does_not_wait_for_the_console(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model_dir: Path, text_dir: Path
) -> None:
    def closed(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(nvamp.study.terminal, "show_results", closed)
    arguments = ["compare", "--loss", "ce", "--seeds", "1", "--steps", "2", "--model", model_dir]
    assert run(monkeypatch, *arguments, "--text", text_dir, "--out", tmp_path / "out") == 130
    assert (tmp_path / "out" / "report.html").exists()


def test_an_environment_that_makes_no_sense(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "first")
    assert run(monkeypatch, "compare") == 2
    assert capsys.readouterr().err == (
        "nvamp: LOCAL_RANK=first in the environment: expected an integer from 0\n"
    )


def test_version(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"nvamp {nvamp.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--version"], 0, f"nvamp {nvamp.__version__}\n"),
        (["compare", "--help"], 0, "--noise"),
        (["compare", "--bogus"], 2, "nvamp: No such option: --bogus"),
        (["compare", "--steps", "many"], 2, "'--steps'"),
        (["compare", "--steps", "0"], 2, "nvamp: --steps must be at least 1, got 0\n"),
        (
            ["compare", "--loss-on", "prompts"],
            2,
            "nvamp: --loss-on: expected all or completions, got prompts\n",
        ),
        (["inspect", "--text", "x"], 2, "--model"),
    ],
)
def test_messages_do_not_wait_for_heavy_imports(arguments: list[str], code: int, said: str) -> None:
    heavy = {"torch", "numpy", "transformers", "datasets", "matplotlib", "jinja2"}
    shown = python(
        "-c",
        f"import sys; sys.argv = ['nvamp', *{arguments!r}]\n"
        "from nvamp.cli import main\n"
        "try: main()\n"
        f"finally: print('heavy:', {heavy!r} & set(sys.modules))",
    )
    assert shown.returncode == code
    assert said in shown.stdout + shown.stderr
    assert shown.stdout.endswith("heavy: set()\n")


def test_an_unknown_loss_waits_for_pytorch_alone() -> None:
    shown = python(
        "-c",
        "import sys; sys.argv = ['nvamp', 'compare', '--loss', 'bogus']\n"
        "from nvamp.cli import main\n"
        "try: main()\n"
        "finally: print('heavy:', {'torch', 'transformers', 'datasets', 'matplotlib'} & set(sys.modules))",
    )
    assert shown.returncode == 2
    assert "--loss bogus" in shown.stderr
    assert shown.stdout.endswith("heavy: {'torch'}\n")


def test_the_module_is_the_program() -> None:
    shown = python("-m", "nvamp", "inspect", "-h")
    assert shown.returncode == 0
    assert "Usage: nvamp inspect " in shown.stdout


def test_shells_complete() -> None:
    """As bash asks, which the script of `--show-completion` makes it do."""
    asked = {"_NVAMP_COMPLETE": "complete_bash", "COMP_WORDS": "nvamp compare --ov", "COMP_CWORD": "2"}
    shown = python("-m", "nvamp", **asked)
    assert (shown.returncode, shown.stdout) == (0, "--overwrite\n")


@pytest.mark.parametrize("command", ["compare", "inspect"])
def test_help_lists_the_objectives(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    assert run(monkeypatch, command, "--help") == 0
    shown = " ".join(re.sub("[│|]", " ", capsys.readouterr().out).split())
    assert f"One of {', '.join(KNOWN)}," in shown
    assert "token_weighted" not in shown


@pytest.mark.parametrize("command", [[], ["compare"], ["inspect"]])
def test_help_is_short_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    assert run(monkeypatch, *command, "-h") == 0
    assert "Usage: " in capsys.readouterr().out


def test_ctrl_c_where_python_drops_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a callback, which can raise nothing."""

    class Freed:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGINT)

    def work(**_: object) -> None:
        Freed()
        for _ in range(1000):
            time.sleep(0.01)

    monkeypatch.setattr("nvamp.cli.app", work)
    hook = sys.unraisablehook
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # it may be ignored, in the background
    try:
        assert run(monkeypatch) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().err == ""
    assert sys.unraisablehook is hook


def test_ctrl_c_while_packages_are_imported() -> None:
    ended = python(
        "-c",
        """
import sys, nvamp

class Interrupting:
    def find_spec(self, name, *rest):
        if name == self.package:
            raise KeyboardInterrupt

sys.meta_path.insert(0, Interrupting())
sys.argv = ["nvamp", "compare"]
for sys.meta_path[0].package in ("typer", "transformers"):
    try:
        from nvamp.cli import main
        main()
    except SystemExit as end:
        print(end.code)
""",
    )
    assert (ended.stdout, ended.stderr) == ("130\n130\n", "")


@pytest.mark.parametrize("missing", ["typer", "transformers", "matplotlib"])
def test_without_the_extra_packages(missing: str) -> None:
    ended = python(
        "-c",
        f"import sys; sys.modules['{missing}'] = None; sys.argv = ['nvamp', 'compare']\n"
        "from nvamp.cli import main; main()",
    )
    assert ended.returncode == 2
    command = f"pip install -e '{Path(__file__).parents[1]}[study]'"
    told = f"nvamp: the command line needs {missing}, which is not installed: {command}\n"
    assert ended.stderr == told


def test_ctrl_c_keeps_finished_runs(text_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-c", "from nvamp.cli import main; main()", "compare", "--loss", "ce"]
    command += ["--seeds", "50", "--steps", "5", "--text", str(text_dir), "--out", str(out)]
    process = started(command)
    deadline = time.monotonic() + 120
    while not list(out.glob("runs/*.json")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    kept = len(list(out.glob("runs/*.json")))
    assert process.returncode == 130
    assert 1 <= kept < 50
    assert err == f"nvamp: interrupted: {kept} finished runs are kept in {out}; the same command continues\n"
