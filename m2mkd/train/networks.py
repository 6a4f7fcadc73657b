"""The networks of a run, built from its recipe and data, and the checks that need no training."""

import platform
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import m2mkd
from m2mkd.distill import AssemblyReport
from m2mkd.distill.assembly import Assembly, ModuleWeights
from m2mkd.errors import CheckpointError, ConfigError
from m2mkd.models import (
    NAC,
    VMoE,
    count_flops,
    create_meta,
    create_network,
    create_vit,
    load_pretrained_vit,
    resolve_depths,
    split_vit,
    upcycle_from,
)
from m2mkd.models.checkpoint import ModelCard, weights_file
from m2mkd.nn import MoEMlp
from m2mkd.recipe import Recipe, digest
from m2mkd.train.data import ImageData
from m2mkd.train.loop import seed_everything
from m2mkd.train.students import make_student


class Networks:
    """Builds meta model, teacher and student; each kind starts from its own seed.

    Attributes:
        teacher_depths: Blocks per teacher module.
        teacher_file: The file with the teacher's given weights, if there is one.
        teacher_dim: Width of teacher and meta model.
        parameters: Number of parameters of `teacher` and `student`.

    Args:
        recipe: What to build.
        data: What meta model, teacher and pairs see.
        end_to_end_data: What the whole student sees; None for the same.

    Raises:
        ConfigError: Models that cannot be built, or do not fit each other or the data.
        CheckpointError: The teacher's weights file does not exist, or the student's does not fit.
    """

    def __init__(
        self, recipe: Recipe, data: ImageData, end_to_end_data: ImageData | None = None
    ) -> None:
        self.recipe = recipe
        self.teacher_file = _given_file("teacher.checkpoint", recipe.teacher.checkpoint)
        _given_file("student.upcycle_from", recipe.student.upcycle_from)
        self._data = data
        self._shape = _shape(data)
        self._student_data = end_to_end_data or data
        teacher = self._fresh_teacher()
        student = self._create_student({}, self._shape)
        count = _number_of_modules(recipe, student)
        is_auto = recipe.teacher.depths == "auto"
        self.teacher_depths = resolve_depths(
            recipe.teacher.depths,
            len(teacher.blocks),
            what="teacher.depths",
            num_modules=count,
            costs=count_flops(teacher, recipe.data.image_size) if is_auto else None,
        )
        split_vit(teacher, self.teacher_depths)  # fails now where it would fail later
        self.teacher_dim = teacher.embed_dim
        self._student = make_student(
            recipe, student, self._student_in_pairs, len(self.teacher_depths), self.teacher_dim
        )
        if isinstance(student, VMoE):
            _check_tokens(teacher, student)
            _check_capacity(student, recipe.data.batch_size)
        if end_to_end_data is not None:
            _check_choices(recipe, data, end_to_end_data)
            student = self._create_student({}, _shape(end_to_end_data))
            if isinstance(student, VMoE):
                _check_capacity(student, recipe.data_of("end_to_end").batch_size)
        self.parameters = {
            "teacher": sum(p.numel() for p in teacher.parameters()),
            "student": sum(p.numel() for p in student.parameters()),
        }

    @property
    def student_depths(self) -> list[int]:
        """Blocks per student module."""
        return self._student.depths

    @property
    def num_modules(self) -> int:
        """L."""
        return len(self.teacher_depths)

    def meta(self) -> VisionTransformer:
        """The meta model, freshly initialised."""
        self._seed("meta")
        teacher = self.recipe.teacher
        return create_meta(
            teacher.model,
            teacher.model_args,
            num_modules=self.num_modules,
            drop_path=self.recipe.meta.drop_path,
            **self._shape,
        )

    def teacher(self, drop_path: float = 0.0) -> VisionTransformer:
        """The teacher: with its given weights, or freshly initialised."""
        self._seed("teacher")
        teacher = self.recipe.teacher
        if not teacher.is_given:
            return self._fresh_teacher(drop_path)
        model = load_pretrained_vit(
            teacher.model,
            teacher.model_args,
            checkpoint=self.teacher_file,
            drop_path=drop_path,
            will_train=teacher.finetune is not None,
            **self._shape,
        )
        self._check_normalisation(model)
        return model

    def _check_normalisation(self, teacher: VisionTransformer) -> None:
        """Warns when images are normalised otherwise than the given weights expect."""
        published = getattr(teacher, "pretrained_cfg", {})
        ours = self._data.preprocessing
        for key in ("mean", "std"):
            expected = published.get(key)
            if expected and list(expected) != list(ours[key]) and len(expected) == len(ours[key]):
                warnings.warn(
                    f"teacher {self.recipe.teacher.model} was published with data.{key} "
                    f"{list(expected)}, this recipe has {list(ours[key])}",
                    stacklevel=2,
                )

    def student_modules(self) -> nn.ModuleList:
        """The student's modules with stitches on both sides of every boundary, as distilled."""
        return self._student.modules()

    def student(self, assembly: Assembly | None = None) -> VMoE | NAC:
        """The student as it is trained end to end, with the stitches that `assembly` leaves."""
        args = self._assembled_args(assembly)
        self._seed("student")
        drop_path = self.recipe.end_to_end.drop_path
        return self._create_student(args, _shape(self._student_data), drop_path)

    def assemble(self, student: VMoE | NAC, weights: Sequence[ModuleWeights]) -> AssemblyReport:
        """Copies trained modules into a student built for the recipe's assembly."""
        return self._student.assemble(student, weights, self.recipe.distill.assembly)

    def _assembled_args(self, assembly: Assembly | None) -> dict[str, Any]:
        return {} if assembly is None else self._student.assembled_args(assembly)

    def card(self, kind: str, assembly: Assembly | None = None) -> ModelCard:
        """What rebuilds a network of this run: kind `meta`, `teacher` or `student`."""
        section = self.recipe.student if kind == "student" else self.recipe.teacher
        data = self._student_data if kind == "student" else self._data
        args = dict(section.model_args)
        depths = {
            "meta": [1] * self.num_modules,
            "teacher": self.teacher_depths,
            "student": self.student_depths,
        }[kind]
        if kind == "meta":
            args["depth"] = self.num_modules
        if kind == "student":
            args |= self._assembled_args(assembly)
        return ModelCard(
            model=section.model,
            model_args=args,
            depths=depths,
            class_names=data.class_names,
            preprocessing=data.preprocessing,
            recipe=digest(self.recipe.model_dump(mode="json")),
            versions=versions(),
            **_shape(data),
        )

    def _student_in_pairs(self, extra: dict[str, Any], drop_path: float) -> VMoE | NAC:
        self._seed("student")
        return self._create_student(extra, self._shape, drop_path)

    def _create_student(
        self, extra: dict[str, Any], shape: dict[str, Any], drop_path: float = 0.0
    ) -> VMoE | NAC:
        section = self.recipe.student
        student = create_network(
            section.model, {**section.model_args, **extra}, drop_path=drop_path, **shape
        )
        if not isinstance(student, (VMoE, NAC)):
            known = timm.list_models("vmoe_*") + timm.list_models("nac_*")
            raise ConfigError(
                f"student.model {section.model} is not modular; take one of {', '.join(known)}"
            )
        if section.upcycle_from is not None and isinstance(student, VMoE):
            upcycle_from(student, section.upcycle_from)
        return student

    def _fresh_teacher(self, drop_path: float = 0.0) -> VisionTransformer:
        teacher = self.recipe.teacher
        return create_vit(teacher.model, teacher.model_args, drop_path=drop_path, **self._shape)

    def _seed(self, kind: str) -> None:
        seed_everything(self.recipe.seed, "weights", kind)


def versions() -> dict[str, str]:
    """Versions of what determines a result."""
    return {
        "m2mkd": m2mkd.__version__,
        "torch": torch.__version__,
        "timm": timm.__version__,
        "python": platform.python_version(),
    }


def _shape(data: ImageData) -> dict[str, Any]:
    """What networks must know of their images and classes."""
    channels, height, _ = data.preprocessing["input_size"]
    return {"num_classes": data.num_classes, "image_size": height, "channels": channels}


def _check_choices(recipe: Recipe, data: ImageData, end_to_end_data: ImageData) -> None:
    """Lets what cannot move into the student fail now, where the recipe does not say what then."""
    choices = recipe.distill
    old, new = _shape(data)["image_size"], _shape(end_to_end_data)["image_size"]
    if old != new and choices.grid == "keep":
        raise ConfigError(
            f"end_to_end_data.image_size {new} is not data.image_size {old}, so positions do not "
            "move as they are; set distill.grid to resize or reset"
        )
    if data.class_names != end_to_end_data.class_names and choices.classifier == "keep":
        raise ConfigError(
            f"end_to_end_data has other classes ({end_to_end_data.num_classes}) than data "
            f"({data.num_classes}), so the classifier cannot move; set distill.classifier: reset"
        )


def _check_capacity(student: VMoE, batch_size: int) -> None:
    """Lets a capacity that rounds to zero fail now, not hours later."""
    tokens = student.patch_embed.num_patches + student.num_prefix_tokens
    for layer in student.modules():
        if isinstance(layer, MoEMlp):
            layer.train().capacity(batch_size * tokens)
            layer.eval().capacity(tokens)


def _check_tokens(teacher: VisionTransformer, student: VisionTransformer) -> None:
    def tokens(vit: VisionTransformer) -> tuple[int, int]:
        return vit.patch_embed.num_patches, vit.num_prefix_tokens

    if tokens(teacher) != tokens(student):
        raise ConfigError(
            "teacher and student modules exchange tokens, but the teacher has "
            "{}+{} (patches + prefix tokens) and the student {}+{}; give both the same patch_size "
            "and class_token".format(*tokens(teacher), *tokens(student))
        )


def _given_file(setting: str, path: Path | None) -> Path | None:
    if path is not None and not path.exists():
        raise CheckpointError(f"{setting} {path} does not exist")
    return None if path is None else weights_file(path)


def _number_of_modules(recipe: Recipe, student: VMoE | NAC) -> int | None:
    """What the recipe says of L in any place; None where it says nothing."""
    for depths in (recipe.teacher.depths, recipe.student.depths):
        if isinstance(depths, list):
            return len(depths)
    return student.depth + 2 if isinstance(student, NAC) else None
