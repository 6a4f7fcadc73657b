"""Plain PyTorch versions of every op: slow, obvious, differentiable; the measure of the kernels.

They are also what runs where no extension was built. Letters: T tokens, D width, H hidden width,
E experts, K choices per token, M routed rows.
"""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import RelaxedBernoulli

from m2mkd.ops import _checks
from m2mkd.ops._checks import MoEPlan, compute_dtype, has_values
from m2mkd.ops.circuit import Circuit

_ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}


def topk_gate(logits_TE: Tensor, k: int, mode: str = "softmax_selected") -> tuple[Tensor, Tensor]:
    """Reference of `m2mkd.ops.topk_gate`."""
    _checks.check_gate(logits_TE, k, mode)
    values_TE, order_TE = torch.sort(
        logits_TE.to(compute_dtype(logits_TE.dtype)), dim=1, descending=True, stable=True
    )
    if mode == "softmax_selected":
        weights_TK = values_TE[:, :k].softmax(dim=1)
    else:
        weights_TK = values_TE.softmax(dim=1)[:, :k]
        if mode == "softmax_all_renorm":
            weights_TK = weights_TK / weights_TK.sum(dim=1, keepdim=True)
    return weights_TK.to(logits_TE.dtype), order_TE[:, :k].to(torch.int32)


def expert_choice(logits_TE: Tensor, capacity: int) -> tuple[Tensor, MoEPlan]:
    """Reference of `m2mkd.ops.expert_choice`."""
    _checks.check_expert_choice(logits_TE, capacity)
    (tokens, experts), device = logits_TE.shape, logits_TE.device
    size = min(capacity, tokens)
    weights_TE = logits_TE.to(compute_dtype(logits_TE.dtype)).softmax(dim=1)
    order_ET = weights_TE.T.sort(dim=1, descending=True, stable=True).indices
    token_EC = order_ET[:, :size].sort(dim=1).values
    row_EC = torch.arange(experts * size, device=device).view(experts, size)
    row_of_ET = torch.full((experts, tokens), -1, device=device).scatter(1, token_EC, row_EC)
    plan = MoEPlan(
        row_of_ET.T.to(torch.int32),
        token_EC.flatten().to(torch.int32),
        torch.arange(experts + 1, device=device, dtype=torch.int32) * size,
    )
    return weights_TE.to(logits_TE.dtype), plan


def moe_plan(
    experts_TK: Tensor,
    num_experts: int,
    capacity: int | None = None,
    priority_T: Tensor | None = None,
) -> MoEPlan:
    """Reference of `m2mkd.ops.moe_plan`."""
    _checks.check_choices(experts_TK, num_experts, capacity, priority_T)
    num_tokens, num_choices = experts_TK.shape
    device = experts_TK.device
    choice_TK = torch.arange(num_tokens * num_choices, device=device).view(experts_TK.shape)
    if capacity is None:
        listed = choice_TK.flatten()
        num_rows: int | torch.SymInt = num_tokens * num_choices
        limit = num_tokens * num_choices
    else:
        if priority_T is not None:
            choice_TK = choice_TK[torch.argsort(priority_T, descending=True, stable=True)]
        listed = choice_TK.T.flatten()
        num_rows = torch.sym_min(num_tokens * num_choices, num_experts * capacity)
        limit = capacity
    expert, order = torch.sort(experts_TK.flatten()[listed].long(), stable=True)
    wanted_E = (expert[:, None] == torch.arange(num_experts, device=device)).sum(0)
    kept_E = wanted_E.clamp(max=limit)
    offsets = F.pad(kept_E.cumsum(0), (1, 0))
    place = torch.arange(expert.shape[0], device=device) - (wanted_E.cumsum(0) - wanted_E)[expert]
    kept = place < limit
    row = offsets[expert] + place
    choice = listed[order]
    row_of = torch.where(kept, row, -1).new_empty(choice.shape[0])
    row_of = row_of.scatter(0, choice, torch.where(kept, row, -1))
    # Dropped choices all land in one spare entry at the end, which is cut off.
    token_of = torch.full((num_rows + 1,), -1, dtype=torch.long, device=device)
    token_of = token_of.scatter(0, torch.where(kept, row, num_rows), choice // num_choices)
    token_of = token_of[:num_rows]
    if capacity is not None and has_values(offsets):
        token_of = token_of[: int(offsets[-1])]
    return MoEPlan(
        row_of.view(experts_TK.shape).to(torch.int32),
        token_of.to(torch.int32),
        offsets.to(torch.int32),
    )


def moe_gather(x_TD: Tensor, plan: MoEPlan) -> Tensor:
    """Reference of `m2mkd.ops.moe_gather`."""
    _checks.check_gather(x_TD, plan)
    token_M = plan.token_of_M.long()
    rows_MD = x_TD.index_select(0, token_M.clamp(min=0))
    return torch.where(token_M[:, None] >= 0, rows_MD, 0)


def grouped_linear(
    rows_MD: Tensor, weight_EHD: Tensor, bias_EH: Tensor | None, offsets: Tensor
) -> Tensor:
    """Reference of `m2mkd.ops.grouped_linear`."""
    _checks.check_grouped(rows_MD, weight_EHD, bias_EH, offsets)
    if not has_values(offsets):
        return _grouped_linear_static(rows_MD, weight_EHD, bias_EH, offsets)
    bounds = offsets.tolist()
    parts = [
        F.linear(rows_MD[low:high], weight_EHD[e], None if bias_EH is None else bias_EH[e])
        for e, (low, high) in enumerate(itertools.pairwise(bounds))
    ]
    parts.append(rows_MD.new_zeros(rows_MD.shape[0] - bounds[-1], weight_EHD.shape[1]))
    return torch.cat(parts)


def _grouped_linear_static(
    rows_MD: Tensor, weight_EHD: Tensor, bias_EH: Tensor | None, offsets: Tensor
) -> Tensor:
    """Every expert on every row, the wrong ones masked: shapes do not depend on the routing."""
    row_M = torch.arange(rows_MD.shape[0], device=rows_MD.device)[:, None]
    out_MH = rows_MD.new_zeros(rows_MD.shape[0], weight_EHD.shape[1])
    for e in range(weight_EHD.shape[0]):
        mine = (row_M >= offsets[e]) & (row_M < offsets[e + 1])
        bias = None if bias_EH is None else bias_EH[e]
        out_MH = torch.where(mine, F.linear(rows_MD, weight_EHD[e], bias), out_MH)
    return out_MH


def moe_combine(rows_MD: Tensor, weights_TK: Tensor, plan: MoEPlan) -> Tensor:
    """Reference of `m2mkd.ops.moe_combine`."""
    _checks.check_combine(rows_MD, weights_TK, plan)
    wide = compute_dtype(rows_MD.dtype)
    kept_TK = plan.row_of_TK >= 0
    padded = F.pad(rows_MD.to(wide), (0, 0, 0, 1))
    index_TK = torch.where(kept_TK, plan.row_of_TK.long(), rows_MD.shape[0])
    picked_TKD = padded.index_select(0, index_TK.flatten()).view(*index_TK.shape, rows_MD.shape[1])
    weights_TK = torch.where(kept_TK, weights_TK.to(wide), 0)
    return (picked_TKD * weights_TK[..., None]).sum(dim=1).to(rows_MD.dtype)


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
    """Reference of `m2mkd.ops.moe_mlp`."""
    fc1, fc2 = (fc1_weight_EHD, fc1_bias_EH), (fc2_weight_EDH, fc2_bias_ED)
    _checks.check_mlp(x_TD, weights_TK, plan, fc1, fc2, activation)
    hidden_MH = grouped_linear(moe_gather(x_TD, plan), *fc1, plan.offsets)
    wide = hidden_MH.to(compute_dtype(hidden_MH.dtype))
    active_MH = _ACTIVATIONS[activation](wide).to(hidden_MH.dtype)
    return moe_combine(grouped_linear(active_MH, *fc2, plan.offsets), weights_TK, plan)


def circuit_attention(
    q_BHUD: Tensor,
    k_BHVD: Tensor,
    v_BHVD: Tensor,
    circuit: Circuit,
    edge_bias: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Reference of `m2mkd.ops.circuit_attention`: gathers queries, keys and values per edge."""
    _checks.check_circuit_attention(q_BHUD, k_BHVD, v_BHVD, circuit, edge_bias)
    wide = compute_dtype(q_BHUD.dtype)
    receiver_N, sender_N = circuit.receiver_of_edge, circuit.sender
    q_BHND, k_BHND, v_BHND = (
        x.to(wide).index_select(2, index)
        for x, index in ((q_BHUD, receiver_N), (k_BHVD, sender_N), (v_BHVD, sender_N))
    )
    scale = q_BHUD.shape[3] ** -0.5 if scale is None else scale
    scores_BHN = (q_BHND * k_BHND).sum(-1) * scale
    if edge_bias is not None:
        scores_BHN = scores_BHN + edge_bias.to(wide).unsqueeze(-2)
    weights_BHN = (scores_BHN - log_sum_over_senders(scores_BHN, circuit)).exp()
    out_BHUD = torch.zeros_like(q_BHUD, dtype=wide)
    out_BHUD = out_BHUD.index_add(2, receiver_N, weights_BHN[..., None] * v_BHND)
    return out_BHUD.to(q_BHUD.dtype)


def log_sum_over_senders(scores_N: Tensor, circuit: Circuit) -> Tensor:
    """For every edge, the log-sum-exp of its receiver's scores, [..., N].

    It is 0 where all of a receiver's scores are -inf, so that subtracting it leaves -inf.
    """
    receiver_N = circuit.receiver_of_edge.long().expand(scores_N.shape)
    sizes = (*scores_N.shape[:-1], circuit.num_receivers)
    largest_U = scores_N.new_full(sizes, -torch.inf)
    largest_U = largest_U.scatter_reduce(-1, receiver_N, scores_N.detach(), "amax")
    largest_U = largest_U.masked_fill(largest_U == -torch.inf, 0)
    shifted_N = (scores_N - largest_U.gather(-1, receiver_N)).exp()
    sum_U = scores_N.new_zeros(sizes).scatter_add(-1, receiver_N, shifted_N)
    log_U = sum_U.masked_fill(sum_U == 0, 1).log() + largest_U
    return log_U.gather(-1, receiver_N)


def read_in_attention(
    q_BHUK: Tensor,
    x_BVD: Tensor,
    key_weight: Tensor,
    value_weight: Tensor,
    key_scale_UD: Tensor,
    value_scale_UD: Tensor,
    value_bias: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Reference of `m2mkd.ops.read_in_attention`: a key and a value of every token per latent."""
    _checks.check_read_in(
        q_BHUK, x_BVD, key_weight, value_weight, key_scale_UD, value_scale_UD, value_bias
    )
    heads, head_width = q_BHUK.shape[1], q_BHUK.shape[3]

    def project(scale_UD: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        scaled_BUVD = x_BVD[:, None] * scale_UD[..., None, :]
        projected: Tensor = F.linear(scaled_BUVD, weight, bias)
        return projected.view(*projected.shape[:3], heads, head_width)

    key_BUVHK = project(key_scale_UD, key_weight, None)
    value_BUVHK = project(value_scale_UD, value_weight, value_bias)
    scale = head_width**-0.5 if scale is None else scale
    weights_BHUV = (torch.einsum("bhuk,buvhk->bhuv", q_BHUK, key_BUVHK) * scale).softmax(-1)
    out_BHUK: Tensor = torch.einsum("bhuv,buvhk->bhuk", weights_BHUV, value_BUVHK)
    return out_BHUK


def circuit_from_signatures(
    receiver_sig_US: Tensor, sender_sig_VS: Tensor, truncation: float
) -> Circuit:
    """Reference of `m2mkd.ops.circuit_from_signatures`, from the matrix of all cosines."""
    _checks.check_signatures("circuit_from_signatures", receiver_sig_US, sender_sig_VS)
    wide = compute_dtype(receiver_sig_US.dtype)
    signatures = receiver_sig_US.detach().to(wide)[:, None], sender_sig_VS.detach().to(wide)[None]
    return Circuit.from_dense(1 - F.cosine_similarity(*signatures, dim=2) <= truncation)


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
    """Reference of `m2mkd.ops.edge_log_affinity`, over all pairs as in the published code."""
    _checks.check_edge_log_affinity(receiver_sig_US, sender_sig_VS, circuit, bandwidth, uniforms_BN)
    wide = compute_dtype(receiver_sig_US.dtype)
    signatures = receiver_sig_US.to(wide)[:, None], sender_sig_VS.to(wide)[None]
    mask_UV = circuit.to_dense()
    log_UV = (F.cosine_similarity(*signatures, dim=2) - 1) / bandwidth
    if sampling == "relaxed_bernoulli":
        if uniforms_BN is None:
            uniforms_BN = torch.rand(batch_size or 1, circuit.num_edges, device=log_UV.device)
        eps = torch.finfo(wide).eps
        uniforms_BN = uniforms_BN.to(wide).clamp(eps, 1 - eps)
        uniforms_BUV = uniforms_BN.new_full((len(uniforms_BN), *log_UV.shape), 0.5)
        uniforms_BUV[:, circuit.receiver_of_edge, circuit.sender] = uniforms_BN
        odds_UV = RelaxedBernoulli(torch.tensor(temperature), probs=log_UV.exp()).logits
        noise_BUV = uniforms_BUV.log() - (1 - uniforms_BUV).log()
        log_UV = F.logsigmoid((odds_UV + noise_BUV) / temperature)
    elif sampling == "threshold":
        log_UV = (log_UV.exp() > 0.5).to(wide).log() + 0 * log_UV
    log_UV = log_UV.masked_fill(~mask_UV, -torch.inf)
    if normalise:
        # Receivers without a link keep -inf.
        dead_U = (log_UV == -torch.inf).all(-1, keepdim=True)
        total_U = log_UV.masked_fill(dead_U, 0).logsumexp(-1, keepdim=True)
        log_UV = log_UV - total_U.masked_fill(dead_U, 0)
    return log_UV[..., circuit.receiver_of_edge, circuit.sender]
