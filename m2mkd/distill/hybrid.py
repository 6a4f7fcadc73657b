"""Hybrids: a module of the teacher or the student hosted by the meta model (arXiv 2402.16918).

For module i the hybrid is meta modules before i, the module, meta modules after i. Letters: B
batch, T tokens, D width, C classes, L modules.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from m2mkd.errors import ConfigError, NotFiniteError, ShapeError

M = TypeVar("M", bound=nn.Module)


@dataclass
class HybridOutput:
    """What one pair's two hybrids computed.

    Attributes:
        student_logits: [B, C], with gradient to the student module.
        teacher_logits: [B, C] without gradient; None when there is no teacher.
        student_boundary: What the student module handed on: tokens [B, T, D], or logits [B, C] for
            the last module.
        meta_boundary: What the meta model has at the same place, [B, T, D] without gradient: the
            input that the next student module is trained on. None when not asked for, for the
            last module, and where the student hands on another number of tokens.
    """

    student_logits: Tensor
    teacher_logits: Tensor | None
    student_boundary: Tensor
    meta_boundary: Tensor | None


def run_hybrid(meta: Sequence[nn.Module], index: int, module: nn.Module, images: Tensor) -> Tensor:
    """Logits [B, C] of one hybrid: the meta model with `module` in the place of meta module i."""
    x = images
    for i, stage in enumerate(meta):
        x = module(x) if i == index else stage(x)
    return x


class Hybrid(nn.Module):
    """The meta model with a module in the place of meta module i, as one network."""

    def __init__(self, meta: Sequence[nn.Module], index: int, module: nn.Module) -> None:
        super().__init__()
        self.meta = nn.ModuleList(meta)
        self.index = index
        self.module = module

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, C] of images [B, channels, H, W]."""
        return run_hybrid(list(self.meta), self.index, self.module, images)


def run_pairs(
    meta: Sequence[nn.Module],
    students: Mapping[int, nn.Module],
    teachers: Mapping[int, nn.Module],
    images: Tensor,
    *,
    boundaries: bool = False,
) -> dict[int, HybridOutput]:
    """Runs the hybrids of several pairs in one pass over the meta model.

    The meta prefix is computed once, without gradient, for all pairs; each later meta module runs
    once on the concatenated batch of all student hybrids that reach it, and once, without
    gradient, on that of the teacher hybrids and the prefix; tokens of another number, which the
    read-in of a NAC hands on, run apart. Images do not influence each other in a transformer, so
    the gradients are those of separate runs, to rounding.

    Args:
        meta: The L meta modules, frozen and in eval mode; gradients pass through them.
        students: Student modules by their index, wrapped in their stitches.
        teachers: Teacher modules by index: all of the students' indices, or empty for training on
            labels alone (Deep Incubation).
        images: [B, channels, H, W].
        boundaries: Whether to return `meta_boundary`.

    Raises:
        ConfigError: An index the meta model does not have, or a teacher missing.
        ShapeError: A module whose output does not fit the next meta module.
    """
    _check_indices(meta, students, teachers)
    outputs: dict[int, HybridOutput] = {}
    student_flow: dict[int, Tensor] = {}
    teacher_flow: dict[int, Tensor] = {}
    prefix: Tensor | None = images
    for i, stage in enumerate(meta):
        if student_flow:
            student_flow = _advance(stage, student_flow)
        here = prefix
        with torch.no_grad():
            reach = max(students) + int(boundaries)
            needs_prefix = i < min(reach, len(meta) - 1)
            frozen = dict(teacher_flow)
            if needs_prefix and prefix is not None:
                frozen[-1] = prefix
            # The first meta module takes images: only the prefix can be there.
            frozen = _advance(stage, frozen) if frozen else {}
            prefix = frozen.pop(-1, None)
            teacher_flow = frozen
        if i in students and here is not None:
            student_out = _run_module(i, students[i], here)
            teacher_out = None
            if teachers:
                with torch.no_grad():
                    teacher_out = teachers[i](here)
                _check_boundary(i, student_out, teacher_out)
                teacher_flow[i] = teacher_out
            student_flow[i] = student_out
            is_comparable = boundaries and prefix is not None and prefix.shape == student_out.shape
            outputs[i] = HybridOutput(
                student_out, teacher_out, student_out, prefix if is_comparable else None
            )
    for i, output in outputs.items():
        output.student_logits = student_flow[i]
        output.teacher_logits = teacher_flow.get(i)
    return outputs


def pair_name(index: int) -> str:
    """Folder and key of a pair: `pair-00`."""
    return f"pair-{index:02d}"


def freeze(modules: M) -> M:
    """Puts a module in eval mode and stops gradients to its parameters; returns it."""
    return modules.eval().requires_grad_(False)


def _run_module(index: int, module: nn.Module, x: Tensor) -> Tensor:
    try:
        output: Tensor = module(x)
    except NotFiniteError as error:
        raise NotFiniteError(f"{pair_name(index)}: {error}") from None
    return output


def _advance(stage: nn.Module, flow: dict[int, Tensor]) -> dict[int, Tensor]:
    """Runs a meta module on all tensors of the flow: once for all of a shape, concatenated."""
    groups: dict[torch.Size, list[int]] = {}
    for index, x in flow.items():
        groups.setdefault(x.shape[1:], []).append(index)
    advanced: dict[int, Tensor] = {}
    for indices in groups.values():
        if len(indices) == 1:
            advanced[indices[0]] = stage(flow[indices[0]])
            continue
        parts = stage(torch.cat([flow[i] for i in indices]))
        sizes = [flow[i].shape[0] for i in indices]
        advanced |= dict(zip(indices, parts.split(sizes), strict=True))
    return advanced


def _check_indices(
    meta: Sequence[nn.Module], students: Mapping[int, nn.Module], teachers: Mapping[int, nn.Module]
) -> None:
    for index in students:
        if not 0 <= index < len(meta):
            raise ConfigError(
                f"pair {index} does not exist: the meta model has {len(meta)} modules, 0 to "
                f"{len(meta) - 1}"
            )
        if teachers and index not in teachers:
            raise ConfigError(f"pair {index} has no teacher module")


def _check_boundary(index: int, student: Tensor, teacher: Tensor) -> None:
    # Numbers of tokens may differ: a NAC's read-in hands on one for each of its latents.
    if student.dim() != teacher.dim() or (student.shape[0], student.shape[-1]) != (
        teacher.shape[0],
        teacher.shape[-1],
    ):
        raise ShapeError(
            f"pair {index}: the student module gives {list(student.shape)}, the teacher module "
            f"{list(teacher.shape)}; student and teacher need the same classes, and stitches of "
            "the teacher's width"
        )
