"""From the states of output latents to logits.

Letters: B batch, U output latents, D state width, C classes.
"""

import torch.nn.functional as F
from torch import Tensor, nn


class ConfidencePooling(nn.Module):
    """A linear classifier on the states' mean, weighted by the confidence each latent has.

    NAC section 3.3: weights are a softmax over latents of a linear score, with Gumbel noise in
    training; in eval mode without it, unless `stochastic_eval` asks for the published behaviour,
    which draws in eval mode too.

    Args:
        state_dim: D.
        num_classes: C; 0 leaves the pooled states as they are.
        temperature: Divisor of the scores.
        gumbel: Whether there is noise at all.
        hard: Whether one latent is chosen, with a straight-through gradient where there is noise.
        stochastic_eval: Whether to draw in eval mode.
    """

    def __init__(
        self,
        state_dim: int,
        num_classes: int,
        *,
        temperature: float = 1.0,
        gumbel: bool = True,
        hard: bool = False,
        stochastic_eval: bool = False,
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.gumbel = gumbel
        self.hard = hard
        self.stochastic_eval = stochastic_eval
        self.confidence = nn.Linear(state_dim, 1)
        self.classifier: nn.Module = (
            nn.Linear(state_dim, num_classes) if num_classes else nn.Identity()
        )

    def weights(self, states_BUD: Tensor) -> Tensor:
        """How much each state counts, [B, U], with a sum of one."""
        scores_BU: Tensor = self.confidence(states_BUD)[..., 0]
        if self.gumbel and (self.training or self.stochastic_eval):
            return F.gumbel_softmax(scores_BU, tau=self.temperature, hard=self.hard)
        if self.hard:
            return F.one_hot(scores_BU.argmax(-1), scores_BU.shape[-1]).to(scores_BU.dtype)
        return (scores_BU / self.temperature).softmax(dim=-1)

    def pool(self, states_BUD: Tensor) -> Tensor:
        """The weighted mean of the states, [B, D]."""
        return (self.weights(states_BUD)[:, None] @ states_BUD)[:, 0]

    def forward(self, states_BUD: Tensor) -> Tensor:
        """Logits [B, C] for states [B, U, D]."""
        logits: Tensor = self.classifier(self.pool(states_BUD))
        return logits


class FirstLatent(nn.Module):
    """The first output latent's state is the logits; the read-out's head gives it C numbers."""

    def weights(self, states_BUC: Tensor) -> Tensor:
        """How much each state counts, [B, U]: the first alone."""
        weights_BU = states_BUC.new_zeros(states_BUC.shape[:2])
        weights_BU[:, 0] = 1.0
        return weights_BU

    def forward(self, states_BUC: Tensor) -> Tensor:
        """Logits [B, C] for states [B, U, C]."""
        return states_BUC[:, 0]
