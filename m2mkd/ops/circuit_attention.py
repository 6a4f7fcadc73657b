"""Attention along a circuit's edges: sparse kernel, dense form, and the choice between them.

SKMDPA of Neural Attentive Circuits (arXiv 2210.08031 section 3.2), after its kernel was evaluated.
Letters: B batch, H heads, U receivers, V senders, D head width, N edges.
"""

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from m2mkd.errors import ShapeError
from m2mkd.ops import _checks, reference
from m2mkd.ops._autocast import to_region
from m2mkd.ops._checks import compute_dtype
from m2mkd.ops._load import EXTENSION
from m2mkd.ops._registration import register
from m2mkd.ops._selftest import has_kernels
from m2mkd.ops.circuit import Circuit

_OPS = torch.ops.m2mkd
Gradients = Literal["none", "inputs", "bias"]
IMPLEMENTATIONS = ("auto", "sparse", "dense", "reference")
# Widest head the kernels take.
MAX_WIDTH = 256


def circuit_attention(
    q_BHUD: Tensor,
    k_BHVD: Tensor,
    v_BHVD: Tensor,
    circuit: Circuit,
    edge_bias: Tensor | None = None,
    scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """Each receiver attends to its senders: softmax over edges of scale q.k + bias, times v.

    A receiver without edges outputs zeros. A bias of -inf removes its edge (for its example), also
    where that leaves a receiver without any; NaN and infinities of its sender stay. Half types are
    accumulated in float32. The sparse kernels give the same bits on every run and use memory for N
    edges, never for U times V; the dense form repeats as far as torch's attention does, whose
    backward on CUDA may not, and lets NaN and infinities of senders reach receivers without an edge
    to them, as any dense mask does.

    On a CPU the sparse kernels read q, k and v as a projection to all heads leaves them, in memory
    [B, U, H, D], without a copy of the whole; results and gradients lie as the inputs do.

    Under autocast q, k and v are cast to the region's dtype; biases are used in float32 (float64
    with float64 queries).

    Args:
        q_BHUD: Queries, [B, H, U, D], floating.
        k_BHVD: Keys, [B, H, V, D], in the dtype of q.
        v_BHVD: Values, [B, H, V, D], in the dtype of q.
        circuit: The edges, U receivers by V senders.
        edge_bias: Added to the scaled scores of each edge, [N] or [B, N], floating; None for none.
        scale: Factor of q.k; 1 / sqrt(D) where None.
        impl: sparse (needs compiled kernels and D <= 256), dense (scaled_dot_product_attention
            with a [U, V] bias), reference (plain PyTorch per edge), or auto, which takes sparse up
            to the density at which dense becomes faster (see `crossover`).

    Returns:
        [B, H, U, D] in the dtype of q; differentiable in q, k, v and edge_bias.

    Raises:
        ShapeError: Shapes, dtypes or devices that do not fit together; an unknown impl; sparse
            where no kernel can serve it.
    """
    q_BHUD, k_BHVD, v_BHVD = to_region(q_BHUD), to_region(k_BHVD), to_region(v_BHVD)
    _checks.check_circuit_attention(q_BHUD, k_BHVD, v_BHVD, circuit, edge_bias)
    scale = q_BHUD.shape[3] ** -0.5 if scale is None else scale
    inputs = (q_BHUD, k_BHVD, v_BHVD, circuit, edge_bias, scale)
    if impl == "auto":
        impl = _choose(*inputs)
    if impl == "sparse":
        return _sparse(*inputs)
    if impl == "dense":
        return _dense(*inputs)
    if impl == "reference":
        return reference.circuit_attention(*inputs)
    raise ShapeError(f"circuit_attention: unknown {impl=}; use one of {', '.join(IMPLEMENTATIONS)}")


def _choose(
    q: Tensor, k: Tensor, v: Tensor, circuit: Circuit, bias: Tensor | None, scale: float
) -> str:
    """The faster of sparse and dense by density."""
    del scale
    width = q.shape[3]
    if not has_kernels(q.device) or not 1 <= width <= MAX_WIDTH:
        return "dense"
    limit = crossover(q.device.type, q.dtype, width, circuit, gradients=_gradients(q, k, v, bias))
    return "sparse" if circuit.density <= limit else "dense"


def _gradients(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Gradients:
    """What a backward pass may follow to."""
    if not torch.is_grad_enabled():
        return "none"
    if bias is not None and bias.requires_grad:
        return "bias"
    return "inputs" if q.requires_grad or k.requires_grad or v.requires_grad else "none"


def crossover(
    device_type: str,
    dtype: torch.dtype,
    width: int,
    circuit: Circuit,
    gradients: Gradients,
) -> float:
    """The density up to which `auto` takes the sparse kernel.

    Args:
        device_type: cpu or cuda.
        dtype: Of the queries.
        width: Of a head.
        circuit: Of which only the numbers of receivers and senders count.
        gradients: Whether a backward pass may follow, to q, k and v only, or to the biases too.
    """
    half = dtype in (torch.float16, torch.bfloat16)
    if device_type == "cuda":
        # Estimated for an H100 from csrc/KERNELS.md, not measured, at D = 64. An edge of a head
        # takes sparse 1/21e9 s in half types and 1/11e9 s in float32 through L2, a third of that
        # where tables are staged; a pair of receiver and sender takes dense 256 FLOP per head, at
        # some 300 TFLOP/s on tensor cores or 40 in float32, and 1e-12 s for its bias. They meet at
        # 4 % and 8 % of pairs, staged at 11 % and 34 %. With backward, dense takes 3.5 times as
        # long and writes a bias gradient per head, sparse 3 (half types 4) times: about the same.
        return 0.04 if half else 0.12
    # Fitted to where the two times, measured with 2 threads, meet (csrc/README.md): on a Zen 4 for
    # 64 to 2048 receivers and senders of widths 16 to 128, on a Zen 3 for 64 to 1024 of width 64.
    # The larger the graph, the better dense attention uses its matrix products. For the gradient
    # of biases torch leaves its fused kernel and spells attention out, which suits wide heads and
    # small graphs only; its backward in half types lost at every density (on the Zen 4).
    side = math.sqrt(max(1, circuit.num_receivers * circuit.num_senders))
    if gradients == "none":
        return 0.52 + 52 / side
    if gradients == "inputs":
        return 1.0 if half else 0.48 + 42 / side
    wide = max(0, width - 64) / 320
    return max(0.48 + 42 / side, min(0.95, math.log2(side) / 10) - wide)


def _sparse(
    q: Tensor, k: Tensor, v: Tensor, circuit: Circuit, bias: Tensor | None, scale: float
) -> Tensor:
    if not has_kernels(q.device) or not 1 <= q.shape[3] <= MAX_WIDTH:
        raise ShapeError(
            f"circuit_attention: no sparse kernel for width {q.shape[3]} on {q.device}; widths go "
            f"up to {MAX_WIDTH}, and `m2mkd info` says what was built; use impl='auto'"
        )
    bias = None if bias is None else bias.to(compute_dtype(q.dtype))
    by_receiver = (circuit.row_ptr, circuit.sender)
    by_sender = (circuit.col_ptr, circuit.receiver, circuit.edge_id)
    out: Tensor = _OPS.circuit_attention(q, k, v, bias, *by_receiver, *by_sender, scale)[0]
    return out


def _dense(
    q: Tensor, k: Tensor, v: Tensor, circuit: Circuit, bias: Tensor | None, scale: float
) -> Tensor:
    """SDPA with -inf wherever there is no edge; dead rows are kept from turning into NaN."""
    wide = compute_dtype(q.dtype)
    bias = q.new_zeros(circuit.num_edges, dtype=wide) if bias is None else bias.to(wide)
    if q.numel() == 0 or k.shape[2] == 0:
        # torch's attention has no gradient for an empty mask. Sums of nothing give zeros as
        # gradients; of everything they might overflow.
        nothing = q[:0].sum() + k[:0].sum() + v[:0].sum() + bias[:0].sum()
        return torch.zeros_like(q) + nothing.to(q.dtype)
    receiver, sender = circuit.receiver_of_edge.long(), circuit.sender.long()
    mask = bias.new_full((*bias.shape[:-1], q.shape[2], k.shape[2]), -torch.inf)
    if bias.dim() == 2:
        example = torch.arange(bias.shape[0], device=q.device)[:, None]
        mask = mask.index_put((example, receiver, sender), bias)[:, None]
    else:
        mask = mask.index_put((receiver, sender), bias)[None, None]
    if q.is_cuda:
        # torch's fused kernels refuse a bias in another dtype, or (cuDNN's) misread it.
        mask = mask.to(q.dtype)
    dead = mask.detach().amax(dim=3, keepdim=True) == -torch.inf
    mask = mask.masked_fill(dead, 0)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    return out.masked_fill(dead, 0)


# What follows tells torch about the compiled op: result shapes for tracing, and derivatives.


def _empty_heads(x: Tensor) -> Tensor:
    """Like x; the CPU kernels keep heads inside rows where they lie so, those for CUDA do not."""
    if x.device.type == "cpu" and x.stride(3) == 1 and x.stride(1) < x.stride(2):
        return x.new_empty(x.transpose(1, 2).shape).transpose(1, 2)
    return x.new_empty(x.shape)


def _attention_fake(q: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    del rest
    return _empty_heads(q), q.new_empty(q.shape[:3], dtype=compute_dtype(q.dtype))


def _attention_backward_fake(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    del grad
    needs_bias = bias is not None and rest[-1]
    bias_grad = q.new_empty(
        bias.shape if bias is not None and needs_bias else (0,), dtype=compute_dtype(q.dtype)
    )
    return _empty_heads(q), _empty_heads(k), _empty_heads(v), bias_grad


def _attention_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output)


def _attention_grad(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 10
    q, k, v, bias, *graph, out, lse = ctx.saved_tensors
    needs_bias = bias is not None and ctx.needs_input_grad[3]
    grads = _OPS.circuit_attention_backward(
        grad, q, k, v, bias, out, lse, *graph, ctx.scale, needs_bias
    )
    return (*grads[:3], grads[3] if needs_bias else None, *(None,) * 6)


if EXTENSION.cpu:
    register(
        "circuit_attention",
        fake=_attention_fake,
        backward_fake=_attention_backward_fake,
        setup=_attention_setup,
        gradient=_attention_grad,
    )
