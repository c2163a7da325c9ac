import json
from collections import Counter
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import processors
from transformers import TrainerCallback

from nvamp.study import StudyError, examples
from nvamp.study.chats import TEMPLATE, encode
from nvamp.study.compare import prepare
from nvamp.study.corpus import Corpus, frequency_classes
from nvamp.study.examples import _Encoder, build_examples
from nvamp.study.losses import parse_loss
from nvamp.study.packing import IGNORED
from nvamp.study.results import describe_corpus
from nvamp.study.rows import Chat, Pair, Rows
from nvamp.study.settings import Lora, Settings
from nvamp.study.sources import shuffled
from nvamp.study.training import Recipe, train
from tests.study.conftest import small_llama, study, words

CHATS = Path(__file__).parents[2] / "examples" / "data" / "chat.jsonl"


def pairs(count: int, length: int = 8) -> list[Pair]:
    return [Pair(f"mark{index} {words(index, 4)}", f" {words(index + 1, length)}") for index in range(count)]


def texts(corpus: Corpus, which: str) -> str:
    blocks = getattr(corpus, which)
    return str(corpus.tokenizer.decode(blocks.inputs.flatten()))


def test_a_tenth_of_the_examples_is_held_out_and_only_that(tokenizer: Any) -> None:
    corpus = build_examples(Rows(examples=[*pairs(60)]), "pairs", 128, tokenizer)
    assert (corpus.counts["examples"], corpus.counts["held_out_examples"]) == (54, 6)
    assert corpus.source == "pairs (60 examples)"
    trained, held_out = texts(corpus, "training"), texts(corpus, "evaluation")
    for index in range(60):
        assert (f"mark{index} " in trained) != (f"mark{index} " in held_out)
    assert len(corpus.prompts) == 6
    for prompt in corpus.prompts:
        text = tokenizer.decode(prompt.ids)
        assert (text, prompt.answer) in pairs(60)
        assert prompt.end == tokenizer.eos_token_id


def test_the_order_of_the_rows_does_not_decide_what_is_held_out(tokenizer: Any) -> None:
    corpus = build_examples(Rows(examples=[*pairs(60)]), "pairs", 128, tokenizer)
    assert (
        corpus.fingerprint()
        == build_examples(Rows(examples=[*pairs(60)]), "pairs", 128, tokenizer).fingerprint()
    )
    held_out = [index for index in range(60) if f"mark{index} " in texts(corpus, "evaluation")]
    assert held_out != list(range(6))


def test_what_is_cut_and_dropped_is_counted(tokenizer: Any) -> None:
    rows = Rows(
        examples=[*pairs(40), *[Pair("x " * 60, " late")] * 2, *[Pair("y", " tail" * 80)] * 3],
        dropped=Counter({"no completion": 4}),
    )
    corpus = build_examples(rows, "rows", 64, tokenizer)
    assert corpus.counts["cut_examples"] == 3 - corpus.counts["dropped_examples"].get(
        "the same as one held out", 0
    )
    assert corpus.counts["dropped_examples"]["no completion"] == 4
    assert corpus.counts["dropped_examples"]["no token to learn in the first 64"] == 2
    assert (
        "3 of them cut at 64 tokens; 6 dropped: 4 no completion, 2 no token to learn in the first 64"
        in corpus.source
    )
    assert corpus.counts["examples"] + corpus.counts["held_out_examples"] == 43
    assert corpus.train.shape[1] == 64
    assert len(corpus.prompts) == sum(
        len(prompt.answer) < 200 for prompt in corpus.prompts
    )  # none of those cut
    described = describe_corpus(corpus)
    assert described["cut_examples"] == 3
    assert corpus.training.examples is not None
    assert described["train_tokens"] == (corpus.training.examples != -1).sum() < corpus.train.numel()
    assert described["held_out_tokens"] == int((corpus.evaluation.labels != IGNORED).sum())
    assert described["learned_tokens"] == int((corpus.training.labels != IGNORED).sum())


def test_what_is_held_out_is_not_trained_on_a_second_time(tokenizer: Any) -> None:
    twice = [*pairs(30), *pairs(30)]
    corpus = build_examples(Rows(examples=twice), "twice", 128, tokenizer)
    same = corpus.counts["dropped_examples"]["the same as one held out"]
    assert 0 < same <= 6
    assert corpus.counts["examples"] == 54 - same
    held_out = texts(corpus, "evaluation")
    assert not any(
        f"mark{index} " in held_out and f"mark{index} " in texts(corpus, "training") for index in range(30)
    )


def test_an_example_that_fills_a_block_is_whole(tokenizer: Any) -> None:
    pair = Pair("alpha beta", " gamma delta")
    whole = encode(pair, tokenizer, True, False)
    length = len(whole.ids)
    for sequence, cut in ((length + 1, 0), (length, 0), (length - 1, 1), (whole.answer + 1, 1)):
        encoder = _Encoder(tokenizer, sequence, True, False)
        ((found, is_whole),) = encoder.encode([pair])
        assert found.ids == whole.ids[:sequence]
        assert (is_whole, encoder.cut) == (not cut, cut)
    encoder = _Encoder(tokenizer, whole.answer, True, False)  # the answer begins beyond the block
    assert encoder.encode([pair]) == []
    assert encoder.dropped.total() == 1


def test_a_single_token_has_nothing_to_learn(tokenizer: Any) -> None:
    own = deepcopy(tokenizer)
    own.eos_token = None
    (alpha,) = own("alpha")["input_ids"]
    assert encode(Pair("", "alpha"), own, True, False).ids == [alpha]
    assert _Encoder(own, 8, True, False).encode([Pair("", "alpha")]) == []


def test_one_of_few_examples_is_held_out(tokenizer: Any) -> None:
    counts = build_examples(Rows(examples=[*pairs(4)]), "pairs", 128, tokenizer).counts
    assert (counts["examples"], counts["held_out_examples"]) == (3, 1)


def test_reasons_to_drop_are_named_up_to_three(tokenizer: Any) -> None:
    for count, end in ((3, ""), (4, ", ...")):
        dropped = Counter(dict.fromkeys("abcd"[:count], 1))
        corpus = build_examples(Rows(examples=[*pairs(40)], dropped=dropped), "pairs", 128, tokenizer)
        assert corpus.source.endswith(f"{count} dropped: 1 a, 1 b, 1 c{end})")


def test_the_tokenizer_is_made_of_the_training_examples(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def trained(texts: list[str]) -> Any:
        seen.extend(texts)
        return deepcopy(tokenizer)

    monkeypatch.setattr(examples, "train_tokenizer", trained)
    corpus = build_examples(Rows(examples=[*pairs(60)]), "pairs", 128)
    assert len(seen) == corpus.counts["examples"] == 54
    held_out = texts(corpus, "evaluation")
    assert not any(text.split()[0] + " " in held_out for text in seen)


def test_no_more_is_evaluated_than_the_limit(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examples, "HELD_OUT_TOKENS", 256)
    corpus = build_examples(Rows(examples=[*pairs(60)]), "pairs", 128, tokenizer, together=False)
    assert (len(corpus.evaluation), corpus.counts["held_out_examples"]) == (2, 6)


def test_the_excerpt_is_without_what_a_tokenizer_puts_before_a_text(tokenizer: Any) -> None:
    own = deepcopy(tokenizer)
    end = own.eos_token
    own._tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{end} $A", special_tokens=[(end, own.eos_token_id)]
    )
    corpus = build_examples(Rows(examples=[*pairs(40)]), "pairs", 128, own)
    assert corpus.held_out[0, 0] == own.eos_token_id
    assert corpus.excerpt.startswith("mark")


def test_no_more_is_read_than_the_limit(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examples, "MAX_CHARACTERS", sum(pair.characters for pair in pairs(60)) // 2)
    corpus = build_examples(Rows(examples=[*pairs(60)]), "pairs", 128, tokenizer)
    (reason, beyond) = next(iter(corpus.counts["dropped_examples"].items()))
    assert reason.startswith("beyond ")
    assert 25 <= beyond <= 35
    assert beyond + corpus.counts["examples"] + corpus.counts["held_out_examples"] == 60
    some = sum(pair.characters for pair in shuffled(pairs(60))[:20])
    for limit, taken in ((some, 20), (some - 1, 19)):
        monkeypatch.setattr(examples, "MAX_CHARACTERS", limit)
        counts = build_examples(Rows(examples=[*pairs(60)]), "pairs", 128, tokenizer).counts
        assert counts["examples"] + counts["held_out_examples"] == taken


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_examples(tokenizer: Any, count: int) -> None:
    with pytest.raises(StudyError, match=r"^too few examples: pairs \(1 examples"):
        build_examples(
            Rows(examples=pairs(1), dropped=Counter({"no completion": count})), "pairs", 64, tokenizer
        )


def test_without_a_token_there_is_no_prompt(tokenizer: Any) -> None:
    examples = [Pair("", f"answer {index}") for index in range(40)]
    assert build_examples(Rows(examples=[*examples]), "pairs", 128, tokenizer).prompts == ()


def test_all_that_a_study_reads_is_in_the_fingerprint(tokenizer: Any) -> None:
    one = build_examples(Rows(examples=[*pairs(40)]), "pairs", 128, tokenizer)
    others = [
        replace(one, prompts=(*one.prompts[:-1], one.prompts[0])),
        replace(one, also=one.evaluation),
        replace(one, training=replace(one.training, positions=None)),
    ]
    assert one.fingerprint() == replace(one).fingerprint()
    assert len({corpus.fingerprint() for corpus in (one, *others)}) == 4


def test_all_tokens_or_completions(tokenizer: Any) -> None:
    some, everything = (
        build_examples(Rows(examples=[*pairs(40)]), "pairs", 128, tokenizer, completions)
        for completions in (True, False)
    )
    assert torch.equal(some.train, everything.train)
    assert len(some.training.learned) < len(everything.training.learned)
    assert some.fingerprint() != everything.fingerprint()
    assert everything.training.examples is not None
    own = everything.training.examples != -1
    assert ((everything.training.labels != IGNORED) <= own).all()
    # All but the first token of each of the 36 examples.
    assert len(everything.training.learned) == int(own.sum()) - 36


def test_a_completion_ends_where_the_template_ends_a_turn(tokenizer: Any) -> None:
    own = deepcopy(tokenizer)
    own.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
    own.chat_template = "{% for message in messages %}{{ message.content }}<|end|>{% endfor %}"
    (end,) = own.convert_tokens_to_ids(["<|end|>"])
    chats = [
        Chat(({"role": "user", "content": a}, {"role": "assistant", "content": b}), 0) for a, b in pairs(40)
    ]
    corpus = build_examples(Rows(examples=[*chats]), "chats", 128, own)
    assert corpus.prompts
    for prompt in corpus.prompts:
        assert prompt.end == end != own.eos_token_id
        assert (own.decode(prompt.ids, skip_special_tokens=True), prompt.answer) in pairs(40)


def test_an_answer_may_end_without_a_special_token(tokenizer: Any) -> None:
    own = deepcopy(tokenizer)
    own.chat_template = "{% for message in messages %}{{ message.content }}\n{% endfor %}"
    chats = [
        Chat(({"role": "user", "content": a}, {"role": "assistant", "content": b}), 0) for a, b in pairs(40)
    ]
    prompts = build_examples(Rows(examples=[*chats]), "chats", 128, own).prompts
    assert {prompt.end for prompt in prompts} == {None}
    assert {prompt.answer.split()[0] for prompt in prompts} <= set(words(0, 200).split())


def test_a_tokenizer_without_a_template_gets_one(tokenizer: Any) -> None:
    chats = [
        Chat(({"role": "user", "content": a}, {"role": "assistant", "content": b}), 0) for a, b in pairs(40)
    ]
    own = deepcopy(tokenizer)
    own.chat_template = None
    corpus = build_examples(Rows(examples=[*chats]), "chats", 128, own)
    assert corpus.special_tokens  # which the excerpt spells out
    assert corpus.tokenizer.chat_template == TEMPLATE
    assert (
        corpus.prompts[0].ids
        == own.apply_chat_template(
            [{"role": "user", "content": own.decode(corpus.prompts[0].ids).split("\n")[1]}],
            add_generation_prompt=True,
        )["input_ids"]
    )
    assert corpus.excerpt.startswith("### user\nmark")
    own.chat_template = "{{ raise_exception('no') }}"
    with pytest.raises(StudyError, match=r"40 dropped: 40 refused by the chat template: no\)$"):
        build_examples(Rows(examples=[*chats]), "chats", 128, own)


@pytest.fixture
def chat_settings() -> Settings:
    return Settings(("ce", "dft"), 1, 3, 4, lr=1e-2, dataset=(str(CHATS),))


def test_the_built_in_model_learns_chats(chat_settings: Settings, tmp_path: Path) -> None:
    corpus = prepare(chat_settings)
    results, _ = study(chat_settings, tmp_path / "out")
    text = results["text"]
    rows = [json.loads(line) for line in CHATS.read_text().splitlines()]
    assert text["source"].startswith(f"{CHATS} ({len(rows):,} examples")
    assert text["held_out_tokens"] == len(corpus.evaluation.learned)
    # The record has a loss of each held-out token that is learned, and of no other.
    nll = np.load(tmp_path / "out" / "runs" / "ce-seed0.npy")
    assert nll.shape == (text["held_out_tokens"],)
    assert results["losses"][0]["metrics"]["cross_entropy"]["mean"] == pytest.approx(nll.mean(dtype=float))
    answers = corpus.tokenizer.decode(corpus.evaluation.learned)
    held_out = [row["messages"] for row in rows if row["messages"][1]["content"] in answers]
    assert len(held_out) >= text["held_out_examples"]
    assert "What does" not in answers
    # What was learned from cannot change without a word.
    with pytest.raises(StudyError, match="the text"):
        study(replace(chat_settings, loss_on="all"), tmp_path / "out")


@pytest.mark.parametrize("lora", [None, Lora(2, 4)])
def test_training_gives_the_model_labels_and_positions(
    tmp_path: Path, tokenizer: Any, lora: Lora | None
) -> None:
    seen: list[dict[str, torch.Tensor]] = []

    class Watched(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            hook = lambda module, args, given: seen.append(given) if module.training else None  # noqa: E731
            kwargs["model"].register_forward_pre_hook(hook, with_kwargs=True)

    small_llama(tokenizer, positions=128).save_pretrained(tmp_path)
    corpus = build_examples(Rows(examples=[*pairs(60)]), "pairs", 128, tokenizer)
    recipe = Recipe(3, 2, 1e-2, model=str(tmp_path), lora=lora)
    run = train(parse_loss("ce"), 0, recipe, corpus, lambda step, value: None, callbacks=[Watched()])
    assert len(run.nll) == len(corpus.evaluation.learned)
    assert len(seen) == 3
    blocks = corpus.training
    assert blocks.positions is not None
    for given in seen:
        for ids, labels, places in zip(
            given["input_ids"], given["labels"], given["position_ids"], strict=True
        ):
            (index,) = (blocks.inputs == ids).all(1).nonzero().flatten().tolist()
            assert torch.equal(labels, blocks.labels[index])
            assert torch.equal(places, blocks.positions[index])


def test_the_frequency_of_tokens_is_that_of_those_learned(chat_settings: Settings) -> None:
    corpus = prepare(chat_settings)
    classes = frequency_classes(corpus.training.labels, len(corpus.tokenizer))
    (hashes,) = corpus.tokenizer("###", add_special_tokens=False)["input_ids"]
    assert (corpus.train == hashes).sum() == 2 * corpus.counts[
        "examples"
    ]  # of the layout, not of the answers
    assert classes[hashes] == 2
    assert classes[corpus.tokenizer.eos_token_id] == 0


def test_loss_on_is_of_examples(chat_settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "lines.txt").write_text("\n".join(words(seed, 60) for seed in range(40)))
    text = replace(chat_settings, dataset=(str(tmp_path / "lines.txt"),))
    assert prepare(text).fingerprint() == prepare(replace(text, loss_on="all")).fingerprint()
    with pytest.raises(
        StudyError, match="--loss-on completions: expected messages, or prompt and completion, got text"
    ):
        prepare(replace(text, loss_on="completions"))
    with pytest.raises(StudyError, match=r"^--loss-on completions: expected messages, .* got text$"):
        replace(chat_settings, dataset=(), loss_on="completions").check()
    with pytest.raises(StudyError, match="--loss-on: expected all or completions, got some"):
        replace(chat_settings, loss_on="some").check()


def test_a_model_that_mixes_examples_gets_one_in_each_block(
    chat_settings: Settings, tmp_path: Path, tokenizer: Any
) -> None:
    from transformers import BloomConfig, BloomForCausalLM

    torch.manual_seed(0)
    config = BloomConfig(vocab_size=len(tokenizer), hidden_size=16, n_layer=1, n_head=2)
    BloomForCausalLM(config).save_pretrained(tmp_path / "bloom")
    small_llama(tokenizer, positions=256).save_pretrained(tmp_path / "llama")
    for name in ("bloom", "llama"):
        tokenizer.save_pretrained(tmp_path / name)
    apart = prepare(replace(chat_settings, model=str(tmp_path / "bloom")))
    together = prepare(replace(chat_settings, model=str(tmp_path / "llama"), special_tokens=True))
    assert apart.training.positions is None
    assert together.training.positions is not None


def test_texts_of_a_dataset_are_shuffled_like_files(tmp_path: Path) -> None:
    (tmp_path / "lines.txt").write_text("\n".join(f"mark{index} {words(index, 40)}" for index in range(60)))
    corpus = prepare(Settings(("ce",), 1, 3, 4, dataset=(str(tmp_path / "lines.txt"),)))
    held_out = [index for index in range(60) if f"mark{index} " in texts(corpus, "evaluation")]
    assert len(held_out) >= 4
    assert held_out != list(range(len(held_out)))  # what is held out comes first


def test_special_tokens_of_a_text_are_text_unless_asked_for(tokenizer: Any, tmp_path: Path) -> None:
    lines = tmp_path / "lines.txt"
    lines.write_text("\n".join(f"{words(seed, 30)}<|endoftext|>{words(seed, 30)}" for seed in range(60)))
    settings = Settings(("ce",), 1, 3, 4, dataset=(str(lines),))
    counts = []
    for special in (False, True):
        corpus = prepare(replace(settings, special_tokens=special))
        ends = [(blocks == corpus.tokenizer.eos_token_id).sum() for blocks in (corpus.train, corpus.held_out)]
        counts.append(torch.stack(ends))
    assert (counts[1] >= 1.5 * counts[0]).all()
    assert counts[0].all()
