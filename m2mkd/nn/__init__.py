"""Modules with parameters; they know nothing of experiments."""

from m2mkd.nn.moe import MoEMlp, auxiliary_loss, expert_copies

__all__ = ["MoEMlp", "auxiliary_loss", "expert_copies"]
