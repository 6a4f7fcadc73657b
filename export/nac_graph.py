"""A NAC as a graph of constants: links as one bias per layer, codes and first states folded away.

In eval mode a NAC's circuits, codes and first states do not depend on the image. So links become a
dense bias on the attention scores (faster on ONNX Runtime than any sparse form, at every density
tried), the read-in's queries and keys become one constant matrix, and latents without a path to
the output are left out. `fold` then evaluates what is left of the codes.

Letters: B batch, H heads, U receivers, V senders, K head width, I token width, D state width.
"""

import types
from collections.abc import Callable
from typing import Any

import onnx_ir
import onnxscript.optimizer
import torch
import torch.nn.functional as F
from onnxscript import opset20, opset23
from torch import Tensor, nn

from m2mkd.export.errors import UnsupportedModelError
from m2mkd.models import NAC
from m2mkd.models.nac_pruning import keep_latents
from m2mkd.nn import LatentAttention, ReadInAttention
from m2mkd.nn.latent_attention import merge_heads, split_heads
from m2mkd.nn.modfc import Folded

# The first with Attention, which ONNX Runtime runs as one kernel on a GPU.
NAC_CUDA_OPSET = 23
# An edge that does not exist; its exponential is 0, and float16 can hold it.
_NO_EDGE = -1e4
# Constants up to this many numbers are evaluated when the graph is folded.
_FOLD_LIMIT = 1 << 28


@torch.library.custom_op("m2mkd_export::linked_attention", mutates_args=())
def linked_attention(q_BHUK: Tensor, k_BHVK: Tensor, v_BHVK: Tensor, bias_UV: Tensor) -> Tensor:
    """Attention with a constant bias per pair of receiver and sender, [B, H, U, K]."""
    return F.scaled_dot_product_attention(q_BHUK, k_BHVK, v_BHVK, attn_mask=bias_UV)


@linked_attention.register_fake
def _linked_attention_shape(q_BHUK: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(q_BHUK)


def check_nac(model: NAC) -> None:
    """Refuses what a graph cannot do.

    Raises:
        UnsupportedModelError: Eval mode draws random numbers.
    """
    samples = [model.kernel(i).options.eval_sampling for i in range(model.depth + 1)]
    if model.options.stochastic_eval or "relaxed_bernoulli" in samples:
        raise UnsupportedModelError(
            "this NAC draws random numbers in eval mode (stochastic_eval or eval_sampling), which "
            "a file cannot; set stochastic_eval: false and eval_sampling: none, and evaluate again"
        )


@torch.no_grad()
def without_unheard(model: NAC) -> NAC:
    """A NAC of the latents that have a path to the output; its logits are the same.

    A mediator that some heard mediator listens to is kept for all layers, so that what is left
    out is heard by nobody who is heard.
    """
    num_inputs = model.input_latents.num_latents
    inputs = torch.zeros(num_inputs, dtype=torch.bool)
    mediators = torch.zeros(model.mediator_latents.num_latents, dtype=torch.bool)
    for layer in reversed(range(model.depth + 1)):
        links_UV = model.circuit(layer).to_dense().cpu()
        receivers = links_UV.new_ones(links_UV.shape[0]) if layer == model.depth else mediators
        heard_V = links_UV[receivers].any(dim=0)
        if model.hears_inputs(layer):
            inputs |= heard_V[:num_inputs]
            heard_V = heard_V[num_inputs:]
        mediators |= heard_V
    # A kind of latents cannot be empty.
    inputs[0] |= not inputs.any()
    mediators[0] |= not mediators.any()
    return keep_latents(
        model, mediators=mediators.nonzero().flatten(), inputs=inputs.nonzero().flatten()
    )


@torch.no_grad()
def use_constant_graph(model: NAC) -> None:
    """Gives a NAC in eval mode the forms above; it is changed for good."""
    model.fix_circuits()
    model.links = nn.ModuleList(_Links(model, layer) for layer in range(model.depth + 1))
    model._edges = types.MethodType(_links_of, model)  # type: ignore[method-assign]
    for module in model.modules():
        if isinstance(module, LatentAttention):
            module._attend = _attend  # type: ignore[method-assign, assignment]
    attention = model.read_in.attention
    states_UD, codes_UC = model._seed(model.input_latents, 1)[0], model.input_latents.codes_of(0)
    key, value = attention.key.fold(codes_UC), attention.value.fold(codes_UC)
    if key is not None and value is not None:
        query_UO = attention.query(attention.receiver_norm(states_UD), codes_UC)
        attention.constants = _ReadInConstants(query_UO, key, value, attention.num_heads)
        attention._attend = types.MethodType(_read, attention)  # type: ignore[method-assign]


def nac_translations(opset: int) -> dict[Callable[..., Any], Callable[..., Any]]:
    """The table of `torch.onnx.export(custom_translation_table=...)` for one opset, 20 or 23."""
    translate = _attention_operator if opset >= 23 else _attention_steps
    return {torch.ops.m2mkd_export.linked_attention.default: translate}


def fold(graph_model: onnx_ir.Model) -> onnx_ir.Model:
    """Evaluates what depends on constants alone, so that codes and what modulates are gone."""
    while True:
        graph_model = onnxscript.optimizer.optimize(
            graph_model, input_size_limit=_FOLD_LIMIT, output_size_limit=_FOLD_LIMIT
        )
        # The optimiser knows no LayerNormalization, which codes pass through.
        constant = [node for node in graph_model.graph if _is_constant_norm(node)]
        if not constant:
            return graph_model
        for node in constant:
            _replace_norm(graph_model.graph, node)


def _is_constant_norm(node: onnx_ir.Node) -> bool:
    return node.op_type == "LayerNormalization" and all(
        value is None or value.const_value is not None for value in node.inputs
    )


def _replace_norm(graph: onnx_ir.Graph, node: onnx_ir.Node) -> None:
    """Puts the result of a LayerNormalization over the last dimension in its place."""
    x, *affine = (None if value is None else _numbers(value) for value in node.inputs)
    weight, bias = (*affine, None)[:2]
    assert x is not None
    weight, bias = (None if part is None else part.float() for part in (weight, bias))
    epsilon = node.attributes["epsilon"].as_float()
    normed = F.layer_norm(x.float(), x.shape[-1:], weight, bias, epsilon)
    old = node.outputs[0]
    array = normed.to(x.dtype).numpy()
    tensor = onnx_ir.tensor(array, name=f"{old.name}_folded")
    new = onnx_ir.Value(
        name=tensor.name,
        const_value=tensor,
        shape=onnx_ir.Shape(array.shape),
        type=onnx_ir.TensorType(tensor.dtype),
    )
    graph.register_initializer(new)
    onnx_ir.convenience.replace_all_uses_with(old, new)
    graph.remove(node, safe=True)


def _numbers(value: onnx_ir.Value) -> Tensor:
    assert value.const_value is not None
    return torch.from_numpy(value.const_value.numpy())


class _Links(nn.Module):
    """The links of a layer.

    Attributes:
        bias_UV: What is added to the scores.
        alive_U1: 0 for receivers without a link, whose messages are zero; None where all have one.
    """

    bias_UV: Tensor
    alive_U1: Tensor | None

    def __init__(self, model: NAC, layer: int) -> None:
        super().__init__()
        circuit, kernel = model.circuit(layer), model.kernel(layer)
        strength_N = kernel(*model.signatures(layer), circuit, 1)
        strength_N = strength_N.reshape(-1).clamp(min=_NO_EDGE)
        bias_UV = strength_N.new_full((circuit.num_receivers, circuit.num_senders), _NO_EDGE)
        bias_UV[circuit.receiver_of_edge.long(), circuit.sender.long()] = strength_N
        alive_U1 = (bias_UV > _NO_EDGE).any(dim=1, keepdim=True)
        self.register_buffer("bias_UV", bias_UV)
        self.register_buffer("alive_U1", None if alive_U1.all() else alive_U1.to(bias_UV.dtype))


class _ReadInConstants(nn.Module):
    """What the read-in computes from codes and first states alone.

    Attributes:
        keys_MI: Queries times keys, scaled, [H U, I].
        value_scale_UI: Scales of the tokens' mixtures.
        value_HIK: Weights of the values, per head.
        value_bias_H1K: Their biases; None for none.
        output_scale_HUK: Scales of the values before the biases; None for none.
    """

    def __init__(self, query_UO: Tensor, key: Folded, value: Folded, num_heads: int) -> None:
        super().__init__()
        if key.output_scale_UO is not None:
            query_UO = query_UO * key.output_scale_UO
        query_HUK = split_heads(query_UO[None], num_heads)[0]
        sizes = (num_heads, query_HUK.shape[2])
        keys_HUI = (query_HUK @ key.weight_OI.unflatten(0, sizes)) * key.input_scale_UI
        bias, scale = value.bias_O, value.output_scale_UO
        tensors = {
            "keys_MI": keys_HUI.flatten(0, 1) * sizes[1] ** -0.5,
            "value_scale_UI": value.input_scale_UI,
            "value_HIK": value.weight_OI.unflatten(0, sizes).transpose(1, 2).contiguous(),
            "value_bias_H1K": None if bias is None else bias.view(num_heads, 1, -1),
            "output_scale_HUK": None if scale is None else split_heads(scale[None], num_heads)[0],
        }
        for name, tensor in tensors.items():
            self.register_buffer(name, None if tensor is None else tensor.detach().clone())


def _read(
    attention: ReadInAttention, query_BUO: Tensor, tokens_BVI: Tensor, codes_UC: Tensor
) -> Tensor:
    """`ReadInAttention._attend` with constants in the place of queries and codes."""
    del query_BUO, codes_UC
    c: Any = attention.constants
    weights_BMV = (c.keys_MI @ tokens_BVI.transpose(1, 2)).softmax(dim=2)
    mixed_BHUI = (weights_BMV @ tokens_BVI).unflatten(1, (attention.num_heads, -1))
    out_BHUK = (mixed_BHUI * c.value_scale_UI) @ c.value_HIK
    if c.output_scale_HUK is not None:
        out_BHUK = out_BHUK * c.output_scale_HUK
    if c.value_bias_H1K is not None:
        out_BHUK = out_BHUK + c.value_bias_H1K
    return merge_heads(out_BHUK)


def _links_of(model: NAC, layer: int, circuits: Any, batch: int) -> Any:
    """What `NAC._edges` is replaced with."""
    del circuits, batch
    links: Any = model.links
    return links[layer]


def _attend(q_BHUK: Tensor, k_BHVK: Tensor, v_BHVK: Tensor, links: _Links) -> Tensor:
    out_BHUK: Tensor = linked_attention(q_BHUK, k_BHVK, v_BHVK, links.bias_UV)
    return out_BHUK if links.alive_U1 is None else out_BHUK * links.alive_U1


def _attention_operator(q: Any, k: Any, v: Any, bias: Any) -> Any:
    return opset23.Attention(q, k, v, bias)[0]


def _attention_steps(q: Any, k: Any, v: Any, bias: Any) -> Any:
    op: Any = opset20
    scale = op.Constant(value_float=int(q.shape[3]) ** -0.5)
    scores = op.MatMul(op.Mul(q, op.CastLike(scale, q)), op.Transpose(k, perm=[0, 1, 3, 2]))
    return op.MatMul(op.Softmax(op.Add(scores, bias), axis=-1), v)
