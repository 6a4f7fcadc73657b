"""Cutting a vision transformer into consecutive modules, the unit that m2mKD teaches.

Letters: B batch, T tokens, D width, C classes, L modules.
"""

from collections.abc import Sequence

import torch
from timm.models import checkpoint_seq
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from m2mkd.errors import ConfigError

_INPUT_PARTS = (
    "patch_embed",
    "cls_token",
    "reg_token",
    "pos_embed",
    "pos_drop",
    "patch_drop",
    "norm_pre",
)
_OUTPUT_PARTS = ("norm", "attn_pool", "fc_norm", "head_drop", "head")


class ViTStage(nn.Module):
    """Consecutive blocks of a timm ViT, with its input or output parts when they are at an end.

    The stage shares the ViT's parameters and has them under local names: `blocks.0` is the
    stage's first block, whatever its number in the ViT.

    Args:
        vit: The whole transformer.
        start: First block.
        end: One past the last block.
        is_first: Owns patch embedding, prefix tokens and positions, and takes images [B, C, H, W].
        is_last: Owns final norm, pooling and head, and returns logits [B, C].
    """

    _vit: VisionTransformer

    def __init__(
        self, vit: VisionTransformer, start: int, end: int, *, is_first: bool, is_last: bool
    ) -> None:
        super().__init__()
        # Unregistered: used for timm's forward methods only, so that the stage's state dict and
        # parameters are those of its own parts.
        object.__setattr__(self, "_vit", vit)
        self.is_first = is_first
        self.is_last = is_last
        names = (_INPUT_PARTS if is_first else ()) + (_OUTPUT_PARTS if is_last else ())
        for name in names:
            setattr(self, name, getattr(vit, name))
        self.blocks = nn.Sequential(*vit.blocks[start:end])
        self.grad_checkpointing = False

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether to compute the blocks again in the backward pass, as timm's models do."""
        self.grad_checkpointing = enable

    def forward(self, x: Tensor) -> Tensor:
        """Maps images or tokens [B, T, D] to tokens or logits."""
        vit = self._vit
        if self.is_first:
            x = vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(x))))
        x = checkpoint_seq(self.blocks, x) if self.grad_checkpointing else self.blocks(x)
        if self.is_last:
            x = vit.forward_head(vit.norm(x))
        return x


def split_vit(vit: VisionTransformer, depths: Sequence[int]) -> nn.ModuleList:
    """Cuts a ViT into modules of the given numbers of blocks; parameters are shared.

    Running the stages one after the other is the ViT's forward pass.

    Raises:
        ConfigError: The depths do not sum to the ViT's number of blocks, or the ViT has parts that
            belong to no module (a distillation token).
    """
    check_depths(depths, len(vit.blocks))
    ends = torch.tensor(depths).cumsum(0).tolist()
    last = len(ends) - 1
    stages = nn.ModuleList(
        ViTStage(vit, end - depth, end, is_first=i == 0, is_last=i == last)
        for i, (depth, end) in enumerate(zip(depths, ends, strict=True))
    )
    owned = {id(parameter) for parameter in stages.parameters()}
    homeless = [name for name, p in vit.named_parameters() if id(p) not in owned]
    if homeless:
        raise ConfigError(
            f"a {type(vit).__name__} cannot be cut into modules: {', '.join(homeless)} belong to "
            "none of them; take a ViT with one class token and one head"
        )
    return stages


def check_depths(depths: Sequence[int], num_blocks: int, *, what: str = "depths") -> None:
    """Raises ConfigError unless the depths are positive and sum to the number of blocks."""
    if len(depths) > num_blocks:
        raise ConfigError(
            f"{what} {list(depths)} asks for {len(depths)} modules of a model with {num_blocks} "
            f"blocks; use at most {num_blocks} modules"
        )
    if min(depths, default=0) < 1 or sum(depths) != num_blocks:
        raise ConfigError(
            f"{what} {list(depths)} sums to {sum(depths)}, but the model has {num_blocks} blocks; "
            f"{balanced_depths(num_blocks, max(1, len(depths)))} would fit"
        )


def balanced_depths(num_blocks: int, num_modules: int) -> list[int]:
    """Splits blocks as evenly as possible, earlier modules taking the remainder.

    Raises:
        ConfigError: More modules than blocks.
    """
    if num_modules > num_blocks:
        raise ConfigError(f"{num_modules} modules need at least as many blocks, not {num_blocks}")
    share, rest = divmod(num_blocks, num_modules)
    return [share + (i < rest) for i in range(num_modules)]


def count_flops(vit: VisionTransformer, image_size: int) -> list[int]:
    """Floating-point operations of each block for one image, counted as PyTorch runs it.

    The first block's include the patch embedding, the last one's pooling and head: they belong to
    the same modules. No values are computed.

    Args:
        vit: The transformer.
        image_size: Height and width, in pixels.
    """
    named = [*vit.named_parameters(), *vit.named_buffers()]
    weights = {name: torch.empty_like(tensor, device="meta") for name, tensor in named}
    image = torch.empty(1, vit.in_chans, image_size, image_size, device="meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        functional_call(vit, weights, (image,))
    root = type(vit).__name__
    counts = {name: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
    blocks = [counts.get(f"{root}.blocks.{i}", 0) for i in range(len(vit.blocks))]
    stem = counts.get(f"{root}.patch_embed", 0)
    rest = counts["Global"] - sum(blocks) - stem
    blocks[0] += stem
    blocks[-1] += rest
    return blocks


def cut_evenly(costs: Sequence[float], num_modules: int) -> list[int]:
    """Cuts a row of blocks into modules whose costs differ least, by their sum of squares.

    Args:
        costs: Of each block.
        num_modules: L.

    Returns:
        Blocks per module.

    Raises:
        ConfigError: More modules than blocks.
    """
    count = len(costs)
    if num_modules > count:
        raise ConfigError(f"{num_modules} modules need at least as many blocks, not {count}")
    # best[end]: least sum of squares, and the depths, of the first blocks in the modules so far.
    best: dict[int, tuple[float, list[int]]] = {0: (0.0, [])}
    for module in range(1, num_modules + 1):
        best = {
            end: min(
                (squares + sum(costs[start:end]) ** 2, [*depths, end - start])
                for start, (squares, depths) in best.items()
                if start < end
            )
            for end in range(module, count - num_modules + module + 1)
        }
    return best[count][1]
