"""Which label the own loss of a transformers model scores a position against: the next one, or the same."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from nvamp.integrations.modes import in_mode

_TOKENS = (1, 6)


class OwnLoss(NamedTuple):
    """What a model's own loss does.

    Attributes:
        shifts: it scores position t against label t+1, as causal language models do; if not, against label
            t, as encoder-decoders and models of masked tokens do.
        is_loss_function: it is computed by `model.loss_function`, which a user may replace.
    """

    shifts: bool
    is_loss_function: bool


def loss_shifts(model: Any) -> bool:
    """Whether `model.loss_function`, as transformers sets it, scores position t against label t+1.

    Raises:
        TypeError: it is the mean cross-entropy neither with the labels t+1 nor with the labels t.
    """
    logits = 3 * torch.randn(*_TOKENS, 50, generator=_seeded())
    with _default_loss(model) as own:
        name = f"{type(model).__name__} has the loss {getattr(own, '__name__', own)}, which"
        return _shifts(lambda labels: (own(logits=logits, labels=labels, vocab_size=50), logits), name)


def own_loss(model: Any) -> OwnLoss:
    """Runs the model on a row of six tokens, without gradients, under three rows of labels.

    Its output layer returns random logits meanwhile, because those of a model that has not been trained
    differ too little.

    Raises:
        TypeError: its loss is the mean cross-entropy neither with the labels t+1 nor with the labels t, or
            the model does not run on six tokens.
    """
    name = type(model).__name__
    calls: list[str] = []

    def loss_of(labels: Tensor) -> tuple[Any, Tensor]:
        outputs = model(**_batch(model), labels=labels.to(model.device))  # some change their inputs
        return outputs["loss"], outputs["logits"]

    with _default_loss(model) as own, in_mode(model, False), torch.no_grad(), _random_logits(model):

        def recorded(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            return own(*args, **kwargs)

        model.loss_function = recorded
        shifts = _shifts(loss_of, f"{name} has a loss that")
    return OwnLoss(shifts, bool(calls))


def _shifts(loss_of: Callable[[Tensor], tuple[Any, Tensor]], subject: str) -> bool:
    """Whether a loss changes with the labels as the cross-entropy of its logits with the labels t+1 does.

    `loss_of` gives the loss under labels, and the logits. What does not depend on the labels, such as the
    loss of a router, is the same under all of them.
    """
    g = _seeded()
    rows = []
    for _ in range(3):
        labels = torch.randint(3, 12, _TOKENS, generator=g)
        try:
            loss, logits = loss_of(labels)
            logits = logits.float().cpu()
            following = cross_entropy(logits[:, :-1].mT, labels[:, 1:])
            rows.append([float(loss), float(following), float(cross_entropy(logits.mT, labels))])
        except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
            raise TypeError(
                f"{subject} cannot be probed with logits and labels of six tokens: {error}"
            ) from error
    table = torch.tensor(rows)
    found, following, same = (table[1:] - table[0]).T
    tolerance = 0.1 * (following - same).abs().max()
    for shifts, expected in ((True, following), (False, same)):
        if (found - expected).abs().max() < tolerance:
            return shifts
    raise TypeError(
        f"{subject} is the mean cross-entropy neither of the next label nor of the label at the same place"
    )


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _batch(model: Any) -> dict[str, Any]:
    """Six tokens for the model; as encoder-decoder it gets the states of an encoder, whatever that takes."""
    tokens = torch.arange(3, 3 + _TOKENS[1], device=model.device)[None]
    if not model.config.is_encoder_decoder:
        return {"input_ids": tokens}
    if model.main_input_name == "input_ids":
        return {"input_ids": tokens, "decoder_input_ids": tokens}
    return {"encoder_outputs": encoder_outputs(model, _TOKENS), "decoder_input_ids": tokens}


def encoder_outputs(model: Any, shape: tuple[int, int]) -> Any:
    """Random states [*shape, hidden size] as the output of the encoder, whatever the encoder itself takes."""
    from transformers.modeling_outputs import BaseModelOutput

    config = getattr(model.config, "encoder", model.config)
    size = getattr(config, "hidden_size", None) or config.get_text_config().hidden_size
    states = BaseModelOutput(torch.randn(*shape, size, generator=_seeded()).to(model.device, model.dtype))
    states.attention_mask = None  # some decoders ask for the encoder's
    return states


@contextmanager
def _default_loss(model: Any) -> Iterator[Any]:
    """The loss function of transformers, which `model.loss_function` is meanwhile."""
    given = vars(model).pop("_loss_function", None)
    try:
        yield model.loss_function
    finally:
        vars(model).pop("_loss_function", None)
        if given is not None:
            model.loss_function = given


@contextmanager
def _random_logits(model: Any) -> Iterator[None]:
    layer = model.get_output_embeddings()
    if layer is None or isinstance(layer, nn.Embedding):  # FSMT gives an embedding, whose weight it uses
        yield
        return
    handle = layer.register_forward_hook(
        lambda _, inputs, logits: 3 * torch.randn(logits.shape, generator=_seeded()).to(logits)
    )
    try:
        yield
    finally:
        handle.remove()
