"""Images to tokens: the first stages of a ConvNeXt, and a learned grid of positions beside them.

ConvNeXt (arXiv 2201.03545) is timm's. Letters: B batch, V tokens, D token width, G grid width.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from timm.layers import LayerNorm, LayerNorm2d, to_2tuple
from timm.models.convnext import ConvNeXtStage
from torch import Tensor, nn
from torch.nn.init import trunc_normal_

from m2mkd.errors import ConfigError, ShapeError


class ConvNeXtTokenizer(nn.Module):
    """Tokens of width dims[-1] + grid_dim, one for each place of the feature map.

    A stem of stride `patch_size`, then ConvNeXt stages; every stage after the first halves the
    map. The grid has the map's size: the model takes images of one size.

    Args:
        img_size: Height and width of the images, in pixels.
        in_chans: Channels of the images.
        depths: Blocks of each stage; 0 leaves the stage's downsampling alone.
        dims: Width of each stage.
        patch_size: Size and stride of the stem's patches, in pixels.
        grid_dim: G; 0 for no grid.

    Raises:
        ConfigError: Not one width for each stage, or an image smaller than one token.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int],
        in_chans: int,
        *,
        depths: Sequence[int],
        dims: Sequence[int],
        patch_size: int = 4,
        grid_dim: int = 64,
    ) -> None:
        super().__init__()
        if not depths or len(depths) != len(dims):
            raise ConfigError(
                f"tokenizer: depths {list(depths)} and dims {list(dims)} must name the same stages"
            )
        height, width = to_2tuple(img_size)
        stride = patch_size * 2 ** (len(depths) - 1)
        if min(height, width) < stride:
            raise ConfigError(
                f"tokenizer: {len(depths)} stages after patches of {patch_size} pixels leave "
                f"nothing of images of {height}x{width}; use fewer stages or smaller patches"
            )
        self.img_size = (height, width)
        self.grid_size = (height // stride, width // stride)
        self.num_tokens = self.grid_size[0] * self.grid_size[1]
        self.width = dims[-1] + grid_dim
        self.stem = nn.Sequential(
            nn.Conv2d(in_chans, dims[0], patch_size, patch_size), LayerNorm2d(dims[0])
        )
        self.stages = nn.Sequential(
            *(
                ConvNeXtStage(
                    before,
                    dim,
                    stride=1 if i == 0 else 2,
                    depth=depth,
                    ls_init_value=1e-6,
                    norm_layer=LayerNorm2d,
                    norm_layer_cl=LayerNorm,
                )
                for i, ((before, dim), depth) in enumerate(
                    zip(pairwise([dims[0], *dims]), depths, strict=True)
                )
            )
        )
        self.grid = nn.Parameter(torch.randn(grid_dim, *self.grid_size)) if grid_dim else None
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Maps images [B, channels, H, W] to tokens [B, V, D].

        Raises:
            ShapeError: Images of another size than the model was made for.
        """
        features = self.stages(self.stem(images))
        if features.shape[2:] != self.grid_size:
            raise ShapeError(
                f"tokenizer: images of {tuple(images.shape[2:])} pixels make "
                f"{tuple(features.shape[2:])} tokens, but the model has a grid of "
                f"{self.grid_size}, for images of {self.img_size}"
            )
        if self.grid is not None:
            features = torch.cat([features, self.grid.expand(features.shape[0], -1, -1, -1)], dim=1)
        tokens: Tensor = features.flatten(2).transpose(1, 2)
        return tokens
