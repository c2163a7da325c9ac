"""MLflow, with its store in SQLite: what `report_to="mlflow"` stored of a training."""

import os
from collections.abc import Iterator
from tempfile import TemporaryDirectory

from tools.trainers.comparing import Result, compare
from tools.trainers.huggingface import tracked


def results() -> Iterator[Result]:
    with TemporaryDirectory() as folder:
        os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder}/mlflow.db"
        yield compare("what `report_to` stored, statistics included", tracked("mlflow", read))


def read(run: str, metric: str) -> list[float]:
    import mlflow

    mlflow.flush_async_logging()
    (found,) = mlflow.search_runs(filter_string=f"run_name = '{run}'", output_format="list")
    history = mlflow.MlflowClient().get_metric_history(found.info.run_id, metric.removeprefix("train/"))
    return [entry.value for entry in sorted(history, key=lambda entry: entry.step)]
