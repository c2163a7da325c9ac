"""Backend `reference`: full logits and PyTorch's own cross-entropy, differentiated by autograd.

It is the oracle of the tests and reads like the definition; it keeps several copies of the logits.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from nvamp.cross_entropy.checks import check_label_range
from nvamp.cross_entropy.options import Options, accumulate_dtype


def token_nll(logits: Tensor, labels: Tensor, metrics: bool, opt: Options) -> tuple[Tensor, ...]:
    """(nll,) or, with `metrics`, (nll, entropy, correct); arguments as in `nvamp.functional.token_nll`."""
    valid, vocab = labels != opt.ignore_index, logits.shape[-1]
    if not torch.compiler.is_compiling():
        check_label_range(labels, vocab, opt.ignore_index)
    x = logits.to(accumulate_dtype(logits.dtype))
    z = opt.logit_scale * torch.where(valid[..., None], x, 0)  # ignored rows may hold anything
    if opt.softcap is not None:
        z = opt.softcap * torch.tanh(z / opt.softcap)
    nll = F.cross_entropy(
        z.flatten(0, -2),
        labels.flatten().long(),
        ignore_index=opt.ignore_index,
        label_smoothing=opt.label_smoothing,
        reduction="none",
    ).view(labels.shape)
    if opt.z_loss:
        nll = nll + torch.where(valid, opt.z_loss * z.logsumexp(-1).square(), 0)
    if not metrics:
        return (nll,)
    p = z.detach().softmax(-1)
    entropy = torch.where(valid, torch.special.entr(p).sum(-1), 0)
    return nll, entropy, valid & (z.argmax(-1) == labels)
