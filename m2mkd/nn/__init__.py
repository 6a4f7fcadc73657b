"""Modules with parameters; they know nothing of experiments."""

from m2mkd.nn.expert_parallel import gather_state_dict, shard_experts, sharded_parameters
from m2mkd.nn.moe import MoEMlp, auxiliary_loss, expert_copies

__all__ = [
    "MoEMlp",
    "auxiliary_loss",
    "expert_copies",
    "gather_state_dict",
    "shard_experts",
    "sharded_parameters",
]
