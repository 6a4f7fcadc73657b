"""What is really in a written graph: operators, expert weights, precision, inputs and outputs.

E experts, D width, H hidden width.
"""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import torch
from torch import nn

from m2mkd.export.errors import InterfaceError, InventoryError, LayoutError
from m2mkd.export.metadata import MoEForm
from m2mkd.export.onnx_ops import (
    CONTRIB_ACTIVATIONS,
    CONTRIB_DOMAIN,
    OPSET,
    moe_layers,
)
from m2mkd.export.session import INPUT, OUTPUT
from m2mkd.nn import MoEMlp


def check_file(
    path: Path, model: nn.Module, *, form: MoEForm, precision: str, opset: int = OPSET
) -> dict[str, int]:
    """Checks a file against the network it was written from.

    Args:
        path: An ONNX file.
        model: The network in float32; its experts are compared with the file's value by value.
        form: What the experts should have become.
        precision: `fp32` or `fp16`.
        opset: Version of the standard operators that was asked for.

    Returns:
        How often each operator occurs.

    Raises:
        InventoryError: Operators, versions or precisions other than asked for.
        LayoutError: Expert weights that are missing, transposed or changed.
    """
    file = onnx_ir.load(path)
    layers = moe_layers(model)
    if file.opset_imports.get("") != opset:
        raise InventoryError(f"the graph uses opset {file.opset_imports.get('')}, not {opset}")
    counts = Counter(
        f"{node.domain}.{node.op_type}" if node.domain else node.op_type for node in file.graph
    )
    _check_operators(counts, layers, form)
    if form == "contrib":
        _check_contrib_nodes(file.graph, layers)
    for name, layer in layers.items():
        _check_experts(file.graph, name, layer, precision)
    _check_precision(file.graph, layers, precision)
    return dict(counts)


def check_interface(session: Any, *, input_size: list[int], num_classes: int) -> None:
    """Checks the names, types and shapes that a runtime session shows.

    Args:
        session: An ONNX Runtime session.
        input_size: Channels, height, width.
        num_classes: Number of logits.

    Raises:
        InterfaceError: They are not `image` [batch, C, H, W] and `logits` [batch, classes], float32
            with a free batch size.
    """
    expected = [(INPUT, input_size), (OUTPUT, [num_classes])]
    for (name, sizes), found in zip(
        expected, [_only(session.get_inputs()), _only(session.get_outputs())], strict=True
    ):
        is_right = (
            found.name == name
            and found.type == "tensor(float)"
            and isinstance(found.shape[0], str)
            and found.shape[1:] == sizes
        )
        if not is_right:
            raise InterfaceError(
                f"the file has '{found.name}' {found.type} {found.shape}, expected '{name}' "
                f"tensor(float) ['batch', {', '.join(map(str, sizes))}]"
            )


def _only(values: list[Any]) -> Any:
    if len(values) != 1:
        raise InterfaceError(f"the file has {len(values)} inputs or outputs, expected one of each")
    return values[0]


def _check_operators(counts: Counter[str], layers: dict[str, MoEMlp], form: MoEForm) -> None:
    contrib = f"{CONTRIB_DOMAIN}.MoE"
    expected = {contrib: len(layers), "NonZero": 0}
    if form == "sorted":
        expected = {contrib: 0, "NonZero": len(layers)}
    for name, count in expected.items():
        if counts[name] != count:
            raise InventoryError(
                f"the graph has {counts[name]} {name} nodes, but {count} were expected for "
                f"{len(layers)} MoE layers in {form} form"
            )
    others = [name for name in counts if "." in name and name != contrib]
    if others:
        raise InventoryError(f"the graph has operators that runtimes may lack: {', '.join(others)}")


def _check_contrib_nodes(graph: onnx_ir.Graph, layers: dict[str, MoEMlp]) -> None:
    nodes = [node for node in graph if node.domain == CONTRIB_DOMAIN]
    for node, (name, layer) in zip(nodes, layers.items(), strict=True):
        found = {key: attribute.value for key, attribute in node.attributes.items()}
        expected = {
            "k": layer.num_selected,
            "activation_type": CONTRIB_ACTIVATIONS[layer.activation],
            "normalize_routing_weights": 1,
        }
        if found != expected:
            raise InventoryError(f"{name}: the MoE node has {found}, expected {expected}")
        weights = [None if value is None else value.name for value in node.inputs[2:5:2]]
        if weights != [f"{name}.fc1_weight", f"{name}.fc2_weight"]:
            raise LayoutError(f"{name}: the MoE node reads weights {weights}")


def _check_experts(graph: onnx_ir.Graph, name: str, layer: MoEMlp, precision: str) -> None:
    # The runtime takes [E, D, H] and [E, H, D] as well and computes garbage from them.
    for part in ("fc1_weight", "fc2_weight"):
        value = graph.initializers.get(f"{name}.{part}")
        if value is None or value.const_value is None:
            raise LayoutError(f"{name}.{part} is not in the graph")
        parameter = layer.get_parameter(part).detach().cpu()
        expected = _in_precision(parameter, precision).numpy()
        found = value.const_value.numpy()
        if found.shape != expected.shape:
            raise LayoutError(
                f"{name}.{part} has shape {list(found.shape)}, expected "
                f"{'[E, H, D]' if part == 'fc1_weight' else '[E, D, H]'} = {list(expected.shape)}"
            )
        if not np.array_equal(found, expected):
            raise LayoutError(f"{name}.{part} in the graph differs from the trained weights")


def _check_precision(graph: onnx_ir.Graph, layers: dict[str, MoEMlp], precision: str) -> None:
    routers = tuple(f"{name}.router" for name in layers)
    wrong = onnx_ir.DataType.FLOAT if precision == "fp16" else onnx_ir.DataType.FLOAT16
    for name, value in graph.initializers.items():
        tensor = value.const_value
        # Scalars belong to the float32 routing, or are constants that weigh nothing.
        if tensor is None or len(tensor.shape) < 2 or name.startswith(routers):
            continue
        if tensor.dtype == wrong:
            raise InventoryError(f"{name} is {tensor.dtype}, in a file of precision {precision}")


def _in_precision(tensor: torch.Tensor, precision: str) -> torch.Tensor:
    return tensor.half() if precision == "fp16" else tensor.float()
