"""How the ops follow an autocast region."""

from typing import TypeVar

import torch
from torch import Tensor

MaybeTensor = TypeVar("MaybeTensor", Tensor, Tensor | None)


def region_dtype(tensor: Tensor) -> torch.dtype | None:
    """The dtype of the autocast region around us, or None outside one."""
    kind = tensor.device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def to_region(tensor: MaybeTensor) -> MaybeTensor:
    """Casts to the autocast region's dtype; float64 stays, as in torch's own rules."""
    if tensor is None:
        return tensor
    dtype = region_dtype(tensor)
    if dtype is None or not tensor.is_floating_point() or tensor.dtype == torch.float64:
        return tensor
    return tensor.to(dtype)
