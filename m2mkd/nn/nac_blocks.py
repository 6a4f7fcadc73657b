"""The three kinds of blocks of a NAC: read-in, propagator and read-out.

Neural Attentive Circuits (arXiv 2210.08031 section 3). Letters: B batch, U receivers, V senders,
D state width, I token width, C code width.
"""

from dataclasses import dataclass, field

from timm.layers import DropPath
from torch import Tensor, nn

from m2mkd.nn.kernel import Edges
from m2mkd.nn.latent_attention import (
    LatentAttention,
    ReadInAttention,
    gamma_of,
    make_layer_scale,
)
from m2mkd.nn.latents import CodeNoise
from m2mkd.nn.modfc import FCOptions
from m2mkd.nn.modulated import Normed


@dataclass(frozen=True)
class BlockOptions:
    """How a block is made; the defaults are those of the published propagators.

    Attributes:
        state_dim: D.
        code_dim: C.
        num_heads: Attention heads.
        head_dim: Width of a head.
        ffn_ratio: Hidden width of the FFN, as a multiple of D.
        gated: GEGLU in the FFN (twice the hidden width before it), or GELU.
        qkv_bias: Whether queries, keys and values have biases.
        layer_scale: Initial factor of attention messages; None for no such layer.
        ffn_layer_scale: The same of the FFN's.
        drop_path: Rate of stochastic depth.
        residual: Whether attention adds to the receivers' states.
        share_norm: Whether one LayerNorm serves receivers and senders.
        code_noise: Scale of the training noise on codes.
        fc: The modulated layers of attention.
        ffn_fc: Those of the FFN; None for the same.
    """

    state_dim: int
    code_dim: int
    num_heads: int = 1
    head_dim: int = 64
    ffn_ratio: float = 1.0
    gated: bool = True
    qkv_bias: bool = False
    layer_scale: float | None = 0.1
    ffn_layer_scale: float | None = 0.1
    drop_path: float = 0.0
    residual: bool = True
    share_norm: bool = True
    code_noise: float = 0.0
    fc: FCOptions = field(default_factory=FCOptions)
    ffn_fc: FCOptions | None = None


class ModFFN(nn.Module):
    """x + drop(scale(fc2(act(fc1(norm(x)))))), both layers modulated by codes."""

    def __init__(self, options: BlockOptions) -> None:
        super().__init__()
        width, hidden = options.state_dim, round(options.ffn_ratio * options.state_dim)
        fc = options.ffn_fc or options.fc
        self.gated = options.gated
        self.norm = nn.LayerNorm(width)
        self.fc1 = fc.build(width, hidden * (2 if options.gated else 1), options.code_dim)
        self.fc2 = fc.build(hidden, width, options.code_dim)
        self.layer_scale = make_layer_scale(width, options.ffn_layer_scale)
        self.drop_path = DropPath(options.drop_path)

    def forward(self, states_BUD: Tensor, codes_UC: Tensor) -> Tensor:
        """States [B, U, D] after the FFN, for codes [U, C] or [1, C]."""
        hidden = self.fc1(Normed.by(self.norm, states_BUD), codes_UC)
        update_BUD: Tensor = self.fc2(
            hidden,
            codes_UC,
            activation="geglu" if self.gated else "gelu",
            output_scale=gamma_of(self.layer_scale),
        )
        update_BUD = self.drop_path(update_BUD)
        return states_BUD + update_BUD


class ReadIn(nn.Module):
    """Input latents read the tokens, then think.

    Of the options, `share_norm` means nothing here, and `drop_path` concerns the FFN.

    Args:
        token_dim: I.
        options: See `BlockOptions`.
    """

    def __init__(self, token_dim: int, options: BlockOptions) -> None:
        super().__init__()
        self.options = options
        self.attention = ReadInAttention(
            token_dim,
            options.state_dim,
            options.code_dim,
            num_heads=options.num_heads,
            head_dim=options.head_dim,
            residual=options.residual,
            qkv_bias=options.qkv_bias,
            layer_scale=options.layer_scale,
            fc=options.fc,
        )
        self.ffn = ModFFN(options)
        self.code_noise = CodeNoise(options.code_noise)

    def forward(self, states_BUD: Tensor, codes_UC: Tensor, tokens_BVI: Tensor) -> Tensor:
        """States [B, U, D] of the input latents after reading tokens [B, V, I]."""
        codes_UC = self.code_noise(codes_UC)
        states_BUD = self.ffn(self.attention(states_BUD, codes_UC, tokens_BVI), codes_UC)
        return states_BUD


class Propagator(nn.Module):
    """One round of messages along the circuit, then an FFN.

    Args:
        options: See `BlockOptions`.
    """

    def __init__(self, options: BlockOptions) -> None:
        super().__init__()
        self.options = options
        self.attention = LatentAttention(
            options.state_dim,
            options.code_dim,
            num_heads=options.num_heads,
            head_dim=options.head_dim,
            residual=options.residual,
            share_norm=options.share_norm,
            qkv_bias=options.qkv_bias,
            layer_scale=options.layer_scale,
            drop_path=options.drop_path,
            fc=options.fc,
        )
        self.ffn = ModFFN(options)
        self.code_noise = CodeNoise(options.code_noise)

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
        """The receivers' states [B, U, D].

        Args:
            receivers_BUD: States of the receivers.
            receiver_codes_UC: Their codes, [U, C], or [1, C] for one code for all.
            senders_BVD: States of the senders.
            sender_codes_VC: Their codes, [V, C] or [1, C].
            edges: Who hears whom; None for everyone alike.
            receivers_send: Whether the last senders are the receivers.
        """
        receiver_codes_UC = self.code_noise(receiver_codes_UC)
        sender_codes_VC = self.code_noise(sender_codes_VC)
        states_BUD: Tensor = self.attention(
            receivers_BUD,
            receiver_codes_UC,
            senders_BVD,
            sender_codes_VC,
            edges,
            receivers_send=receivers_send,
        )
        states_BUD = self.ffn(states_BUD, receiver_codes_UC)
        return states_BUD


class ReadOut(Propagator):
    """A propagator to the output latents, with a head that may turn states into class scores.

    Args:
        options: See `BlockOptions`.
        num_outputs: Width of the head's output; None for no head.
        head_norm: Whether a LayerNorm stands before the head.
    """

    def __init__(
        self, options: BlockOptions, *, num_outputs: int | None = None, head_norm: bool = True
    ) -> None:
        super().__init__(options)
        self.head_norm = nn.LayerNorm(options.state_dim) if num_outputs and head_norm else None
        self.head = (
            options.fc.build(options.state_dim, num_outputs, options.code_dim)
            if num_outputs
            else None
        )

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
        """As `Propagator`; with a head [B, U, num_outputs]."""
        states_BUD = super().forward(
            receivers_BUD,
            receiver_codes_UC,
            senders_BVD,
            sender_codes_VC,
            edges,
            receivers_send=receivers_send,
        )
        if self.head_norm is not None:
            states_BUD = self.head_norm(states_BUD)
        return states_BUD if self.head is None else self.head(states_BUD, receiver_codes_UC)
