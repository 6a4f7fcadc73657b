"""Tensors in, tensors out: the compute kernels and their plain PyTorch references."""

from m2mkd.ops._checks import MoEPlan
from m2mkd.ops._load import ExtensionWarning, status
from m2mkd.ops._selftest import selftest
from m2mkd.ops.affinity import edge_log_affinity
from m2mkd.ops.circuit import Circuit, circuit_from_signatures
from m2mkd.ops.circuit_attention import circuit_attention
from m2mkd.ops.moe_dispatch import (
    expert_choice,
    grouped_linear,
    moe_combine,
    moe_gather,
    moe_mlp,
    moe_plan,
    topk_gate,
)
from m2mkd.ops.read_in import read_in_attention

__all__ = [
    "Circuit",
    "ExtensionWarning",
    "MoEPlan",
    "circuit_attention",
    "circuit_from_signatures",
    "edge_log_affinity",
    "expert_choice",
    "grouped_linear",
    "moe_combine",
    "moe_gather",
    "moe_mlp",
    "moe_plan",
    "read_in_attention",
    "selftest",
    "status",
    "topk_gate",
]
