"""What is trained: each task maps images and targets to a loss.

Tasks are timm `TrainingTask`s: `forward(images, targets)` returns a dict with `loss`, `output`
(logits for metrics) and further scalars for logging; `trainable_module` owns the parameters.
Targets are class probabilities [B, C].
"""

from collections.abc import Mapping, Sequence

import torch
from timm.task import TrainingTask
from torch import Tensor, nn
from torch.nn import functional as F

from m2mkd.distill.hybrid import freeze, pair_name, run_pairs
from m2mkd.distill.losses import PairLossSettings, boundary_loss, distillation_loss, kd_loss
from m2mkd.nn import auxiliary_loss


class SupervisedTask(TrainingTask):
    """Trains a network on labels: cross-entropy, plus the auxiliary losses of its MoE layers."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(verbose=False)
        self.trainable_module = model

    def forward(self, images: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Loss of images [B, channels, H, W] against targets [B, C]."""
        logits = self.trainable_module(images)
        loss = F.cross_entropy(logits, targets)
        return {"loss": _with_auxiliary(loss, self.trainable_module), "output": logits}


class LogitKDTask(TrainingTask):
    """Baseline: the whole teacher teaches the whole student at the logits."""

    def __init__(self, model: nn.Module, teacher: nn.Module, settings: PairLossSettings) -> None:
        super().__init__(verbose=False)
        self.trainable_module = model
        self.teacher = freeze(teacher)
        self.settings = settings

    def forward(self, images: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Loss of images [B, channels, H, W] against targets [B, C] and the teacher."""
        with torch.no_grad():
            teacher_logits = self.teacher(images)
        logits = self.trainable_module(images)
        loss = distillation_loss(logits, teacher_logits, targets, self.settings)
        return {"loss": _with_auxiliary(loss, self.trainable_module), "output": logits}

    def train(self, mode: bool = True) -> "LogitKDTask":
        """Keeps the teacher in eval mode."""
        super().train(mode)
        self.teacher.eval()
        return self


class PairsTask(TrainingTask):
    """Trains modules inside the frozen meta model: m2mKD pairs, or Deep Incubation's modules.

    Args:
        meta: The L meta modules.
        modules: Modules to train by index; their keys in `trainable_module` are `pair-00`, ...
        teachers: Teacher modules by index; empty trains on labels alone (arXiv 2212.04129).
        settings: How pairs are graded.

    The result holds each pair's loss and accuracy as `pair-00/loss`, `pair-00/accuracy`; `loss` is
    their sum. Modules share no parameters, so each pair's gradients are those of training alone.
    """

    def __init__(
        self,
        meta: Sequence[nn.Module],
        modules: Mapping[int, nn.Module],
        teachers: Mapping[int, nn.Module],
        settings: PairLossSettings | None = None,
    ) -> None:
        super().__init__(verbose=False)
        self.meta = nn.ModuleList(meta)
        freeze(self.meta)
        self.indices = sorted(modules)
        self.trainable_module = nn.ModuleDict({pair_name(i): modules[i] for i in self.indices})
        self.teachers = nn.ModuleDict({pair_name(i): m for i, m in teachers.items()})
        freeze(self.teachers)
        self.settings = settings or PairLossSettings()

    def forward(self, images: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Losses of images [B, channels, H, W] against targets [B, C] and the teacher hybrids."""
        students = {i: self.trainable_module[pair_name(i)] for i in self.indices}
        teachers = {i: self.teachers[pair_name(i)] for i in self.indices if len(self.teachers)}
        weight = self.settings.boundary_weight
        outputs = run_pairs(list(self.meta), students, teachers, images, boundaries=weight > 0.0)
        result: dict[str, Tensor] = {}
        losses = []
        labels = targets.argmax(dim=1)
        for i, output in outputs.items():
            logits = output.student_logits
            if output.teacher_logits is None:
                loss = F.cross_entropy(logits, targets)
            else:
                loss = distillation_loss(logits, output.teacher_logits, targets, self.settings)
                if output.meta_boundary is not None:
                    term = boundary_loss(output.student_boundary, output.meta_boundary)
                    loss = loss + weight * term
            losses.append(_with_auxiliary(loss, students[i]))
            result[f"{pair_name(i)}/loss"] = losses[-1]
            result[f"{pair_name(i)}/accuracy"] = (logits.argmax(dim=1) == labels).float().mean()
        result["loss"] = torch.stack(losses).sum()
        return result

    def train(self, mode: bool = True) -> "PairsTask":
        """Keeps meta model and teachers in eval mode."""
        super().train(mode)
        self.meta.eval()
        self.teachers.eval()
        return self


class AlignTask(TrainingTask):
    """Teaches every meta module what the teacher's module in its place does to its tokens.

    A meta model that learned from labels does not know the features of a teacher that was trained
    elsewhere: hybrids of the two predict little better than chance. Ours, not the paper's, whose
    teacher is incubated in the meta model.

    Args:
        meta: The L meta modules; their keys in `trainable_module` are `pair-00`, ...
        teacher: The L teacher modules, frozen.

    The result holds each module's loss as `pair-00/loss`: `boundary_loss` against the teacher's
    tokens, for the last module the KL from the teacher's predictions. `loss` is their sum. Modules
    share neither parameters nor inputs, so each trains as if alone.
    """

    def __init__(self, meta: Sequence[nn.Module], teacher: Sequence[nn.Module]) -> None:
        super().__init__(verbose=False)
        self.trainable_module = nn.ModuleDict({pair_name(i): m for i, m in enumerate(meta)})
        self.teacher = freeze(nn.ModuleList(teacher))

    def forward(self, images: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Losses of images [B, channels, H, W]; the targets are not looked at."""
        del targets
        result: dict[str, Tensor] = {}
        tokens, losses = images, []
        for i, stage in enumerate(self.teacher):
            output = self.trainable_module[pair_name(i)](tokens)
            with torch.no_grad():
                tokens = stage(tokens)
            is_last = i == len(self.teacher) - 1
            losses.append(kd_loss(output, tokens) if is_last else boundary_loss(output, tokens))
            result[f"{pair_name(i)}/loss"] = losses[-1]
        result["loss"] = torch.stack(losses).sum()
        return result

    def train(self, mode: bool = True) -> "AlignTask":
        """Keeps the teacher in eval mode."""
        super().train(mode)
        self.teacher.eval()
        return self


def _with_auxiliary(loss: Tensor, module: nn.Module) -> Tensor:
    extra = auxiliary_loss(module)
    return loss if extra is None else loss + extra
