"""Both ONNX forms of the experts, against the PyTorch layer, for every setting it has."""

import copy
import functools
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from m2mkd.export.onnx_ops import OPSET, translations, use_export_op
from m2mkd.nn import MoEMlp

WIDTH, HIDDEN, TOKENS = 8, 16, 5
TOLERANCE = {"fp32": 2e-6, "fp16": 5e-3}  # outputs are about 1; float16 has 11 bits


def layer(*, num_experts: int = 3, activation: str = "gelu_tanh", **settings: Any) -> MoEMlp:
    made = MoEMlp(WIDTH, HIDDEN, num_experts=num_experts, activation=activation, **settings)
    nn.init.normal_(made.router.weight)
    return made


def tied_layer() -> MoEMlp:
    """Experts 1 and 2 have the same logit, the highest, for every token."""
    made = layer(num_selected=1)
    with torch.no_grad():
        made.router.weight.zero_()
        made.router.bias.copy_(torch.tensor([0.0, 1.0, 1.0]))
    return made


def high_layer(gate: str) -> MoEMlp:
    """Logits near 1000, where float16 has steps of a half."""
    made = layer(num_selected=2, gate=gate)
    nn.init.constant_(made.router.bias, 1000.0)
    return made


def variants() -> dict[str, MoEMlp]:
    """The layers by name, in the order of the graph's outputs."""
    gates = ("softmax_selected", "softmax_all")
    made = {f"{gate} k{k}": layer(gate=gate, num_selected=k) for gate in gates for k in (1, 2, 3)}
    made["softmax_all_renorm k2"] = layer(gate="softmax_all_renorm", num_selected=2)
    made |= {name: layer(activation=name) for name in ("gelu", "relu", "silu")}
    made |= {f"high {gate}": high_layer(gate) for gate in gates}
    made["no bias"] = layer(bias=False)
    made["one expert"] = layer(num_experts=1, num_selected=1)
    made["tied"] = tied_layer()
    return made


VARIANTS = list(variants())
# Casts are what float16 adds, so fewer settings show whether they are right.
HALF = [
    "softmax_selected k2",
    "softmax_all k2",
    "high softmax_selected",
    "high softmax_all",
    "tied",
]
CASES = [("fp32", name) for name in VARIANTS] + [("fp16", name) for name in HALF]


class Side(nn.Module):
    """Some layers on the same tokens."""

    def __init__(self, layers: dict[str, MoEMlp], dtype: torch.dtype) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers.values())
        self.dtype = dtype
        for each in self.layers:
            router = copy.deepcopy(each.router)
            each.to(dtype)
            each.router = router

    def forward(self, x: Tensor) -> list[Tensor]:
        return [each(x.to(self.dtype)).float() for each in self.layers]


@pytest.fixture(scope="module")
def layers() -> dict[str, MoEMlp]:
    torch.manual_seed(0)
    return variants()


@pytest.fixture(scope="module")
def sessions(layers: dict[str, MoEMlp], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A function from form and precision to a runtime session of all variants."""
    folder = tmp_path_factory.mktemp("forms")

    @functools.cache
    def make(form: str, precision: str) -> Any:
        names = HALF if precision == "fp16" else VARIANTS
        side = Side(
            {name: copy.deepcopy(layers[name]) for name in names},
            torch.float16 if precision == "fp16" else torch.float32,
        )
        use_export_op(side)
        program = torch.onnx.export(
            side.eval(),
            (torch.zeros(2, TOKENS, WIDTH),),
            dynamo=True,
            opset_version=OPSET,
            input_names=["x"],
            output_names=names,
            dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
            custom_translation_table=translations(form),
            verbose=False,
        )
        program.save(folder / "side.onnx")
        return onnxruntime.InferenceSession(
            folder / "side.onnx", providers=["CPUExecutionProvider"]
        )

    return make


def expected_layer(layers: dict[str, MoEMlp], variant: str, form: str) -> MoEMlp:
    """The layer whose values the form has: the contrib operator's GELU is the tanh form."""
    if (variant, form) != ("gelu", "contrib"):
        return layers[variant]
    tanh = copy.deepcopy(layers[variant])
    tanh.activation = "gelu_tanh"
    return tanh


@torch.no_grad()
@pytest.mark.parametrize(("precision", "variant"), CASES)
@pytest.mark.parametrize("form", ["contrib", "sorted"])
def test_the_form_computes_what_the_layer_computes(
    form: str, precision: str, variant: str, sessions: Any, layers: dict[str, MoEMlp]
) -> None:
    session = sessions(form, precision)
    for batch in (1, 3, 8):
        x = torch.randn(batch, TOKENS, WIDTH)
        expected = expected_layer(layers, variant, form)(x).numpy()
        (found,) = session.run([variant], {"x": x.numpy()})
        assert np.abs(expected).max() > 0.1
        np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE[precision])


@torch.no_grad()
def test_the_two_forms_of_gelu_differ_by_more_than_the_tolerance(layers: Any) -> None:
    x = torch.randn(8, TOKENS, WIDTH)
    erf, tanh = (expected_layer(layers, "gelu", form)(x) for form in ("sorted", "contrib"))
    assert (erf - tanh).abs().max() > 10 * TOLERANCE["fp32"]


@torch.no_grad()
def test_the_tied_layer_depends_on_which_expert_wins(layers: dict[str, MoEMlp]) -> None:
    """Guards the variant `tied`: another choice would show."""
    x = torch.randn(2, TOKENS, WIDTH)
    other = copy.deepcopy(layers["tied"])
    other.router.bias.copy_(torch.tensor([0.0, 1.0, 2.0]))
    assert (layers["tied"](x) - other(x)).abs().max() > 0.05


def test_while_tracing_the_layer_is_one_operator(layers: dict[str, MoEMlp]) -> None:
    replaced = copy.deepcopy(layers["relu"])
    use_export_op(replaced)
    graph = torch.export.export(replaced, (torch.zeros(2, TOKENS, WIDTH),)).graph
    calls = [node for node in graph.nodes if node.target is torch.ops.m2mkd_export.moe.default]
    assert len(calls) == 1


@torch.no_grad()
@pytest.mark.parametrize("variant", ["softmax_all k2", "gelu", "no bias"])
def test_the_traced_operator_means_the_same_in_pytorch(
    variant: str, layers: dict[str, MoEMlp]
) -> None:
    x = torch.randn(3, TOKENS, WIDTH)
    replaced = copy.deepcopy(layers[variant])
    use_export_op(replaced)
    torch.testing.assert_close(replaced(x), layers[variant](x))
