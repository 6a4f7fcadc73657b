"""Tells torch about a compiled op: result shapes for tracing, and its first derivative.

`torch.library.register_autograd` would do the same, at a cost that shows beside kernels of a few
milliseconds: it passes every call through helpers for lists of tensors, keyword arguments and
defaults, of which our schemas have none.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

# Registrations last as long as this object.
_LIBRARY = torch.library.Library("m2mkd", "IMPL")

Fake = Callable[..., Any]
# Called with the context of the call, its inputs and its output; keeps what `Gradient` needs.
Setup = Callable[[Any, tuple[Any, ...], Any], None]
# Called with that context and the gradients of outputs; returns those of all inputs.
Gradient = Callable[..., Any]

_REFUSAL = "m2mkd's kernels have {} use m2mkd.ops.reference"


def register(name: str, fake: Fake, backward_fake: Fake, setup: Setup, gradient: Gradient) -> None:
    """Registers op `name` and the op `name`_backward that its gradient calls.

    Args:
        name: Of the op in namespace m2mkd; its arguments are positional and no lists.
        fake: Returns empty results for the op's inputs.
        backward_fake: The same of `name`_backward.
        setup: See `Setup`.
        gradient: See `Gradient`.
    """
    torch.library.register_fake(f"m2mkd::{name}", fake)
    torch.library.register_fake(f"m2mkd::{name}_backward", backward_fake)
    _register_gradient(name, setup, gradient)
    _register_gradient(f"{name}_backward", _keep_nothing, _refuse_second)


def _register_gradient(name: str, setup: Setup, gradient: Gradient) -> None:
    """Registers the kernel that torch calls before the device's own, wherever autograd is on."""
    op = getattr(torch.ops.m2mkd, name).default

    def below_autograd(*inputs: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return op(*inputs)

    def forward(ctx: Any, *inputs: Any) -> Any:
        output = below_autograd(*inputs)
        setup(ctx, inputs, output)
        return output

    methods = {"forward": staticmethod(forward), "backward": staticmethod(gradient)}
    # By its own name in grad_fn and in profiles.
    function: Any = type(f"m2mkd_{name}", (torch.autograd.Function,), methods)

    def kernel(*inputs: Any) -> Any:
        # Below autograd tangents would be lost, and what is lost counts as zeros.
        if forward_ad._current_level >= 0 and any(map(_has_tangent, inputs)):
            raise RuntimeError(_REFUSAL.format("no forward-mode derivatives; for those"))
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*inputs):
            return function.apply(*inputs)
        return below_autograd(*inputs)

    _LIBRARY.impl(name, kernel, "Autograd")


def _keep_nothing(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    del ctx, inputs, output


def _has_tangent(value: Any) -> bool:
    return isinstance(value, Tensor) and forward_ad.unpack_dual(value).tangent is not None


def _refuse_second(ctx: Any, *grads: Any) -> None:
    raise RuntimeError(_REFUSAL.format("first derivatives only; for second ones"))
