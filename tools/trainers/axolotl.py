"""Axolotl's `axolotl train`, in one process, with our plugin in its configuration."""

import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tools.trainers.comparing import Outcome, Result, compare
from tools.trainers.huggingface import STEPS, logged, model, save, weights


def results() -> Iterator[Result]:
    os.environ |= {"AXOLOTL_DO_NOT_TRACK": "1", "DO_NOT_TRACK": "1"}
    yield compare("the plugin", partial(alone, 1))
    what = "the plugin, 2 micro-batches a step: Axolotl's mean of means, our mean of tokens"
    yield compare(what, partial(alone, 2), limit=0.1)


def alone(accumulate: int, objective: str | None) -> Outcome:
    """In a process of its own: Axolotl keeps a plugin for all later trainings of a process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(train, accumulate, objective).result()


def train(accumulate: int, objective: str | None) -> Outcome:
    import axolotl.train
    import yaml
    from axolotl.cli.args import TrainerCliArgs
    from axolotl.cli.config import load_cfg
    from axolotl.common.datasets import load_datasets

    plugin = {"plugins": ["nvamp.integrations.axolotl.NVAMPPlugin"], "nvamp_loss": objective}
    with TemporaryDirectory() as folder:
        save(Path(folder))
        configuration: dict[str, Any] = {
            "base_model": folder,
            "datasets": [{"path": f"{folder}/data.json", "ds_type": "json", "type": "alpaca"}],
            "dataset_prepared_path": f"{folder}/prepared",
            "output_dir": f"{folder}/out",
            "dataset_num_proc": 1,
            "sequence_len": 128,
            "micro_batch_size": 8 // accumulate,
            "gradient_accumulation_steps": accumulate,
            "max_steps": STEPS,
            "optimizer": "sgd",
            "learning_rate": 0.3,
            "lr_scheduler": "constant",
            "logging_steps": 1,
            "save_strategy": "no",
            "bf16": False,
            "tf32": False,
            "device": "cpu",
            "attn_implementation": "eager",
            **({} if objective is None else plugin),
        }
        file = Path(folder, "configuration.yml")
        file.write_text(yaml.safe_dump(configuration))
        cfg = load_cfg(str(file))
        data = load_datasets(cfg=cfg, cli_args=TrainerCliArgs())
        start = weights(model())
        trained, _, trainer = axolotl.train.train(cfg=cfg, dataset_meta=data)
        return Outcome(logged(trainer), weights(trained) - start)
