"""The tests of every op, with the CUDA kernels on the emulator in place of the CPU's."""

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import emulation
import op_testing
import pytest
import test_circuit_attention
import test_moe_dispatch
import torch
from op_testing import OpTests, evaluate, needs_kernels, normal

pytestmark = needs_kernels

# About values and memory; the rest is the same for all devices.
KEPT = {
    "test_values_and_every_gradient_equal_the_reference",
    "test_any_problem_equals_the_reference",
    "test_strided_inputs_are_accepted",
    "test_each_input_may_lie_at_any_address",
    "test_upstream_gradients_of_any_layout_are_accepted",
    "test_each_saved_tensor_may_come_back_at_any_address",
    "test_frozen_inputs_do_not_change_the_gradients_of_others",
    "test_without_gradients_the_values_are_the_same",
    "test_its_kernels_refuse_tensors_of_another_device",
    # Of circuit attention alone:
    "test_every_number_of_edges_of_a_receiver_equals_the_reference",
    "test_scale_multiplies_scores_and_not_biases",
    "test_large_scores_do_not_overflow",
    "test_nan_is_not_hidden",
    "test_an_infinite_value_is_not_made_nan",
}


@pytest.fixture(autouse=True)
def emulated() -> Iterator[None]:
    """Replaces the kernels for one test; pytest shows the seed where it fails."""
    print(f"repeat with M2MKD_EMULATOR_SEED={emulation.SEED}")
    torch.use_deterministic_algorithms(True)  # fills what wrappers leave empty with NaN
    with emulation.kernels():
        yield
    torch.use_deterministic_algorithms(False)


class Emulated:
    """What the emulator adds to an op's tests."""

    def pytest_generate_tests(self: Any, metafunc: pytest.Metafunc) -> None:
        """As for other devices, but on this one only."""
        choices = {"problem": self.problems, "dtype": self.dtypes, "device": ["cpu"]}
        for argument, values in choices.items():
            if argument in metafunc.fixturenames:
                metafunc.parametrize(argument, values)

    def test_every_schedule_gives_the_same_bits(self: Any) -> None:
        for dtype in (torch.float32, torch.bfloat16):
            inputs = self.inputs(self.compiled[-1], dtype, "cpu")
            emulation.set_seed(1)
            first = evaluate(self.op, inputs, normal)
            for seed in (2, 3, 4):
                emulation.set_seed(seed)
                again = evaluate(self.op, inputs, normal)
                assert all(torch.equal(first[name], again[name]) for name in first)


def classes() -> Iterator[type[OpTests]]:
    """The test classes of all ops that have kernels and use them."""
    for path in sorted((Path(__file__).parents[1] / "ops").glob("test_*.py")):
        for value in vars(importlib.import_module(path.stem)).values():
            if isinstance(value, type) and issubclass(value, OpTests) and hasattr(value, "name"):
                has_kernels = value.test_its_registered_ops_pass_opcheck is not None
                if has_kernels and op_testing.REGISTERED[value.name]:
                    yield value


for base in classes():
    others = {name: None for name in dir(base) if name.startswith("test_") and name not in KEPT}
    globals()[base.__name__] = type(base.__name__, (Emulated, base), others)


test_padding = test_moe_dispatch.test_padding_rows_are_zero_and_get_zero_gradients


@pytest.mark.parametrize("width", [32, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_circuits_of_widths_that_fill_whole_groups_of_lanes(width: int, dtype: torch.dtype) -> None:
    problem = test_circuit_attention.Problem(1, 2, 20, 24, width)
    globals()["TestSparse"]().check_agreement(
        test_circuit_attention.attention_inputs(problem, dtype)
    )


@pytest.mark.parametrize("sizes", [(24, 110), (110, 24)])
def test_circuits_that_ask_for_more_than_the_usual_shared_memory(sizes: tuple[int, int]) -> None:
    # 2 tables of 110 rows of 256 bytes are 55 KiB.
    problem = test_circuit_attention.Problem(1, 2, *sizes, 64, "complete", "shared")
    globals()["TestSparse"]().check_agreement(
        test_circuit_attention.attention_inputs(problem, torch.float32)
    )


@pytest.mark.parametrize("rows", [1, 5])
def test_grouped_gemm_takes_views_at_any_address_and_stride(rows: int) -> None:
    def view(*sizes: int) -> torch.Tensor:
        wide = normal(torch.empty(*sizes[:-1], sizes[-1] + 3, dtype=torch.bfloat16))
        # Of one row it is contiguous as it is, though its stride is odd.
        part = wide[..., 1:-2]
        return (part if rows == 1 else wide.flatten()[1:][: part.numel()].view(sizes)).detach()

    inputs = {
        "rows_MD": view(rows, 16).requires_grad_(),
        "weight_EHD": normal(torch.empty(385, dtype=torch.bfloat16))[1:].view(3, 8, 16),
        "bias_EH": None,
        "offsets": torch.tensor([0, rows // 2, rows, rows], dtype=torch.int32),
    }
    assert inputs["rows_MD"].data_ptr() % 16 and inputs["weight_EHD"].data_ptr() % 16
    inputs["weight_EHD"].requires_grad_()
    globals()["TestGroupedLinear"]().check_agreement(inputs, lambda out: view(*out.shape))


def test_rows_too_wide_for_loops_that_count_in_32_bits_are_refused() -> None:
    nowhere = torch.empty(0, dtype=torch.int32)

    def gather(width: int) -> torch.Tensor:
        return torch.ops.m2mkd.moe_gather(torch.empty(0, width), nowhere[:, None], nowhere)

    assert gather(2**31 - 257).shape == (0, 2**31 - 257)
    with pytest.raises(RuntimeError, match="D is 2147483648, over the int32 limit"):
        gather(2**31 - 256)


def test_values_that_only_a_trace_lets_through_stay_within_bounds() -> None:
    experts = torch.tensor([[0], [7], [-2], [1]], dtype=torch.int32)
    row_of, _, offsets = torch.ops.m2mkd.moe_plan(experts, None, 2, None)
    assert row_of.flatten().tolist() == [0, -1, -1, 1]
    assert offsets.tolist() == [0, 1, 2]
    logits = torch.tensor([[torch.nan, 1.0, 2.0], [torch.nan] * 3])
    _, chosen = torch.ops.m2mkd.topk_gate(logits, 2, "softmax_all")
    assert chosen.tolist() == [[2, 1], [0, 1]]
