"""What a loss means: hybrids, m2mKD losses, training tasks and assembly."""

from m2mkd.distill.assembly import AssemblyReport, assemble, stitch_args
from m2mkd.distill.hybrid import Hybrid, HybridOutput, freeze, pair_name, run_hybrid, run_pairs
from m2mkd.distill.losses import PairLossSettings, boundary_loss, distillation_loss, kd_loss
from m2mkd.distill.nac_assembly import assemble_nac
from m2mkd.distill.tasks import AlignTask, LogitKDTask, PairsTask, SupervisedTask

__all__ = [
    "AlignTask",
    "AssemblyReport",
    "Hybrid",
    "HybridOutput",
    "LogitKDTask",
    "PairLossSettings",
    "PairsTask",
    "SupervisedTask",
    "assemble",
    "assemble_nac",
    "boundary_loss",
    "distillation_loss",
    "freeze",
    "kd_loss",
    "pair_name",
    "run_hybrid",
    "run_pairs",
    "stitch_args",
]
