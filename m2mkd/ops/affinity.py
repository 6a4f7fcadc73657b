"""Log-affinities of a circuit's edges from signatures (NAC, arXiv 2210.08031 section 3.2).

Letters: B batch, U receivers, V senders, N edges, S signature width.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from m2mkd.errors import ShapeError
from m2mkd.ops import _checks
from m2mkd.ops._checks import compute_dtype
from m2mkd.ops.circuit import Circuit
from m2mkd.ops.reference import log_sum_over_senders

# Beyond it softplus is its argument, to the last bit of a float64.
_LINEAR = 40
SAMPLINGS = ("none", "relaxed_bernoulli", "threshold")


def edge_log_affinity(
    receiver_sig_US: Tensor,
    sender_sig_VS: Tensor,
    circuit: Circuit,
    bandwidth: Tensor | float,
    *,
    sampling: str = "none",
    temperature: float = 0.5,
    batch_size: int | None = None,
    uniforms_BN: Tensor | None = None,
    normalise: bool = True,
) -> Tensor:
    """How strongly each edge links its ends: the log-kernel -(1 - cosine) / bandwidth.

    With sampling, the kernel is the probability of a link, which is drawn anew for each example as
    a relaxed Bernoulli variable (Concrete distribution, arXiv 1611.00712), or cut at one half.
    The result is the edge bias of `circuit_attention`. Normalisation over a receiver's senders
    cancels in that softmax, so `normalise=False` gives the same attention for less work.

    Args:
        receiver_sig_US: Signatures of receivers, [U, S], floating.
        sender_sig_VS: Signatures of senders, [V, S], in the same dtype.
        circuit: The edges, U receivers by V senders.
        bandwidth: Positive scalar, or a 0-d tensor (whose sign is not looked at).
        sampling: none; relaxed_bernoulli (the published training); threshold (a link of
            probability above one half has affinity one, the others none).
        temperature: Of the relaxed Bernoulli distribution, positive.
        batch_size: B, for samples that are drawn here from torch's default generator.
        uniforms_BN: The uniform draws in [0, 1) to use instead, [B, N].
        normalise: Whether to subtract the log-sum-exp over a receiver's senders.

    Returns:
        Log-affinities in circuit order, [N], or [B, N] with relaxed Bernoulli samples; float32, or
        float64 for float64 signatures. Differentiable in signatures and bandwidth. -inf where an
        edge was cut, and on all edges of a receiver left without any.

    Raises:
        ShapeError: Shapes, dtypes or devices that do not fit together; an unknown sampling; neither
            batch_size nor uniforms_BN with relaxed_bernoulli; a temperature that is not positive,
            or such a bandwidth that is no tensor.
    """
    _checks.check_edge_log_affinity(receiver_sig_US, sender_sig_VS, circuit, bandwidth, uniforms_BN)
    wide = compute_dtype(receiver_sig_US.dtype)
    receivers_US = F.normalize(receiver_sig_US.to(wide), dim=1)
    senders_VS = F.normalize(sender_sig_VS.to(wide), dim=1)
    log_N = (_cosines(receivers_US, senders_VS, circuit) - 1) / bandwidth
    if sampling == "relaxed_bernoulli":
        uniforms_BN = _uniforms(log_N, batch_size, uniforms_BN)
        log_N = _relaxed_bernoulli(log_N, temperature, uniforms_BN)
    elif sampling == "threshold":
        linked_N = log_N > math.log(0.5)
        log_N = torch.where(linked_N, log_N * 0, -torch.inf)
    elif sampling != "none":
        raise ShapeError(
            f"edge_log_affinity: unknown {sampling=}; use one of {', '.join(SAMPLINGS)}"
        )
    return log_N - log_sum_over_senders(log_N, circuit) if normalise else log_N


def _cosines(receivers_US: Tensor, senders_VS: Tensor, circuit: Circuit) -> Tensor:
    """Products of the ends of all edges, [N], in the way that keeps less for the backward pass."""
    num_pairs = circuit.num_receivers * circuit.num_senders
    if num_pairs > circuit.num_edges * receivers_US.shape[1]:
        ends_NS = receivers_US.index_select(0, circuit.receiver_of_edge)
        return (ends_NS * senders_VS.index_select(0, circuit.sender)).sum(1)
    # In float64, which neither autocast nor TensorFloat-32 makes coarser.
    cosines_UV = (receivers_US.double() @ senders_VS.double().T).to(receivers_US.dtype)
    pair_N = circuit.receiver_of_edge.long() * circuit.num_senders + circuit.sender
    return cosines_UV.flatten().index_select(0, pair_N)


def _uniforms(log_N: Tensor, batch_size: int | None, uniforms_BN: Tensor | None) -> Tensor:
    """The given draws or new ones, [B, N]."""
    if uniforms_BN is not None:
        return uniforms_BN.to(log_N.dtype)
    if batch_size is None:
        raise ShapeError("edge_log_affinity: relaxed_bernoulli needs batch_size or uniforms_BN")
    return torch.rand(batch_size, *log_N.shape, dtype=log_N.dtype, device=log_N.device)


def _relaxed_bernoulli(log_N: Tensor, temperature: float, uniforms_BN: Tensor) -> Tensor:
    """Log of a Concrete sample; probabilities of exactly 0 or 1 are moved inside by an eps."""
    if not temperature > 0:
        raise ShapeError(f"edge_log_affinity: {temperature=} must be positive")
    eps = torch.finfo(log_N.dtype).eps
    odds_N = torch.logit(log_N.exp(), eps)
    noise_BN = torch.logit(uniforms_BN, eps)
    # The log of a sigmoid. Written as softplus, one tensor less is kept for the backward pass.
    return -F.softplus((odds_N + noise_BN) / -temperature, threshold=_LINEAR)
