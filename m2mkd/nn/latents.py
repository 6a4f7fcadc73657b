"""Latents of a NAC: what each module of a circuit is (signature), does (code) and starts from.

Neural Attentive Circuits (arXiv 2210.08031 section 3). Letters: B batch, U latents, S signature
width, C code width, D state width, L layers.
"""

import torch
from torch import Tensor, nn

from m2mkd.errors import ShapeError

_LOG_VARIANCE = -5.0


class Latents(nn.Module):
    """Signatures and codes of U latents, and their first states where those are learned.

    Args:
        num_latents: U.
        signature_dim: S.
        code_dim: C.
        num_layers: L for a code per layer; None for one code for all layers.
        state_dim: D where first states are learned; None where they are seeded from codes.
        signatures: Initial signatures, [U, S]; None draws them from a standard normal.

    Raises:
        ShapeError: Initial signatures of another shape.
    """

    def __init__(
        self,
        num_latents: int,
        signature_dim: int,
        code_dim: int,
        *,
        num_layers: int | None = None,
        state_dim: int | None = None,
        signatures: Tensor | None = None,
    ) -> None:
        super().__init__()
        if signatures is None:
            signatures = torch.randn(num_latents, signature_dim)
        if signatures.shape != (num_latents, signature_dim):
            raise ShapeError(
                f"latents: initial signatures have shape {tuple(signatures.shape)}; "
                f"{num_latents} latents need ({num_latents}, {signature_dim})"
            )
        layers = () if num_layers is None else (num_layers,)
        self.signatures = nn.Parameter(signatures.detach().clone())
        self.codes = nn.Parameter(torch.randn(*layers, num_latents, code_dim))
        self.states = (
            None if state_dim is None else nn.Parameter(torch.randn(num_latents, state_dim))
        )

    @property
    def num_latents(self) -> int:
        """U."""
        return self.signatures.shape[0]

    def codes_of(self, layer: int) -> Tensor:
        """Codes at a layer, [U, C]; -1 is the last layer."""
        return self.codes if self.codes.dim() == 2 else self.codes[layer]


class CodeNoise(nn.Module):
    """Multiplies each number of a code by a draw from [1 - scale, 1 + scale] in training.

    The draw is a constant to autograd: the gradient is that of the code itself, as published.
    """

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, codes_UC: Tensor) -> Tensor:
        """Codes [U, C] with noise in training mode; themselves otherwise."""
        if not self.training or self.scale == 0.0:
            return codes_UC
        draw_UC = (2.0 * torch.rand_like(codes_UC) - 1.0) * self.scale
        return codes_UC + codes_UC.detach() * draw_UC


class Seeder(nn.Module):
    """First states from codes: a normal variable whose mean and variance are linear in the code.

    NAC section 3.3. In eval mode the mean alone, unless `stochastic_eval` asks for the published
    behaviour, which draws in eval mode too.

    Args:
        code_dim: C.
        state_dim: D.
        code_noise: Scale of the noise on codes.
        stochastic_eval: Whether to draw in eval mode.
    """

    def __init__(
        self,
        code_dim: int,
        state_dim: int,
        *,
        code_noise: float = 0.0,
        stochastic_eval: bool = False,
    ) -> None:
        super().__init__()
        self.code_noise = CodeNoise(code_noise)
        self.norm = nn.LayerNorm(code_dim)
        self.mean = nn.Linear(code_dim, state_dim)
        self.log_variance = nn.Linear(code_dim, state_dim)
        self.stochastic_eval = stochastic_eval
        nn.init.constant_(self.log_variance.bias, _LOG_VARIANCE)

    def forward(self, codes_UC: Tensor, batch_size: int) -> Tensor:
        """States [B, U, D] for codes [U, C]."""
        normed_UC = self.norm(self.code_noise(codes_UC))
        mean_UD: Tensor = self.mean(normed_UC)
        if not (self.training or self.stochastic_eval):
            return mean_UD.expand(batch_size, -1, -1)
        deviation_UD = (0.5 * self.log_variance(normed_UC)).exp()
        states_BUD: Tensor = mean_UD + deviation_UD * torch.randn(
            batch_size, *mean_UD.shape, device=mean_UD.device, dtype=mean_UD.dtype
        )
        return states_BUD
