"""Attention between latents, and from latents to tokens, with projections that codes modulate.

Neural Attentive Circuits (arXiv 2210.08031 sections 3.1 and 3.2). Letters: B batch, H heads,
U receivers, V senders, D state width, I token width, C code width, K head width.
"""

import torch.nn.functional as F
from timm.layers import DropPath, LayerScale
from torch import Tensor, nn

from m2mkd import ops
from m2mkd.nn.kernel import Edges
from m2mkd.nn.modfc import FCOptions
from m2mkd.nn.modulated import Normed


class LatentAttention(nn.Module):
    """Receivers gather messages from senders: along a circuit, or from all of them without one.

    Args:
        state_dim: D.
        code_dim: C.
        num_heads: H.
        head_dim: K.
        residual: Whether the receivers' states are added to the messages.
        share_norm: Whether one LayerNorm serves receivers and senders.
        qkv_bias: Whether queries, keys and values have biases; the exit layer always has.
        layer_scale: Initial factor of the messages; None for no such layer.
        drop_path: Rate of stochastic depth, applied to the messages.
        fc: The modulated layer.

    Attributes:
        impl: Which `ops.circuit_attention` runs.
    """

    def __init__(
        self,
        state_dim: int,
        code_dim: int,
        *,
        num_heads: int,
        head_dim: int,
        residual: bool,
        share_norm: bool,
        qkv_bias: bool,
        layer_scale: float | None,
        drop_path: float,
        fc: FCOptions,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.residual = residual
        self.impl = "auto"
        inner = num_heads * head_dim
        self.receiver_norm = nn.LayerNorm(state_dim)
        self.sender_norm = None if share_norm else nn.LayerNorm(state_dim)
        self.query = fc.build(state_dim, inner, code_dim, bias=qkv_bias)
        self.key = fc.build(state_dim, inner, code_dim, bias=qkv_bias)
        self.value = fc.build(state_dim, inner, code_dim, bias=qkv_bias)
        self.exit = fc.build(inner, state_dim, code_dim)
        self.layer_scale = make_layer_scale(state_dim, layer_scale)
        self.drop_path = DropPath(drop_path)

    def forward(
        self,
        receivers_BUD: Tensor,
        receiver_codes_UC: Tensor,
        senders_BVD: Tensor,
        sender_codes_VC: Tensor,
        edges: Edges | None = None,
        *,
        receivers_send: bool = False,
    ) -> Tensor:
        """The receivers' states [B, U, D] after one round of messages.

        Args:
            receivers_BUD: States of the receivers.
            receiver_codes_UC: Their codes, [U, C], or [1, C] for one code for all.
            senders_BVD: States of the senders.
            sender_codes_VC: Their codes, [V, C] or [1, C].
            edges: Who hears whom, and how well; None for everyone alike.
            receivers_send: Whether the last senders are the receivers, so that one norm for both
                is computed once.
        """
        if self.sender_norm is not None:
            receiver_BUD = Normed.by(self.receiver_norm, receivers_BUD)
            sender_BVD = Normed.by(self.sender_norm, senders_BVD)
        else:
            sender_BVD = Normed.by(self.receiver_norm, senders_BVD)
            receiver_BUD = (
                sender_BVD.last(receivers_BUD.shape[1])
                if receivers_send
                else Normed.by(self.receiver_norm, receivers_BUD)
            )
        q_BHUK = split_heads(self.query(receiver_BUD, receiver_codes_UC), self.num_heads)
        k_BHVK = split_heads(self.key(sender_BVD, sender_codes_VC), self.num_heads)
        v_BHVK = split_heads(self.value(sender_BVD, sender_codes_VC), self.num_heads)
        out_BHUK = self._attend(q_BHUK, k_BHVK, v_BHVK, edges)
        messages: Tensor = self.exit(
            out_BHUK,
            receiver_codes_UC,
            activation="heads",
            output_scale=gamma_of(self.layer_scale),
        )
        return receivers_BUD + self.drop_path(messages) if self.residual else messages

    def _attend(
        self, q_BHUK: Tensor, k_BHVK: Tensor, v_BHVK: Tensor, edges: Edges | None
    ) -> Tensor:
        if edges is None:
            return F.scaled_dot_product_attention(q_BHUK, k_BHVK, v_BHVK)
        return ops.circuit_attention(
            q_BHUK, k_BHVK, v_BHVK, edges.circuit, edges.bias, impl=self.impl
        )


class ReadInAttention(nn.Module):
    """Latents attend to tokens through keys and values of their own, which codes modulate.

    The layers are folded (`ops.read_in_attention`): no key is made for a pair of token and latent.

    Args:
        token_dim: I.
        state_dim: D.
        code_dim: C.
        num_heads: H.
        head_dim: K.
        residual: Whether the latents' states are added to the messages.
        qkv_bias: Whether queries, keys and values have biases.
        layer_scale: Initial factor of the messages; None for no such layer.
        fc: The modulated layer.
    """

    def __init__(
        self,
        token_dim: int,
        state_dim: int,
        code_dim: int,
        *,
        num_heads: int,
        head_dim: int,
        residual: bool,
        qkv_bias: bool,
        layer_scale: float | None,
        fc: FCOptions,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.residual = residual
        inner = num_heads * head_dim
        self.receiver_norm = nn.LayerNorm(state_dim)
        self.sender_norm = nn.LayerNorm(token_dim)
        self.query = fc.build(state_dim, inner, code_dim, bias=qkv_bias)
        self.key = fc.build(token_dim, inner, code_dim, bias=qkv_bias)
        self.value = fc.build(token_dim, inner, code_dim, bias=qkv_bias)
        self.exit = fc.build(inner, state_dim, code_dim)
        self.layer_scale = make_layer_scale(state_dim, layer_scale)

    def forward(self, states_BUD: Tensor, codes_UC: Tensor, tokens_BVI: Tensor) -> Tensor:
        """The latents' states [B, U, D] after reading the tokens.

        Args:
            states_BUD: States of the latents.
            codes_UC: Their codes, [U, C], or [1, C] for one code for all.
            tokens_BVI: Tokens.
        """
        codes_UC = codes_UC.expand(states_BUD.shape[1], -1)
        query = self.query(self.receiver_norm(states_BUD), codes_UC)
        out_BUK = self._attend(query, self.sender_norm(tokens_BVI), codes_UC)
        messages: Tensor = self.exit(out_BUK, codes_UC, output_scale=gamma_of(self.layer_scale))
        return states_BUD + messages if self.residual else messages

    def _attend(self, query_BUK: Tensor, tokens_BVI: Tensor, codes_UC: Tensor) -> Tensor:
        key, value = self.key.fold(codes_UC), self.value.fold(codes_UC)
        if key is None or value is None:
            return self._attend_unfolded(query_BUK, tokens_BVI, codes_UC)
        if self.training and key.bias_O is not None:
            # It cancels in the softmax. A gradient of zero keeps data-parallel training content,
            # which wants one for every parameter.
            query_BUK = query_BUK + 0.0 * key.bias_O
        if key.output_scale_UO is not None:
            query_BUK = query_BUK * key.output_scale_UO
        value_bias = value.bias_O if value.output_scale_UO is None else None
        out_BHUK = ops.read_in_attention(
            split_heads(query_BUK, self.num_heads),
            tokens_BVI,
            key.weight_OI,
            value.weight_OI,
            key.input_scale_UI,
            value.input_scale_UI,
            value_bias,
        )
        out_BUK = merge_heads(out_BHUK)
        if value.output_scale_UO is not None:
            out_BUK = out_BUK * value.output_scale_UO
            out_BUK = out_BUK if value.bias_O is None else out_BUK + value.bias_O
        return out_BUK

    def _attend_unfolded(self, query_BUK: Tensor, tokens_BVI: Tensor, codes_UC: Tensor) -> Tensor:
        """With keys and values for every pair, where a norm of x * s forbids folding."""
        tokens_BVUI = tokens_BVI[:, :, None].expand(-1, -1, codes_UC.shape[0], -1)
        # Heads before latents, and each latent its own batch entry of one query: [B, U, H, V, K].
        k, v = (
            layer(tokens_BVUI, codes_UC).unflatten(3, (self.num_heads, -1)).permute(0, 2, 3, 1, 4)
            for layer in (self.key, self.value)
        )
        q = query_BUK.unflatten(2, (self.num_heads, 1, -1)).to(k.dtype)
        return F.scaled_dot_product_attention(q, k, v).flatten(2)


def make_layer_scale(dim: int, initial: float | None) -> LayerScale | None:
    """A learned factor per channel, or None where there is no initial value.

    It is not called: the layer before it takes its factors, see `gamma_of`.
    """
    return None if initial is None else LayerScale(dim, init_values=initial)


def gamma_of(layer_scale: LayerScale | None) -> Tensor | None:
    """The factors [D] of a layer scale, or None."""
    return None if layer_scale is None else layer_scale.gamma


def split_heads(x_BUI: Tensor, num_heads: int) -> Tensor:
    """[B, U, H K] as [B, H, U, K]."""
    heads_BUHK: Tensor = x_BUI.unflatten(2, (num_heads, -1))
    return heads_BUHK.transpose(1, 2)


def merge_heads(x_BHUK: Tensor) -> Tensor:
    """[B, H, U, K] as [B, U, H K]."""
    return x_BHUK.transpose(1, 2).flatten(2)
