"""Stitches: layers between the widths of a student and its teacher, and what may be kept of them.

m2mKD (arXiv 2402.16918 section 3.2). Letters: B batch, U latents, D state width.
"""

from collections.abc import Sequence

from timm.layers import DropPath
from torch import Tensor, nn


class KeptStitches(nn.Module):
    """Pairs of distilled stitches that stay in a NAC as residual layers.

    x + drop(pre_i(gelu(post_i(norm(x))))), with one LayerNorm for all pairs. Pair 0 stands after
    the read-in, pair i after propagator i - 1.

    Args:
        state_dim: D.
        stitch_dim: The teacher's width.
        num_pairs: Propagators and the read-in.
        drop_path: Rate of stochastic depth.
    """

    def __init__(
        self, state_dim: int, stitch_dim: int, *, num_pairs: int, drop_path: float = 0.0
    ) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(state_dim)
        self.post = nn.ModuleList(nn.Linear(state_dim, stitch_dim) for _ in range(num_pairs))
        self.pre = nn.ModuleList(nn.Linear(stitch_dim, state_dim) for _ in range(num_pairs))
        self.drop_path = DropPath(drop_path)

    def keep(self, pairs: Sequence[int]) -> None:
        """Leaves some of the pairs, numbered anew."""
        self.post = nn.ModuleList(self.post[pair] for pair in pairs)
        self.pre = nn.ModuleList(self.pre[pair] for pair in pairs)

    def forward(self, states_BUD: Tensor, pair: int) -> Tensor:
        """States [B, U, D] after the given pair."""
        inner = nn.functional.gelu(self.post[pair](self.norm(states_BUD)))
        stitched: Tensor = states_BUD + self.drop_path(self.pre[pair](inner))
        return stitched
