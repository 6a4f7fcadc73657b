"""Putting NAC modules together after m2mKD (arXiv 2402.16918): which tensor goes where.

Codes, signatures, seeder and bandwidths had no part in the pairs and keep their first values.
"""

from collections.abc import Sequence
from typing import get_args

import torch
from torch import Tensor

from m2mkd.distill.assembly import AssemblyReport, ModuleWeights
from m2mkd.errors import CheckpointError
from m2mkd.models import NAC
from m2mkd.models.adapt import ClassifierChoice, GridChoice, check_choice, resize_grid

_GRID = "tokenizer.grid"
# The code and states that a pair was taught under belong to the pair.
_OF_THE_PAIR = ("codes", "states")
_POOLING = ("pooling.", "read_out.head.", "read_out.head_norm.")


@torch.no_grad()
def assemble_nac(
    nac: NAC,
    modules: Sequence[ModuleWeights],
    *,
    grid: GridChoice = "keep",
    pooling: ClassifierChoice = "keep",
) -> AssemblyReport:
    """Copies the weights of separately trained modules into a NAC.

    Stitches are kept where the NAC has places for them (`stitch_dim`): the stitch after a module
    and the one before the next become one residual pair. Otherwise they are dropped, as published.

    Args:
        nac: The whole network.
        modules: Weights of read-in, propagators and read-out, under the names of `split_nac`.
        grid: What becomes of the positions: `keep` needs the same grid, `resize` interpolates
            between them, `reset` leaves the NAC's own.
        pooling: What becomes of confidence and classifier: `keep` needs the same classes, `reset`
            leaves the NAC's own.

    Returns:
        What moved, what was dropped and what stayed.

    Raises:
        CheckpointError: A tensor with no place in the NAC, or of another shape.
        ConfigError: An unknown choice.
    """
    check_choice("grid", grid, get_args(GridChoice))
    check_choice("pooling", pooling, get_args(ClassifierChoice))
    if len(modules) != nac.depth + 2:
        raise CheckpointError(f"{len(modules)} trained modules for {nac.depth + 2} modules")
    own = nac.state_dict()
    report = AssemblyReport()
    moved: dict[str, Tensor] = {}
    for i, weights in enumerate(modules):
        places = {name: _place(nac, i, name) for name in weights if name not in _OF_THE_PAIR}
        for name, place in places.items():
            stays = (place == _GRID and grid == "reset") or (
                place is not None and place.startswith(_POOLING) and pooling == "reset"
            )
            if place is None or stays:
                report.dropped.append(f"{i}: {name}")
                continue
            tensor = weights[name]
            if place == _GRID and grid == "resize":
                tensor = resize_grid(tensor, (own[_GRID].shape[1], own[_GRID].shape[2]))
            _check_place(f"module {i}: {name}", tensor, own.get(place))
            moved[place] = tensor
        report.transferred.append(sum(place in moved for place in places.values()))
    nac.load_state_dict({**own, **moved})
    report.untouched = [name for name in own if name not in moved]
    return report


def _place(nac: NAC, module: int, name: str) -> str | None:
    """Where a module's tensor belongs in the NAC; None for stitches that are not kept."""
    part, _, rest = name.partition(".")
    if part == "propagator":
        return f"propagators.{module - 1}.{rest}"
    if part == "post_stitch":
        return f"stitches.post.{module}.{rest}" if nac.stitches is not None else None
    if part == "pre_stitch":
        return f"stitches.pre.{module - 1}.{rest}" if nac.stitches is not None else None
    return name


def _check_place(what: str, tensor: Tensor, own: Tensor | None) -> None:
    if own is None:
        raise CheckpointError(f"{what} has no place in the NAC")
    if own.shape == tensor.shape:
        return
    hint = ""
    if what.endswith(_GRID):
        hint = "; images of another size need grid 'resize' or 'reset'"
    elif "pooling." in what or "read_out.head" in what:
        hint = "; other classes need pooling 'reset'"
    raise CheckpointError(f"{what} has shape {list(tensor.shape)}, not {list(own.shape)}{hint}")
