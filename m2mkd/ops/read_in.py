"""Read-in attention of Neural Attentive Circuits, without a key and a value for every pair.

Each latent u has its own projections of the tokens, W diag(s_u). The published code makes keys of
shape [B, V, U, H K]; by associativity the scores are (s_u * W_k^T q_u) . x_v and the output is
W_v (s_u * sum_v a_uv x_v), which is the same numbers from tensors of shape [B, H, U, D].

Letters: B batch, H heads, U latents, V tokens, K head width, D token width.
"""

import torch
from torch import Tensor

from m2mkd.ops import _checks
from m2mkd.ops._autocast import to_region
from m2mkd.ops._checks import has_values

# On the CPU as many examples are done at once as keep a [B, H, U, D] tensor in the cache: forward
# is up to twice as fast for it, because fresh memory costs page faults.
_CACHE_BYTES = 1 << 21


def read_in_attention(
    q_BHUK: Tensor,
    x_BVD: Tensor,
    key_weight: Tensor,
    value_weight: Tensor,
    key_scale_UD: Tensor,
    value_scale_UD: Tensor,
    value_bias: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Latents attend to tokens through projections of their own, W diag(s_u).

    A bias of the keys would add the same number to all scores of a latent, which the softmax
    cancels: there is none to pass.

    Args:
        q_BHUK: Queries, [B, H, U, K], floating.
        x_BVD: Tokens, [B, V, D], in the dtype of q.
        key_weight: W_k, [H K, D], in the dtype of q.
        value_weight: W_v, [H K, D], in the dtype of q.
        key_scale_UD: s of the keys, [U, D], or [B, U, D] where it differs between examples.
        value_scale_UD: s of the values, in the same shape.
        value_bias: Added to the values, [H K], or None.
        scale: Factor of q.k; 1 / sqrt(K) where None.

    Returns:
        [B, H, U, K] in the dtype of q (of the autocast region in one); differentiable in all.

    Raises:
        ShapeError: Shapes, dtypes or devices that do not fit together.
    """
    q_BHUK, x_BVD = to_region(q_BHUK), to_region(x_BVD)
    key_weight, value_weight = to_region(key_weight), to_region(value_weight)
    key_scale_UD, value_scale_UD = to_region(key_scale_UD), to_region(value_scale_UD)
    value_bias = to_region(value_bias)
    _checks.check_read_in(
        q_BHUK, x_BVD, key_weight, value_weight, key_scale_UD, value_scale_UD, value_bias
    )
    scale = q_BHUK.shape[3] ** -0.5 if scale is None else scale
    batch = q_BHUK.shape[0]
    size = q_BHUK.shape[1] * q_BHUK.shape[2] * x_BVD.shape[2] * x_BVD.element_size()
    shared = (key_weight, value_weight, value_bias, scale)
    if not has_values(x_BVD) or x_BVD.device.type != "cpu" or size * batch <= _CACHE_BYTES:
        return _read_in(q_BHUK, x_BVD, (key_scale_UD, value_scale_UD), *shared)
    step = max(1, _CACHE_BYTES // size)
    parts = []
    for first in range(0, batch, step):
        some = slice(first, first + step)
        key_scale = key_scale_UD if key_scale_UD.dim() == 2 else key_scale_UD[some]
        value_scale = value_scale_UD if value_scale_UD.dim() == 2 else value_scale_UD[some]
        parts.append(_read_in(q_BHUK[some], x_BVD[some], (key_scale, value_scale), *shared))
    return torch.cat(parts)


def _read_in(
    q_BHUK: Tensor,
    x_BVD: Tensor,
    scales: tuple[Tensor, Tensor],
    key_weight: Tensor,
    value_weight: Tensor,
    value_bias: Tensor | None,
    scale: float,
) -> Tensor:
    """The products for all examples at once; scales of keys and of values."""
    batch, heads, latents, head_width = q_BHUK.shape
    width = x_BVD.shape[2]
    key_HKD = key_weight.view(heads, head_width, width)
    value_HKD = value_weight.view(heads, head_width, width)
    # Heads lead where their weights act, examples lead where their tokens do: neither weights nor
    # tokens are then copied for the products.
    q_HMK = q_BHUK.transpose(0, 1).reshape(heads, batch * latents, head_width)
    folded_HBUD = (q_HMK @ key_HKD).view(heads, batch, latents, width) * (scales[0] * scale)
    folded_BMD = folded_HBUD.transpose(0, 1).reshape(batch, heads * latents, width)
    weights_BMV = (folded_BMD @ x_BVD.transpose(1, 2)).softmax(dim=2)
    mixed_BHUD = (weights_BMV @ x_BVD).view(batch, heads, latents, width)
    mixed_HBUD = mixed_BHUD.transpose(0, 1) * scales[1]
    out_HMK = mixed_HBUD.reshape(heads, batch * latents, width) @ value_HKD.transpose(1, 2)
    if value_bias is not None:
        out_HMK = out_HMK + value_bias.view(heads, 1, head_width)
    return out_HMK.view(heads, batch, latents, head_width).transpose(0, 1)
