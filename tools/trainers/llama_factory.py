"""LLaMA-Factory's fine-tuning, whose model a callback patches."""

import json
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType

from nvamp import LinearLoss
from nvamp.objectives import parse
from tools.trainers.comparing import Outcome, Result, compare
from tools.trainers.huggingface import ARGUMENTS, Watch, save


def results() -> Iterator[Result]:
    yield compare("`run_exp`, stage sft, with a callback that patches", train)


def train(objective: str | None) -> Outcome:
    # It imports torchaudio, whose wheel needs CUDA, and uses it for audio alone.
    stand_in = ModuleType("torchaudio")
    stand_in.__spec__ = ModuleSpec("torchaudio", None)
    sys.modules["torchaudio"] = stand_in
    from llamafactory.train.tuner import run_exp

    watch = Watch(LinearLoss(parse(objective)) if objective else None)
    with TemporaryDirectory() as folder:
        save(Path(folder))
        Path(folder, "dataset_info.json").write_text(json.dumps({"made": {"file_name": "data.json"}}))
        arguments = {
            "model_name_or_path": folder,
            "stage": "sft",
            "do_train": True,
            "finetuning_type": "full",
            "dataset_dir": folder,
            "dataset": "made",
            "template": "empty",
            "cutoff_len": 32,
            "output_dir": f"{folder}/out",
            "overwrite_cache": True,
            **ARGUMENTS,
        }
        run_exp(arguments, callbacks=[watch])
    assert watch.outcome is not None
    return watch.outcome
