"""Removing latents from a trained NAC, those first that the others, or the logits, need least.

Letters: B batch, U receivers, V senders, I inputs, M mediators, O outputs.
"""

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from m2mkd.errors import ConfigError
from m2mkd.models.nac import NAC
from m2mkd.nn import Latents


@torch.no_grad()
def latent_traffic(model: NAC) -> tuple[Tensor, Tensor]:
    """How much attention each input and mediator latent may expect from others, over all layers.

    Affinities, normalised over a receiver's senders, say how a receiver divides its attention
    before it has seen a state. A latent's traffic is its share in that of every receiver of every
    layer, the read-out included and itself left out: its expected degree.

    Args:
        model: A NAC; only signatures and bandwidths matter.

    Returns:
        Traffic of inputs [I] and of mediators [M], float32, not negative.
    """
    num = model.mediator_latents.num_latents
    signatures_IS = model.input_latents.signatures
    traffic_I = signatures_IS.new_zeros(signatures_IS.shape[0])
    traffic_M = signatures_IS.new_zeros(num)
    for layer in range(model.depth + 1):
        affinity_UV = _affinities(model, layer)
        traffic_M += affinity_UV[:, -num:].sum(dim=0)
        if layer < model.depth:
            traffic_M -= affinity_UV[:, -num:].diagonal()
        if model.hears_inputs(layer):
            traffic_I += affinity_UV[:, :-num].sum(dim=0)
    return traffic_I, traffic_M


@torch.no_grad()
def output_weights(model: NAC, images: Tensor) -> Tensor:
    """How much the logits owe to each output latent: the mean of its weight in the pooling, [O].

    Nobody hears an output latent, so it has no traffic to go by.

    Args:
        model: A NAC in eval mode.
        images: [B, channels, H, W], on its device.
    """
    return model.pooling.weights(model.forward_features(images)).mean(dim=0)


@torch.no_grad()
def keep_latents(
    model: NAC,
    *,
    mediators: Tensor | Sequence[int] | None = None,
    inputs: Tensor | Sequence[int] | None = None,
    outputs: Tensor | Sequence[int] | None = None,
) -> NAC:
    """A copy of a NAC with some of its latents; their links are divided anew.

    Args:
        model: It stays as it is.
        mediators: Numbers of the mediators to keep, at least one, in any order; None for all.
        inputs: The same of the input latents.
        outputs: The same of the output latents.

    Returns:
        The smaller NAC, in the mode and on the device of the model.

    Raises:
        ConfigError: No latent, or numbers that do not exist.
    """
    pruned = copy.deepcopy(model)
    if mediators is not None:
        _keep(pruned.mediator_latents, mediators, "mediators")
    if inputs is not None:
        _keep(pruned.input_latents, inputs, "inputs")
    if outputs is not None:
        _keep(pruned.output_latents, outputs, "outputs")
    pruned.options = replace(pruned.options, **pruned_args(pruned))
    return pruned


def pruned_args(model: NAC) -> dict[str, Any]:
    """What arguments of a NAC become with as many latents as a pruned one has."""
    return {
        "num_inputs": model.input_latents.num_latents,
        "num_mediators": model.mediator_latents.num_latents,
        "num_outputs": model.output_latents.num_latents,
        # A prior would draw another graph, and may not exist for the new number.
        "prior": "none",
        "prior_args": {},
    }


def _keep(latents: Latents, kept: Tensor | Sequence[int], kind: str) -> None:
    chosen = sorted({int(i) for i in kept})
    if not chosen or chosen[0] < 0 or chosen[-1] >= latents.num_latents:
        raise ConfigError(
            f"keep_latents: cannot keep {chosen or 'none'} of {kind} 0 to {latents.num_latents - 1}"
        )
    index = torch.tensor(chosen, device=latents.signatures.device)
    for name, parameter in list(latents.named_parameters()):
        # Codes may be [L, M, C]: latents are always the last but one dimension.
        part = parameter.index_select(-2, index)
        setattr(latents, name, nn.Parameter(part, requires_grad=parameter.requires_grad))


def _affinities(model: NAC, layer: int) -> Tensor:
    """How a layer's receivers divide their attention over its senders, [U, V]."""
    circuit = model.circuit(layer)
    strength_N = model.log_affinity(layer).exp()
    affinity_UV = strength_N.new_zeros(circuit.num_receivers, circuit.num_senders)
    affinity_UV[circuit.receiver_of_edge.long(), circuit.sender.long()] = strength_N
    return affinity_UV
