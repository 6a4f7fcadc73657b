"""Layers that codes modulate, and read-in attention on top of them."""

import pytest
import torch

from m2mkd.errors import ConfigError
from m2mkd.nn import FCOptions, ReadInAttention

KINDS = {
    "published": FCOptions(),
    "default": FCOptions(gain=1.0, learn_gain=False, add_one=False),
    "l2 scale": FCOptions(scale_norm="l2"),
    "weights of unit length": FCOptions(kind="wmodfc"),
    "plain": FCOptions(kind="fc"),
    "normed products": FCOptions(product_norm="ln"),
    "products of unit length": FCOptions(product_norm="l2"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_folded_layer_is_the_layer(kind: str) -> None:
    layer = KINDS[kind].build(6, 5, 4)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    x, codes = torch.randn(3, 7, 6), torch.randn(7, 4)
    folded = layer.fold(codes)
    if kind in ("normed products", "products of unit length"):
        assert folded is None
        return
    y = (x * folded.input_scale_UI) @ folded.weight_OI.T
    if folded.output_scale_UO is not None:
        y = y * folded.output_scale_UO
    torch.testing.assert_close(y + folded.bias_O, layer(x, codes))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("qkv_bias", [False, True])
def test_read_in_attention_is_that_of_keys_and_values_for_every_pair(
    kind: str, qkv_bias: bool
) -> None:
    layer = ReadInAttention(
        5,
        8,
        4,
        num_heads=2,
        head_dim=3,
        residual=True,
        qkv_bias=qkv_bias,
        layer_scale=1.0,
        fc=KINDS[kind],
    )
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    states, codes, tokens = torch.randn(3, 6, 8), torch.randn(6, 4), torch.randn(3, 9, 5)
    pairs = layer.sender_norm(tokens)[:, :, None].expand(-1, -1, 6, -1)
    k, v = (m(pairs, codes).unflatten(3, (2, 3)) for m in (layer.key, layer.value))
    q = layer.query(layer.receiver_norm(states), codes).unflatten(2, (2, 3))
    weights = (torch.einsum("buhk,bvuhk->buhv", q, k) * 3**-0.5).softmax(3)
    messages = torch.einsum("buhv,bvuhk->buhk", weights, v).flatten(2)
    expected = states + layer.layer_scale(layer.exit(messages, codes))
    torch.testing.assert_close(layer(states, codes, tokens), expected)


def test_a_gain_of_zero_plus_one_is_a_plain_layer() -> None:
    layer = FCOptions(gain=0.0).build(6, 5, 4)
    x = torch.randn(2, 7, 6)
    plain = torch.nn.functional.linear(x, layer.weight, layer.bias)
    torch.testing.assert_close(layer(x, torch.randn(7, 4)), plain)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale_norm": "rms"}, "scale_norm='rms' is none of ln, l2"),
        ({"product_norm": "tanh"}, "product_norm='tanh' is none of none, ln, l2"),
        ({"kind": "modfcc"}, "did you mean 'modfc'"),
    ],
)
def test_unknown_choices_are_named(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FCOptions(**options).build(6, 5, 4)
