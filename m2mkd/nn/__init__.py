"""Modules with parameters; they know nothing of experiments."""

from m2mkd.nn.moe import MoEMlp, auxiliary_loss

__all__ = ["MoEMlp", "auxiliary_loss"]
