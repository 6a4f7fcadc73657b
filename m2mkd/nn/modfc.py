"""Linear layers modulated by a code: how a latent of a NAC computes differently from its peers.

Neural Attentive Circuits (arXiv 2210.08031 section 3.1). Letters: U latents, I inputs, O outputs,
C code width.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m2mkd.errors import ConfigError, did_you_mean
from m2mkd.nn.modulated import (
    Activation,
    Normed,
    activate,
    modulated_linear,
    plain,
    scale_outputs,
)

FCKind = Literal["modfc", "wmodfc", "fc"]
ScaleNorm = Literal["ln", "l2", "none", "sigmoid", "tanh"]
ProductNorm = Literal["none", "ln", "l2"]
_WEIGHT_EPS = 1e-6
_NORM_EPS = 1e-5


class Folded(NamedTuple):
    """A modulated layer as output_scale_UO * (weight_OI (input_scale_UI * x)) + bias_O.

    Attributes:
        input_scale_UI: [U, I].
        weight_OI: [O, I], the same for all latents.
        output_scale_UO: [U, O], or None for ones.
        bias_O: [O], or None.
    """

    input_scale_UI: Tensor
    weight_OI: Tensor
    output_scale_UO: Tensor | None
    bias_O: Tensor | None


class ModFC(nn.Module):
    """y = W p(x * s) + b with s = gain * n(V code) [+ 1]; W and V are shared, codes differ.

    NAC section 3.1. V has no bias; n is a layer norm without parameters in the published models.

    Args:
        in_features: I.
        out_features: O.
        code_dim: C.
        bias: Whether there is a b.
        scale_norm: n: `ln`, `l2` (unit length), `none`, `sigmoid` or `tanh`.
        product_norm: p: `none`, `ln` or `l2`.
        gain: Factor of the scale, or its initial value.
        learn_gain: Whether the gain is a parameter.
        add_one: Whether 1 is added, so that a gain of 0 is a plain linear layer.

    Raises:
        ConfigError: An unknown norm.
    """

    gain: Tensor | float

    def __init__(
        self,
        in_features: int,
        out_features: int,
        code_dim: int,
        *,
        bias: bool = True,
        scale_norm: ScaleNorm = "ln",
        product_norm: ProductNorm = "none",
        gain: float = 1.0,
        learn_gain: bool = False,
        add_one: bool = False,
    ) -> None:
        super().__init__()
        _check_choice("scale_norm", scale_norm, get_args(ScaleNorm))
        _check_choice("product_norm", product_norm, get_args(ProductNorm))
        self.scale_norm = scale_norm
        self.product_norm = product_norm
        self.add_one = add_one
        self.weight = _new_weight(out_features, in_features)
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None
        self.scale = nn.Linear(code_dim, in_features, bias=False)
        self.gain = nn.Parameter(torch.tensor(float(gain))) if learn_gain else float(gain)

    def scale_of(self, codes_UC: Tensor) -> Tensor | Normed:
        """The factors s of the inputs, [U, I], for codes [U, C]."""
        scale_UI: Tensor = self.scale(codes_UC)
        if self.scale_norm == "ln":
            # Gain and one as the norm's affine part: fewer passes, and less is kept for backward.
            width = scale_UI.shape[-1:]
            gain_I = self.weight.new_ones(width) * self.gain
            one_I = self.weight.new_ones(width) if self.add_one else None
            normed_UI = F.layer_norm(scale_UI, width, gain_I, one_I, _NORM_EPS)
            return Normed(normed_UI, scale_UI, gain_I, one_I, _NORM_EPS)
        if self.scale_norm == "l2":
            scale_UI = F.normalize(scale_UI, dim=-1)
        elif self.scale_norm == "sigmoid":
            scale_UI = scale_UI.sigmoid()
        elif self.scale_norm == "tanh":
            scale_UI = scale_UI.tanh()
        scale_UI = self.gain * scale_UI
        return scale_UI + 1.0 if self.add_one else scale_UI

    def forward(
        self,
        x: Tensor | Normed,
        codes_UC: Tensor,
        *,
        activation: Activation = "none",
        output_scale: Tensor | None = None,
    ) -> Tensor:
        """Maps x [..., U, I] to [..., U, O].

        Args:
            x: Inputs; twice as wide where they go through GEGLU first, [B, H, U, K] where heads
                are put side by side first.
            codes_UC: Codes [U, C], or [1, C] for one code for all.
            activation: What the inputs go through first.
            output_scale: Factor of the outputs, [O]: a layer scale that follows.
        """
        scale_UI = self.scale_of(codes_UC)
        if self.product_norm == "none":
            return modulated_linear(x, scale_UI, self.weight, self.bias, activation, output_scale)
        product = activate(plain(x), activation) * plain(scale_UI)
        if self.product_norm == "ln":
            product = F.layer_norm(product, product.shape[-1:])
        else:
            product = F.normalize(product, dim=-1)
        return F.linear(product, *scale_outputs(self.weight, self.bias, output_scale))

    def fold(self, codes_UC: Tensor) -> Folded | None:
        """The layer as scales around a shared weight; None where a norm stands between."""
        if self.product_norm != "none":
            return None
        return Folded(plain(self.scale_of(codes_UC)), self.weight, None, self.bias)


class WModFC(nn.Module):
    """A linear layer with weights W_u = rows of W diag(V code + 1), each of unit length.

    The published alternative to `ModFC`. The normalisation is applied to the outputs, so no weight
    is made per latent.

    Args:
        in_features: I.
        out_features: O.
        code_dim: C.
        bias: Whether there is a bias on the outputs.
    """

    def __init__(
        self, in_features: int, out_features: int, code_dim: int, *, bias: bool = True
    ) -> None:
        super().__init__()
        self.modulation = nn.Linear(code_dim, in_features)
        self.weight = _new_weight(out_features, in_features)
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    def forward(
        self,
        x: Tensor | Normed,
        codes_UC: Tensor,
        *,
        activation: Activation = "none",
        output_scale: Tensor | None = None,
    ) -> Tensor:
        """As `ModFC`."""
        scale_UI, norm_UO = self._scales(codes_UC)
        y = modulated_linear(x, scale_UI, self.weight, None, activation) * norm_UO
        y = y if self.bias is None else y + self.bias
        return y if output_scale is None else y * output_scale

    def fold(self, codes_UC: Tensor) -> Folded:
        """The layer as scales around a shared weight."""
        scale_UI, norm_UO = self._scales(codes_UC)
        return Folded(scale_UI, self.weight, norm_UO, self.bias)

    def _scales(self, codes_UC: Tensor) -> tuple[Tensor, Tensor]:
        """Scales of the inputs [U, I], and inverse lengths of the scaled rows [U, O]."""
        scale_UI = self.modulation(codes_UC) + 1.0
        squares_UO = F.linear(scale_UI.square(), self.weight.square())
        return scale_UI, (squares_UO + _WEIGHT_EPS).rsqrt()


class FC(nn.Module):
    """A linear layer that takes codes and ignores them, for models without modulation.

    Args:
        in_features: I.
        out_features: O.
        code_dim: C, unused.
        bias: Whether there is a bias.
    """

    def __init__(
        self, in_features: int, out_features: int, code_dim: int, *, bias: bool = True
    ) -> None:
        super().__init__()
        del code_dim
        self.linear = nn.Linear(in_features, out_features, bias=bias)

    def forward(
        self,
        x: Tensor | Normed,
        codes_UC: Tensor,
        *,
        activation: Activation = "none",
        output_scale: Tensor | None = None,
    ) -> Tensor:
        """As `ModFC`, but for the codes."""
        del codes_UC
        weight, bias = scale_outputs(self.linear.weight, self.linear.bias, output_scale)
        return F.linear(activate(plain(x), activation), weight, bias)

    def fold(self, codes_UC: Tensor) -> Folded:
        """The layer with scales of one."""
        ones_UI = codes_UC.new_ones(codes_UC.shape[0], self.linear.in_features)
        return Folded(ones_UI, self.linear.weight, None, self.linear.bias)


@dataclass(frozen=True)
class FCOptions:
    """Which layer a block is made of; the defaults are those of the published NACs.

    Attributes:
        kind: `modfc`, `wmodfc` or `fc`; what follows concerns `modfc` only.
        scale_norm, product_norm, gain, learn_gain, add_one: See `ModFC`.
    """

    kind: FCKind = "modfc"
    scale_norm: ScaleNorm = "ln"
    product_norm: ProductNorm = "none"
    gain: float = 0.1
    learn_gain: bool = True
    add_one: bool = True

    def build(
        self, in_features: int, out_features: int, code_dim: int, *, bias: bool = True
    ) -> ModFC | WModFC | FC:
        """Makes one layer.

        Raises:
            ConfigError: An unknown kind or norm.
        """
        _check_choice("kind", self.kind, get_args(FCKind))
        if self.kind == "fc":
            return FC(in_features, out_features, code_dim, bias=bias)
        if self.kind == "wmodfc":
            return WModFC(in_features, out_features, code_dim, bias=bias)
        return ModFC(
            in_features,
            out_features,
            code_dim,
            bias=bias,
            scale_norm=self.scale_norm,
            product_norm=self.product_norm,
            gain=self.gain,
            learn_gain=self.learn_gain,
            add_one=self.add_one,
        )


def _new_weight(out_features: int, in_features: int) -> nn.Parameter:
    """Drawn as nn.Linear draws its own."""
    bound = in_features**-0.5
    return nn.Parameter(torch.empty(out_features, in_features).uniform_(-bound, bound))


def _check_choice(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        hint = did_you_mean(str(value), known)
        raise ConfigError(f"modulated layer: {name}={value!r} is none of {', '.join(known)}{hint}")
