"""Circuits: building, checks, transposes, equality, moving, and links by signatures."""

import copy
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from m2mkd.errors import NotFiniteError, ShapeError
from m2mkd.ops import Circuit, _checks, circuit_attention, circuit_from_signatures, reference


def ints(*values: int) -> Tensor:
    """An int32 tensor."""
    return torch.tensor(values, dtype=torch.int32)


@st.composite
def masks(drawn: st.DrawFn) -> Tensor:
    """A boolean matrix of up to 8 by 8."""
    rows, columns = drawn(st.integers(0, 8)), drawn(st.integers(0, 8))
    flat = drawn(st.lists(st.booleans(), min_size=rows * columns, max_size=rows * columns))
    return torch.tensor(flat, dtype=torch.bool).view(rows, columns)


def test_literal_example() -> None:
    circuit = Circuit.from_edges(torch.tensor([2, 0, 0]), torch.tensor([1, 3, 1]), 3, 4)
    assert circuit.row_ptr.tolist() == [0, 2, 2, 3]
    assert circuit.sender.tolist() == [1, 3, 1]
    assert circuit.receiver_of_edge.tolist() == [0, 0, 2]
    assert circuit.col_ptr.tolist() == [0, 0, 2, 2, 3]
    assert circuit.receiver.tolist() == [0, 2, 0]
    assert circuit.edge_id.tolist() == [0, 2, 1]
    assert (circuit.num_receivers, circuit.num_senders, circuit.num_edges) == (3, 4, 3)
    assert circuit.density == 0.25
    assert "3 receivers, 4 senders, 3 edges" in repr(circuit)
    assert all(t.dtype == torch.int32 for t in circuit.tensors().values())


@settings(max_examples=60)
@given(mask=masks(), seed=st.integers(0, 99))
def test_dense_and_edge_forms_hold_the_same_edges_in_any_order(mask: Tensor, seed: int) -> None:
    circuit = Circuit.from_dense(mask)
    assert torch.equal(circuit.to_dense(), mask)
    receiver, sender = mask.nonzero(as_tuple=True)
    order = torch.randperm(len(receiver), generator=torch.Generator().manual_seed(seed))
    shuffled = Circuit.from_edges(receiver[order], sender[order], *mask.shape)
    assert shuffled == circuit
    assert hash(shuffled) == hash(circuit)
    assert Circuit(circuit.row_ptr, circuit.sender, mask.shape[1]) == circuit


@settings(max_examples=60)
@given(mask=masks())
def test_the_transpose_lists_the_same_edges_by_sender(mask: Tensor) -> None:
    circuit, turned = Circuit.from_dense(mask), Circuit.from_dense(mask.T)
    assert torch.equal(circuit.col_ptr, turned.row_ptr)
    assert torch.equal(circuit.receiver, turned.sender)
    edge = circuit.edge_id.long()
    assert torch.equal(circuit.receiver_of_edge[edge], turned.sender)
    assert torch.equal(circuit.sender[edge], turned.receiver_of_edge)


@settings(max_examples=60)
@given(mask=masks(), other=masks())
def test_circuits_are_equal_where_their_edges_are(mask: Tensor, other: Tensor) -> None:
    same = mask.shape == other.shape and torch.equal(mask, other)
    assert (Circuit.from_dense(mask) == Circuit.from_dense(other)) == same


def test_circuits_differ_by_senders_that_nobody_hears() -> None:
    mask = torch.ones(2, 2, dtype=torch.bool)
    wider = torch.tensor([[True, True, False], [True, True, False]])
    assert Circuit.from_dense(mask) != Circuit.from_dense(wider)
    assert Circuit.from_dense(mask) != "a circuit"


def test_it_is_a_key_of_a_dictionary_and_can_be_copied() -> None:
    circuit = Circuit.from_dense(torch.eye(4))
    cache = {circuit: "seen"}
    assert cache[Circuit.from_dense(torch.eye(4))] == "seen"
    assert copy.deepcopy(circuit) == circuit


def test_moving_takes_everything_along_and_keeps_one_that_is_there() -> None:
    circuit = Circuit.from_dense(torch.eye(3))
    assert circuit.to("cpu") is circuit
    moved = circuit.to("meta")
    assert all(t.device.type == "meta" for t in moved.tensors().values())
    assert (moved.num_receivers, moved.num_senders, moved.num_edges) == (3, 3, 3)


def test_what_the_caller_does_to_its_tensors_later_changes_no_circuit() -> None:
    row_ptr, sender = ints(0, 1, 2), ints(0, 1)
    circuit = Circuit(row_ptr, sender, 2)
    row_ptr.zero_()
    sender.zero_()
    assert circuit == Circuit.from_dense(torch.eye(2))


@pytest.mark.parametrize("impl", ["auto", "dense", "reference"])
def test_a_circuit_built_in_inference_mode_serves_training(impl: str) -> None:
    with torch.inference_mode():
        circuit = Circuit.from_dense(torch.eye(3))
        assert not any(t.is_inference() for t in circuit.to("meta").tensors().values())
    q = torch.randn(1, 1, 3, 4, requires_grad=True)
    circuit_attention(q, q, q, circuit, impl=impl).sum().backward()
    assert q.grad is not None


@pytest.mark.gpu
def test_a_circuit_on_the_gpu_equals_its_original() -> None:
    circuit = Circuit.from_dense(torch.eye(3))
    assert circuit.to("cuda") == circuit
    assert Circuit.from_dense(torch.eye(3, device="cuda")) == circuit


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Circuit(ints(0, 1), ints(0).long(), 1), "sender is torch.int64; convert it"),
        (lambda: Circuit(ints(0, 1).long(), ints(0), 1), "row_ptr is torch.int64; convert it"),
        (lambda: Circuit(ints(), ints(), 1), "row_ptr is empty"),
        (lambda: Circuit(ints(0, 2), ints(0), 1), "row_ptr must rise from 0 to N=1"),
        (lambda: Circuit(ints(1, 1), ints(0), 1), "it starts with 1 and ends with 1"),
        (lambda: Circuit(ints(0, 2, 1, 2), ints(0, 1), 2), "row_ptr must rise"),
        (lambda: Circuit(ints(0, 1), ints(2), 2), r"sender numbers run from 2 to 2; .* \[0, 2\)"),
        (lambda: Circuit(ints(0, 1), ints(-1), 2), "sender numbers run from -1 to -1"),
        (lambda: Circuit(ints(0, 2), ints(1, 1), 2), "receiver 0 has sender 1 twice"),
        (lambda: Circuit(ints(0, 1, 3), ints(1, 1, 0), 2), "receiver 1 has sender 0 out of order"),
        (lambda: Circuit(ints(0, 1)[None], ints(0), 1), r"row_ptr must be \[U \+ 1\]"),
        (lambda: Circuit(ints(0, 1), ints(0).to("meta"), 1), "sender is on meta"),
        (lambda: Circuit.from_dense(torch.ones(3)), r"mask must be \[U, V\]"),
        (lambda: Circuit.from_edges(ints(0, 0), ints(1, 1), 1, 2), "sender 1 twice"),
        (lambda: Circuit.from_edges(ints(0, 0), ints(1), 1, 2), "N of sender is 1"),
        (lambda: Circuit.from_edges(ints(3), ints(1), 3, 2), r"receiver numbers .* \[0, 3\)"),
        (lambda: Circuit.from_edges(ints(0).float(), ints(1), 3, 2), "use integers"),
        (lambda: Circuit.from_edges(ints(0).to(torch.uint16), ints(1), 3, 2), "use integers"),
        (
            lambda: Circuit.from_edges(ints(0, 1), ints(0, 1)[:, None], 2, 2),
            r"sender must be \[N\]",
        ),
        (lambda: Circuit.from_edges(ints(0), ints(0).to("meta"), 1, 1), "sender is on meta"),
        (lambda: Circuit.from_edges(*[ints(0).to("meta")] * 2, 1, 1), "holds no values"),
        (lambda: Circuit.from_edges(ints(), ints(), -1, 2), "U is -1; it cannot be negative"),
        (lambda: Circuit.from_edges(ints(), ints(), 2, -1), "V is -1; it cannot be negative"),
        (lambda: Circuit(ints(0), ints(), -2), "V is -2; it cannot be negative"),
        (lambda: Circuit(*[ints(0).to("meta")] * 2, 1), "holds no values"),
        (lambda: Circuit.from_dense(torch.ones(2, 2, device="meta")), "holds no values"),
        (lambda: circuit_from_signatures(torch.ones(2, 3), torch.ones(2, 4), 1.0), "S of senders"),
        (lambda: circuit_from_signatures(torch.ones(2, 3), torch.ones(2, 3), 2.5), "truncation"),
    ],
)
def test_what_is_not_a_circuit_is_refused_with_its_reason(
    build: Callable[[], Circuit], message: str
) -> None:
    with pytest.raises(ShapeError, match=message):
        build()


def test_numbers_past_int32_are_refused_without_allocating() -> None:
    big = 2**31
    with pytest.raises(ShapeError, match=r"V \+ 1 is 2147483649, over the int32 limit"):
        Circuit.from_edges(ints(0), ints(0), 1, big)
    with pytest.raises(ShapeError, match=r"U \+ 1 is 2147483649, over the int32 limit"):
        Circuit.from_edges(ints(0), ints(0), big, 1)
    with pytest.raises(ShapeError, match=r"V \+ 1 is 2147483649, over the int32 limit"):
        Circuit(ints(0, 1), ints(0), big)
    many = torch.empty(big, dtype=torch.int32, device="meta")
    with pytest.raises(ShapeError, match="N is 2147483648, over the int32 limit"):
        Circuit(ints(0, 1).to("meta"), many, 5)
    assert _checks.INT32_MAX == big - 1


def test_signatures_link_by_cosine_and_not_by_length() -> None:
    receivers = torch.tensor([[1.0, 0.0], [0.0, -3.0]])
    senders = torch.tensor([[5.0, 0.0], [1.0, 1.0], [0.0, 2.0]])
    # Distances 1 - cosine: 0, 0.29, 1 and 1, 1.71, 2.
    for truncation, edges in ((0.1, 1), (0.5, 2), (1.0, 4), (1.9, 5), (2.0, 6)):
        assert circuit_from_signatures(receivers, senders, truncation).num_edges == edges


def test_blocks_of_signatures_give_the_circuit_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    receivers, senders = (torch.randn(n, 5, generator=generator) for n in (23, 17))
    whole = circuit_from_signatures(receivers, senders, 0.7)
    monkeypatch.setattr("m2mkd.ops.circuit._BLOCK", 40)
    assert circuit_from_signatures(receivers, senders, 0.7) == whole


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_half_types_and_autocast_link_what_float32_links(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    receivers, senders = (torch.randn(n, 16, generator=generator).to(dtype) for n in (90, 110))
    for function in (circuit_from_signatures, reference.circuit_from_signatures):
        expected = function(receivers.float(), senders.float(), 0.9)
        assert function(receivers, senders, 0.9) == expected
        with torch.autocast("cpu", torch.bfloat16):
            assert function(receivers, senders, 0.9) == expected


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_signatures_of_a_diverged_model_are_refused(value: float) -> None:
    good, bad = torch.ones(2, 3), torch.tensor([[1.0, 2.0, value]])
    for pair in ((good, bad), (bad, good)):
        with pytest.raises(NotFiniteError, match="signatures hold NaN or infinity"):
            circuit_from_signatures(*pair, 0.9)
