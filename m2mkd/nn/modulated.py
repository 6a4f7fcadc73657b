"""The arithmetic of modulated layers, which keeps little for its backward pass.

y = W (a(x) * s) + b. Written with separate operations, autograd would keep a(x) and the product for
every layer of every block; here x alone is kept and the rest is computed again, elementwise.

Letters: B batch, H heads, U latents, K head width, I inputs, O outputs.
"""

from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from m2mkd.ops._autocast import to_region

Activation = Literal["none", "gelu", "geglu", "heads"]
ACTIVATIONS = get_args(Activation)


def activate(x: Tensor, activation: Activation) -> Tensor:
    """What a layer's inputs go through first.

    Args:
        x: Inputs.
        activation: `none`; `gelu` (erf); `geglu`, the first half of x times GELU of the second;
            `heads`, attention's outputs [B, H, U, K] side by side, as [B, U, H K].
    """
    if activation == "gelu":
        return F.gelu(x)
    if activation == "geglu":
        value, gate = x.chunk(2, dim=-1)
        return value * F.gelu(gate)
    if activation == "heads":
        return x.transpose(1, 2).flatten(2)
    return x


def modulated_linear(
    x: Tensor,
    scale_UI: Tensor,
    weight_OI: Tensor,
    bias_O: Tensor | None,
    activation: Activation = "none",
) -> Tensor:
    """W (a(x) * s) + b, [..., U, O].

    Args:
        x: [..., U, I], [..., U, 2 I] for GEGLU, or [B, H, U, K] for heads.
        scale_UI: [U, I], or [1, I] for one scale for all.
        weight_OI: [O, I].
        bias_O: [O], or None.
        activation: a.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        # A compiler decides for itself what to compute again.
        return F.linear(activate(x, activation) * scale_UI, weight_OI, bias_O)
    x, scale_UI, weight_OI = to_region(x), to_region(scale_UI), to_region(weight_OI)
    out: Tensor = _Modulated.apply(x, scale_UI, weight_OI, to_region(bias_O), activation)
    return out


class _Modulated(torch.autograd.Function):
    @staticmethod
    def forward(
        x: Tensor,
        scale_UI: Tensor,
        weight_OI: Tensor,
        bias_O: Tensor | None,
        activation: Activation,
    ) -> Tensor:
        return F.linear(activate(x, activation) * scale_UI, weight_OI, bias_O)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        del output
        x, scale_UI, weight_OI, _, ctx.activation = inputs
        ctx.save_for_backward(x, scale_UI, weight_OI)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, scale_UI, weight_OI = ctx.saved_tensors
        needs_x, needs_scale, needs_weight, needs_bias, _ = ctx.needs_input_grad
        (grad,) = grads
        rows_O = grad.reshape(-1, grad.shape[-1])
        active = activate(x, ctx.activation)
        grad_weight = grad_bias = grad_scale = grad_x = None
        if needs_bias:
            grad_bias = rows_O.sum(0)
        if needs_weight:
            grad_weight = rows_O.T @ (active * scale_UI).reshape(-1, active.shape[-1])
        if needs_x or needs_scale:
            grad_product = grad @ weight_OI
            if needs_scale:
                grad_scale = (grad_product * active).sum_to_size(scale_UI.shape)
            if needs_x:
                grad_x = _activate_backward(grad_product * scale_UI, x, ctx.activation)
        return grad_x, grad_scale, grad_weight, grad_bias, None


def _activate_backward(grad: Tensor, x: Tensor, activation: Activation) -> Tensor:
    if activation == "none":
        return grad
    if activation == "gelu":
        return torch.ops.aten.gelu_backward(grad, x)  # type: ignore[no-any-return]
    if activation == "heads":
        return grad.unflatten(2, (x.shape[1], x.shape[3])).transpose(1, 2)  # type: ignore[no-any-return]
    value, gate = x.chunk(2, dim=-1)
    grad_gate = torch.ops.aten.gelu_backward(grad * value, gate)
    return torch.cat([grad * F.gelu(gate), grad_gate], dim=-1)
