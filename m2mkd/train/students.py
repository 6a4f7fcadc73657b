"""The two kinds of students: how each is cut into modules, taught, and put together again."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from m2mkd.distill import AssemblyReport, assemble, assemble_nac, stitch_args
from m2mkd.distill.assembly import Assembly, ModuleWeights
from m2mkd.errors import ConfigError
from m2mkd.models import NAC, VMoE, resolve_depths, split_nac, split_vit
from m2mkd.recipe import Recipe

# Builds the student with further arguments and a stochastic depth rate.
Create = Callable[[dict[str, Any], float], Any]


class VMoEStudent:
    """Modules are runs of blocks; stitches may stay, go, or be folded.

    Attributes:
        depths: Blocks per module.
    """

    def __init__(
        self, recipe: Recipe, network: VMoE, create: Create, num_modules: int, teacher_dim: int
    ) -> None:
        self._recipe = recipe
        self._create = create
        self._teacher_dim = teacher_dim
        if recipe.distill.nac_context != "alone":
            raise ConfigError(
                f"distill.nac_context {recipe.distill.nac_context} is for NACs, and student.model "
                f"{recipe.student.model} is none; leave it out"
            )
        self.depths = resolve_depths(
            recipe.student.depths,
            len(network.blocks),
            what="student.depths",
            num_modules=num_modules,
        )

    def assembled_args(self, assembly: Assembly) -> dict[str, Any]:
        """Model arguments of the assembled student."""
        return self._stitches(assembly)

    def modules(self) -> nn.ModuleList:
        """The modules between stitches of the teacher's width, freshly initialised."""
        drop_path = self._recipe.distill.schedule.drop_path
        return split_vit(self._create(self._stitches(None), drop_path), self.depths)

    def assemble(
        self, network: Any, weights: Sequence[ModuleWeights], assembly: Assembly
    ) -> AssemblyReport:
        """Copies trained module weights into a network built with `assembled_args`."""
        choices = self._recipe.distill
        return assemble(
            network,
            self.depths,
            weights,
            assembly,
            grid=choices.grid,
            classifier=choices.classifier,
        )

    def _stitches(self, assembly: Assembly | None) -> dict[str, Any]:
        stitch = self._recipe.distill.stitch
        return stitch_args(self.depths, self._teacher_dim, stitch=stitch, assembly=assembly)


class NACStudent:
    """Modules are the read-in, each propagator and the read-out; stitches may stay or go.

    Attributes:
        depths: One per module.
    """

    def __init__(
        self, recipe: Recipe, network: NAC, create: Create, num_modules: int, teacher_dim: int
    ) -> None:
        self._recipe = recipe
        self._create = create
        self._teacher_dim = teacher_dim
        self.depths = [1] * (network.depth + 2)
        _check_nac(recipe, network, num_modules)

    def assembled_args(self, assembly: Assembly) -> dict[str, Any]:
        """Model arguments of the assembled student."""
        return {"stitch_dim": self._teacher_dim} if assembly == "keep" else {}

    def modules(self) -> nn.ModuleList:
        """The modules between stitches of the teacher's width, freshly initialised."""
        nac = self._create({}, self._recipe.distill.schedule.drop_path)
        return split_nac(nac, self._teacher_dim, context=self._recipe.distill.nac_context)

    def assemble(
        self, network: Any, weights: Sequence[ModuleWeights], assembly: Assembly
    ) -> AssemblyReport:
        """Copies trained module weights into a network built with `assembled_args`."""
        del assembly
        choices = self._recipe.distill
        return assemble_nac(network, weights, grid=choices.grid, pooling=choices.classifier)


def make_student(
    recipe: Recipe, network: nn.Module, create: Create, num_modules: int, teacher_dim: int
) -> VMoEStudent | NACStudent:
    """The student of a recipe.

    Args:
        recipe: Says how it is distilled.
        network: A freshly built student, to look at.
        create: Builds others.
        num_modules: L, of teacher and meta model.
        teacher_dim: Their width.

    Raises:
        ConfigError: Modules that do not fit the teacher's, or settings that the kind cannot have.
    """
    kind = NACStudent if isinstance(network, NAC) else VMoEStudent
    return kind(recipe, network, create, num_modules, teacher_dim)  # type: ignore[arg-type]


def _check_nac(recipe: Recipe, nac: NAC, num_modules: int) -> None:
    own = nac.depth + 2
    wrong = {
        f"student.depths {recipe.student.depths}": recipe.student.depths != "auto",
        "student.upcycle_from": recipe.student.upcycle_from is not None,
        f"distill.stitch {recipe.distill.stitch} (they are linear)": recipe.distill.stitch
        != "linear",
        "distill.assembly fold (drop or keep)": recipe.distill.assembly == "fold",
        "distill.boundary_weight (tokens do not correspond)": recipe.distill.boundary_weight > 0.0,
    }
    for setting, is_wrong in wrong.items():
        if is_wrong:
            raise ConfigError(f"student.model {recipe.student.model}: a NAC cannot have {setting}")
    if own != num_modules:
        raise ConfigError(
            f"student.model {recipe.student.model} has {own} modules (read-in, {nac.depth} "
            f"propagators, read-out), but the teacher has {num_modules}; set teacher.depths to "
            f"{own} numbers or student.model_args.depth to {num_modules - 2}"
        )
