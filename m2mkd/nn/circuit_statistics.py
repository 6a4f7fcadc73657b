"""What a circuit is like, in numbers. Letters: U receivers, V senders."""

from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from m2mkd.errors import ShapeError
from m2mkd.ops import Circuit


def circuit_statistics(circuit: Circuit) -> dict[str, Any]:
    """Describes a propagator's circuit: senders are V - U inputs, then the receivers themselves.

    Figures of degree count every edge. Those from `components` on are of the receivers' own graph,
    without inputs and without edges from a receiver to itself; `components` and `clustering` take
    it as undirected.

    Args:
        circuit: U receivers by V senders.

    Returns:
        Numbers by name, ready for JSON:
        `receivers`, `inputs`, `edges`, `density` (edges / U V);
        `degree_min`, `degree_mean`, `degree_max` (senders per receiver);
        `isolated` (receivers without an edge), `self_only` (receivers that hear only themselves),
        `unheard` (senders without an edge);
        `hub_share` (share of the edges that the busiest tenth of the senders has);
        `reached` (receivers to which a path leads from some input; all where there are none);
        `components`, `largest_component` (receivers in it), `reciprocity` (share of edges whose
        reverse exists, 1 without edges), `clustering` (mean local clustering coefficient).

    Raises:
        ShapeError: Fewer senders than receivers.
    """
    num, outside = circuit.num_receivers, num_inputs(circuit)
    degree_U, degree_V = circuit.row_ptr.diff().cpu(), circuit.col_ptr.diff().cpu()
    mask_UV = circuit.to_dense().cpu()
    loop_U = mask_UV[:, outside:].diagonal()
    own_UU = mask_UV[:, outside:].clone().fill_diagonal_(False)
    num_own = int(own_UU.sum())
    busiest = degree_V.sort(descending=True).values[: -(-circuit.num_senders // 10)]
    num_components, component_U = connected_components(csr_array(own_UU.numpy()), directed=False)
    return {
        "receivers": num,
        "inputs": outside,
        "edges": circuit.num_edges,
        "density": circuit.density,
        "degree_min": int(degree_U.min()) if num else 0,
        "degree_mean": circuit.num_edges / max(1, num),
        "degree_max": int(degree_U.max()) if num else 0,
        "isolated": int((degree_U == 0).sum()),
        "self_only": int((loop_U & (degree_U == 1)).sum()),
        "unheard": int((degree_V == 0).sum()),
        "hub_share": int(busiest.sum()) / max(1, circuit.num_edges),
        "reached": _count_reached(mask_UV[:, :outside], own_UU),
        "components": int(num_components),
        "largest_component": int(np.bincount(component_U, minlength=1).max()),
        "reciprocity": int((own_UU & own_UU.T).sum()) / num_own if num_own else 1.0,
        "clustering": _clustering(own_UU | own_UU.T),
    }


def num_inputs(circuit: Circuit) -> int:
    """Senders of a propagator's circuit that are not receivers, V - U.

    Raises:
        ShapeError: Fewer senders than receivers.
    """
    outside = circuit.num_senders - circuit.num_receivers
    if outside < 0:
        raise ShapeError(
            f"circuit statistics: {circuit.num_senders} senders for {circuit.num_receivers} "
            "receivers; use a propagator's circuit, whose senders include its receivers"
        )
    return outside


def _count_reached(from_inputs: Tensor, own_UU: Tensor) -> int:
    """Receivers that inputs reach over any number of edges."""
    if from_inputs.shape[1] == 0:
        return own_UU.shape[0]
    reached_U = from_inputs.any(dim=1)
    while True:
        wider_U = reached_U | (own_UU & reached_U).any(dim=1)
        if torch.equal(wider_U, reached_U):
            return int(reached_U.sum())
        reached_U = wider_U


def _clustering(linked_UU: Tensor) -> float:
    """Mean over nodes of the share of their pairs of neighbours that are neighbours."""
    linked_UU = linked_UU.float()
    degree_U = linked_UU.sum(dim=1)
    closed_U = ((linked_UU @ linked_UU) * linked_UU).sum(dim=1)
    share_U = closed_U / (degree_U * (degree_U - 1)).clamp_min(1)
    return float(share_U.double().mean()) if len(share_U) else 0.0
