"""Greedy completions of held-out prompts, and how they compare with the answers."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from transformers import GenerationConfig

from nvamp.integrations.modes import in_mode
from nvamp.study.corpus import Prompt
from nvamp.study.models import positions

LONGER = 16  # tokens that a completion may have beyond those of its answer


def generation_metrics(model: Any, tokenizer: Any, prompts: Sequence[Prompt]) -> dict[str, float]:
    """Exact match and token F1 of the greedy completions of `prompts`, in percent."""
    found = [(complete(model, tokenizer, prompt), prompt.answer) for prompt in prompts]
    return {
        "exact_match": 100 * sum(a.strip() == b.strip() for a, b in found) / len(found),
        "token_f1": 100 * sum(token_f1(a, b) for a, b in found) / len(found),
    }


@torch.no_grad()
def complete(model: Any, tokenizer: Any, prompt: Prompt) -> str:
    """The greedy completion of a prompt, up to a token that ends it or somewhat more than its answer."""
    answer = tokenizer(prompt.answer, add_special_tokens=False)["input_ids"]
    room = (positions(model.config) or len(prompt.ids) + len(answer) + LONGER) - len(prompt.ids)
    if room < 1:
        return ""
    ids = torch.tensor([prompt.ids], device=model.device)
    ends = {prompt.end, tokenizer.eos_token_id, *_as_list(model.generation_config.eos_token_id)} - {None}
    config = GenerationConfig(
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        max_new_tokens=min(room, len(answer) + LONGER),
        eos_token_id=sorted(ends) or None,
        pad_token_id=next(iter(sorted(ends)), 0),
    )
    with in_mode(model, False):
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config)
    text: str = tokenizer.decode(out[0, len(prompt.ids) :], skip_special_tokens=True)
    return text


def token_f1(found: str, wanted: str) -> float:
    """The harmonic mean of precision and recall of the words of `found`, regardless of case and order."""
    a, b = Counter(found.casefold().split()), Counter(wanted.casefold().split())
    if not a or not b:
        return float(a == b)
    return 2 * (a & b).total() / (a.total() + b.total())


def _as_list(value: int | list[int] | None) -> list[int | None]:
    return [*value] if isinstance(value, list) else [value]
