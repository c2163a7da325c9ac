"""Small changes to the code, each of which some test must see."""

from typing import NamedTuple


class Mutant(NamedTuple):
    """A text that occurs once in a file, what stands in its place, and the tests that must then fail."""

    file: str
    old: str
    new: str
    tests: str  # a file
    names: str  # those of its tests whose name has this; all if empty


STUDY, TESTS = "src/nvamp/study", "tests/study"

MUTANTS = [
    Mutant(
        f"{STUDY}/metrics.py",
        "    nll = scores.nll.astype(np.float64)\n",
        "    nll = scores.nll\n",
        f"{TESTS}/test_metrics.py",
        "",
    ),
    Mutant(
        f"{STUDY}/sources.py",
        "        kept.append(document[:left])",
        "        kept.append(document)",
        f"{TESTS}/test_sources.py",
        "limit",
    ),
    Mutant(
        f"{STUDY}/sources.py",
        "        if left <= 0:\n            break\n",
        "",
        f"{TESTS}/test_sources.py",
        "limit",
    ),
    Mutant(
        f"{STUDY}/sources.py", "file.read(MAX_CHARACTERS)", "file.read()", f"{TESTS}/test_sources.py", "limit"
    ),
    Mutant(
        f"{STUDY}/sources.py",
        "    random.Random(0).shuffle(items)\n",
        "",
        f"{TESTS}/test_sources.py",
        "shuffled",
    ),
    Mutant(
        f"{STUDY}/sources.py", "random.Random(0)", "random.Random()", f"{TESTS}/test_sources.py", "shuffled"
    ),
    Mutant(
        f"{STUDY}/sources.py",
        "_bounded(_shuffled(_read_dataset(dataset)))",
        "_bounded(_read_dataset(dataset))",
        f"{TESTS}/test_sources.py",
        "shuffled",
    ),
    Mutant(
        f"{STUDY}/training.py",
        'lr_scheduler_type="cosine"',
        'lr_scheduler_type="linear"',
        f"{TESTS}/test_training.py",
        "recipe",
    ),
    Mutant(
        f"{STUDY}/training.py",
        "recipe.steps // 10",
        "recipe.steps // 5",
        f"{TESTS}/test_training.py",
        "recipe",
    ),
    Mutant(
        f"{STUDY}/training.py",
        "max_grad_norm=1.0",
        "max_grad_norm=0.0",
        f"{TESTS}/test_training.py",
        "recipe",
    ),
    Mutant(f"{STUDY}/training.py", "    model.eval()\n", "", f"{TESTS}/test_training.py", "dropout"),
    Mutant(
        f"{STUDY}/inspect/score.py", "    model.eval()\n", "", f"{TESTS}/inspect/test_score.py", "dropout"
    ),
    Mutant(
        f"{STUDY}/models.py",
        "from_pretrained(name, trust_remote_code=False, **kwargs)",
        "from_pretrained(name, **kwargs)",
        f"{TESTS}/test_models.py",
        "code_in",
    ),
    Mutant(
        f"{STUDY}/store.py",
        '            write_json(self._settings, conditions)  # first: without it the rest is not a study\'s\n            for part in ("runs", "models", "inspect"):\n                (self.out / part).mkdir(exist_ok=True)\n',
        '            for part in ("runs", "models", "inspect"):\n                (self.out / part).mkdir(exist_ok=True)\n            write_json(self._settings, conditions)\n',
        f"{TESTS}/test_store.py",
        "after_its_first",
    ),
    Mutant(
        f"{STUDY}/store.py",
        '("nvamp", "torch", "transformers", "device")',
        '("nvamp", "transformers", "device")',
        f"{TESTS}/test_store.py",
        "versions_and",
    ),
    Mutant(
        f"{STUDY}/store.py",
        '("nvamp", "torch", "transformers", "device")',
        '("nvamp", "torch", "transformers")',
        f"{TESTS}/test_store.py",
        "versions_and",
    ),
    Mutant(
        f"{STUDY}/inspect/score.py",
        " if around and around[0] == tokenizer.bos_token_id else []",
        "",
        f"{TESTS}/inspect/test_score.py",
        "bos",
    ),
    Mutant(
        f"{STUDY}/terminal.py",
        "highlight=False, markup=False)\n\n\n@context",
        "highlight=False)\n\n\n@context",
        f"{TESTS}/test_terminal.py",
        "",
    ),
    Mutant(
        f"{STUDY}/files.py",
        "fcntl.LOCK_EX | fcntl.LOCK_NB",
        "fcntl.LOCK_SH | fcntl.LOCK_NB",
        f"{TESTS}/test_store.py",
        "one_process",
    ),
    Mutant(
        f"{STUDY}/store.py",
        "        self._held.close()",
        "        pass",
        f"{TESTS}/test_store.py",
        "one_process",
    ),
    Mutant(
        f"{STUDY}/store.py",
        '_BEFORE = {f"{SETTINGS}.part", LOCK}',
        "_BEFORE = {LOCK}",
        f"{TESTS}/test_store.py",
        "kill_leaves",
    ),
    Mutant(
        f"{STUDY}/store.py",
        '_BEFORE = {f"{SETTINGS}.part", LOCK}',
        '_BEFORE = {f"{SETTINGS}.part"}',
        f"{TESTS}/test_store.py",
        "kill_leaves",
    ),
    Mutant(
        f"{STUDY}/store.py",
        'record.pop("checksum", None) == _checksum(_canonical(record))',
        'record.pop("checksum", None) is not None',
        f"{TESTS}/test_store.py",
        "damaged",
    ),
    Mutant(
        f"{STUDY}/store.py",
        'if _checksum(content) != saved["checksum"]:',
        "if False:",
        f"{TESTS}/test_store.py",
        "damaged",
    ),
    Mutant(f"{STUDY}/store.py", "nll.dtype != np.float32 or ", "", f"{TESTS}/test_store.py", "damaged"),
    Mutant(
        f"{STUDY}/store.py", ' or nll.shape != (saved["tokens"],)', "", f"{TESTS}/test_store.py", "damaged"
    ),
    Mutant(f"{STUDY}/compare.py", "needed > free", "needed > free + 1", f"{TESTS}/test_store.py", "space"),
    Mutant("src/nvamp/cli.py", 'errors="replace"', 'errors="strict"', "tests/test_cli.py", "not_utf_8"),
    Mutant(
        "src/nvamp/cli.py",
        '            try:  # the report first: a console can fail\n                page = write_report(results, out / "report.html")\n            finally:\n                show_results(console, results)\n',
        '            show_results(console, results)\n            page = write_report(results, out / "report.html")\n',
        "tests/test_cli.py",
        "does_not_wait",
    ),
    Mutant(
        f"{STUDY}/store.py",
        "            except Exception as error:  # the writers",
        "            except ZeroDivisionError as error:  # the writers",
        f"{TESTS}/test_store.py",
        "full_disk",
    ),
    Mutant(
        f"{STUDY}/store.py",
        "            self._record(loss, seed).unlink(missing_ok=True)\n",
        "",
        f"{TESTS}/test_store.py",
        "trained_again",
    ),
    Mutant(
        f"{STUDY}/compare.py",
        "        display.replacing(len(left_out))",
        "        pass",
        f"{TESTS}/test_compare.py",
        "may_join",
    ),
    Mutant(
        f"{STUDY}/sources.py",
        "return Unread.OWN if _PAGE.match(text) else text",
        "return text",
        f"{TESTS}/test_sources.py",
        "nvamp_writes",
    ),
    Mutant(
        f"{STUDY}/sources.py",
        "        for directory in (path, *path.parents):",
        "        for directory in (path,):",
        f"{TESTS}/test_sources.py",
        "nvamp_writes",
    ),
    Mutant(
        f"{STUDY}/sources.py",
        "{out.resolve(): True} if out else {}",
        "{}",
        f"{TESTS}/test_sources.py",
        "nvamp_writes",
    ),
    Mutant(
        f"{STUDY}/sources.py",
        "        if not (path.is_file() or path.is_dir()):\n            return Unread.ERROR\n",
        "        if not path.exists():\n            return Unread.ERROR\n        if path.is_fifo():\n            raise AssertionError\n",
        f"{TESTS}/test_sources.py",
        "counted",
    ),
    Mutant(
        f"{STUDY}/sources.py",
        "os.walk(root, onerror=self._not_listed)",
        "os.walk(root)",
        f"{TESTS}/test_sources.py",
        "counted",
    ),
    Mutant(
        f"{STUDY}/sources.py",
        'if _DATASET_FORMATS.get(path.suffix, "text") != "text":',
        'if path.suffix == ".jsonl":',
        f"{TESTS}/test_sources.py",
        "rows",
    ),
    Mutant(
        f"{STUDY}/peers.py",
        '_number(os.environ, "RANK", 0, world - 1)',
        '_number(os.environ, "RANK", 0, world)',
        f"{TESTS}/test_peers.py",
        "no_sense",
    ),
    Mutant(
        f"{STUDY}/peers.py",
        "    except (ValueError, RuntimeError) as error:",
        "    except ValueError as error:",
        f"{TESTS}/test_peers.py",
        "cannot_meet",
    ),
    Mutant(f"{STUDY}/models.py", "return 4 * int(", "return 2 * int(", f"{TESTS}/test_store.py", "space"),
    Mutant(
        f"{STUDY}/store.py",
        "kept = self.check()  # again: another process may have held it so far",
        "kept = None",
        f"{TESTS}/test_store.py",
        "versions_and",
    ),
    Mutant(
        "src/nvamp/cli.py",
        "            finally:\n                show_results(console, results)",
        "            except ZeroDivisionError:\n                pass\n            show_results(console, results)",
        "tests/test_cli.py",
        "end_to_end",
    ),
]
