"""Kills `nvamp compare` at random points, damages what it wrote, and gives both commands random options.

    python -m tools.soak [--seconds 3600] [--seed SEED]

It works in rounds. Each has its own seed, one more than the last. In a round, a study with random options is
killed or interrupted and its files are damaged, until the command is left alone: then its numbers must be
those of the same study undisturbed. Nothing may end in a traceback: what cannot go on is one line and exit
code 2, and a damaged run is trained again once the file that the line names is deleted. `nvamp inspect` then
reads a random text under one of the models. The first failure ends the run with exit code 1; `--seed` with
the seed of that round repeats it, as far as the time of a kill allows.
"""

import argparse
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from nvamp.cli import main as nvamp_main
from nvamp.study.corpus import train_tokenizer
from nvamp.study.losses import KNOWN
from nvamp.study.metrics import HELD_OUT
from tests.study.conftest import small_llama, words

CHATS = Path(__file__).parents[1] / "examples/data/chat.jsonl"
TRIES = 20  # commands until a study must be finished
LONGEST = 3.0  # seconds until a kill, at most
MISTAKES = (
    ["--seeds", "0"],
    ["--steps", "many"],
    ["--lr", "nan"],
    ["--noise", "2"],
    ["--loss", "bogus"],
    ["--loss", "nvamp:gamma=-1"],
    ["--batch-size", "1000000"],
    ["--text", ""],
    ["--model", "./none"],
    ["--out", ""],
    ["--lora", "0"],
    ["--epochs", "0", "--steps", "1"],
    ["--accumulate", "0"],
    ["--loss-on", "bogus"],
    ["--dataset", "./none.jsonl"],
    ["--config", "./none.toml"],
    ["--bogus"],
)


class UnexpectedError(Exception):
    """What must not happen has happened."""


class Ended(NamedTuple):
    """A command that has ended: its exit code, negative for the signal that killed it, and its errors."""

    code: int
    errors: str


def _run(arguments: list[str], log: Path) -> int:
    """Run `nvamp` in this process, its errors in the file `log`, and return its exit code."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with log.open("w") as errors, Path(os.devnull).open("w") as nothing:
        os.dup2(errors.fileno(), 2)
        os.dup2(nothing.fileno(), 1)
    sys.argv = ["nvamp", *arguments]
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        nvamp_main()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1
    except KeyboardInterrupt:  # before or after `nvamp` looks for it
        return 130
    except BaseException:
        traceback.print_exc()
    return 1


def nvamp_ended(arguments: list[str], log: Path, kill: int = 0, after: float = 0.0) -> Ended:
    """`nvamp` in a process of its own, with the signal `kill` sent to it after so many seconds."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # until the fork is ready for it
    pid = os.fork()
    if pid == 0:
        code = 130
        try:
            code = _run(arguments, log)
        finally:  # whatever arrives, it must not go on as its parent
            os._exit(code)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    if kill:
        deadline = time.monotonic() + after
        while time.monotonic() < deadline:
            if (done := os.waitpid(pid, os.WNOHANG))[0]:
                return Ended(os.waitstatus_to_exitcode(done[1]), log.read_text(errors="replace"))
            time.sleep(0.01)
        os.kill(pid, kill)
    return Ended(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), log.read_text(errors="replace"))


def check(ended: Ended, *codes: int) -> None:
    """Raise an `UnexpectedError` if a command ended with none of these codes, or said more than one line."""
    if ended.code not in codes or ended.errors.count("\n") > 1:
        raise UnexpectedError(f"exit code {ended.code}: {ended.errors}")


def damage(path: Path, rng: random.Random) -> None:
    """Damage a file somehow, or delete it."""
    content = path.read_bytes()
    at = rng.randrange(len(content) + 1)
    flipped = bytes([content[at - 1] ^ 1 << rng.randrange(8)]) if at else b"x"
    damaged = (
        content[:at],
        content[: at - 1] + flipped + content[at:],
        content + b"\0",
        b"PK\x03\x04" + bytes(40),
        b"[" * 50_000,
        b"{}",
        b"text",
        rng.randbytes(100),
        None,
    )[rng.randrange(9)]
    if damaged is None:
        path.unlink()
    else:
        path.write_bytes(damaged)


def numbers(out: Path) -> list[Any]:
    """All numbers of a study's runs but times."""
    runs = json.loads((out / "results.json").read_text())["runs"]
    return [
        [run["loss"], run["seed"], run["curve"], {key: run["metrics"][key] for key in HELD_OUT}]
        for run in runs
    ]


class Soak:
    """Rounds over one text and one model in a directory."""

    def __init__(self, scratch: Path) -> None:
        self.scratch, self.text, self.model = scratch, scratch / "text", scratch / "model"
        self.log = scratch / "errors"
        self.count: Counter[str] = Counter()
        self.text.mkdir()
        documents = [words(seed, 200) for seed in range(80)]
        for index, document in enumerate(documents):
            (self.text / f"{index}.txt").write_text(document)
        tokenizer = train_tokenizer(documents)
        small_llama(tokenizer, 256).save_pretrained(self.model)
        tokenizer.save_pretrained(self.model)

    def options(self, rng: random.Random) -> list[str]:
        """Those of a small study, of plain text or of chats."""
        options = [f"--loss={loss}" for loss in rng.sample(KNOWN, rng.randint(1, 2))]
        options += ["--seeds", str(rng.randint(1, 2)), "--steps", str(rng.randint(1, 3))]
        options += ["--batch-size", str(rng.choice((1, 4))), "--model", str(self.model)]
        if rng.random() < 0.5:
            options += ["--dataset", str(CHATS), "--loss-on", rng.choice(("all", "completions"))]
            options += ["--generate", str(rng.choice((0, 2)))]
        else:
            options += ["--text", str(self.text), "--noise", str(rng.choice((0.0, 0.2, 1.0)))]
        options += rng.choice(([], [], ["--lora", "2"]))
        options += rng.choice(([], ["--bf16"], ["--gradient-checkpointing"], ["--accumulate", "2"]))
        return [*options, *rng.choice(([], ["--also", str(self.text)]))]

    def round(self, seed: int) -> None:
        rng = random.Random(seed)
        out, whole = self.scratch / "out", self.scratch / "whole"
        for path in (out, whole):
            shutil.rmtree(path, ignore_errors=True)
        study = ["compare", *self.options(rng), "--out", str(out)]
        self.count["rounds"] += 1
        for left in reversed(range(TRIES)):
            if rng.random() < 0.3:
                check(nvamp_ended([*study, *rng.choice(MISTAKES)], self.log), 2)
                self.count["mistakes"] += 1
            kill = rng.choice((0, signal.SIGKILL, signal.SIGINT)) if left > TRIES // 2 else 0
            ended = nvamp_ended(study, self.log, kill, rng.uniform(0, LONGEST))
            check(ended, 0, 2, 130, -signal.SIGKILL)
            self.count["kills"] += ended.code == -signal.SIGKILL
            self.count["interrupts"] += ended.code == 130
            if ended.code == 2:
                self.delete_damaged(ended)
            elif ended.code == 0:
                files = [*out.glob("runs/*"), out / "results.json", out / "report.html"]
                if left <= TRIES // 2 or rng.random() < 0.3:
                    break
                damage(rng.choice(files), rng)
                self.count["damages"] += 1
        else:
            raise UnexpectedError(f"not finished after {TRIES} commands: {ended.errors}")
        check(nvamp_ended([*study[:-1], str(whole)], self.log), 0)
        if numbers(out) != numbers(whole):
            raise UnexpectedError("the numbers are not those of the study undisturbed")
        if left_over := list(out.rglob("*.part")):
            raise UnexpectedError(f"left over: {left_over}")
        self.inspect(rng, out)

    def delete_damaged(self, ended: Ended) -> None:
        """Do what the error says."""
        found = re.fullmatch(r"nvamp: (.+) is damaged: delete it to train this run again\n", ended.errors)
        if not found:
            raise UnexpectedError(ended.errors)
        Path(found[1]).unlink()
        self.count["found damaged"] += 1

    def inspect(self, rng: random.Random, out: Path) -> None:
        text, page = self.scratch / "page.txt", self.scratch / "page.html"
        length = rng.choice((0, 1, 2, 50, 50, 500))
        odd = "".join(chr(rng.choice((10, 32, 97, 233, 0x202E, 0x1F600, 0))) for _ in range(length))
        text.write_bytes(odd.encode() if rng.random() < 0.8 else rng.randbytes(length))
        model = rng.choice([self.model, *out.glob("models/*"), self.scratch / "none"])
        ended = nvamp_ended(
            ["inspect", "--model", str(model), "--text", str(text), "--out", str(page)], self.log
        )
        check(ended, 0, 2)
        self.count["pages" if ended.code == 0 else "no pages"] += 1


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=3600)
    parser.add_argument("--seed", type=int, default=random.randrange(10**9))
    arguments = parser.parse_args()
    seed = arguments.seed
    for module in ("nvamp.study.compare", "nvamp.study.report", "nvamp.study.inspect.page", "peft"):
        import_module(module)  # so that the forks need not
    with tempfile.TemporaryDirectory() as scratch:
        soak = Soak(Path(scratch))
        started = time.monotonic()
        while time.monotonic() - started < arguments.seconds:
            try:
                soak.round(seed)
            except UnexpectedError as failure:
                print(f"soak: {failure}\nsoak: failed; to repeat: python -m tools.soak --seed {seed}")
                return 1
            seed += 1
        counts = ", ".join(f"{number} {what}" for what, number in soak.count.items())
        print(f"soak: seeds {arguments.seed} to {seed - 1}, {counts}, no failure")
    return 0


if __name__ == "__main__":
    sys.exit(main())
