"""Signatures fitted to a graph: near where there is an edge, far where there is none.

Letters: U nodes, S signature width. Distances are 1 - cosine.
"""

import torch
from torch import Tensor

from m2mkd.errors import ShapeError
from m2mkd.ops import circuit_from_signatures

_LEARNING_RATE = 1e-3


def orthogonal_start(num: int, width: int, *, seed: int) -> Tensor:
    """A random matrix with orthonormal rows (columns where U > S), [U, S], float32."""
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.init.orthogonal_(torch.empty(num, width), generator=generator)


@torch.no_grad()
def fit_signatures(
    start_US: Tensor,
    edges_UU: Tensor,
    truncation: float = 0.8,
    *,
    steps: int = 400,
    settle: bool = True,
) -> Tensor:
    """Moves signatures until near pairs are the edges of a graph.

    Minimises the published hinge with Adam at rate 1e-3: the mean over pairs of
    max(truncation, d) on edges and of max(-truncation, -d) elsewhere. Departs from the published
    fit, which is `steps=1000, settle=False`: by default the fit ends as soon as every pair is on
    its side, after which the published steps only coast, and the rate falls to zero over the
    second half of the steps, without which some graphs keep a few wrong pairs for ever.
    docs/circuits.md has the comparison.

    Args:
        start_US: Signatures to begin with, [U, S], floating, left as they are.
        edges_UU: Neighbours, [U, U], bool, symmetric; the diagonal does not count.
        truncation: Largest distance of an edge, in [0, 2].
        steps: Largest number of Adam steps.
        settle: Whether to end early and to let the rate fall.

    Returns:
        Fitted signatures, [U, S], in the dtype of start_US.

    Raises:
        ShapeError: Shapes that do not fit together, a mask that is not symmetric or not boolean,
            or a truncation that is not in [0, 2].
    """
    _check_fit(start_US, edges_UU, truncation)
    signature_US = start_US.detach().clone()
    signature_US.grad = torch.zeros_like(signature_US)
    adam = torch.optim.Adam([signature_US], lr=_LEARNING_RATE)
    side_UU = edges_UU.to(start_US.dtype).mul_(2).sub_(1).fill_diagonal_(0)
    least_UU = side_UU * (1 - truncation)
    for step in range(steps):
        length_U1 = signature_US.norm(dim=1, keepdim=True).clamp_min_(1e-12)
        unit_US = signature_US / length_U1
        cosine_UU = unit_US @ unit_US.T
        # 1 on edges that are too far and -1 on pairs that are too near, else 0.
        wrong_UU = cosine_UU.mul_(side_UU).lt_(least_UU).mul_(side_UU)
        if settle and not wrong_UU.any():
            break
        # By hand, at a fifth of autograd's time: each pair counts twice, d falls with the cosine,
        # and a change along a signature does not turn it.
        pull_US = wrong_UU @ unit_US * (-2 / edges_UU.numel())
        along_U1 = (unit_US * pull_US).sum(dim=1, keepdim=True)
        torch.div(pull_US - unit_US * along_U1, length_U1, out=signature_US.grad)
        if settle:
            adam.param_groups[0]["lr"] = _LEARNING_RATE * min(1.0, 2 * (1 - step / steps))
        adam.step()
    signature_US.grad = None
    return signature_US


def graph_mistakes(
    signature_US: Tensor, edges_UU: Tensor, truncation: float = 0.8
) -> tuple[int, int]:
    """Pairs by which the signatures' circuit and a graph differ, the diagonal left out.

    Args:
        signature_US: Signatures, [U, S], floating.
        edges_UU: Neighbours, [U, U], bool.
        truncation: Largest distance of an edge.

    Returns:
        Edges of the graph that the circuit lacks, and those that only the circuit has; both
        directions of a pair count.
    """
    linked_UU = circuit_from_signatures(signature_US, signature_US, truncation).to_dense()
    linked_UU.fill_diagonal_(False)
    edges_UU = edges_UU.clone().fill_diagonal_(False)
    return int((edges_UU & ~linked_UU).sum()), int((linked_UU & ~edges_UU).sum())


def _check_fit(start_US: Tensor, edges_UU: Tensor, truncation: float) -> None:
    op = "fit_signatures"
    if start_US.dim() != 2 or not start_US.is_floating_point():
        raise ShapeError(f"{op}: start is {start_US.dtype} {tuple(start_US.shape)}; use [U, S]")
    num = start_US.shape[0]
    if edges_UU.dtype != torch.bool or edges_UU.shape != (num, num):
        raise ShapeError(
            f"{op}: edges are {edges_UU.dtype} {tuple(edges_UU.shape)}; use bool [{num}, {num}]"
        )
    if not torch.equal(edges_UU, edges_UU.T):
        raise ShapeError(f"{op}: edges are not symmetric, but cosines are")
    if not 0 <= truncation <= 2:
        raise ShapeError(f"{op}: {truncation=} is not in [0, 2], the range of 1 - cosine")
