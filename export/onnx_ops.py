"""The experts as one operator while exporting, and its two ONNX forms.

While a model is traced, each `MoEMlp` calls `m2mkd_export::moe`, a custom operator whose eager
meaning is `m2mkd.ops.reference`. A translation then writes it as

- `contrib`: the operator `com.microsoft.MoE` of ONNX Runtime, for its CUDA kernels;
- `sorted`: standard operators that group the routed rows by expert and multiply only those.

Both choose experts with a float32 `TopK`, which prefers the lower expert index in ties as
`m2mkd.ops.topk_gate` does; the contrib operator's own choice prefers the higher.

Letters: T tokens, D width, H hidden width, E experts, K choices per token, M = T*K routed rows.
"""

import types
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import torch
from onnx.defs import OpSchema
from onnxscript import opset20 as op
from onnxscript.values import Op, Opset
from torch import Tensor, nn

from m2mkd.export.metadata import MoEForm
from m2mkd.nn import MoEMlp
from m2mkd.ops import reference

CONTRIB_DOMAIN = "com.microsoft"
OPSET = 20  # the first with Gelu

# The contrib operator has one GELU, the tanh form on CPU.
CONTRIB_ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu", "relu": "relu", "silu": "silu"}
# A router input that no softmax lets through, and that float16 can hold.
_NEVER = -1e4


@torch.library.custom_op("m2mkd_export::moe", mutates_args=())
def moe(
    x_TD: Tensor,
    logits_TE: Tensor,
    fc1_weight_EHD: Tensor,
    fc1_bias_EH: Tensor | None,
    fc2_weight_EDH: Tensor,
    fc2_bias_ED: Tensor | None,
    k: int,
    gate: str,
    activation: str,
) -> Tensor:
    """Routes every token to its k experts and combines what they return.

    Args:
        x_TD: Tokens, float32 or float16.
        logits_TE: Router logits, float32.
        fc1_weight_EHD, fc1_bias_EH, fc2_weight_EDH, fc2_bias_ED: Experts, in x's dtype.
        k: Experts per token.
        gate: A mode of `m2mkd.ops.topk_gate`.
        activation: `gelu`, `gelu_tanh`, `relu` or `silu`.

    Returns:
        [T, D] in x's dtype.
    """
    weights_TK, experts_TK = reference.topk_gate(logits_TE, k, gate)
    plan = reference.moe_plan(experts_TK, logits_TE.shape[1])
    return reference.moe_mlp(
        x_TD, weights_TK, plan, fc1_weight_EHD, fc1_bias_EH, fc2_weight_EDH, fc2_bias_ED, activation
    )


@moe.register_fake
def _moe_shape(x_TD: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x_TD)


def moe_layers(model: nn.Module) -> dict[str, MoEMlp]:
    """Returns the MoE layers of a model by module path."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, MoEMlp)}


def use_export_op(model: nn.Module) -> None:
    """Makes every MoE layer of `model` call the operator above; the model is changed for good."""
    for layer in moe_layers(model).values():
        layer.forward = types.MethodType(_forward, layer)  # type: ignore[method-assign]


def translations(form: MoEForm) -> dict[Callable[..., Any], Callable[..., Any]]:
    """The table of `torch.onnx.export(custom_translation_table=...)` for one form."""
    translate = {"contrib": _contrib, "sorted": _sorted}[form]
    return {torch.ops.m2mkd_export.moe.default: translate}


def _forward(layer: MoEMlp, x: Tensor) -> Tensor:
    tokens_TD = x.reshape(-1, x.shape[-1])
    logits_TE, _ = layer._logits(tokens_TD)
    out_TD: Tensor = moe(
        tokens_TD,
        logits_TE,
        layer.fc1_weight,
        layer.fc1_bias,
        layer.fc2_weight,
        layer.fc2_bias,
        layer.num_selected,
        layer.gate,
        layer.activation,
    )
    return out_TD.reshape(x.shape)


def _contrib(
    x: Any, logits: Any, w1: Any, b1: Any, w2: Any, b2: Any, k: int, gate: str, activation: str
) -> Any:
    kept, experts = _top(logits, k)
    # The operator chooses again, among scores in x's precision: with the others out of reach and
    # the kept ones relative to their maximum it can only confirm the choice made in float32.
    never = op.ConstantOfShape(op.Shape(logits), value=_tensor(np.array([_NEVER], np.float32)))
    relative = op.Sub(kept, op.ReduceMax(kept, _ints(1)))
    scores = op.CastLike(op.ScatterElements(never, experts, relative, axis=1), x)
    out = _MOE(
        x,
        scores,
        w1,
        b1,
        w2,
        b2,
        k=k,
        activation_type=CONTRIB_ACTIVATIONS[activation],
        normalize_routing_weights=1,
    )
    if gate == "softmax_all":
        mass = op.ReduceSum(_softmax_all(logits, experts), _ints(1))
        out = op.Mul(out, op.CastLike(mass, x))
    return out


def _sorted(
    x: Any, logits: Any, w1: Any, b1: Any, w2: Any, b2: Any, k: int, gate: str, activation: str
) -> Any:
    num_experts, _, width = (int(size) for size in w1.shape)
    kept, experts = _top(logits, k)
    weights = _softmax_all(logits, experts) if gate == "softmax_all" else op.Softmax(kept)

    # Row e of the comparison marks the choices of expert e, so NonZero, which goes row by row,
    # lists all choices grouped by expert and in token order: `choice` has M entries t * K + k.
    numbers = op.Constant(value=_tensor(np.arange(num_experts)[:, None]))
    is_mine = op.Equal(op.Reshape(experts, _ints(1, -1)), numbers)
    choice = op.Gather(op.NonZero(is_mine), _int(1))
    ones: Any = op.Cast(is_mine, to=onnx.TensorProto.INT64)
    counts = op.ReduceSum(ones, _ints(1), keepdims=0)
    rows = _split(op.Gather(x, op.Div(choice, _int(k))), num_experts, counts)

    layers = zip(rows, *(_per_expert(part, num_experts) for part in (w1, b1, w2, b2)), strict=True)
    results = [
        op.Gemm(_activate(op.Gemm(row, w1_e, b1_e, transB=1), activation), w2_e, b2_e, transB=1)
        for row, w1_e, b1_e, w2_e, b2_e in layers
    ]
    result = op.Concat(*results, axis=0) if num_experts > 1 else results[0]

    places = op.Range(_int(0), op.Squeeze(op.Shape(choice)), _int(1))
    row_of_choice = op.ScatterElements(choice, choice, places)
    picked = op.Reshape(op.Gather(result, row_of_choice), _ints(-1, k, width))
    weighted = op.Mul(picked, op.CastLike(op.Unsqueeze(weights, _ints(-1)), x))
    return op.ReduceSum(weighted, _ints(1), keepdims=0)


def _top(logits: Any, k: int) -> tuple[Any, Any]:
    kept, experts = op.TopK(logits, _ints(k), axis=-1)
    return kept, experts


def _softmax_all(logits: Any, experts: Any) -> Any:
    return op.GatherElements(op.Softmax(logits), experts, axis=1)


def _per_expert(stacked: Any, num_experts: int) -> list[Any]:
    """The E slices of a parameter, or of an absent bias."""
    if stacked is None:
        return [None] * num_experts
    return [op.Squeeze(part, _ints(0)) for part in _split(stacked, num_experts)]


def _split(value: Any, num_parts: int, sizes: Any = None) -> list[Any]:
    if num_parts == 1:
        return [value]
    parts = op.Split(value, sizes, axis=0, num_outputs=num_parts)
    if sizes is not None:
        # The builder learns the number of outputs from an attribute that ONNX forbids beside sizes.
        parts[0].producer().attributes.pop("num_outputs")
    return list(parts)


def _activate(hidden: Any, activation: str) -> Any:
    if activation == "relu":
        return op.Relu(hidden)
    if activation == "silu":
        return op.Mul(hidden, op.Sigmoid(hidden))
    return op.Gelu(hidden, approximate="tanh" if activation == "gelu_tanh" else "none")


def _int(value: int) -> Any:
    return op.Constant(value_int=value)


def _ints(*values: int) -> Any:
    return op.Constant(value_ints=list(values))


def _tensor(values: Any) -> onnx.TensorProto:
    return onnx.numpy_helper.from_array(values)


def _contrib_operator() -> Op:
    """`com.microsoft.MoE`, described for onnxscript, which knows no contrib operators."""
    optional = OpSchema.FormalParameterOption.Optional
    schema = OpSchema(
        "MoE",
        CONTRIB_DOMAIN,
        1,
        inputs=[
            OpSchema.FormalParameter("input", "T"),
            OpSchema.FormalParameter("router_probs", "T"),
            OpSchema.FormalParameter("fc1_experts_weights", "T"),
            OpSchema.FormalParameter("fc1_experts_bias", "T", param_option=optional),
            OpSchema.FormalParameter("fc2_experts_weights", "T"),
            OpSchema.FormalParameter("fc2_experts_bias", "T", param_option=optional),
        ],
        outputs=[OpSchema.FormalParameter("output", "T")],
        type_constraints=[("T", ["tensor(float)", "tensor(float16)"], "tokens and experts")],
        attributes=[
            OpSchema.Attribute("k", OpSchema.AttrType.INT, required=True),
            OpSchema.Attribute("activation_type", OpSchema.AttrType.STRING, required=True),
            OpSchema.Attribute("normalize_routing_weights", OpSchema.AttrType.INT, required=True),
        ],
    )
    return Op(Opset(CONTRIB_DOMAIN, 1), "MoE", schema)


_MOE = _contrib_operator()
