"""Fine-tuning with TRL's `SFTTrainer`, on completions alone, with the components of the loss logged.

    python examples/trl_sft.py

Each block of text is a prompt and its completion. It trains the small Llama of `nvamp compare` on the source
of Python's standard library, or on `--text`. It prints what it logs, and writes it for TensorBoard to
`--out`/events.

Needs: `pip install 'nvamp-loss[study]' trl tensorboard`. `nvamp.study` is here for the demo's data and
model only.
"""

import argparse
import os
from pathlib import Path

import torch
import transformers
import trl
from datasets import Dataset

from nvamp import TokenLoss
from nvamp.integrations.stats import log_stats
from nvamp.integrations.trl import SFTTrainer
from nvamp.objectives import NVAMP
from nvamp.study.compare import LR, SEQUENCE
from nvamp.study.corpus import build_corpus
from nvamp.study.models import build_model
from nvamp.study.sources import read_documents

ROWS = 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=20, help="default: 20")
    parser.add_argument("--out", type=Path, default=Path("runs/trl_sft"), help="default: runs/trl_sft")
    parser.add_argument("--text", action="append", default=[], help="a file or directory of text; repeat it")
    options = parser.parse_args()
    corpus = build_corpus(*read_documents(options.text), SEQUENCE)
    halves = (map(corpus.tokenizer.decode, block.split(SEQUENCE // 2)) for block in corpus.train[:ROWS])
    rows = [{"prompt": prompt, "completion": completion} for prompt, completion in halves]
    transformers.set_seed(0)
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(options.out / "events")
    criterion = TokenLoss(NVAMP())
    trainer = SFTTrainer(
        model=build_model(None, corpus),
        args=trl.SFTConfig(
            output_dir=str(options.out),
            max_steps=options.steps,
            learning_rate=LR,
            max_length=SEQUENCE,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            logging_steps=5,
            save_strategy="no",
            report_to="tensorboard",
            bf16=torch.cuda.is_available(),
            dataloader_pin_memory=torch.cuda.is_available(),
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=corpus.tokenizer,
        criterion=criterion,
    )
    log_stats(trainer, criterion)
    trainer.train()


if __name__ == "__main__":
    main()
