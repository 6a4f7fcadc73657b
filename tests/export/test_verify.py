"""The comparison with PyTorch: it fails when it should, and knows what rounding may do."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from m2mkd.export import verify
from m2mkd.export.errors import ActivationError, AgreementError, InterfaceError, ParityError
from m2mkd.export.verify import BATCH_SIZES, TOLERANCE, Reference, compare, reference_outputs
from m2mkd.nn import MoEMlp

IMAGES, CLASSES = 12, 4
CLEAR, TIED = np.float32(1.0), np.float32(1e-6)


class FakeSession:
    """Stands for a loaded file: gives stored logits, batch after batch."""

    def __init__(self, logits: Any) -> None:
        self.logits = np.asarray(logits)
        self.sizes: list[int] = []

    def run(self, names: list[str], inputs: dict[str, Any]) -> list[Any]:
        start = sum(self.sizes)
        self.sizes.append(len(inputs["image"]))
        return [self.logits[start : start + self.sizes[-1]]]

    def get_providers(self) -> list[str]:
        return ["FakeProvider"]


@pytest.fixture
def reference() -> Reference:
    """Logits of about 1, whose best class leads by 3, and clear routers."""
    generator = np.random.default_rng(0)
    logits = generator.standard_normal((IMAGES, CLASSES)).astype(np.float32)
    logits[np.arange(IMAGES), np.arange(IMAGES) % CLASSES] = 6
    images = np.zeros((IMAGES, 1, 2, 2), np.float32)
    return Reference(images, logits, np.full(IMAGES, CLEAR))


def compared(reference: Reference, logits: Any, **settings: Any) -> verify.Parity:
    values = {"precision": "fp32", "tolerance": None, "inputs": "noise", **settings}
    return compare(FakeSession(logits), reference, **values)


def shifted(reference: Reference, images: list[int], by: float) -> Any:
    """The logits with one class of some images moved by a fraction of the largest logit."""
    logits = reference.logits.copy()
    logits[images, 0] += by * np.abs(logits).max()
    return logits


def test_equal_values_pass_and_are_recorded(reference: Reference) -> None:
    parity = compared(reference, shifted(reference, [3], TOLERANCE["fp32"] / 2), inputs="samples")
    assert parity.max_difference == pytest.approx(TOLERANCE["fp32"] / 2, rel=0.1)
    assert (parity.images, parity.clear, parity.agreeing, parity.excused) == (12, 12, 12, 0)
    assert (parity.inputs, parity.provider) == ("samples", "FakeProvider")


def test_several_batch_sizes_are_tried(reference: Reference) -> None:
    session = FakeSession(reference.logits)
    compare(session, reference, precision="fp32", tolerance=None, inputs="noise")
    assert session.sizes == list(BATCH_SIZES)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_one_image_over_the_tolerance_fails(precision: str, reference: Reference) -> None:
    logits = shifted(reference, [7], 2 * TOLERANCE[precision])
    with pytest.raises(ParityError, match=r"more than .*; first at image 7, class 0"):
        compared(reference, logits, precision=precision)


def test_an_accepted_tolerance_replaces_the_default(reference: Reference) -> None:
    logits = shifted(reference, [7], 0.01)
    assert compared(reference, logits, tolerance=0.02).tolerance == 0.02
    with pytest.raises(ParityError):
        compared(reference, logits, tolerance=0.005)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_fail(value: float, reference: Reference) -> None:
    logits = reference.logits.copy()
    logits[11, 2] = value
    with pytest.raises(ParityError, match="image 11"):
        compared(reference, logits)


@pytest.mark.parametrize(("num_tied", "passes"), [(6, True), (7, False)])
def test_nearly_tied_routers_excuse_at_most_half_of_the_images(
    num_tied: int, passes: bool, reference: Reference
) -> None:
    reference.margins[:num_tied] = TIED
    logits = shifted(reference, list(range(num_tied)), 0.01)
    if passes:
        assert compared(reference, logits).excused == num_tied
    else:
        with pytest.raises(ParityError):
            compared(reference, logits)


def test_a_tie_in_one_image_does_not_excuse_another(reference: Reference) -> None:
    reference.margins[0] = TIED
    with pytest.raises(ParityError, match="image 5"):
        compared(reference, shifted(reference, [5], 0.01))


@pytest.mark.parametrize(("wrong", "passes"), [(1, True), (2, False)])
def test_other_classes_fail_whatever_tolerance_is_accepted(
    wrong: int, passes: bool, reference: Reference
) -> None:
    logits = reference.logits.copy()
    logits[:wrong] = np.roll(logits[:wrong], 1, axis=1)
    if passes:
        parity = compared(reference, logits, tolerance=10.0)
        assert (parity.clear, parity.agreeing) == (12, 11)
    else:
        with pytest.raises(AgreementError, match="2 of 12 images"):
            compared(reference, logits, tolerance=10.0)


def test_classes_too_close_to_call_are_not_counted(reference: Reference) -> None:
    reference.logits[0] = [1.0, 1.0, 0.0, 0.0]
    logits = reference.logits.copy()
    logits[0, 1] += 1e-5
    parity = compared(reference, logits)
    assert (parity.clear, parity.agreeing) == (11, 11)


@pytest.mark.parametrize("level", [0.0, 3.0])
def test_a_network_with_one_answer_for_all_cannot_be_verified(
    level: float, reference: Reference
) -> None:
    reference.logits[:] = level
    with pytest.raises(ParityError, match="the same logits, so nothing can be verified"):
        compared(reference, reference.logits)


@pytest.mark.parametrize("by", [1e-2, TOLERANCE["fp32"] / 10])
def test_the_tanh_form_is_refused_and_named_however_little_it_changes(
    by: float, reference: Reference
) -> None:
    reference.tanh_logits = shifted(reference, list(range(IMAGES)), by)
    with pytest.raises(ActivationError, match="--target cpu"):
        compared(reference, reference.tanh_logits)
    assert compared(reference, reference.tanh_logits, tolerance=2 * by).excused == 0
    with pytest.raises(ParityError, match="differ from PyTorch's"):
        compared(reference, reference.tanh_logits, tolerance=by / 2)


def test_other_differences_are_not_blamed_on_the_tanh_form(reference: Reference) -> None:
    reference.tanh_logits = shifted(reference, list(range(IMAGES)), 1e-3)
    with pytest.raises(ParityError) as caught:
        compared(reference, shifted(reference, list(range(IMAGES)), -1e-3))
    assert not isinstance(caught.value, ActivationError)
    # Rounding of float16 hides which form it is, and stays within the float16 tolerance.
    rounded = shifted(reference, list(range(IMAGES)), 3e-3)
    assert compared(reference, rounded, precision="fp16").excused == 0


@pytest.mark.parametrize("part", ["shape", "type"])
def test_outputs_of_another_kind_fail(part: str, reference: Reference) -> None:
    logits = reference.logits[:, :3] if part == "shape" else reference.logits.astype(np.float16)
    with pytest.raises(InterfaceError, match="a batch of 1 images gave"):
        compared(reference, logits)


class OneLayer(nn.Module):
    """An MoE layer on the pixels as tokens, whose mean is the logits."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.layer = MoEMlp(3, 5, num_experts=4, **settings)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.layer(images.flatten(2).transpose(1, 2))
        return out.mean(dim=1)


def test_the_reference_knows_the_smallest_margin_of_each_image() -> None:
    network = OneLayer(num_selected=2).eval()
    with torch.no_grad():
        network.layer.router.weight.zero_()
        network.layer.router.weight[:, 0] = torch.tensor([4.0, 3.0, 1.0, 0.0])
        network.layer.router.bias.zero_()
    images = np.zeros((2, 3, 1, 2), np.float32)
    # Second and third logit of a token differ by twice its first channel.
    images[0, 0] = [[1.0, 0.25]]
    images[1, 0] = [[0.5, 2.0]]
    found = reference_outputs(network, images, has_tanh_twin=False)
    np.testing.assert_allclose(found.margins, [0.5, 1.0], rtol=1e-6)
    np.testing.assert_array_equal(found.logits, network(torch.from_numpy(images)).detach())
    assert found.tanh_logits is None


def test_where_all_experts_are_chosen_no_router_is_undecided() -> None:
    images = np.zeros((1, 3, 1, 2), np.float32)
    found = reference_outputs(OneLayer(num_selected=4).eval(), images, has_tanh_twin=False)
    assert found.margins.tolist() == [np.inf]


def test_the_tanh_twin_is_computed_and_the_network_given_back() -> None:
    network = OneLayer(activation="gelu").eval()
    images = np.random.default_rng(0).standard_normal((3, 3, 4, 4)).astype(np.float32)
    found = reference_outputs(network, images, has_tanh_twin=True)
    assert network.layer.activation == "gelu"
    network.layer.activation = "gelu_tanh"
    expected = network(torch.from_numpy(images)).detach().numpy()
    assert found.tanh_logits is not None
    np.testing.assert_allclose(found.tanh_logits, expected, atol=1e-7)
    assert np.abs(found.tanh_logits - found.logits).max() > 1e-6
