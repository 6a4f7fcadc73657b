"""Mixture-of-experts dispatch: gate, plan, gather, expert GEMMs, combine (V-MoE, arXiv 2106.05974).

Letters: T tokens, D width, H hidden width, E experts, K choices per token, M routed rows (T*K minus
dropped). Where no kernel was built for a tensor's device, the functions here are those of
`m2mkd.ops.reference`.

Under autocast the gate computes in float32; the others compute in the region's dtype, float64
excepted. Combine weights are always used in float32 (float64 with float64 rows).
"""

from typing import Any

import torch
from torch import Tensor

from m2mkd.ops import _checks, reference
from m2mkd.ops._autocast import region_dtype, to_region
from m2mkd.ops._checks import MoEPlan, compute_dtype, has_values
from m2mkd.ops._load import EXTENSION
from m2mkd.ops._registration import register
from m2mkd.ops._selftest import has_kernels

_OPS = torch.ops.m2mkd


def topk_gate(logits_TE: Tensor, k: int, mode: str = "softmax_selected") -> tuple[Tensor, Tensor]:
    """Chooses the k experts with the largest logits of each token, and their weights.

    Choices are in falling order of logits; equal logits go to the lower expert number.

    Args:
        logits_TE: Router logits, [T, E], floating.
        k: Experts per token, 1 to E.
        mode: softmax_selected: softmax over the k chosen logits (the m2mKD student); softmax_all:
            softmax over all E, not renormalised (V-MoE section 2.1); softmax_all_renorm: the same,
            divided by the sum of the chosen.

    Returns:
        Weights [T, K] in the dtype of the logits (float32 under autocast), differentiable in them,
        and expert numbers [T, K], int32.

    Raises:
        ShapeError: A wrong shape, dtype, k or mode.
        NotFiniteError: NaN among the logits (looked for outside
            tracing only, which on a GPU waits for the logits).
    """
    if region_dtype(logits_TE) is not None:
        logits_TE = logits_TE.to(compute_dtype(logits_TE.dtype))
    if not has_kernels(logits_TE.device):
        return reference.topk_gate(logits_TE, k, mode)
    _checks.check_gate(logits_TE, k, mode)
    weights_TK, experts_TK = _OPS.topk_gate(logits_TE, k, mode)
    return weights_TK, experts_TK


def moe_plan(
    experts_TK: Tensor,
    num_experts: int,
    capacity: int | None = None,
    priority_T: Tensor | None = None,
) -> MoEPlan:
    """Sorts choices by expert, stably, dropping what an expert has no room for.

    Without a capacity nothing is dropped and an expert's rows are in order of tokens (of choices
    within a token); a priority then has no effect. With a capacity all first choices are placed
    before all second ones, and so on, tokens of one rank in order of number or of falling priority
    (batch prioritised routing, V-MoE section 2.4; equal priorities in order of number). An expert's
    rows are numbered in order of placement; later ones than its capacity-th are dropped.

    While tracing for torch.compile or torch.export the number of rows must not depend on values:
    token_of_M then has min(T*K, E*capacity) entries, and those past offsets[-1] are -1. Every op
    takes such plans and treats the padding as absent.

    Args:
        experts_TK: Chosen experts, [T, K], int32, in [0, num_experts).
        num_experts: E.
        capacity: Rows per expert, at least 1; None for as many as needed.
        priority_T: Priority of each token, [T], floating; larger is placed first.

    Returns:
        The plan; see `MoEPlan`.

    Raises:
        ShapeError: A wrong shape or dtype, a capacity below 1, T*K beyond int32, or (looked for
            outside tracing only) an expert number outside [0, num_experts).
    """
    if not has_kernels(experts_TK.device):
        return reference.moe_plan(experts_TK, num_experts, capacity, priority_T)
    _checks.check_choices(experts_TK, num_experts, capacity, priority_T)
    order_T = None
    if capacity is not None and priority_T is not None:
        order_T = torch.argsort(priority_T, descending=True, stable=True)
    row_of_TK, token_of_M, offsets = _OPS.moe_plan(experts_TK, order_T, num_experts, capacity)
    if capacity is not None and has_values(offsets):
        token_of_M = token_of_M[: int(offsets[-1])]
    return MoEPlan(row_of_TK, token_of_M, offsets)


def expert_choice(logits_TE: Tensor, capacity: int) -> tuple[Tensor, MoEPlan]:
    """Lets every expert choose its tokens (expert choice, arXiv 2202.09368 section 3.2).

    Each expert takes the `capacity` tokens whose softmax over experts is largest for it; equal
    values go to the lower token number. So all experts have equally many rows, and a token has as
    many as chose it, none among them. Column e of the result is expert e's choice: K is E, which
    the other ops read at no cost that could be measured (E up to 128).

    Args:
        logits_TE: Router logits, [T, E], floating.
        capacity: Tokens per expert, at least 1; with fewer tokens, all of them.

    Returns:
        Weights [T, E], the softmax over experts in the dtype of the logits (float32 under
        autocast), differentiable in them; and the plan, with K = E and an expert's rows in order
        of tokens. Weights of choices that no expert made are not used.

    Raises:
        ShapeError: A wrong shape or dtype, or a capacity below 1.
        NotFiniteError: A token's largest logit is NaN or infinite (looked for outside tracing
            only, which on a GPU waits for the logits).
    """
    _checks.check_expert_choice(logits_TE, capacity)
    if region_dtype(logits_TE) is not None:
        logits_TE = logits_TE.to(compute_dtype(logits_TE.dtype))
    (tokens, experts), device = logits_TE.shape, logits_TE.device
    size = min(capacity, tokens)
    weights_TE = logits_TE.to(compute_dtype(logits_TE.dtype)).softmax(dim=1)
    # Comparing with the smallest chosen value takes a fifth of the time of sorting all tokens.
    value_ET = weights_TE.detach().T.contiguous()
    if size < tokens:
        least_E1 = value_ET.topk(size, dim=1, sorted=False).values.amin(dim=1, keepdim=True)
        above_ET, equal_ET = value_ET > least_E1, value_ET == least_E1
        room_E1 = size - above_ET.sum(dim=1, keepdim=True)
        is_chosen_ET = above_ET | (equal_ET & (equal_ET.cumsum(dim=1) <= room_E1))
    else:
        is_chosen_ET = torch.ones_like(value_ET, dtype=torch.bool)
    offsets = torch.arange(experts + 1, device=device, dtype=torch.int32) * size
    row_ET = is_chosen_ET.cumsum(dim=1) - 1 + offsets[:-1, None]
    # The rest all land in one spare entry at the end, which is cut off.
    token_ET = torch.arange(tokens, device=device, dtype=torch.int32).expand(experts, tokens)
    token_of_M = token_ET.new_empty(experts * size + 1)
    token_of_M = token_of_M.scatter(
        0, torch.where(is_chosen_ET, row_ET, experts * size).flatten(), token_ET.flatten()
    )
    row_of_TE = torch.where(is_chosen_ET, row_ET, -1).T.to(torch.int32).contiguous()
    return weights_TE.to(logits_TE.dtype), MoEPlan(row_of_TE, token_of_M[:-1], offsets)


def moe_gather(x_TD: Tensor, plan: MoEPlan) -> Tensor:
    """Copies each token to the rows of its chosen experts.

    Args:
        x_TD: Tokens, [T, D], floating.
        plan: From `moe_plan`.

    Returns:
        Rows [M, D] in the dtype of x; zeros on padding rows. The gradient of a token is the sum
        over its rows in order of choices.

    Raises:
        ShapeError: A wrong shape or dtype, or a plan of other size or on another device.
    """
    if not has_kernels(x_TD.device):
        return reference.moe_gather(x_TD, plan)
    _checks.check_gather(x_TD, plan)
    rows_MD: Tensor = _OPS.moe_gather(x_TD, plan.row_of_TK, plan.token_of_M)
    return rows_MD


def grouped_linear(
    rows_MD: Tensor, weight_EHD: Tensor, bias_EH: Tensor | None, offsets: Tensor
) -> Tensor:
    """Applies each expert's linear layer to its rows: rows @ weight[e].T + bias[e].

    Args:
        rows_MD: Rows sorted by expert, [M, D], floating.
        weight_EHD: Weights, [E, out, in], in the dtype of rows.
        bias_EH: Biases, [E, out], or None.
        offsets: First row of each expert and the number of rows in use, [E + 1], int32.

    Returns:
        Rows [M, H] in the dtype of rows; zeros at or past offsets[-1].

    Raises:
        ShapeError: Shapes, dtypes or devices that do not fit together.
    """
    rows_MD, weight_EHD = to_region(rows_MD), to_region(weight_EHD)
    bias_EH = to_region(bias_EH)
    if not has_kernels(rows_MD.device):
        return reference.grouped_linear(rows_MD, weight_EHD, bias_EH, offsets)
    _checks.check_grouped(rows_MD, weight_EHD, bias_EH, offsets)
    out_MH: Tensor = _OPS.grouped_linear(rows_MD, weight_EHD, bias_EH, offsets)
    return out_MH


def moe_combine(rows_MD: Tensor, weights_TK: Tensor, plan: MoEPlan) -> Tensor:
    """Sums each token's rows with their weights, in order of choices; dropped ones add nothing.

    Args:
        rows_MD: Expert outputs, [M, D], floating.
        weights_TK: Combine weights, [T, K], floating.
        plan: The plan the rows were gathered with.

    Returns:
        Tokens [T, D] in the dtype of rows, summed in float32 (float64 for float64).

    Raises:
        ShapeError: Shapes, dtypes or devices that do not fit together.
    """
    rows_MD = to_region(rows_MD)
    if not has_kernels(rows_MD.device):
        return reference.moe_combine(rows_MD, weights_TK, plan)
    _checks.check_combine(rows_MD, weights_TK, plan)
    weights_TK = weights_TK.to(compute_dtype(rows_MD.dtype))
    out_TD: Tensor = _OPS.moe_combine(rows_MD, weights_TK, plan.row_of_TK)
    return out_TD


def moe_mlp(
    x_TD: Tensor,
    weights_TK: Tensor,
    plan: MoEPlan,
    fc1_weight_EHD: Tensor,
    fc1_bias_EH: Tensor | None,
    fc2_weight_EDH: Tensor,
    fc2_bias_ED: Tensor | None,
    activation: str,
) -> Tensor:
    """The whole expert layer: gather, fc1, activation, fc2 and weighted combine in one op.

    Equal to composing the ops above, up to rounding, without their [M, D] and [M, H] tensors: on
    the CPU inference keeps nothing of M rows, and training only fc1's product.

    Args:
        x_TD: Tokens, [T, D], floating.
        weights_TK: Combine weights, [T, K], floating.
        plan: From `moe_plan`.
        fc1_weight_EHD: [E, H, D] in the dtype of x.
        fc1_bias_EH: [E, H], or None.
        fc2_weight_EDH: [E, D, H] in the dtype of x.
        fc2_bias_ED: [E, D], or None.
        activation: gelu (erf form), gelu_tanh, relu or silu.

    Returns:
        Tokens [T, D] in the dtype of x; zeros for a token whose choices were all dropped.

    Raises:
        ShapeError: Shapes, dtypes or devices that do not fit together; an unknown activation.
    """
    x_TD = to_region(x_TD)
    fc1_weight_EHD, fc1_bias_EH = to_region(fc1_weight_EHD), to_region(fc1_bias_EH)
    fc2_weight_EDH, fc2_bias_ED = to_region(fc2_weight_EDH), to_region(fc2_bias_ED)
    fc1, fc2 = (fc1_weight_EHD, fc1_bias_EH), (fc2_weight_EDH, fc2_bias_ED)
    if not has_kernels(x_TD.device):
        return reference.moe_mlp(x_TD, weights_TK, plan, *fc1, *fc2, activation)
    _checks.check_mlp(x_TD, weights_TK, plan, fc1, fc2, activation)
    weights_TK = weights_TK.to(compute_dtype(x_TD.dtype))
    inputs = (x_TD, weights_TK, *fc1, *fc2)
    save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
    out_TD, _ = _OPS.moe_mlp(x_TD, weights_TK, *plan, *fc1, *fc2, activation, save)
    return out_TD  # type: ignore[no-any-return]


# What follows tells torch about the compiled ops: result shapes for tracing, and derivatives.


def _gate_fake(logits: Tensor, k: int, mode: str) -> tuple[Tensor, Tensor]:
    sizes = (logits.shape[0], k)
    return logits.new_empty(sizes), logits.new_empty(sizes, dtype=torch.int32)


def _gate_backward_fake(grad: Tensor, logits: Tensor, experts: Tensor, mode: str) -> Tensor:
    return logits.new_empty(logits.shape)


def _gate_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, _, ctx.mode = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(logits, output[1])


def _gate_grad(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, None, None]:
    return _OPS.topk_gate_backward(grad, *ctx.saved_tensors, ctx.mode), None, None


def _plan_fake(
    experts: Tensor, order: Tensor | None, num_experts: int, capacity: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    rows = experts.shape[0] * experts.shape[1]
    bound = rows if capacity is None else torch.sym_min(rows, num_experts * capacity)
    return (
        experts.new_empty(experts.shape),
        experts.new_empty(bound),
        experts.new_empty(num_experts + 1),
    )


def _gather_fake(x: Tensor, row_of: Tensor, token_of: Tensor) -> Tensor:
    return x.new_empty(token_of.shape[0], x.shape[1])


def _gather_backward_fake(grad: Tensor, row_of: Tensor) -> Tensor:
    return grad.new_empty(row_of.shape[0], grad.shape[1])


def _gather_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _gather_grad(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    return _OPS.moe_gather_backward(grad, *ctx.saved_tensors), None, None


def _grouped_fake(rows: Tensor, weight: Tensor, bias: Tensor | None, offsets: Tensor) -> Tensor:
    return rows.new_empty(rows.shape[0], weight.shape[1])


def _grouped_backward_fake(
    grad: Tensor,
    rows: Tensor,
    weight: Tensor,
    offsets: Tensor,
    needs_rows: bool,
    needs_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    experts, out, width = weight.shape
    experts = experts if needs_weight else 0
    return (
        rows.new_empty(rows.shape[0] if needs_rows else 0, width),
        rows.new_empty(experts, out, width),
        rows.new_empty(experts, out),
    )


def _grouped_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    rows, weight, _, offsets = inputs
    ctx.save_for_backward(rows, weight, offsets)


def _grouped_grad(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    rows, weight, bias, _ = ctx.needs_input_grad
    grads = _OPS.grouped_linear_backward(grad, *ctx.saved_tensors, rows, weight or bias)
    return (*_only(grads, (rows, weight, bias)), None)


def _combine_fake(rows: Tensor, weights: Tensor, row_of: Tensor) -> Tensor:
    return rows.new_empty(row_of.shape[0], rows.shape[1])


def _combine_backward_fake(
    grad: Tensor, rows: Tensor, weights: Tensor, row_of: Tensor
) -> tuple[Tensor, Tensor]:
    return rows.new_empty(rows.shape), weights.new_empty(weights.shape)


def _combine_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _combine_grad(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grads = _OPS.moe_combine_backward(grad, *ctx.saved_tensors)
    return (*_only(grads, ctx.needs_input_grad[:2]), None)


def _mlp_fake(x: Tensor, weights: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    token_of, fc1_weight, save = rest[1], rest[3], rest[8]
    rows = token_of.shape[0] if save else 0
    return x.new_empty(x.shape), x.new_empty(rows, fc1_weight.shape[1])


def _mlp_backward_fake(
    grad: Tensor, hidden: Tensor, x: Tensor, weights: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    fc1_weight = rest[3]
    needs_x, needs_fc1, needs_fc2 = rest[8:]
    experts, hidden_width, width = fc1_weight.shape
    num_fc1, num_fc2 = (experts if needed else 0 for needed in (needs_fc1, needs_fc2))
    return (
        x.new_empty(x.shape[0] if needs_x else 0, width),
        weights.new_empty(weights.shape),
        x.new_empty(num_fc1, hidden_width, width),
        x.new_empty(num_fc1, hidden_width),
        x.new_empty(num_fc2, width, hidden_width),
        x.new_empty(num_fc2, width),
    )


def _mlp_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.activation, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1], *tensors)


def _mlp_grad(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 11
    needs = ctx.needs_input_grad
    needs_x, needs_fc1, needs_fc2 = needs[0], needs[5] or needs[6], needs[7] or needs[8]
    x, weights, *parameters = _OPS.moe_mlp_backward(
        grad, *ctx.saved_tensors, ctx.activation, needs_x, needs_fc1, needs_fc2
    )
    x, weights, *parameters = _only((x, weights, *parameters), (*needs[:2], *needs[5:9]))
    return (x, weights, None, None, None, *parameters, None, None)


def _only(grads: Any, needed: Any) -> tuple[Tensor | None, ...]:
    """Gradients that were asked for, None for the rest."""
    return tuple(g if want else None for g, want in zip(grads, needed, strict=True))


def _register() -> None:
    """Registers shapes and derivatives of the compiled ops."""
    rules: dict[str, tuple[Any, Any, Any, Any]] = {
        "topk_gate": (_gate_fake, _gate_backward_fake, _gate_setup, _gate_grad),
        "moe_gather": (_gather_fake, _gather_backward_fake, _gather_setup, _gather_grad),
        "grouped_linear": (_grouped_fake, _grouped_backward_fake, _grouped_setup, _grouped_grad),
        "moe_combine": (_combine_fake, _combine_backward_fake, _combine_setup, _combine_grad),
        "moe_mlp": (_mlp_fake, _mlp_backward_fake, _mlp_setup, _mlp_grad),
    }
    torch.library.register_fake("m2mkd::moe_plan", _plan_fake)
    for name, (fake, backward_fake, setup, gradient) in rules.items():
        register(name, fake, backward_fake, setup, gradient)


if EXTENSION.cpu:
    _register()
