"""Regularisers of signatures, against their definitions."""

import math
from itertools import permutations

import pytest
import torch

from m2mkd.errors import ConfigError, ShapeError
from m2mkd.nn.circuit_losses import block_model_loss, signature_repulsion


def at_angles(*degrees: float) -> torch.Tensor:
    """Signatures in the plane."""
    angle = torch.tensor(degrees, dtype=torch.float64).deg2rad()
    return torch.stack([angle.cos(), angle.sin()], dim=1) * 3


def test_repulsion_is_minus_the_distances_of_pairs_within_the_hinge() -> None:
    loss = signature_repulsion(at_angles(0, 30, 90), hinge=0.4)
    # 30 and 90 degrees are 0.5 apart, 0 and 90 are 1 apart.
    torch.testing.assert_close(loss.item(), math.cos(math.radians(30)) - 1)


def test_repulsion_widens_the_angle_of_a_near_pair_and_leaves_far_ones() -> None:
    signatures = at_angles(0, 20, 120).requires_grad_()
    signature_repulsion(signatures).backward()
    moved = (signatures - 0.1 * signatures.grad).detach()
    cosine = torch.nn.functional.cosine_similarity(moved[0], moved[1], dim=0)
    assert cosine < math.cos(math.radians(20)) - 1e-3
    assert signatures.grad[2].eq(0).all()


@pytest.mark.parametrize("bandwidth", [0.7, 1.0])
def test_block_model_loss_is_the_least_over_all_matchings_of_rows(bandwidth: float) -> None:
    torch.manual_seed(0)
    signatures = torch.randn(6, 3, dtype=torch.float64)
    unit = signatures / signatures.norm(dim=1, keepdim=True)
    distance = 1 - unit @ unit.T
    probability = (-distance / bandwidth).exp() * (distance <= 0.9)
    target = torch.full((6, 6), 0.2, dtype=torch.float64)
    target[:3, :3] = target[3:, 3:] = 0.9
    least = min((probability[list(p)] - target).square().mean() for p in permutations(range(6)))
    torch.testing.assert_close(
        block_model_loss(signatures, bandwidth, num_clusters=2), least, atol=1e-12, rtol=0
    )


def test_block_model_loss_has_exact_gradients_in_signatures_and_bandwidth() -> None:
    torch.manual_seed(1)
    signatures = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    bandwidth = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda s, b: block_model_loss(s, b, num_clusters=2), (signatures, bandwidth)
    )


def test_descending_the_block_model_loss_forms_its_clusters() -> None:
    torch.manual_seed(2)
    signatures = torch.randn(12, 8).requires_grad_()
    adam = torch.optim.Adam([signatures], lr=0.02)
    for _ in range(300):
        adam.zero_grad()
        block_model_loss(signatures, 0.5, num_clusters=3, p_out=0.05).backward()
        adam.step()
    unit = torch.nn.functional.normalize(signatures.detach(), dim=1)
    near = (unit @ unit.T > 0.8).sum(dim=1)
    assert near.tolist() == [4] * 12


def test_regularisers_do_not_follow_autocast_to_half_precision() -> None:
    signatures = torch.randn(8, 4)
    full = signature_repulsion(signatures), block_model_loss(signatures, 1.0, num_clusters=2)
    with torch.autocast("cpu", torch.bfloat16):
        half = signature_repulsion(signatures), block_model_loss(signatures, 1.0, num_clusters=2)
    assert half[0].dtype == half[1].dtype == torch.float32
    torch.testing.assert_close(half, full, atol=1e-6, rtol=0)


def test_regularisers_refuse_what_they_cannot_use() -> None:
    with pytest.raises(ConfigError, match="8 signatures cannot be split into num_clusters=3"):
        block_model_loss(torch.randn(8, 4), 1.0, num_clusters=3)
    with pytest.raises(ShapeError, match=r"signature_repulsion: signatures are torch.float32 \(8,"):
        signature_repulsion(torch.randn(8))
