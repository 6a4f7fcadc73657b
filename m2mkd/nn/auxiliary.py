"""Losses that layers add to the task's: balance of experts, distance of signatures."""

import torch
from torch import Tensor, nn


def auxiliary_loss(model: nn.Module) -> Tensor | None:
    """Sums the weighted losses that layers left in `auxiliary_loss` in their last forward pass.

    MoE layers (`m2mkd.nn.MoEMlp`) and NACs (`m2mkd.models.NAC`) do, in training mode; None where
    there is none.
    """
    found = (getattr(layer, "auxiliary_loss", None) for layer in model.modules())
    losses = [loss for loss in found if loss is not None]
    return torch.stack(losses).sum() if losses else None
