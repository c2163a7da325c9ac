"""The model that most tests of a criterion need: an output layer."""

from typing import Any

from torch import Tensor, nn

from nvamp import LinearNVAMPLoss, NVAMPLoss

CRITERIA: dict[str, type[NVAMPLoss] | type[LinearNVAMPLoss]] = {
    "logits": NVAMPLoss,
    "linear": LinearNVAMPLoss,
}


class HeadAndLoss(nn.Module):
    """An output layer, and a criterion of its logits or of its input and weight."""

    def __init__(self, criterion: NVAMPLoss | LinearNVAMPLoss, features: int, classes: int) -> None:
        super().__init__()
        self.head, self.criterion = nn.Linear(features, classes), criterion

    def forward(self, hidden: Tensor, labels: Tensor, **options: Any) -> Any:
        if isinstance(self.criterion, LinearNVAMPLoss):
            return self.criterion(hidden, self.head.weight, labels, self.head.bias, **options)
        return self.criterion(self.head(hidden), labels, **options)
