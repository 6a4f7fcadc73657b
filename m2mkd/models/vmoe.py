"""V-MoE: vision transformers whose MLPs are mixtures of experts (arXiv 2106.05974).

A V-MoE is a timm `VisionTransformer` with other blocks, so everything timm knows about ViTs
(position resampling, pooling, heads, `create_model`) holds. Sizes are those of timm's ViTs.
"""

from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from m2mkd.errors import ConfigError
from m2mkd.nn import MoEMlp

__all__ = ["VMoE"]

MoEBlocks = Literal["all", "every_2"] | str | Sequence[int]
Stitch = Literal["norm_linear", "linear"]

_ACTIVATIONS = {"GELU": "gelu", "GELUTanh": "gelu_tanh", "ReLU": "relu", "SiLU": "silu"}


def make_stitch(in_dim: int, out_dim: int, kind: Stitch) -> nn.Module:
    """A layer between two widths: LayerNorm then Linear (m2mKD's V-MoE), or Linear alone."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    if kind == "norm_linear":
        layers["norm"] = nn.LayerNorm(in_dim)
    layers["fc"] = nn.Linear(in_dim, out_dim)
    return nn.Sequential(layers)


class VMoEBlock(Block):
    """A timm block that may hold an MoE MLP, and stitches before and after it."""

    def __init__(
        self,
        dim: int,
        *,
        depth: int = 0,
        moe_blocks: frozenset[int] = frozenset(),
        moe_args: dict[str, Any] | None = None,
        pre_stitch_blocks: frozenset[int] = frozenset(),
        post_stitch_blocks: frozenset[int] = frozenset(),
        stitch_dim: int | None = None,
        stitch: Stitch = "norm_linear",
        **block_args: Any,
    ) -> None:
        mlp_layer = block_args.pop("mlp_layer")
        if depth in moe_blocks:
            mlp_layer = _moe_layer(moe_args or {})
        super().__init__(dim, depth=depth, mlp_layer=mlp_layer, **block_args)
        width = stitch_dim or dim
        has_pre, has_post = depth in pre_stitch_blocks, depth in post_stitch_blocks
        self.pre_stitch = make_stitch(width, dim, stitch) if has_pre else nn.Identity()
        self.post_stitch = make_stitch(dim, width, stitch) if has_post else nn.Identity()

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """Maps tokens [B, T, in] to [B, T, out]; the widths differ from D only at stitches."""
        x = super().forward(self.pre_stitch(x), attn_mask=attn_mask, is_causal=is_causal)
        stitched: Tensor = self.post_stitch(x)
        return stitched


class VMoE(VisionTransformer):
    """A ViT with mixture-of-experts MLPs.

    Args:
        moe_blocks: Which blocks hold experts: `all`, `every_2` (blocks 1, 3, 5, ...), `last_N`
            (the last N of those odd blocks, as V-MoE names them), or a list of block numbers.
        num_experts, num_selected, gate, router_noise, capacity_factor, eval_capacity_factor,
        prioritise, importance_weight, load_weight, z_weight: See `m2mkd.nn.MoEMlp`.
        pre_stitch_blocks: Blocks with a stitch from `stitch_dim` to the model's width before them.
        post_stitch_blocks: Blocks with a stitch from the model's width to `stitch_dim` after them.
        stitch_dim: Width outside the stitches; default the model's own.
        stitch: `norm_linear` or `linear`.
        vit_args: Arguments of timm's VisionTransformer.

    Raises:
        ConfigError: moe_blocks or stitch blocks that the model does not have.
    """

    def __init__(
        self,
        *,
        depth: int = 12,
        moe_blocks: MoEBlocks = "all",
        num_experts: int = 8,
        num_selected: int = 2,
        gate: str = "softmax_selected",
        router_noise: float = 0.0,
        capacity_factor: float | None = None,
        eval_capacity_factor: float | None = None,
        prioritise: bool = False,
        importance_weight: float = 0.0,
        load_weight: float = 0.0,
        z_weight: float = 0.0,
        pre_stitch_blocks: Sequence[int] = (),
        post_stitch_blocks: Sequence[int] = (),
        stitch_dim: int | None = None,
        stitch: Stitch = "norm_linear",
        **vit_args: Any,
    ) -> None:
        chosen: dict[str, Any] = {
            "moe_blocks": _moe_block_numbers(moe_blocks, depth),
            "pre_stitch_blocks": _block_numbers("pre_stitch_blocks", pre_stitch_blocks, depth),
            "post_stitch_blocks": _block_numbers("post_stitch_blocks", post_stitch_blocks, depth),
        }
        moe_args = {
            "num_experts": num_experts,
            "num_selected": num_selected,
            "gate": gate,
            "router_noise": router_noise,
            "capacity_factor": capacity_factor,
            "eval_capacity_factor": eval_capacity_factor,
            "prioritise": prioritise,
            "importance_weight": importance_weight,
            "load_weight": load_weight,
            "z_weight": z_weight,
        }

        # timm calls it as it would call a Block class.
        block_fn: Any = partial(
            VMoEBlock, moe_args=moe_args, stitch_dim=stitch_dim, stitch=stitch, **chosen
        )
        super().__init__(depth=depth, block_fn=block_fn, **vit_args)


def _moe_layer(moe_args: dict[str, Any]) -> Any:
    """A stand-in for timm's Mlp class: called with its arguments, builds an `MoEMlp`."""

    def build(
        in_features: int,
        hidden_features: int,
        act_layer: type[nn.Module],
        bias: bool = True,
        drop: float = 0.0,
        norm_layer: Any = None,
        device: Any = None,
        dtype: Any = None,
    ) -> nn.Module:
        name = act_layer.__name__
        if name not in _ACTIVATIONS:
            known = ", ".join(_ACTIVATIONS.values())
            raise ConfigError(f"experts have no activation {name}; set act_layer to one of {known}")
        if drop or norm_layer is not None:
            raise ConfigError("experts have no dropout or inner norm; set proj_drop_rate=0")
        layer = MoEMlp(
            in_features, hidden_features, activation=_ACTIVATIONS[name], bias=bias, **moe_args
        )
        return layer.to(device=device, dtype=dtype)

    return build


def _moe_block_numbers(spec: MoEBlocks, depth: int) -> frozenset[int]:
    if not isinstance(spec, str):
        return _block_numbers("moe_blocks", spec, depth)
    odd = range(1, depth, 2)
    if spec == "all":
        return frozenset(range(depth))
    if spec == "every_2":
        return frozenset(odd)
    count = spec.removeprefix("last_")
    if count != spec and count.isdigit() and 1 <= int(count) <= len(odd):
        return frozenset(odd[-int(count) :])
    raise ConfigError(
        f"moe_blocks={spec!r} is none of: all, every_2, last_1 to last_{len(odd)}, a list of blocks"
    )


def _block_numbers(name: str, blocks: Sequence[int], depth: int) -> frozenset[int]:
    missing = [block for block in blocks if not 0 <= block < depth]
    if missing:
        raise ConfigError(f"{name} names block {missing[0]}, but blocks go from 0 to {depth - 1}")
    return frozenset(blocks)


def _create(variant: str, pretrained: bool, sizes: dict[str, Any], kwargs: Any) -> VMoE:
    if pretrained:
        raise ConfigError(f"{variant} has no published weights; train one or load a checkpoint")
    model: VMoE = build_model_with_cfg(VMoE, variant, pretrained, **{**sizes, **kwargs})
    return model


_CFG = {
    "url": "",
    "num_classes": 1000,
    "input_size": (3, 224, 224),
    "pool_size": None,
    "crop_pct": 0.9,
    "interpolation": "bicubic",
    "fixed_input_size": True,
    "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5),
    "first_conv": "patch_embed.proj",
    "classifier": "head",
}

default_cfgs = generate_default_cfgs(
    {
        f"{name}.untrained": _CFG
        for name in (
            "vmoe_tiny_patch16_224",
            "vmoe_small_patch16_224",
            "vmoe_small_patch32_224",
            "vmoe_base_patch16_224",
            "vmoe_base_patch32_224",
            "vmoe_large_patch16_224",
            "vmoe_huge_patch14_224",
            "vit_incubated",
        )
    }
)


def _sizes(patch_size: int, embed_dim: int, depth: int, num_heads: int) -> dict[str, Any]:
    return {
        "patch_size": patch_size,
        "embed_dim": embed_dim,
        "depth": depth,
        "num_heads": num_heads,
    }


@register_model
def vmoe_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> VMoE:
    """ViT-Tiny width (192), all 12 blocks with 8 experts."""
    return _create("vmoe_tiny_patch16_224", pretrained, _sizes(16, 192, 12, 3), kwargs)


@register_model
def vmoe_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> VMoE:
    """ViT-Small width (384), all 12 blocks with 8 experts."""
    return _create("vmoe_small_patch16_224", pretrained, _sizes(16, 384, 12, 6), kwargs)


@register_model
def vmoe_small_patch32_224(pretrained: bool = False, **kwargs: Any) -> VMoE:
    """ViT-Small width (384), patches of 32 pixels, all 12 blocks with 8 experts."""
    return _create("vmoe_small_patch32_224", pretrained, _sizes(32, 384, 12, 6), kwargs)


@register_model
def vmoe_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> VMoE:
    """The m2mKD paper's student: ViT-Base width (768), all 12 blocks with 8 experts."""
    return _create("vmoe_base_patch16_224", pretrained, _sizes(16, 768, 12, 12), kwargs)


@register_model
def vmoe_base_patch32_224(pretrained: bool = False, **kwargs: Any) -> VMoE:
    """ViT-Base width (768), patches of 32 pixels, all 12 blocks with 8 experts."""
    return _create("vmoe_base_patch32_224", pretrained, _sizes(32, 768, 12, 12), kwargs)


@register_model
def vmoe_large_patch16_224(pretrained: bool = False, **kwargs: Any) -> VMoE:
    """ViT-Large width (1024), all 24 blocks with 8 experts."""
    return _create("vmoe_large_patch16_224", pretrained, _sizes(16, 1024, 24, 16), kwargs)


@register_model
def vmoe_huge_patch14_224(pretrained: bool = False, **kwargs: Any) -> VMoE:
    """ViT-Huge width (1280), all 32 blocks with 8 experts."""
    return _create("vmoe_huge_patch14_224", pretrained, _sizes(14, 1280, 32, 16), kwargs)


@register_model
def vit_incubated(
    pretrained: bool = False, norm_eps: float = 1e-6, **kwargs: Any
) -> VisionTransformer:
    """Deep Incubation's ViT: timm's, with the eps of its norms as an option (1e-5 in ViT-H)."""
    if pretrained:
        raise ConfigError("vit_incubated has no weights here; `m2mkd import` a published one")
    model: VisionTransformer = build_model_with_cfg(
        VisionTransformer,
        "vit_incubated",
        pretrained,
        norm_layer=partial(nn.LayerNorm, eps=norm_eps),
        **kwargs,
    )
    return model
