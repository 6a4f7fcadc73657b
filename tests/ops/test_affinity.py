"""Affinities of edges: golden values, the reference over all pairs, sampling, gradients."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_testing import DifferentiableOpTests, Inputs, draw
from torch import Tensor

from m2mkd import ops
from m2mkd.errors import ShapeError
from m2mkd.ops import reference

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "kernel_sampling.npz"


def signatures(num: int, width: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Normal values that want gradients."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num, width, generator=generator, dtype=dtype).requires_grad_()


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    """The published kernel's inputs and outputs."""
    with np.load(GOLDEN) as file:
        return {key: torch.from_numpy(file[key]) for key in file.files if key != "config"}


@pytest.mark.parametrize("case", ["train", "eval"])
def test_log_affinities_and_gradients_are_those_of_the_published_code(
    golden: dict[str, Tensor], case: str
) -> None:
    receivers = golden["in/receiver_signatures"].clone().requires_grad_()
    senders = golden["in/sender_signatures"].clone().requires_grad_()
    bandwidth = golden["in/bandwidth"].clone().requires_grad_()
    circuit = ops.circuit_from_signatures(receivers, senders, 0.9)
    mask = golden["train/log_kernel"] > -torch.inf
    assert torch.equal(circuit.to_dense(), mask)
    samples = {"sampling": "relaxed_bernoulli", "uniforms_BN": golden["in/uniforms"][:, mask]}
    log_affinity = ops.edge_log_affinity(
        receivers, senders, circuit, bandwidth, **(samples if case == "train" else {})
    )
    expected = golden[f"{case}/log_affinity_normalised"][..., mask]
    torch.testing.assert_close(log_affinity, expected, rtol=0, atol=2e-5)
    weight = golden["in/loss_weight"] if case == "train" else golden["in/loss_weight"][0]
    loss = (log_affinity.exp() * weight[..., mask]).sum()
    torch.testing.assert_close(loss, golden[f"{case}/loss"], rtol=0, atol=2e-5)
    names = ["receiver_signatures", "sender_signatures", "bandwidth"]
    grads = torch.autograd.grad(loss, [receivers, senders, bandwidth])
    for name, grad in zip(names, grads, strict=True):
        torch.testing.assert_close(grad, golden[f"{case}/grad_{name}"], rtol=0, atol=1e-4)


def test_log_samples_before_normalisation_are_those_of_the_published_code(
    golden: dict[str, Tensor],
) -> None:
    receivers, senders = golden["in/receiver_signatures"], golden["in/sender_signatures"]
    circuit = ops.circuit_from_signatures(receivers, senders, 0.9)
    mask = circuit.to_dense()
    options = {
        "train": {"sampling": "relaxed_bernoulli", "uniforms_BN": golden["in/uniforms"][:, mask]},
        "eval": {},
        "threshold": {"sampling": "threshold"},
    }
    for case, option in options.items():
        found = ops.edge_log_affinity(
            receivers, senders, circuit, golden["in/bandwidth"], normalise=False, **option
        )
        expected = golden[f"{case}/log_sample"][..., mask]
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("sampling", ["none", "relaxed_bernoulli", "threshold"])
@settings(max_examples=20, deadline=None)
@given(
    num_receivers=st.integers(0, 9),
    num_senders=st.integers(0, 12),
    truncation=st.sampled_from([0.0, 0.6, 0.9, 2.0]),
    seed=st.integers(0, 99),
)
def test_edges_have_the_affinities_of_the_reference_over_all_pairs(
    sampling: str,
    normalise: bool,
    num_receivers: int,
    num_senders: int,
    truncation: float,
    seed: int,
) -> None:
    receivers, senders = signatures(num_receivers, 5, seed), signatures(num_senders, 5, seed + 1)
    bandwidth = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    circuit = ops.circuit_from_signatures(receivers, senders, truncation)
    assert circuit == reference.circuit_from_signatures(receivers, senders, truncation)
    uniforms = torch.rand(3, circuit.num_edges, generator=torch.Generator().manual_seed(seed))
    arguments = (receivers, senders, circuit, bandwidth)
    results = [
        function(
            *arguments,
            sampling=sampling,
            uniforms_BN=uniforms if sampling == "relaxed_bernoulli" else None,
            normalise=normalise,
        )
        for function in (ops.edge_log_affinity, reference.edge_log_affinity)
    ]
    torch.testing.assert_close(*results)
    weight = torch.randn(results[0].shape, generator=torch.Generator().manual_seed(1)).double()
    leaves = [receivers, senders, bandwidth]
    found, expected = (
        torch.autograd.grad((result.exp() * weight).sum(), leaves) for result in results
    )
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


class TestEdgeLogAffinity(DifferentiableOpTests):
    """Problems are U, V, S, the truncation, and B of the samples or None."""

    name = "edge_log_affinity"
    problems = (
        pytest.param((5, 6, 4, 1.1, None), id="shared by the batch"),
        pytest.param((7, 5, 3, 1.1, 3), id="samples per example"),
        pytest.param((33, 65, 8, 0.7, 2), id="receivers without edges"),
        pytest.param((40, 50, 4, 0.2, 2), id="few edges, which are cheaper than all pairs"),
        pytest.param((1, 40, 8, 2.0, None), id="one receiver takes all"),
        pytest.param((40, 1, 8, 2.0, None), id="one sender to all"),
        pytest.param((5, 6, 4, 0.0, 2), id="no edges"),
        pytest.param((0, 6, 4, 1.1, None), id="no receivers"),
        pytest.param((5, 0, 4, 1.1, 2), id="no senders"),
        pytest.param((5, 6, 4, 1.1, 0), id="no examples"),
        pytest.param((1, 1, 1, 2.0, 1), id="all sizes one"),
    )
    small = (3, 4, 3, 1.2, 2)
    compiled = ((5, 6, 4, 1.1, 2), (7, 8, 4, 1.1, 3))
    # Signatures of one element have cosines of 1 or -1, and gradients of rounding only.
    any_problem = st.tuples(
        *(st.integers(0, 9), st.integers(0, 12), st.integers(2, 6)),
        *(st.sampled_from([0.0, 0.6, 1.1, 2.0]), st.sampled_from([None, 0, 1, 3])),
    )
    # Always in float32 or wider.
    region_dtype = torch.float32
    any_float = frozenset({"bandwidth", "uniforms_BN"})

    @staticmethod
    def inputs(
        problem: tuple[int, int, int, float, int | None], dtype: torch.dtype, device: str
    ) -> Inputs:
        receivers, senders, width, truncation, batch = problem
        ends = [
            draw(count, width, dtype=dtype, device=device, seed=seed)
            for seed, count in enumerate((receivers, senders))
        ]
        circuit = ops.circuit_from_signatures(*ends, truncation)
        generator = torch.Generator().manual_seed(2)
        uniforms = torch.rand(batch or 0, circuit.num_edges, generator=generator)
        return {
            "receiver_sig_US": ends[0],
            "sender_sig_VS": ends[1],
            "circuit": circuit,
            "bandwidth": torch.tensor(0.8, dtype=dtype, device=device, requires_grad=True),
            "sampling": "none" if batch is None else "relaxed_bernoulli",
            "uniforms_BN": None if batch is None else uniforms.to(device),
        }


def test_samples_are_drawn_anew_for_each_example_and_repeat_with_a_seed() -> None:
    receivers, senders = signatures(5, 4, 0), signatures(6, 4, 1)
    circuit = ops.circuit_from_signatures(receivers, senders, 1.1)

    def draw() -> Tensor:
        torch.manual_seed(3)
        return ops.edge_log_affinity(
            receivers, senders, circuit, 0.8, sampling="relaxed_bernoulli", batch_size=4
        )

    assert torch.equal(draw(), draw())
    assert draw().shape == (4, circuit.num_edges)
    assert not torch.equal(draw()[0], draw()[1])


def test_relaxed_samples_have_the_mean_of_the_link_probability_at_low_temperature() -> None:
    signature = torch.tensor([[1.0, 0.0], [0.6, 0.8]], dtype=torch.float64)
    circuit = ops.Circuit.from_dense(torch.tensor([[False, True], [True, False]]))
    log_samples = ops.edge_log_affinity(
        signature,
        signature,
        circuit,
        1.0,
        sampling="relaxed_bernoulli",
        temperature=0.01,
        uniforms_BN=torch.linspace(0, 1, 2001)[:-1, None].expand(-1, 2),
        normalise=False,
    )
    probability = torch.tensor(-0.4, dtype=torch.float64).exp()
    assert abs(log_samples.exp().mean() - probability) < 2e-3


def test_edges_of_a_receiver_sum_to_one_and_attention_does_not_need_it() -> None:
    receivers, senders = signatures(7, 4, 0), signatures(9, 4, 1)
    circuit = ops.circuit_from_signatures(receivers, senders, 0.8)
    log_affinity = ops.edge_log_affinity(receivers, senders, circuit, 0.8)
    sums = torch.zeros(7, dtype=torch.float64)
    sums.index_add_(0, circuit.receiver_of_edge, log_affinity.detach().exp())
    linked = circuit.row_ptr.diff() > 0
    torch.testing.assert_close(sums, linked.double())
    raw = ops.edge_log_affinity(receivers, senders, circuit, 0.8, normalise=False)
    q, k, v = (torch.randn(2, 3, n, 4, dtype=torch.float64) for n in (7, 9, 9))
    torch.testing.assert_close(
        ops.circuit_attention(q, k, v, circuit, raw, impl="reference"),
        ops.circuit_attention(q, k, v, circuit, log_affinity, impl="reference"),
    )


def test_half_type_signatures_are_compared_in_float32() -> None:
    receivers, senders = (signatures(4, 8, s, torch.bfloat16) for s in (0, 1))
    circuit = ops.circuit_from_signatures(receivers, senders, 1.0)
    found = ops.edge_log_affinity(receivers, senders, circuit, 1.0)
    assert found.dtype == torch.float32
    expected = ops.edge_log_affinity(receivers.float(), senders.float(), circuit, 1.0)
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sampling": "gumbel"}, "unknown sampling='gumbel'; use one of none, relaxed_bernoulli"),
        ({"sampling": "relaxed_bernoulli"}, "needs batch_size or uniforms_BN"),
        ({"bandwidth": 0.0}, "bandwidth=0.0 must be positive"),
        ({"bandwidth": float("nan")}, "bandwidth=nan must be positive"),
        (
            {"sampling": "relaxed_bernoulli", "batch_size": 2, "temperature": 0.0},
            "temperature=0.0 must be positive",
        ),
        (
            {"sampling": "relaxed_bernoulli", "uniforms_BN": torch.rand(2, 3)},
            "N of uniforms is 3, but N of circuit is",
        ),
        ({"receiver_sig_US": torch.rand(4, 4)}, "is torch.float64, but receiver signatures is"),
        ({"sender_sig_VS": torch.rand(6, 5).double()}, "S of senders is 5, but S of receivers is"),
        ({"receiver_sig_US": torch.rand(3, 4).double()}, "U of signatures is 3, but the circuit's"),
        ({"receiver_sig_US": torch.rand(20).double()}, r"must be \[U, S\], got shape \(20,\)"),
    ],
)
def test_impossible_arguments_are_named(change: dict[str, object], message: str) -> None:
    receivers, senders = signatures(5, 4, 0), signatures(6, 4, 1)
    arguments = {
        "receiver_sig_US": receivers,
        "sender_sig_VS": senders,
        "circuit": ops.circuit_from_signatures(receivers, senders, 1.1),
        "bandwidth": 0.8,
    }
    with pytest.raises(ShapeError, match=message):
        ops.edge_log_affinity(**(arguments | change))  # type: ignore[arg-type]


def test_a_truncation_out_of_range_is_named() -> None:
    with pytest.raises(ShapeError, match=r"truncation=-1 is not in \[0, 2\]"):
        ops.circuit_from_signatures(signatures(2, 3, 0), signatures(2, 3, 1), -1)


def test_truncation_keeps_what_is_near_also_over_several_blocks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    receivers, senders = signatures(40, 6, 0), signatures(30, 6, 1)
    whole = ops.circuit_from_signatures(receivers, senders, 0.7)
    monkeypatch.setattr("m2mkd.ops.circuit._BLOCK", 100)
    assert ops.circuit_from_signatures(receivers, senders, 0.7) == whole
    assert 0 < whole.num_edges < 1200
