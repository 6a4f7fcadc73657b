"""The arithmetic of modulated layers, which keeps little for its backward pass.

y = g (W (a(x) * s) + b). Written with separate operations, autograd would keep a(x), the product
and g W for every layer of every block; here the inputs alone are kept and the rest is computed
again, elementwise. Of an input that a LayerNorm made, the norm's input is kept instead, which
autograd keeps for the norm anyway.

Letters: B batch, H heads, U latents, K head width, I inputs, O outputs.
"""

from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m2mkd.ops._autocast import to_region

Activation = Literal["none", "gelu", "geglu", "heads"]
ACTIVATIONS = get_args(Activation)


class Normed(NamedTuple):
    """A LayerNorm's output, and what gives it again.

    Attributes:
        out: The output, [..., width].
        source: The norm's input, of the same shape.
        weight: The norm's factors, [width]; None for ones.
        bias: What it adds, [width]; None for zeros.
        eps: Added to variances.
    """

    out: Tensor
    source: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float

    @staticmethod
    def by(norm: nn.LayerNorm, source: Tensor) -> "Normed":
        """The output of a module over the last dimension."""
        return Normed(norm(source), source, norm.weight, norm.bias, norm.eps)

    def last(self, count: int) -> "Normed":
        """That of the last rows of [B, V, D] alone, [B, count, D]."""
        return self._replace(out=self.out[:, -count:], source=self.source[:, -count:])


def plain(x: Tensor | Normed) -> Tensor:
    """The tensor itself."""
    return x.out if isinstance(x, Normed) else x


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
    x: Tensor | Normed,
    scale_UI: Tensor | Normed,
    weight_OI: Tensor,
    bias_O: Tensor | None,
    activation: Activation = "none",
    output_scale_O: Tensor | None = None,
) -> Tensor:
    """g (W (a(x) * s) + b), [..., U, O].

    Args:
        x: [..., U, I], [..., U, 2 I] for GEGLU, or [B, H, U, K] for heads.
        scale_UI: s, [U, I], or [1, I] for one scale for all.
        weight_OI: W, [O, I].
        bias_O: b, [O], or None.
        activation: a.
        output_scale_O: g, [O]; None for ones.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        # A compiler decides for itself what to compute again.
        product = activate(plain(x), activation) * plain(scale_UI)
        return F.linear(product, *scale_outputs(weight_OI, bias_O, output_scale_O))
    inputs = (plain(x), plain(scale_UI), weight_OI, bias_O, output_scale_O)
    norms = (origin if isinstance(origin, Normed) else None for origin in (x, scale_UI))
    out: Tensor = _Modulated.apply(*(to_region(t) for t in inputs), activation, *norms)
    return out


def scale_outputs(
    weight_OI: Tensor, bias_O: Tensor | None, scale_O: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """A linear layer times factors: scaling weights is less work than scaling outputs."""
    if scale_O is None:
        return weight_OI, bias_O
    return scale_O[:, None] * weight_OI, None if bias_O is None else scale_O * bias_O


class _Again(NamedTuple):
    """How an input is had again in the backward pass; `eps` is None where it was kept itself."""

    dtype: torch.dtype
    norm_dtype: torch.dtype
    eps: float | None

    @staticmethod
    def keep(x: Tensor, norm: Normed | None) -> "tuple[_Again, list[Tensor | None]]":
        """With the tensors that `make` will want."""
        if norm is None:
            return _Again(x.dtype, x.dtype, None), [x, None, None]
        again = _Again(x.dtype, norm.out.dtype, norm.eps)
        return again, [norm.source, norm.weight, norm.bias]

    def make(self, source: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        if self.eps is None:
            return source
        # As the norm computed under autocast, which is over in the backward pass.
        weight, bias = (None if t is None else t.to(self.norm_dtype) for t in (weight, bias))
        source = source.to(self.norm_dtype)
        return F.layer_norm(source, source.shape[-1:], weight, bias, self.eps).to(self.dtype)


class _Modulated(torch.autograd.Function):
    @staticmethod
    def forward(
        x: Tensor,
        scale_UI: Tensor,
        weight_OI: Tensor,
        bias_O: Tensor | None,
        output_scale_O: Tensor | None,
        activation: Activation,
        x_norm: Normed | None,
        scale_norm: Normed | None,
    ) -> Tensor:
        del x_norm, scale_norm
        product = activate(x, activation) * scale_UI
        return F.linear(product, *scale_outputs(weight_OI, bias_O, output_scale_O))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        del output
        x, scale_UI, weight_OI, bias_O, output_scale_O, ctx.activation, *norms = inputs
        ctx.x_again, x_kept = _Again.keep(x, norms[0])
        ctx.scale_again, scale_kept = _Again.keep(scale_UI, norms[1])
        bias_O = None if output_scale_O is None else bias_O
        ctx.save_for_backward(*x_kept, *scale_kept, weight_OI, bias_O, output_scale_O)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        *kept, weight_OI, bias_O, output_scale_O = ctx.saved_tensors
        x, scale_UI = ctx.x_again.make(*kept[:3]), ctx.scale_again.make(*kept[3:])
        needs_x, needs_scale, needs_weight, needs_bias, needs_output_scale, *_ = (
            ctx.needs_input_grad
        )
        rows_O = grad.reshape(-1, grad.shape[-1])
        active = activate(x, ctx.activation)
        grad_weight = grad_bias = grad_output_scale = grad_scale = grad_x = None
        if needs_bias or (needs_output_scale and bias_O is not None):
            grad_bias = rows_O.sum(0)
        if needs_weight or needs_output_scale:
            grad_weight = rows_O.T @ (active * scale_UI).reshape(-1, active.shape[-1])
        if needs_x or needs_scale:
            grad_product = grad @ scale_outputs(weight_OI, None, output_scale_O)[0]
            if needs_scale:
                grad_scale = (grad_product * active).sum_to_size(scale_UI.shape)
            del active  # as large as x, and what follows needs as much again
            if needs_x:
                grad_product = grad_product * scale_UI
                grad_x = _activate_backward(grad_product, x, ctx.activation)
        if output_scale_O is not None:
            grad_weight, grad_bias, grad_output_scale = _scale_outputs_backward(
                grad_weight, grad_bias, weight_OI, bias_O, output_scale_O
            )
        return grad_x, grad_scale, grad_weight, grad_bias, grad_output_scale, None, None, None


def _scale_outputs_backward(
    grad_weight: Tensor | None,
    grad_bias: Tensor | None,
    weight_OI: Tensor,
    bias_O: Tensor | None,
    scale_O: Tensor,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of weight, bias and factors, from those of weight and bias times the factors."""
    grad_scale = None if grad_weight is None else (grad_weight * weight_OI).sum(1)
    if grad_scale is not None and grad_bias is not None and bias_O is not None:
        grad_scale = grad_scale + grad_bias * bias_O
    grad_weight = None if grad_weight is None else scale_O[:, None] * grad_weight
    return grad_weight, None if grad_bias is None else scale_O * grad_bias, grad_scale


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
