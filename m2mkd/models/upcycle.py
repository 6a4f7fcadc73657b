"""Sparse upcycling: a V-MoE that starts as a trained dense ViT (arXiv 2212.05055)."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from m2mkd.errors import CheckpointError
from m2mkd.models.build import place_weights, read_weights
from m2mkd.models.checkpoint import weights_file
from m2mkd.models.vmoe import VMoE
from m2mkd.nn import MoEMlp, expert_copies

# What a dense ViT does not have.
_FRESH = (".router.", "pre_stitch.", "post_stitch.")
_SETTING = "student.upcycle_from"


def upcycle(student: VMoE, dense: Mapping[str, Tensor], *, source: str = "dense ViT") -> None:
    """Gives a V-MoE the weights of a dense ViT; every expert becomes a copy of its block's MLP.

    With a gate whose weights sum to one (`softmax_selected` or `softmax_all_renorm`), no capacity
    and the same activation, the student then computes what the dense ViT does. Routers and
    stitches keep their initial weights; so does a head for another number of classes.

    Args:
        student: It is changed.
        dense: State dict of a timm ViT of the student's sizes.
        source: Where it came from, for messages.

    Raises:
        CheckpointError: The weights do not fit, or are those of a V-MoE.
    """
    weights = dict(dense)
    for i, block in enumerate(student.blocks):
        if not isinstance(block.mlp, MoEMlp):
            continue
        prefix = f"blocks.{i}.mlp."
        names = [name for name in weights if name.startswith(prefix)]
        if f"{prefix}fc1.weight" not in names:
            raise CheckpointError(
                f"{source} has no {prefix}fc1.weight; experts start as copies of a dense ViT's "
                "MLP, so name one with as many blocks, such as the teacher folder of a run"
            )
        mlp = {name.removeprefix(prefix): weights.pop(name) for name in names}
        copies = expert_copies(mlp, block.mlp.num_experts)
        weights |= {prefix + name: value for name, value in copies.items()}
    place_weights(student, weights, source=source, fresh=_FRESH)


def upcycle_from(student: VMoE, path: Path) -> None:
    """Does so from a file, or from a folder with a checkpoint of ours.

    Args:
        student: It is changed.
        path: A .safetensors or .pth file, or a stage folder such as `runs/NAME/teacher`. Positions
            are resampled to the student's image size, the patch embedding to its channels.

    Raises:
        CheckpointError: Nothing readable there, or weights that do not fit.
    """
    weights = read_weights(student, weights_file(path), setting=_SETTING)
    upcycle(student, weights, source=f"{_SETTING} {path}")
