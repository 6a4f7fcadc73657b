"""Mixture-of-experts dispatch: gate, plan, gather, expert GEMMs, combine (V-MoE, arXiv 2106.05974).

Letters: T tokens, D width, H hidden width, E experts, K choices per token, M routed rows (T*K minus
dropped).
"""

from m2mkd.ops._checks import MoEPlan
from m2mkd.ops.reference import (
    grouped_linear,
    moe_combine,
    moe_gather,
    moe_mlp,
    moe_plan,
    topk_gate,
)

__all__ = [
    "MoEPlan",
    "grouped_linear",
    "moe_combine",
    "moe_gather",
    "moe_mlp",
    "moe_plan",
    "topk_gate",
]
