"""Read-in attention of Neural Attentive Circuits, without a key and a value for every pair.

Each latent u has its own projections of the tokens, W diag(s_u). The published code makes keys of
shape [B, V, U, H K]; by associativity the scores are (s_u * W_k^T q_u) . x_v and the output is
W_v (s_u * sum_v a_uv x_v), which is the same numbers from tensors of shape [B, H, U, D].

Letters: B batch, H heads, U latents, V tokens, K head width, D token width.
"""

from torch import Tensor

from m2mkd.ops import _checks
from m2mkd.ops._autocast import to_region


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
    batch, heads, latents, head_width = q_BHUK.shape
    width = x_BVD.shape[2]
    scale = head_width**-0.5 if scale is None else scale
    # [H, K, D]; the heads' latents share one batched product with the tokens of an example.
    key_HKD = key_weight.view(heads, head_width, width)
    value_HKD = value_weight.view(heads, head_width, width)
    key_scale = (key_scale_UD * scale).unsqueeze(-3)
    folded_BHUD = (q_BHUK @ key_HKD) * key_scale
    scores_BMV = folded_BHUD.view(batch, heads * latents, width) @ x_BVD.transpose(1, 2)
    weights_BMV = scores_BMV.softmax(dim=2)
    mixed_BHUD = (weights_BMV @ x_BVD).view(batch, heads, latents, width)
    out_BHUK = (mixed_BHUD * value_scale_UD.unsqueeze(-3)) @ value_HKD.transpose(1, 2)
    if value_bias is not None:
        out_BHUK = out_BHUK + value_bias.view(heads, 1, head_width)
    return out_BHUK
