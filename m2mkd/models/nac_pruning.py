"""Removing mediators from a trained NAC, those first through which the least is expected to flow.

Letters: U receivers, V senders, M mediators.
"""

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from m2mkd.errors import ConfigError
from m2mkd.models.nac import NAC


@torch.no_grad()
def mediator_traffic(model: NAC) -> Tensor:
    """How much attention each mediator may expect from others, over all layers.

    Affinities, normalised over a receiver's senders, say how a receiver divides its attention
    before it has seen a state. A mediator's traffic is its share in that of every receiver of
    every layer, the read-out included and itself left out: its expected degree.

    Args:
        model: A NAC; only signatures and bandwidths matter.

    Returns:
        Traffic, [M], float32, not negative.
    """
    num = model.mediator_latents.num_latents
    traffic_M = _affinities(model, model.depth)[:, -num:].sum(dim=0)
    for layer in range(model.depth):
        affinity_MM = _affinities(model, layer)[:, -num:]
        traffic_M += affinity_MM.sum(dim=0) - affinity_MM.diagonal()
    return traffic_M


@torch.no_grad()
def keep_mediators(model: NAC, kept: Tensor | Sequence[int]) -> NAC:
    """A copy of a NAC with some of its mediators; the rest divide their links anew.

    Args:
        model: It stays as it is.
        kept: Numbers of the mediators to keep, at least one; their order does not matter.

    Returns:
        The smaller NAC, in the mode and on the device of the model.

    Raises:
        ConfigError: No mediator, or numbers that do not exist.
    """
    latents = model.mediator_latents
    chosen = sorted({int(i) for i in kept})
    if not chosen or chosen[0] < 0 or chosen[-1] >= latents.num_latents:
        raise ConfigError(
            f"keep_mediators: cannot keep {chosen or 'none'} of mediators 0 to "
            f"{latents.num_latents - 1}"
        )
    index = torch.tensor(chosen, device=latents.signatures.device)
    pruned = copy.deepcopy(model)
    for name, parameter in latents.named_parameters():
        # Codes may be [L, M, C]: mediators are always the last but one dimension.
        part = parameter.index_select(-2, index)
        setattr(
            pruned.mediator_latents, name, nn.Parameter(part, requires_grad=parameter.requires_grad)
        )
    pruned.options = replace(pruned.options, **pruned_args(len(chosen)))
    return pruned


def pruned_args(num_mediators: int) -> dict[str, Any]:
    """What changes in the arguments of a NAC whose mediators were pruned to so many."""
    # A prior would draw another graph, and may not exist for the new number.
    return {"num_mediators": num_mediators, "prior": "none", "prior_args": {}}


def _affinities(model: NAC, layer: int) -> Tensor:
    """How a layer's receivers divide their attention over its senders, [U, V]."""
    circuit = model.circuit(layer)
    strength_N = model.log_affinity(layer).exp()
    affinity_UV = strength_N.new_zeros(circuit.num_receivers, circuit.num_senders)
    affinity_UV[circuit.receiver_of_edge.long(), circuit.sender.long()] = strength_N
    return affinity_UV
