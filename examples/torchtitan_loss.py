"""Steps as torchtitan's trainer takes them, with its chunked loss: no more logits than those of a chunk.

    python examples/torchtitan_loss.py

It trains the small Llama of `nvamp compare` on the source of Python's standard library, or on `--text`, in a
loop of its own that needs torchtitan's loss module alone. In torchtitan that configuration of the loss goes
into `Trainer.Config(loss=...)`.

Needs Python 3.11 and:

    pip install 'nvamp-loss[study]' spmd_types tyro
    pip install --no-deps torchtitan==0.3.0

`nvamp.study` is here for the demo's data and model only.
"""

import argparse

import torch
import transformers
from torchtitan.components.loss import ChunkedLossWrapper

from nvamp.integrations.torchtitan import TitanLoss
from nvamp.study.compare import LR, SEQUENCE
from nvamp.study.corpus import build_corpus
from nvamp.study.models import build_model
from nvamp.study.sources import read_documents

BATCH, CHUNKS = 8, 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--loss", default="nvamp:gradient=token", help="default: nvamp:gradient=token")
    parser.add_argument("--steps", type=int, default=20, help="default: 20")
    parser.add_argument("--text", action="append", default=[], help="a file or directory of text; repeat it")
    options = parser.parse_args()
    corpus = build_corpus(*read_documents(options.text), SEQUENCE)
    transformers.set_seed(0)
    model = build_model(None, corpus)
    config = ChunkedLossWrapper.Config(num_chunks=CHUNKS, loss_fn=TitanLoss.Config(loss=options.loss))
    loss_fn = config.build(compile_config=None)
    loss_fn.set_lm_head(model.lm_head)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    for step, blocks in enumerate(corpus.train.split(BATCH)[: options.steps], start=1):
        labels = torch.nn.functional.pad(
            blocks[:, 1:], (0, 1), value=-100
        )  # torchtitan's data has them shifted
        loss, _ = loss_fn(model.model(input_ids=blocks).last_hidden_state, labels, (labels != -100).sum())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step}: loss {loss.item():.5f}", flush=True)


if __name__ == "__main__":
    main()
