"""Regularisers of a circuit's signatures (NAC, arXiv 2210.08031; the forms of m2mKD's runs).

Letters: U nodes, S signature width, C clusters. Distances are 1 - cosine.
"""

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from m2mkd.errors import ConfigError, ShapeError
from m2mkd.nn.precision import without_autocast


def signature_repulsion(signature_US: Tensor, hinge: float = 0.4) -> Tensor:
    """Pushes near signatures apart: minus the sum of d over unordered pairs with d < hinge.

    The published runs give it the signatures of inputs, mediators and outputs together, and a
    weight of 0.1. The pull fades as a pair closes in: it cannot part equal signatures.

    Args:
        signature_US: Signatures, [U, S], floating.
        hinge: Distance from which pairs are left alone.

    Returns:
        0-d, in float32 or wider, not positive; differentiable.

    Raises:
        ShapeError: Signatures that are not a floating matrix.
    """
    distance_UU = _distances("signature_repulsion", signature_US)
    near_UU = (distance_UU.detach() < hinge).tril(-1)
    return -distance_UU[near_UU].sum()


def block_model_loss(
    signature_US: Tensor,
    bandwidth: Tensor | float,
    truncation: float = 0.9,
    *,
    num_clusters: int = 8,
    p_in: float = 0.9,
    p_out: float = 0.2,
) -> Tensor:
    """Draws link probabilities towards a stochastic block model of equal clusters.

    The mean over pairs of (probability - target)^2. A link's probability is exp(-d / bandwidth),
    and 0 beyond the truncation, where it has no gradient. Its target is p_in within a cluster and
    p_out between two; cluster c is the c-th run of U / C columns, and rows are given to clusters,
    U / C to each, such that the loss is least (Hungarian matching, anew on each call and without
    gradient). As in m2mKD's code, columns stay where they are: a row may be matched with a
    cluster other than its column's. m2mKD adds the losses of all propagators' bandwidths, on
    mediators alone, with weight 1.

    Args:
        signature_US: Signatures, [U, S], floating.
        bandwidth: Of one propagator's kernel, positive scalar or 0-d tensor.
        truncation: Largest distance of a link.
        num_clusters: C, a divisor of U.
        p_in: Target within a cluster.
        p_out: Target between clusters.

    Returns:
        0-d, in float32 or wider; differentiable in signatures and bandwidth.

    Raises:
        ShapeError: Signatures that are not a floating matrix.
        ConfigError: Nodes that cannot be split into the clusters.
    """
    distance_UU = _distances("block_model_loss", signature_US)
    num = distance_UU.shape[0]
    if num_clusters < 1 or num % num_clusters:
        raise ConfigError(
            f"block_model_loss: {num} signatures cannot be split into {num_clusters=} equal parts"
        )
    linked_UU = distance_UU.detach() <= truncation
    probability_UU = torch.where(linked_UU, (-distance_UU / bandwidth).exp(), 0.0)
    target_CU = probability_UU.new_full((num_clusters, num), p_out)
    cluster_U = torch.arange(num, device=target_CU.device) // (num // num_clusters)
    target_CU[cluster_U, torch.arange(num, device=target_CU.device)] = p_in
    cluster_of_row_U = _assign(probability_UU.detach(), target_CU)
    return F.mse_loss(probability_UU, target_CU[cluster_of_row_U])


def _assign(probability_UU: Tensor, target_CU: Tensor) -> Tensor:
    """Gives each row a cluster, U / C rows to each, at the least sum of squared differences."""
    size = probability_UU.shape[0] // target_CU.shape[0]
    # The squares of probabilities cost every choice the same.
    cost_UC = target_CU.square().sum(1) - 2 * probability_UU @ target_CU.T
    places_UU = cost_UC.repeat_interleave(size, dim=1)
    _, place_U = linear_sum_assignment(places_UU.cpu().numpy())
    return torch.from_numpy(place_U).to(probability_UU.device) // size


def _distances(op: str, signature_US: Tensor) -> Tensor:
    """1 - cosine of all pairs, [U, U], never in half precision."""
    if signature_US.dim() != 2 or not signature_US.is_floating_point():
        raise ShapeError(
            f"{op}: signatures are {signature_US.dtype} {tuple(signature_US.shape)}; use floating "
            "[U, S]"
        )
    with without_autocast(signature_US):
        wide = torch.promote_types(signature_US.dtype, torch.float32)
        unit_US = F.normalize(signature_US.to(wide), dim=1)
        return 1 - unit_US @ unit_US.T
