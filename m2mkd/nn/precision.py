"""What is computed in full precision whatever the autocast region around it."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def without_autocast(tensor: Tensor) -> AbstractContextManager[object]:
    """A context in which autocast does nothing on the tensor's device.

    torch.autocast itself refuses devices that it does not know, such as meta.
    """
    kind = tensor.device.type
    if not torch.amp.is_autocast_available(kind):
        return nullcontext()
    return torch.autocast(kind, enabled=False)
