"""Checks shared by the kernels' public functions and their references, so messages are the same.

T tokens, D width, H hidden width, E experts, K choices per token, M routed rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from m2mkd.errors import NotFiniteError, ShapeError

if TYPE_CHECKING:
    from m2mkd.ops.circuit import Circuit

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
GATE_MODES = ("softmax_selected", "softmax_all", "softmax_all_renorm")
ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "silu")
INT32_MAX = 2**31 - 1


class MoEPlan(NamedTuple):
    """Which row of the expert-sorted batch holds which choice of which token.

    Rows are grouped by expert: expert e owns rows offsets[e] up to offsets[e + 1]. Rows at or past
    offsets[-1], which only a traced plan with a capacity has, are padding.

    Attributes:
        row_of_TK: Row of each choice, [T, K], int32; -1 where the choice was dropped.
        token_of_M: Token of each row, [M], int32; -1 on padding rows.
        offsets: First row of each expert and the number of rows in use, [E + 1], int32.
    """

    row_of_TK: Tensor
    token_of_M: Tensor
    offsets: Tensor


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which element-wise arithmetic on `dtype` is done: float32 for half types."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def has_values(tensor: Tensor) -> bool:
    """Whether values may be looked at: false while tracing and on the meta device."""
    return not torch.compiler.is_compiling() and not tensor.is_meta


def check_rank(op: str, name: str, tensor: Tensor, shape: str, rank: int) -> None:
    """Raises ShapeError unless `tensor` has `rank` dimensions."""
    if tensor.dim() != rank:
        raise ShapeError(f"{op}: {name} must be {shape}, got shape {tuple(tensor.shape)}")


def check_float(op: str, name: str, tensor: Tensor) -> None:
    """Raises ShapeError unless `tensor` is float16, bfloat16, float32 or float64."""
    if tensor.dtype not in FLOATS:
        raise ShapeError(
            f"{op}: {name} is {tensor.dtype}; use float16, bfloat16, float32 or float64"
        )


def check_int32(op: str, name: str, tensor: Tensor) -> None:
    """Raises ShapeError unless `tensor` is int32."""
    if tensor.dtype != torch.int32:
        raise ShapeError(f"{op}: {name} is {tensor.dtype}; convert it with .to(torch.int32)")


def check_size(op: str, what: str, found: int, expected: int, why: str) -> None:
    """Raises ShapeError unless `found == expected`."""
    if found != expected:
        raise ShapeError(f"{op}: {what} is {found}, but {why} is {expected}")


def check_width(op: str, name: str, tensor: Tensor) -> None:
    """Raises ShapeError where heads hold no numbers."""
    if tensor.shape[-1] == 0:
        raise ShapeError(
            f"{op}: heads of {name} {tuple(tensor.shape)} have width 0; give them at least 1"
        )


def check_indexable(op: str, what: str, count: int) -> None:
    """Raises ShapeError where `count` rows cannot be numbered in int32."""
    if count > INT32_MAX:
        raise ShapeError(f"{op}: {what} is {count}, over the int32 limit {INT32_MAX}; split it")


def check_together(op: str, first: str, tensor: Tensor, **others: Tensor | None) -> None:
    """Raises ShapeError unless all `others` lie on the device of `tensor`."""
    for name, other in others.items():
        if other is not None and other.device != tensor.device:
            raise ShapeError(
                f"{op}: {name} is on {other.device}, but {first} is on {tensor.device}; "
                "move one of them"
            )


def check_same_dtype(op: str, first: str, tensor: Tensor, **others: Tensor | None) -> None:
    """Raises ShapeError unless all `others` have the dtype of `tensor`."""
    for name, other in others.items():
        if other is not None and other.dtype != tensor.dtype:
            raise ShapeError(
                f"{op}: {name} is {other.dtype}, but {first} is {tensor.dtype}; convert one of them"
            )


def check_gate(logits_TE: Tensor, k: int, mode: str) -> None:
    """Checks the arguments of `topk_gate`; looks for NaN when not tracing."""
    op = "topk_gate"
    check_rank(op, "logits", logits_TE, "[T, E]", 2)
    check_float(op, "logits", logits_TE)
    if mode not in GATE_MODES:
        raise ShapeError(f"{op}: unknown mode {mode!r}; use one of {', '.join(GATE_MODES)}")
    if not 1 <= k <= logits_TE.shape[1]:
        raise ShapeError(f"{op}: k={k} is not between 1 and the {logits_TE.shape[1]} experts")
    check_indexable(op, "T*E", logits_TE.shape[0] * logits_TE.shape[1])
    if has_values(logits_TE) and bool(logits_TE.isnan().any()):
        raise NotFiniteError(
            f"{op}: the router's logits {tuple(logits_TE.shape)} hold NaN; look for a diverged "
            "loss or a bad input image"
        )


def check_expert_choice(logits_TE: Tensor, capacity: int) -> None:
    """Checks the arguments of `expert_choice`; looks at the logits when not tracing."""
    op = "expert_choice"
    check_rank(op, "logits", logits_TE, "[T, E]", 2)
    check_float(op, "logits", logits_TE)
    tokens, experts = logits_TE.shape
    if capacity < 1 or experts < 1:
        raise ShapeError(f"{op}: {capacity=} and E={experts} must be at least 1")
    check_indexable(op, "T*E", tokens * experts)
    if has_values(logits_TE) and not bool(logits_TE.amax(dim=1).isfinite().all()):
        raise NotFiniteError(
            f"{op}: a token's largest logit of {tuple(logits_TE.shape)} is NaN or infinite; look "
            "for a diverged loss or a bad input image"
        )


def check_choices(
    experts_TK: Tensor, num_experts: int, capacity: int | None, priority_T: Tensor | None
) -> None:
    """Checks the arguments of `moe_plan`; looks at the expert numbers when not tracing."""
    op = "moe_plan"
    check_rank(op, "experts", experts_TK, "[T, K]", 2)
    check_int32(op, "experts", experts_TK)
    num_tokens, num_choices = experts_TK.shape
    if num_experts < 1 or num_choices < 1:
        raise ShapeError(f"{op}: {num_experts=} and K={num_choices} must be at least 1")
    if capacity is not None and capacity < 1:
        raise ShapeError(
            f"{op}: {capacity=} for T={num_tokens} tokens, K={num_choices}, {num_experts=}; "
            "raise the capacity factor or use fewer experts"
        )
    check_indexable(op, "T*K", num_tokens * num_choices)
    check_indexable(op, "E + 1", num_experts + 1)
    if priority_T is not None:
        check_rank(op, "priority", priority_T, "[T]", 1)
        check_float(op, "priority", priority_T)
        check_size(op, "priority's length", priority_T.shape[0], num_tokens, "T of experts")
        check_together(op, "experts", experts_TK, priority=priority_T)
    if has_values(experts_TK) and experts_TK.numel() > 0:
        low, high = (int(value) for value in torch.aminmax(experts_TK))
        if low < 0 or high >= num_experts:
            raise ShapeError(
                f"{op}: expert numbers run from {low} to {high}, but {num_experts=}; "
                f"they must lie in [0, {num_experts})"
            )


def check_plan(op: str, like: str, tensor: Tensor, plan: MoEPlan) -> None:
    """Checks the parts of a plan against each other and against the device of `tensor`."""
    check_rank(op, "plan.row_of_TK", plan.row_of_TK, "[T, K]", 2)
    check_rank(op, "plan.token_of_M", plan.token_of_M, "[M]", 1)
    check_rank(op, "plan.offsets", plan.offsets, "[E + 1]", 1)
    for name, part in zip(plan._fields, plan, strict=True):
        check_int32(op, f"plan.{name}", part)
    check_together(op, like, tensor, **plan._asdict())


def check_gather(x_TD: Tensor, plan: MoEPlan) -> None:
    """Checks the arguments of `moe_gather`."""
    op = "moe_gather"
    check_rank(op, "x", x_TD, "[T, D]", 2)
    check_float(op, "x", x_TD)
    check_plan(op, "x", x_TD, plan)
    check_size(op, "T of x", x_TD.shape[0], plan.row_of_TK.shape[0], "T of the plan")


def check_grouped(rows_MD: Tensor, weight: Tensor, bias: Tensor | None, offsets: Tensor) -> None:
    """Checks the arguments of `grouped_linear`."""
    op = "grouped_linear"
    check_rank(op, "rows", rows_MD, "[M, D]", 2)
    check_rank(op, "weight", weight, "[E, out, in]", 3)
    check_rank(op, "offsets", offsets, "[E + 1]", 1)
    check_float(op, "rows", rows_MD)
    check_int32(op, "offsets", offsets)
    check_together(op, "rows", rows_MD, weight=weight, bias=bias, offsets=offsets)
    check_same_dtype(op, "rows", rows_MD, weight=weight, bias=bias)
    check_size(op, "D of rows", rows_MD.shape[1], weight.shape[2], "the input width of weight")
    check_size(op, "the number of offsets", offsets.shape[0], weight.shape[0] + 1, "E + 1")
    check_bias(op, "bias", bias, weight)


def check_bias(op: str, name: str, bias: Tensor | None, weight: Tensor) -> None:
    """Raises ShapeError unless `bias` is None or [E, out] for a weight [E, out, in]."""
    if bias is not None and bias.shape != weight.shape[:2]:
        raise ShapeError(
            f"{op}: {name} has shape {tuple(bias.shape)}, but its weight {tuple(weight.shape)} "
            f"needs {tuple(weight.shape[:2])}"
        )


def check_combine(rows_MD: Tensor, weights_TK: Tensor, plan: MoEPlan) -> None:
    """Checks the arguments of `moe_combine`."""
    op = "moe_combine"
    check_rank(op, "rows", rows_MD, "[M, D]", 2)
    check_float(op, "rows", rows_MD)
    check_plan(op, "rows", rows_MD, plan)
    check_size(op, "M of rows", rows_MD.shape[0], plan.token_of_M.shape[0], "M of the plan")
    check_gate_weights(op, "rows", rows_MD, weights_TK, plan)


def check_gate_weights(
    op: str, like: str, tensor: Tensor, weights_TK: Tensor, plan: MoEPlan
) -> None:
    """Checks combine weights against the plan they go with."""
    check_float(op, "weights", weights_TK)
    check_together(op, like, tensor, weights=weights_TK)
    if weights_TK.shape != plan.row_of_TK.shape:
        raise ShapeError(
            f"{op}: weights have shape {tuple(weights_TK.shape)}, but the plan is for "
            f"{tuple(plan.row_of_TK.shape)} choices"
        )


def check_mlp(
    x_TD: Tensor,
    weights_TK: Tensor,
    plan: MoEPlan,
    fc1: tuple[Tensor, Tensor | None],
    fc2: tuple[Tensor, Tensor | None],
    activation: str,
) -> None:
    """Checks the arguments of `moe_mlp`; fc1 and fc2 are (weight, bias) pairs."""
    op = "moe_mlp"
    check_rank(op, "x", x_TD, "[T, D]", 2)
    check_float(op, "x", x_TD)
    check_plan(op, "x", x_TD, plan)
    check_size(op, "T of x", x_TD.shape[0], plan.row_of_TK.shape[0], "T of the plan")
    check_gate_weights(op, "x", x_TD, weights_TK, plan)
    if activation not in ACTIVATIONS:
        raise ShapeError(
            f"{op}: unknown activation {activation!r}; use one of {', '.join(ACTIVATIONS)}"
        )
    check_rank(op, "fc1_weight", fc1[0], "[E, H, D]", 3)
    check_rank(op, "fc2_weight", fc2[0], "[E, D, H]", 3)
    others = {"fc1_weight": fc1[0], "fc1_bias": fc1[1], "fc2_weight": fc2[0], "fc2_bias": fc2[1]}
    check_together(op, "x", x_TD, **others)
    check_same_dtype(op, "x", x_TD, **others)
    experts, hidden, width = fc1[0].shape
    check_size(op, "D of x", x_TD.shape[1], width, "the input width of fc1_weight")
    check_size(op, "the number of offsets", plan.offsets.shape[0], experts + 1, "E + 1")
    if fc2[0].shape != (experts, width, hidden):
        raise ShapeError(
            f"{op}: fc2_weight has shape {tuple(fc2[0].shape)}, but fc1_weight "
            f"{tuple(fc1[0].shape)} needs {(experts, width, hidden)}"
        )
    check_bias(op, "fc1_bias", fc1[1], fc1[0])
    check_bias(op, "fc2_bias", fc2[1], fc2[0])


def check_signatures(op: str, receiver_sig_US: Tensor, sender_sig_VS: Tensor) -> None:
    """Checks signatures of receivers and senders against each other."""
    check_rank(op, "receiver signatures", receiver_sig_US, "[U, S]", 2)
    check_rank(op, "sender signatures", sender_sig_VS, "[V, S]", 2)
    check_float(op, "receiver signatures", receiver_sig_US)
    senders = {"sender signatures": sender_sig_VS}
    check_together(op, "receiver signatures", receiver_sig_US, **senders)
    check_same_dtype(op, "receiver signatures", receiver_sig_US, **senders)
    check_size(
        op, "S of senders", sender_sig_VS.shape[1], receiver_sig_US.shape[1], "S of receivers"
    )


def check_edge_log_affinity(
    receiver_sig_US: Tensor,
    sender_sig_VS: Tensor,
    circuit: Circuit,
    bandwidth: Tensor | float,
    uniforms_BN: Tensor | None,
) -> None:
    """Checks the tensors given to `edge_log_affinity`."""
    op = "edge_log_affinity"
    check_signatures(op, receiver_sig_US, sender_sig_VS)
    receivers, senders = receiver_sig_US.shape[0], sender_sig_VS.shape[0]
    check_size(op, "U of signatures", receivers, circuit.num_receivers, "the circuit's U")
    check_size(op, "V of signatures", senders, circuit.num_senders, "the circuit's V")
    others = {"circuit": circuit.row_ptr, "uniforms": uniforms_BN}
    if isinstance(bandwidth, Tensor):
        check_rank(op, "bandwidth", bandwidth, "[]", 0)
        check_float(op, "bandwidth", bandwidth)
        others["bandwidth"] = bandwidth
    elif not bandwidth > 0:
        raise ShapeError(f"{op}: {bandwidth=} must be positive")
    check_together(op, "receiver signatures", receiver_sig_US, **others)
    if uniforms_BN is not None:
        check_rank(op, "uniforms", uniforms_BN, "[B, N]", 2)
        check_float(op, "uniforms", uniforms_BN)
        edges = circuit.num_edges
        check_size(op, "N of uniforms", uniforms_BN.shape[1], edges, "N of circuit")


def check_circuit_attention(
    q_BHUD: Tensor, k_BHVD: Tensor, v_BHVD: Tensor, circuit: Circuit, edge_bias: Tensor | None
) -> None:
    """Checks the arguments of `circuit_attention`."""
    op = "circuit_attention"
    check_rank(op, "q", q_BHUD, "[B, H, U, D]", 4)
    check_rank(op, "k", k_BHVD, "[B, H, V, D]", 4)
    check_float(op, "q", q_BHUD)
    check_together(op, "q", q_BHUD, k=k_BHVD, v=v_BHVD, circuit=circuit.row_ptr, bias=edge_bias)
    check_same_dtype(op, "q", q_BHUD, k=k_BHVD, v=v_BHVD)
    if v_BHVD.shape != k_BHVD.shape:
        raise ShapeError(
            f"{op}: v has shape {tuple(v_BHVD.shape)}, but k has {tuple(k_BHVD.shape)}"
        )
    batch, heads, receivers, width = q_BHUD.shape
    check_size(op, "U of q", receivers, circuit.num_receivers, "the circuit's receivers")
    check_size(op, "V of k", k_BHVD.shape[2], circuit.num_senders, "the circuit's senders")
    for letter, found, expected in zip(
        "BHD",
        (k_BHVD.shape[0], k_BHVD.shape[1], k_BHVD.shape[3]),
        (batch, heads, width),
        strict=True,
    ):
        check_size(op, f"{letter} of k", found, expected, f"{letter} of q")
    check_width(op, "q", q_BHUD)
    if edge_bias is not None:
        check_float(op, "edge_bias", edge_bias)
        edges = circuit.num_edges
        if edge_bias.shape not in ((edges,), (batch, edges)):
            raise ShapeError(
                f"{op}: edge_bias has shape {tuple(edge_bias.shape)}; it must be [N={edges}] or "
                f"[B={batch}, N={edges}]"
            )


def check_read_in(
    q_BHUK: Tensor,
    x_BVD: Tensor,
    key_weight: Tensor,
    value_weight: Tensor,
    key_scale_UD: Tensor,
    value_scale_UD: Tensor,
    value_bias: Tensor | None,
) -> None:
    """Checks the arguments of `read_in_attention`."""
    op = "read_in_attention"
    check_rank(op, "q", q_BHUK, "[B, H, U, K]", 4)
    check_rank(op, "x", x_BVD, "[B, V, D]", 3)
    check_float(op, "q", q_BHUK)
    others = {"x": x_BVD, "key_weight": key_weight, "value_weight": value_weight}
    scales = {"key_scale": key_scale_UD, "value_scale": value_scale_UD}
    check_together(op, "q", q_BHUK, **others, **scales, value_bias=value_bias)
    check_same_dtype(op, "q", q_BHUK, **others, **scales, value_bias=value_bias)
    check_width(op, "q", q_BHUK)
    batch, heads, latents, head_width = q_BHUK.shape
    width = x_BVD.shape[2]
    check_size(op, "B of x", x_BVD.shape[0], batch, "B of q")
    if x_BVD.shape[1] == 0:
        raise ShapeError(f"{op}: there are no tokens to attend to, x has {tuple(x_BVD.shape)}")
    matrix = (heads * head_width, width)
    scale_shapes: list[tuple[int, ...]] = [(latents, width), (batch, latents, width)]
    expected: dict[str, tuple[Tensor | None, list[tuple[int, ...]]]] = {
        "key_weight": (key_weight, [matrix]),
        "value_weight": (value_weight, [matrix]),
        "key_scale": (key_scale_UD, scale_shapes),
        "value_scale": (value_scale_UD, scale_shapes),
        "value_bias": (value_bias, [matrix[:1]]),
    }
    for name, (tensor, shapes) in expected.items():
        if tensor is not None and tuple(tensor.shape) not in shapes:
            raise ShapeError(
                f"{op}: {name} has shape {tuple(tensor.shape)}; it must be "
                f"{' or '.join(map(str, shapes))}"
            )
