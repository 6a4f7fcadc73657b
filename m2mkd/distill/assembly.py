"""Putting separately trained modules together: the student after m2mKD, the incubated teacher."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from m2mkd.errors import CheckpointError
from m2mkd.models import split_vit
from m2mkd.models.adapt import ClassifierChoice, GridChoice, adapt

Assembly = Literal["drop", "keep", "fold"]
ModuleWeights = Mapping[str, Tensor]

_PRE = "blocks.0.pre_stitch."


@dataclass
class AssemblyReport:
    """What became of the trained tensors.

    Attributes:
        transferred: Number of tensors that moved, per module.
        dropped: Tensors left out (stitches, and what was asked to start afresh), as `module: name`.
        folded: Boundaries (module before, module after) whose stitches became one map.
        untouched: Names in the assembled network that keep their initial values.
    """

    transferred: list[int] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    folded: list[tuple[int, int]] = field(default_factory=list)
    untouched: list[str] = field(default_factory=list)


def stitch_args(
    depths: Sequence[int], teacher_dim: int, *, stitch: str, assembly: Assembly | None = None
) -> dict[str, Any]:
    """`VMoE` arguments for stitches at the module boundaries.

    Args:
        depths: Blocks per module.
        teacher_dim: Width of teacher and meta model.
        stitch: `norm_linear` or `linear`.
        assembly: None gives the network that is distilled, with stitches on both sides of every
            boundary; otherwise the assembled one: `drop` has none, `keep` has them all, `fold` has
            one map of the student's width at each boundary.
    """
    ends = torch.tensor(list(depths)).cumsum(0).tolist()
    before = ends[:-1]
    if assembly == "drop":
        return {}
    if assembly == "fold":
        return {"pre_stitch_blocks": before, "stitch": "linear"}
    return {
        "pre_stitch_blocks": before,
        "post_stitch_blocks": [end - 1 for end in before],
        "stitch_dim": teacher_dim,
        "stitch": stitch,
    }


@torch.no_grad()
def assemble(
    network: VisionTransformer,
    depths: Sequence[int],
    modules: Sequence[ModuleWeights],
    assembly: Assembly | None = None,
    *,
    grid: GridChoice = "keep",
    classifier: ClassifierChoice = "keep",
) -> AssemblyReport:
    """Copies module weights into a network and says what moved and what did not.

    Args:
        network: The whole network, built with the `stitch_args` of this assembly.
        depths: Blocks per module.
        modules: Trained weights per module, under the local names of `ViTStage`.
        assembly: What to do with stitches; None when there are none (the teacher).
        grid: What becomes of positions, as for `m2mkd.models.adapt.adapt`.
        classifier: What becomes of the head, likewise.

    Raises:
        CheckpointError: A tensor of a module that has no place in the network, or a wrong shape.
        ConfigError: An unknown choice.
    """
    report = AssemblyReport()
    stages = split_vit(network, depths)
    if len(modules) != len(stages):
        raise CheckpointError(f"{len(modules)} trained modules for {len(stages)} modules")
    for i, (stage, weights) in enumerate(zip(stages, modules, strict=True)):
        weights = dict(weights)
        if assembly in ("drop", "fold"):
            if assembly == "drop":
                report.dropped += [f"{i}: {name}" for name in weights if is_stitch(name)]
            weights = {name: w for name, w in weights.items() if not is_stitch(name)}
        if assembly == "fold" and i > 0:
            weights |= _folded(modules[i - 1], depths[i - 1], modules[i])
            report.folded.append((i - 1, i))
        for name, tensor in list(weights.items()):
            adapted = adapt(name, tensor, network, grid=grid, classifier=classifier)
            if adapted is None:
                report.dropped.append(f"{i}: {name}")
                del weights[name]
            else:
                weights[name] = adapted
        try:
            missing, unplaced = stage.load_state_dict(weights, strict=False)
        except RuntimeError as error:
            detail = " ".join(str(error).split())[:300]
            raise CheckpointError(f"module {i} does not fit the network: {detail}") from None
        if unplaced:
            raise CheckpointError(f"module {i}: no place in the network for {', '.join(unplaced)}")
        report.transferred.append(len(weights))
        report.untouched += [f"{i}: {name}" for name in missing]
    return report


def is_stitch(name: str) -> bool:
    """Whether a tensor's name is that of a stitch layer."""
    return ".pre_stitch." in name or ".post_stitch." in name


def _folded(before: ModuleWeights, depth_before: int, after: ModuleWeights) -> dict[str, Tensor]:
    """One map between two modules: the next module's pre-stitch applied to the post-stitch.

    pre(post(x)) = W_pre (W_post x + b_post) + b_pre, multiplied out in float64.
    """
    post = f"blocks.{depth_before - 1}.post_stitch."
    post_weight, post_bias = before[f"{post}fc.weight"].double(), before[f"{post}fc.bias"].double()
    pre_weight, pre_bias = after[f"{_PRE}fc.weight"].double(), after[f"{_PRE}fc.bias"].double()
    dtype = after[f"{_PRE}fc.weight"].dtype
    return {
        f"{_PRE}fc.weight": (pre_weight @ post_weight).to(dtype),
        f"{_PRE}fc.bias": (pre_weight @ post_bias + pre_bias).to(dtype),
    }
