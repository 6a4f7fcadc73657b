"""Removing latents and layers from a trained NAC, those first that the rest needs least.

Letters: B batch, U receivers, V senders, I inputs, M mediators, O outputs.
"""

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
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


@torch.no_grad()
def least_missed_layers(model: NAC, images: Tensor, labels_B: Tensor, num_layers: int) -> list[int]:
    """Which propagators to keep: one after the other goes whose loss is felt least.

    Args:
        model: A NAC in eval mode.
        images: [B, channels, H, W], on its device, whose cross-entropy decides.
        labels_B: Their classes, [B].
        num_layers: How many stay.

    Returns:
        Numbers of the layers to keep, in order.
    """
    kept = list(range(model.depth))
    while len(kept) > num_layers:
        rests = [[layer for layer in kept if layer != gone] for gone in kept]
        losses = [F.cross_entropy(keep_layers(model, rest)(images), labels_B) for rest in rests]
        kept = rests[int(torch.stack(losses).argmin())]
    return kept


@torch.no_grad()
def keep_layers(model: NAC, layers: Sequence[int]) -> NAC:
    """A copy of a NAC with some of its propagators.

    Args:
        model: It stays as it is.
        layers: Numbers of the propagators to keep, at least one, in any order.

    Returns:
        The NAC of fewer layers, in the mode and on the device of the model.

    Raises:
        ConfigError: No layer, or numbers that do not exist.
    """
    chosen = _chosen(layers, model.depth, "layers")
    pruned = copy.deepcopy(model)
    if not pruned.options.share_propagators:
        pruned.propagators = nn.ModuleList(pruned.propagators[i] for i in chosen)
        pruned.kernels = nn.ModuleList(pruned.kernels[i] for i in chosen)
    if pruned.options.per_layer_codes:
        codes = pruned.mediator_latents.codes
        pruned.mediator_latents.codes = nn.Parameter(codes[chosen], codes.requires_grad)
    if pruned.stitches is not None:
        pruned.stitches.keep([0, *(layer + 1 for layer in chosen)])
    pruned.depth = len(chosen)
    pruned.options = replace(pruned.options, **pruned_args(pruned))
    return pruned


def pruned_args(model: NAC) -> dict[str, Any]:
    """What arguments of a NAC become with as many latents and layers as a pruned one has."""
    return {
        "depth": model.depth,
        "num_inputs": model.input_latents.num_latents,
        "num_mediators": model.mediator_latents.num_latents,
        "num_outputs": model.output_latents.num_latents,
        # A prior would draw another graph, and may not exist for the new number.
        "prior": "none",
        "prior_args": {},
    }


def _keep(latents: Latents, kept: Tensor | Sequence[int], kind: str) -> None:
    chosen = _chosen(kept, latents.num_latents, kind)
    index = torch.tensor(chosen, device=latents.signatures.device)
    for name, parameter in list(latents.named_parameters()):
        # Codes may be [L, M, C]: latents are always the last but one dimension.
        part = parameter.index_select(-2, index)
        setattr(latents, name, nn.Parameter(part, requires_grad=parameter.requires_grad))


def _chosen(kept: Tensor | Sequence[int], total: int, kind: str) -> list[int]:
    chosen = sorted({int(i) for i in kept})
    if not chosen or chosen[0] < 0 or chosen[-1] >= total:
        raise ConfigError(f"cannot keep {chosen or 'none'} of {kind} 0 to {total - 1}")
    return chosen


def _affinities(model: NAC, layer: int) -> Tensor:
    """How a layer's receivers divide their attention over its senders, [U, V]."""
    circuit = model.circuit(layer)
    strength_N = model.log_affinity(layer).exp()
    affinity_UV = strength_N.new_zeros(circuit.num_receivers, circuit.num_senders)
    affinity_UV[circuit.receiver_of_edge.long(), circuit.sender.long()] = strength_N
    return affinity_UV
