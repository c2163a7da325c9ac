"""Reinforcement learning with GRPO: the clipped policy gradient on a patched model, with KL and entropy.

    python examples/grpo.py

The small Llama of `nvamp compare` continues prompts from the source of Python's standard library, or from
`--text`. The reward of a completion is the share of its tokens in which a letter occurs. Each step draws a
group of completions per prompt, takes their log-probabilities under the model that drew them and under the
reference model, and then trains on them four times. It prints the mean reward of each step.

Needs: `pip install 'nvamp-loss[study]'`. `nvamp.study` is here for the demo's data and model only.
"""

import argparse
import copy
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from nvamp import LinearLoss
from nvamp.functional import logprobs
from nvamp.integrations.transformers import patch
from nvamp.objectives import ClippedPolicy
from nvamp.study.compare import SEQUENCE
from nvamp.study.corpus import build_corpus
from nvamp.study.models import build_model
from nvamp.study.sources import read_documents

PROMPT, DRAWN = 16, 24  # tokens of a prompt, and of a completion at most
PROMPTS, GROUP = 4, 8  # prompts of a step, and completions of each
EPOCHS, MICRO_BATCHES = 4, 2
LR = 5e-3


@torch.no_grad()
def logprobs_of(model: Any, tokens: Tensor, labels: Tensor) -> Tensor:
    """The log-probability of each label, on the grid of the labels [B, S], in nats; 0 where there is none."""
    hidden = model.model(tokens).last_hidden_state
    return F.pad(logprobs(hidden[:, :-1], model.lm_head.weight, labels[:, 1:]), (1, 0))


def advantages(reward: Tensor) -> Tensor:
    """How much better each completion of a group is than the group, in its standard deviations; [P, G]."""
    return (reward - reward.mean(-1, keepdim=True)) / (reward.std(-1, keepdim=True) + 1e-4)


def labels_of(tokens: Tensor, end: int) -> Tensor:
    """The tokens [B, S] that the model has drawn, up to and with the end of the text; −100 elsewhere."""
    drawn = tokens[:, PROMPT:]
    after_end = (drawn == end).cumsum(-1) - (drawn == end).long() > 0
    return torch.cat([torch.full_like(tokens[:, :PROMPT], -100), drawn.masked_fill(after_end, -100)], -1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=20, help="default: 20")
    parser.add_argument("--letter", default="e", help="the letter that is rewarded; default: e")
    parser.add_argument("--text", action="append", default=[], help="a file or directory of text; repeat it")
    options = parser.parse_args()
    corpus = build_corpus(*read_documents(options.text), SEQUENCE)
    end = corpus.tokenizer.eos_token_id
    names = map(corpus.tokenizer.decode, range(len(corpus.tokenizer)))
    rewarded = torch.tensor([options.letter in name for name in names])
    transformers.set_seed(0)
    model = build_model(None, corpus)
    reference = copy.deepcopy(model)
    patch(model, LinearLoss(ClippedPolicy(clip=0.2, clip_high=0.28, kl=0.01, entropy=0.001)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0)

    for step in range(1, options.steps + 1):
        blocks = corpus.train[torch.randint(len(corpus.train), (PROMPTS,))]
        prompts = blocks[:, :PROMPT].repeat_interleave(GROUP, 0)
        tokens = model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            do_sample=True,
            top_k=0,  # the whole distribution, as its log-probabilities below are
            max_new_tokens=DRAWN,
            pad_token_id=end,
        )
        labels = labels_of(tokens, end)
        drawn = labels != -100
        reward = (rewarded[tokens] & drawn).sum(-1) / drawn.sum(-1)
        advantage = advantages(reward.view(PROMPTS, GROUP)).view(-1, 1).expand_as(tokens)
        old, ref = (logprobs_of(each, tokens, labels) for each in (model, reference))

        for _ in range(EPOCHS):
            for rows in torch.randperm(len(tokens)).chunk(MICRO_BATCHES):
                model(
                    input_ids=tokens[rows],
                    labels=labels[rows],
                    num_items_in_batch=drawn.sum(),  # the micro-batches add up to the mean over tokens
                    advantage=advantage[rows],
                    old_logprob=old[rows],
                    ref_logprob=ref[rows],
                ).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        print(f"step {step}: reward {reward.mean():.3f}")


if __name__ == "__main__":
    main()
