"""Loading checkpoints of the papers' published code.

Each loader below names the code its layout comes from. Every tensor is placed
under our names or the load fails; nothing is skipped silently.
"""

import math
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from m2mkd.errors import CheckpointError, ConfigError, did_you_mean
from m2mkd.models.adapt import ClassifierChoice, GridChoice, adapt, hint
from m2mkd.models.official_nac import (
    STITCH,
    load_mediator,
    load_nac,
    load_read_in,
    load_read_out,
    nac_arguments,
)
from m2mkd.models.stages import ViTStage
from m2mkd.models.vmoe import VMoE, vit_incubated

Config = Mapping[str, Any]

_EPS = 1e-6

# FastMoE names -> ours, inside a block. Expert weights are [E, H, D] and [E, D, H] in both.
_MOE_NAMES = {
    "moe.gate.gate.weight": "mlp.router.weight",
    "moe.gate.gate.bias": "mlp.router.bias",
    "moe.experts.htoh4.weight": "mlp.fc1_weight",
    "moe.experts.htoh4.bias": "mlp.fc1_bias",
    "moe.experts.h4toh.weight": "mlp.fc2_weight",
    "moe.experts.h4toh.bias": "mlp.fc2_bias",
    "pre_stitch.ln.weight": "pre_stitch.norm.weight",
    "pre_stitch.ln.bias": "pre_stitch.norm.bias",
    "post_stitch.ln.weight": "post_stitch.norm.weight",
    "post_stitch.ln.bias": "post_stitch.norm.bias",
}
_SINGLE_EXPERT = re.compile(
    r"(blocks\.\d+\.moe\.experts)\.(\d+)\.((?:htoh4|h4toh)\.(?:weight|bias))$"
)
_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)$")
_STAGE = re.compile(r"stages\.(\d+)\.(.+)$")


def load(
    kind: str,
    state_dict: Mapping[str, Any],
    config: Config,
    *,
    grid: GridChoice = "keep",
    classifier: ClassifierChoice = "keep",
) -> nn.Module:
    """Builds our module from a published checkpoint and returns it in eval mode.

    Args:
        kind: `vit` (Deep Incubation's teachers and meta models), `vmoe` (m2mKD's V-MoE, whole
            or one student module), `nac` (a NeuralCompiler), or one of its student modules
            `nac_readin`, `nac_mediator`, `nac_readout`.
        state_dict: Tensors (or arrays) under the published names; `stages.*` repetitions of
            `blocks.*` may be there.
        config: Sizes, as the published constructors name them: embed_dim, num_heads, patch_size,
            img_size, num_classes, mlp_ratio, qkv_bias, layernorm_eps; for V-MoE also num_expert,
            top_k, moe_pos, pre_stitch_pos, post_stitch_pos, stitch_dim, is_student, idx. The number
            of blocks is read from the checkpoint, and what else it shows where the config is
            silent; a published model's name under `model` gives the heads. For NACs, the keys of
            the published YAML files. Beside a student module's tensors, state_dict may have the
            `codes` [1, C] and `states` that it was taught under; without them they are drawn (see
            its `set_latents`).

        grid: What becomes of positions when the config has images of another size than the
            checkpoint: `keep` refuses, `resize` interpolates, `reset` starts afresh.
        classifier: The same for other classes: `keep` refuses, `reset` starts afresh.

    Returns:
        A timm `VisionTransformer`, a `VMoE`, for one student module of it a `ViTStage`, a `NAC`, or
        one of the stages in `m2mkd.models.nac_stages`. The attribute
        `loaded_tensors` maps every tensor's published name to ours (`name[2]` for the part of
        expert 2, where the published layout has one tensor per expert); `fresh_tensors` lists ours
        that started afresh.

    Raises:
        ConfigError: Unknown kind or a config that lacks a size.
        CheckpointError: A tensor that has no place, is missing, or has another shape.
    """
    if kind not in _LOADERS:
        raise ConfigError(
            f"unknown kind '{kind}'{did_you_mean(kind, _LOADERS)}; known: {', '.join(_LOADERS)}"
        )
    tensors = _as_tensors(state_dict)
    experts = _fuse_experts(tensors)
    try:
        module, names = _LOADERS[kind](tensors, config)
    except KeyError as error:
        raise ConfigError(f"config of a {kind} checkpoint lacks {error}") from None
    fresh = _fill(module, tensors, names, kind, grid=grid, classifier=classifier)
    for name, (fused, expert) in experts.items():
        names[name] = f"{names[fused]}[{expert}]"
    names = {name: ours for name, ours in names.items() if ours not in fresh}
    # Plain attributes, not submodules.
    object.__setattr__(module, "loaded_tensors", names)
    object.__setattr__(module, "fresh_tensors", fresh)
    return module.eval()


def describe(
    kind: str, state_dict: Mapping[str, Any], config: Config
) -> tuple[str, dict[str, Any], list[int]]:
    """How timm creates the network of a published checkpoint, for a `ModelCard`.

    Args:
        kind: `vit`, `vmoe` or `nac`: the kinds of whole networks.
        state_dict: As for `load`.
        config: As for `load`; `divided_depths` are the blocks of each module.

    Returns:
        Model name; JSON-able arguments with img_size, in_chans and num_classes among them; blocks
        per module.

    Raises:
        ConfigError: A student module, or a config that lacks a size.
    """
    if kind == "nac":
        arguments = nac_arguments(config)
        stitch = state_dict.get(STITCH)
        if stitch is not None:
            arguments["stitch_dim"] = len(stitch)
        return "nac", arguments, [1] * (arguments["depth"] + 2)
    if kind not in _LOADERS or kind.startswith("nac_") or config.get("is_student"):
        raise ConfigError(f"a {kind} checkpoint of this config is not a whole network")
    tensors = _as_tensors(state_dict)
    try:
        arguments = _sizes(tensors, config)
        if kind == "vmoe":
            arguments |= _expert_sizes(tensors, config)
    except KeyError as error:
        raise ConfigError(f"config of a {kind} checkpoint lacks {error}") from None
    if kind == "vmoe" and "norm_eps" in arguments:
        raise ConfigError(f"a V-MoE's norms have an eps of {_EPS}, not {arguments['norm_eps']}")
    name = {"vit": "vit_incubated", "vmoe": "vmoe_base_patch16_224"}[kind]
    depth = arguments["depth"]
    return name, arguments, list(config.get("divided_depths") or [depth])


def _as_tensors(state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    tensors = {
        name: torch.from_numpy(np.asarray(value)) if not isinstance(value, Tensor) else value
        for name, value in state_dict.items()
        if not name.startswith("__")  # notes beside the tensors, such as `__aliases__`
    }
    return _without_repetitions(tensors)


def _load_vit(tensors: dict[str, Tensor], config: Config) -> tuple[nn.Module, dict[str, str]]:
    """Deep Incubation's VisionTransformer; its names are timm's."""
    vit = vit_incubated(**_sizes(tensors, config))
    return vit, {name: name for name in tensors}


def _load_vmoe(tensors: dict[str, Tensor], config: Config) -> tuple[nn.Module, dict[str, str]]:
    """m2mKD's VMoE with FastMoE experts, fused (up to 1.0.0) or one by one (from 1.0.1)."""
    sizes = _sizes(tensors, config)
    norm_layer = partial(nn.LayerNorm, eps=sizes.pop("norm_eps", _EPS))
    model = VMoE(norm_layer=norm_layer, **sizes, **_expert_sizes(tensors, config))
    names = {name: _our_name(name) for name in tensors}
    if not config.get("is_student"):
        return model, names
    index = config["idx"]
    return ViTStage(model, 0, sizes["depth"], is_first=index == 0, is_last=index == -1), names


_LOADERS: dict[str, Callable[[dict[str, Tensor], Config], tuple[nn.Module, dict[str, str]]]] = {
    "vit": _load_vit,
    "vmoe": _load_vmoe,
    "nac": load_nac,
    "nac_readin": load_read_in,
    "nac_mediator": load_mediator,
    "nac_readout": load_read_out,
}


# Of the published constructors: heads, and the norms' eps where it is not 1e-6.
_PUBLISHED: dict[str, dict[str, Any]] = {
    "vit_base_patch16_224": {"num_heads": 12},
    "vit_large_patch16_224": {"num_heads": 16},
    "vit_huge_patch14_224": {"num_heads": 16, "layernorm_eps": 1e-5},
    "vmoe_base": {"num_heads": 12},
    "vmoe_large": {"num_heads": 16},
    "vmoe_huge": {"num_heads": 16},
}


def _sizes(tensors: Mapping[str, Tensor], config: Config) -> dict[str, Any]:
    """Arguments of a ViT, JSON-able: from the config, and where it is silent from the tensors."""
    config = {**_PUBLISHED.get(config.get("model", ""), {}), **_visible_sizes(tensors), **config}
    sizes = {
        "depth": _num_blocks(tensors),
        "img_size": config["img_size"],
        "patch_size": config["patch_size"],
        "embed_dim": config["embed_dim"],
        "num_heads": config["num_heads"],
        "num_classes": config["num_classes"],
        "in_chans": config.get("in_chans", 3),
        "mlp_ratio": config.get("mlp_ratio", 4),
        "qkv_bias": config.get("qkv_bias", True),
    }
    eps = config.get("layernorm_eps", _EPS)
    return sizes if eps == _EPS else {**sizes, "norm_eps": eps}


def _visible_sizes(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """What the tensors of a whole ViT say about its sizes."""
    if not {"patch_embed.proj.weight", "pos_embed", "head.weight"} <= set(tensors):
        return {}
    embed_dim, in_chans, patch_size, _ = tensors["patch_embed.proj.weight"].shape
    side = math.isqrt(tensors["pos_embed"].shape[1] - 1)
    visible = {
        "embed_dim": embed_dim,
        "in_chans": in_chans,
        "patch_size": patch_size,
        "img_size": side * patch_size,
        "num_classes": tensors["head.weight"].shape[0],
        "qkv_bias": "blocks.0.attn.qkv.bias" in tensors,
    }
    gates = [t for name, t in tensors.items() if name.endswith("moe.gate.gate.weight")]
    return {**visible, "num_expert": gates[0].shape[0]} if gates else visible


def _expert_sizes(tensors: Mapping[str, Tensor], config: Config) -> dict[str, Any]:
    """Arguments of a V-MoE beyond a ViT's, JSON-able."""
    config = {**_visible_sizes(tensors), **config}
    moe_pos = config.get("moe_pos")
    sizes = {
        "moe_blocks": "all" if moe_pos is None else list(moe_pos),
        "num_experts": config["num_expert"],
        "num_selected": config.get("top_k", 2),
        "pre_stitch_blocks": list(config.get("pre_stitch_pos") or ()),
        "post_stitch_blocks": list(config.get("post_stitch_pos") or ()),
    }
    if config.get("stitch_dim") is not None:
        sizes["stitch_dim"] = config["stitch_dim"]
    return sizes


def _num_blocks(tensors: Mapping[str, Tensor]) -> int:
    blocks = [int(match[1]) for match in map(_BLOCK.match, tensors) if match]
    if not blocks:
        raise CheckpointError("the checkpoint has no tensor named blocks.N.*; not a ViT")
    return max(blocks) + 1


def _without_repetitions(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Drops `stages.*` names, which repeat others; a stage's blocks count from 0.

    Raises:
        CheckpointError: One that repeats nothing, or has other values than what it repeats.
    """
    repeated = {name: match for name in tensors if (match := _STAGE.match(name))}
    blocks_of: dict[int, int] = {}
    for match in repeated.values():
        if block := _BLOCK.match(match[2]):
            stage = int(match[1])
            blocks_of[stage] = max(blocks_of.get(stage, 0), int(block[1]) + 1)
    kept = {name: tensor for name, tensor in tensors.items() if name not in repeated}
    for name, match in repeated.items():
        original = match[2]
        if block := _BLOCK.match(original):
            earlier = sum(count for stage, count in blocks_of.items() if stage < int(match[1]))
            original = f"blocks.{earlier + int(block[1])}.{block[2]}"
        if original not in kept or not torch.equal(kept[original], tensors[name]):
            raise CheckpointError(f"no place for {name}: it should repeat {original} and does not")
    return kept


def _fuse_experts(tensors: dict[str, Tensor]) -> dict[str, tuple[str, int]]:
    """Stacks per-expert tensors [1, ...] (FastMoE 1.0.1 and later) into [E, ...], in place.

    Returns:
        For every name that was stacked, the fused one and the expert's number.

    Raises:
        CheckpointError: An expert between two others is missing.
    """
    groups: dict[str, dict[int, str]] = {}
    for name in tensors:
        if match := _SINGLE_EXPERT.match(name):
            groups.setdefault(f"{match[1]}.{match[3]}", {})[int(match[2])] = name
    placed: dict[str, tuple[str, int]] = {}
    for fused, members in groups.items():
        if sorted(members) != list(range(len(members))):
            raise CheckpointError(f"{fused}: experts {sorted(members)} are there, others missing")
        placed |= {name: (fused, expert) for expert, name in members.items()}
        tensors[fused] = torch.cat([tensors.pop(members[e]) for e in range(len(members))])
    return placed


def _our_name(name: str) -> str:
    match = _BLOCK.match(name)
    if match and match[2] in _MOE_NAMES:
        return f"blocks.{match[1]}.{_MOE_NAMES[match[2]]}"
    return name


def _fill(
    module: nn.Module,
    tensors: dict[str, Tensor],
    names: dict[str, str],
    kind: str,
    *,
    grid: GridChoice,
    classifier: ClassifierChoice,
) -> list[str]:
    """Puts tensors into a module; returns the names that keep their own values by choice."""
    own = module.state_dict()
    placed: dict[str, Tensor] = {}
    fresh: list[str] = []
    problems = []
    for name, tensor in tensors.items():
        place = names[name]
        if place not in own:
            problems.append(f"no place for {name}")
            continue
        adapted = adapt(place, tensor, module, grid=grid, classifier=classifier)
        if adapted is None:
            fresh.append(place)
            continue
        placed[place] = adapted
        if adapted.shape != own[place].shape:
            problems.append(
                f"{name} has shape {list(adapted.shape)}, not {list(own[place].shape)}{hint(place)}"
            )
    problems += [f"{name} is missing" for name in own if name not in placed and name not in fresh]
    if problems:
        shown = "; ".join(problems[:8])
        more = f" and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise CheckpointError(f"checkpoint does not fit a {kind} of this config: {shown}{more}")
    module.load_state_dict({**own, **placed})
    return fresh
