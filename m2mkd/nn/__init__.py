"""Modules with parameters; they know nothing of experiments."""

from m2mkd.nn.auxiliary import auxiliary_loss
from m2mkd.nn.expert_parallel import (
    gather_experts,
    gather_state_dict,
    shard_experts,
    sharded_parameters,
)
from m2mkd.nn.kernel import CircuitCache, Edges, KernelOptions, SignatureKernel
from m2mkd.nn.latent_attention import LatentAttention, ReadInAttention
from m2mkd.nn.latents import CodeNoise, Latents, Seeder
from m2mkd.nn.modfc import FC, FCOptions, ModFC, WModFC
from m2mkd.nn.moe import MoEMlp, expert_copies
from m2mkd.nn.nac_blocks import BlockOptions, ModFFN, Propagator, ReadIn, ReadOut
from m2mkd.nn.pooling import ConfidencePooling, FirstLatent
from m2mkd.nn.stitches import KeptStitches
from m2mkd.nn.tokenizer import ConvNeXtTokenizer

__all__ = [
    "FC",
    "BlockOptions",
    "CircuitCache",
    "CodeNoise",
    "ConfidencePooling",
    "ConvNeXtTokenizer",
    "Edges",
    "FCOptions",
    "FirstLatent",
    "KeptStitches",
    "KernelOptions",
    "LatentAttention",
    "Latents",
    "MoEMlp",
    "ModFC",
    "ModFFN",
    "Propagator",
    "ReadIn",
    "ReadInAttention",
    "ReadOut",
    "Seeder",
    "SignatureKernel",
    "WModFC",
    "auxiliary_loss",
    "expert_copies",
    "gather_experts",
    "gather_state_dict",
    "shard_experts",
    "sharded_parameters",
]
