import json
import os
import re
import resource
import shutil
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import nvamp.study.compare
import nvamp.study.store
from nvamp.study import StudyError
from nvamp.study.compare import compare, prepare, recipe_of
from nvamp.study.files import hold, remove
from nvamp.study.inspect.score import inspect_text
from nvamp.study.losses import MODES, parse_losses
from nvamp.study.models import build_model, load_model
from nvamp.study.settings import Lora, Settings
from nvamp.study.store import Store, _canonical, _checksum, conditions, finite, versions, write_json
from nvamp.study.training import train
from nvamp.study.watching import Progress
from tests.study.conftest import Silent, study


def test_an_unfinished_run_is_not_taken_for_a_finished_one(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "save", full_disk)
    with pytest.raises(KeyboardInterrupt):
        study(settings, tmp_path)
    monkeypatch.undo()
    assert not list((tmp_path / "runs").glob("*.json"))
    _, display = study(settings, tmp_path)
    assert display.kept == 0
    assert not list(tmp_path.rglob("*.part"))


def test_trained_models_can_be_opened(settings: Settings, tmp_path: Path) -> None:
    study(settings, tmp_path)
    directory = tmp_path / "models" / "dft-seed1"
    model = AutoModelForCausalLM.from_pretrained(directory)
    assert (directory / "model.safetensors").exists()
    assert len(AutoTokenizer.from_pretrained(directory)) == model.config.vocab_size


def test_held_out_text_is_read_by_the_first_model_of_each_loss(settings: Settings, tmp_path: Path) -> None:
    results, _ = study(settings, tmp_path)
    assert results["pages"] == {"ce": "inspect/ce-seed0.html", "dft": "inspect/dft-seed0.html"}
    assert sorted(tmp_path.glob("inspect/*")) == [tmp_path / page for page in results["pages"].values()]
    data = re.search(
        r'<script type="application/json" id="data">(.*?)</script>',
        (tmp_path / results["pages"]["dft"]).read_text(),
    )
    assert data
    page = json.loads(data[1])
    (of_model,) = page["models"]
    assert (of_model["name"], of_model["trained"]) == ("dft, seed 0", "dft")
    assert page["text"] == prepare(settings).excerpt
    assert [loss["name"] for loss in of_model["losses"]] == ["dft", *MODES]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "models" / "dft-seed0")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "models" / "dft-seed0")
    again = inspect_text(model, tokenizer, page["text"], parse_losses(["dft"]))
    assert of_model["statistics"]["mean"] == pytest.approx(float(again.statistics.mean), rel=1e-6)
    assert of_model["statistics"]["mean"] == pytest.approx(
        results["runs"][2]["metrics"]["cross_entropy"], rel=0.1
    )


@pytest.mark.parametrize("special", [False, True])
def test_the_page_reads_special_tokens_as_the_study_does(
    one: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, special: bool
) -> None:
    read: list[bool] = []

    def remember(*args: Any, special_tokens: bool) -> None:
        read.append(special_tokens)
        raise StudyError("no page")

    monkeypatch.setattr(nvamp.study.store, "inspect_text", remember)
    study(replace(one, special_tokens=special), tmp_path)
    assert read == [special]


def test_text_that_makes_no_page_is_no_failed_run(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_page(*args: Any, **options: Any) -> None:
        raise StudyError("expected at least 2 tokens, got 1")

    monkeypatch.setattr(nvamp.study.store, "inspect_text", no_page)
    results, display = study(settings, tmp_path)
    assert len(display.trained) == 4
    assert results["pages"] == {}


def test_runs_of_other_settings_are_not_mixed_in(settings: Settings, one: Settings, tmp_path: Path) -> None:
    changed = replace(settings, steps=5, noise=0.0)
    study(one, tmp_path)
    mine = [tmp_path / name for name in ("mine", "models/mine.bin", "runs/notes.json", "inspect/ce.html")]
    for path in mine:
        path.write_text("keep")
    (tmp_path / "models" / "focal-seed7.part").mkdir()  # of a run that was interrupted
    with pytest.raises(StudyError) as error:
        study(changed, tmp_path)
    assert str(error.value) == (
        f"{tmp_path} holds runs of another study: --steps 6 (now 5), --noise 0.1 (now 0.0); "
        "choose another --out, or start over with --overwrite"
    )
    results, display = study(changed, tmp_path, overwrite=True)
    assert display.kept == 0
    assert {run["steps"] for run in results["runs"]} == {5}
    assert [path.read_text() for path in mine] == ["keep"] * 4
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("content", [None, b"{}", b"[]", b"\xff", b'{"editor.tabSize": 4}'])
def test_a_directory_that_holds_no_study_is_left_alone(
    settings: Settings, tmp_path: Path, content: bytes | None, overwrite: bool
) -> None:
    (tmp_path / "models").mkdir()
    for name in ("models/ce-seed0", "report.html", "results.json"):
        (tmp_path / name).write_text("mine")
    if content is not None:
        (tmp_path / "settings.json").write_bytes(content)
    before = {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}
    with pytest.raises(StudyError, match=f"{tmp_path}.*(not a study's|is damaged)"):
        study(settings, tmp_path, overwrite=overwrite)
    assert {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")} == before


def test_another_model_in_the_same_place_is_another_study(
    one: Settings, tmp_path: Path, model_dir: Path
) -> None:
    directory = tmp_path / "model"
    shutil.copytree(model_dir, directory)
    one = replace(one, model=str(directory))
    study(one, tmp_path / "out")
    (directory / "README.md").write_text("Of no weight.")
    assert study(one, tmp_path / "out")[1].kept == 1
    model = load_model(str(directory))
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    model.save_pretrained(directory)
    with pytest.raises(StudyError, match="another study: the content of --model has changed since; choose"):
        study(one, tmp_path / "out")


def array(numbers: Any) -> bytes:
    """The bytes of a `.npy` file."""
    buffer = BytesIO()
    np.save(buffer, numbers)
    return buffer.getvalue()


def test_damaged_runs(one: Settings, tmp_path: Path) -> None:
    study(one, tmp_path)
    record, nll = (tmp_path / "runs" / f"ce-seed0.{suffix}" for suffix in ("json", "npy"))
    nll.unlink()
    assert study(one, tmp_path)[1].trained == [("ce", 0)]
    whole = {path: path.read_bytes() for path in (record, nll)}
    losses = np.load(nll)
    huge = whole[nll].replace(b"(%d,)" % len(losses), b"(%d,)" % 10**11)
    for path, content in (
        (nll, b""),
        (nll, b"\x93NUMPY"),
        (nll, b"PK\x03\x04" + bytes(40)),
        (nll, b"some text"),
        (nll, array(losses.astype(np.float64))),
        (nll, array(losses[:-1])),
        (nll, array(losses[None])),
        (nll, array(losses * np.nan)),
        (nll, huge),
        (nll, whole[nll][:-1] + b"\0"),
        (record, b"{"),
        (record, b"[]"),
        (record, b"{}"),
        (record, b"\xff"),
        (record, b"[" * 100_000),
        (record, whole[record].replace(b'"diverged": false', b'"diverged": true')),
        (record, whole[record].replace(b'"cross_entropy": ', b'"cross_entropy": 1')),
    ):
        assert content != whole[path]
        path.write_bytes(content)
        with pytest.raises(StudyError, match=f"^{path} is damaged: delete it to train this run again$"):
            study(one, tmp_path)
        path.write_bytes(whole[path])
    assert study(one, tmp_path)[1].kept == 1
    nll.unlink()
    nll.mkdir()
    with pytest.raises(StudyError, match=f"^{nll} is damaged: "):
        study(one, tmp_path)


def test_losses_that_do_not_belong_to_the_model_are_damaged(one: Settings, tmp_path: Path) -> None:
    """Checksums that fit do not make up for a dtype or a shape that does not."""
    study(one, tmp_path)
    (loss,) = parse_losses(one.losses)
    with Store(tmp_path) as store:
        record, nll = store.kept(loss, 0)
        for wrong in (nll.astype(np.float64), nll[None]):
            (tmp_path / "runs" / "ce-seed0.npy").write_bytes(array(wrong))
            saved = {"tokens": len(nll), "checksum": _checksum(array(wrong))}
            fields = {**record, "nll": saved}
            write_json(
                tmp_path / "runs" / "ce-seed0.json", {**fields, "checksum": _checksum(_canonical(fields))}
            )
            with pytest.raises(StudyError, match=r"ce-seed0\.npy is damaged"):
                store.load(loss, 0)


@pytest.mark.parametrize("left", ["settings.json.part", ".nvamp.lock"])
def test_what_a_kill_leaves_before_the_first_file(one: Settings, tmp_path: Path, left: str) -> None:
    (tmp_path / left).write_text("process 1 on another machine")
    assert study(one, tmp_path)[1].trained == [("ce", 0)]
    assert not list(tmp_path.glob("*.part"))


def test_a_study_interrupted_after_its_first_file_continues(
    one: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(path: Path, *rest: Any, **options: Any) -> None:
        if path.name == "models":  # "runs" is there already
            raise KeyboardInterrupt
        mkdir(path, *rest, **options)

    mkdir = Path.mkdir
    monkeypatch.setattr(Path, "mkdir", interrupted)
    with pytest.raises(KeyboardInterrupt):
        study(one, tmp_path / "out")
    monkeypatch.undo()
    assert study(one, tmp_path / "out")[1].trained == [("ce", 0)]


def test_a_run_interrupted_as_it_is_trained_again_is_not_damaged(
    one: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other(*arguments: Any) -> Any:
        run = train(*arguments)
        run.nll[0] += 1  # on another number of threads, say
        return run

    def interrupted(path: Path, value: Any) -> None:
        if path.name == "ce-seed0.json":
            raise KeyboardInterrupt
        write_json(path, value)

    study(one, tmp_path)
    (tmp_path / "runs" / "ce-seed0.npy").unlink()
    monkeypatch.setattr(nvamp.study.compare, "train", other)
    monkeypatch.setattr(nvamp.study.store, "write_json", interrupted)
    with pytest.raises(KeyboardInterrupt):
        study(one, tmp_path)
    monkeypatch.undo()
    assert (tmp_path / "runs" / "ce-seed0.npy").exists()
    assert study(one, tmp_path)[1].trained == [("ce", 0)]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_directory_belongs_to_one_process_at_a_time(one: Settings, tmp_path: Path, overwrite: bool) -> None:
    refused = []

    class Meanwhile(Silent):
        def run(self, loss: str, seed: int) -> Progress:
            with pytest.raises(StudyError) as error:
                study(one, tmp_path, overwrite=overwrite)
            refused.append(str(error.value))
            return super().run(loss, seed)

    with Store(tmp_path) as store:
        assert compare(one, store, "", Meanwhile())
    (message,) = refused
    assert message.startswith(f"{tmp_path} is in use by process {os.getpid()} on ")
    assert study(one, tmp_path)[1].kept == 1


def test_the_next_holder_alone_is_named(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    for _ in range(2):
        with hold(lock):
            assert lock.read_text().count("process ") == 1


def test_a_link_is_removed_and_not_what_it_leads_to(tmp_path: Path) -> None:
    (tmp_path / "directory").mkdir()
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "directory")
    remove(link)
    remove(tmp_path / "nothing")
    assert [*tmp_path.iterdir()] == [tmp_path / "directory"]


@pytest.mark.parametrize(
    ("bytes_left", "name"),
    [(5_000, "models/dft-seed0"), (600, "models/dft-seed0"), (200_000, "results.json")],
)
def test_a_full_disk_is_reported_in_one_line(
    settings: Settings, one: Settings, tmp_path: Path, bytes_left: int, name: str
) -> None:
    """A file that may not grow fails as on a full disk: in Rust, in NumPy or in Python."""
    study(one, tmp_path)
    if name == "results.json":
        study(settings, tmp_path)
        bytes_left = (tmp_path / name).stat().st_size // 2
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_left, hard))
    try:
        with pytest.raises(StudyError) as error:
            study(settings, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    kept = 4 if name == "results.json" else 1
    message = str(error.value)
    assert message.startswith(f"{tmp_path / name}: ")
    assert "File too large" in message
    assert message.endswith(f"; {kept} finished runs are kept in {tmp_path}")
    assert "\n" not in message
    assert not list(tmp_path.rglob("*.part"))
    assert study(settings, tmp_path)[1].kept == kept


@pytest.mark.parametrize("built_in", [False, True])
def test_space_is_checked_before_training(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, built_in: bool
) -> None:
    settings = replace(settings, model=None) if built_in else settings
    corpus = prepare(settings)
    needed = 4 * 4 * build_model(settings.model, corpus).num_parameters()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=needed - 1))
    with pytest.raises(StudyError) as error:
        study(settings, tmp_path / "out")
    assert str(error.value) == (
        f"--out {tmp_path / 'out'}: the models of the 4 runs to train take {needed / 1e6:,.2f} MB, "
        f"and the disk has {needed / 1e6:,.2f} MB left; 0 finished runs are kept"
    )
    if not built_in:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=needed))
        assert len(study(settings, tmp_path / "out")[1].trained) == 4


@pytest.mark.parametrize("name", ["nvamp", "torch", "transformers", "device"])
def test_other_versions_and_devices_are_another_study(
    one: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    corpus, recipe = prepare(one), recipe_of(one, 1)
    with Store(tmp_path) as store:
        store.claim(conditions(recipe, corpus), overwrite=False)
    monkeypatch.setattr(nvamp.study.store, "versions", lambda: {**here, name: "another"})
    here = versions()
    with pytest.raises(StudyError, match=rf"another study: {name} .* \(now another\); choose"):
        study(one, tmp_path)


def test_another_peft_is_another_study_of_adapters(
    one: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus, recipe = prepare(one), recipe_of(one, 1)
    adapted = replace(recipe, lora=Lora(8, 16))
    before = [conditions(it, corpus) for it in (recipe, adapted)]
    here = versions()
    monkeypatch.setattr(nvamp.study.store, "versions", lambda: {**here, "peft": "another"})
    assert conditions(recipe, corpus) == before[0]
    assert conditions(adapted, corpus) == {**before[1], "peft": "another"}


def test_other_blocks_of_the_same_text_are_not_another_text(one: Settings, tmp_path: Path) -> None:
    study(one, tmp_path)
    with pytest.raises(StudyError, match=r"another study: --sequence 16 \(now 8\); choose"):
        study(replace(one, sequence=8), tmp_path)


def test_other_text_is_another_study(one: Settings, tmp_path: Path, text_dir: Path) -> None:
    study(one, tmp_path / "out")
    (tmp_path / "more").write_text("entirely different words here " * 20)
    with pytest.raises(StudyError, match="another study: the text has changed since; choose"):
        study(replace(one, text=(str(text_dir), str(tmp_path / "more"))), tmp_path / "out")


def test_out_that_is_a_file(settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StudyError, match=f"--out {tmp_path / 'file'}: "):
        study(settings, tmp_path / "file")


def test_json_has_no_nan(tmp_path: Path) -> None:
    write_json(tmp_path / "x", {"a": [float("nan"), (1.5, float("inf"))], "b": np.float64("nan"), "c": "NaN"})
    found = json.loads((tmp_path / "x").read_text(), parse_constant=pytest.fail)
    assert found == {"a": [None, [1.5, None]], "b": None, "c": "NaN"} == finite(found)
