"""Backend `reference`: full logits and PyTorch's own cross-entropy, differentiated by autograd.

It is the oracle of the tests and reads like the definition; it keeps several copies of the logits.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor

from nvamp.engine.checks import check_label_range
from nvamp.engine.options import Head, Options, accumulate_dtype, weights_of


def token_nll(logits: Tensor, labels: Tensor, metrics: int, opt: Options) -> tuple[Tensor, ...]:
    """(nll,), or with `metrics` (nll, lse, entropy, prediction), and with 3 the mean of z too.

    The arguments are as in `functional.token_nll`. The losses and the entropies are differentiable.
    """
    valid, vocab = labels != opt.ignore_index, logits.shape[-1]
    if not (torch.compiler.is_compiling() or is_functorch_wrapped_tensor(labels)):  # no data to look at
        check_label_range(labels, vocab, opt.ignore_index)
    z = _z(logits, valid, opt)
    nll = F.cross_entropy(
        z.flatten(0, -2),
        labels.flatten().long(),
        opt.class_weight,
        ignore_index=opt.ignore_index,
        label_smoothing=opt.label_smoothing,
        reduction="none",
    ).view(labels.shape)
    if opt.z_loss:
        weights = weights_of(labels, opt)
        weight = 1 if weights is None else weights[..., 1]
        nll = nll + torch.where(valid, weight * opt.z_loss * z.logsumexp(-1).square(), 0)
    if not metrics:
        return (nll,)
    log_p = z.log_softmax(-1)
    lowest = torch.finfo(log_p.dtype).min  # in place of −inf, whose product with p = 0 would be NaN
    entropy = -(log_p.exp() * log_p.clamp(min=lowest)).sum(-1)
    found = [z.detach().logsumexp(-1), entropy, z.argmax(-1)]
    if metrics > 2:
        found.append(z.detach().mean(-1))
    return nll, *(torch.where(valid, x, 0) for x in found)


def part_statistics(logits: Tensor, labels: Tensor, opt: Options) -> tuple[Tensor, ...]:
    """`Backend.part_statistics`, differentiable. Labels of other parts are below 0."""
    z = _z(logits, labels != opt.ignore_index, opt)
    padded = F.pad(z, (0, 1), value=-torch.inf)  # never empty
    top = padded.detach().amax(-1)
    below = padded - torch.where(top == -torch.inf, 0, top)[..., None]
    at_label = padded.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    e = below.exp()
    total = e.sum(-1)
    some = torch.where(total == 0, 1, total)  # a part of no mass has an entropy of 0
    entropy = some.log() - (e * below.clamp(min=torch.finfo(e.dtype).min)).sum(-1) / some
    weight = 1 if opt.class_weight is None else opt.class_weight
    sum_below = -(below[..., :-1] * weight).sum(-1)
    results = torch.stack((top, total), -1), torch.where(labels < 0, 0, at_label), sum_below
    return *results, entropy, padded.argmax(-1), -below.detach()[..., :-1].sum(-1)


def logits_of(head: Head, ignore_index: int) -> Tensor:
    """All logits. A row without a label may hold anything, so it counts as a hidden state of zeros."""
    labelled = (head.labels != ignore_index)[:, None]
    return F.linear(torch.where(labelled, head.hidden, 0), head.weight, head.bias)


def _z(logits: Tensor, valid: Tensor, opt: Options) -> Tensor:
    x = logits.to(accumulate_dtype(logits.dtype))
    z = opt.logit_scale * torch.where(valid[..., None], x, 0)  # ignored rows may hold anything
    return z if opt.softcap is None else opt.softcap * torch.tanh(z / opt.softcap)
