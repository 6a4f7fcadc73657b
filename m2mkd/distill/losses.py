"""Losses of m2mKD (arXiv 2402.16918, section 3; formulas as in the published code).

Letters: B batch, T tokens, D width, C classes.
"""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor
from torch.nn import functional as F

KDKind = Literal["soft", "hard"]
KDReduction = Literal["batchmean", "numel"]


@dataclass(frozen=True)
class PairLossSettings:
    """How a pair is graded.

    Attributes:
        alpha: Weight of the KD term; the labels weigh 1 - alpha.
        temperature: Softens both distributions; the term is scaled by its square.
        kd: `soft` (KL from the teacher's distribution) or `hard` (its top class as the label).
        kd_reduction: `batchmean` divides the KL by B, `numel` by B * C as the published code does.
        boundary_weight: Weight of `boundary_loss`; ours, not the paper's.
    """

    alpha: float = 0.5
    temperature: float = 1.0
    kd: KDKind = "soft"
    kd_reduction: KDReduction = "batchmean"
    boundary_weight: float = 0.0


def kd_loss(
    student_BC: Tensor,
    teacher_BC: Tensor,
    *,
    temperature: float = 1.0,
    kd: KDKind = "soft",
    reduction: KDReduction = "batchmean",
) -> Tensor:
    """Distance of the student's predictions from the teacher's; the teacher gets no gradient.

    Args:
        student_BC: Logits [B, C].
        teacher_BC: Logits [B, C].
        temperature: See `PairLossSettings`; unused by `hard`.
        kd: `soft` or `hard`.
        reduction: Of the soft form: `batchmean` or `numel`.

    Returns:
        A scalar.
    """
    teacher_BC = teacher_BC.detach()
    if kd == "hard":
        return F.cross_entropy(student_BC, teacher_BC.argmax(dim=1))
    divergence = F.kl_div(
        F.log_softmax(student_BC / temperature, dim=1),
        F.log_softmax(teacher_BC / temperature, dim=1),
        reduction="sum",
        log_target=True,
    )
    count = student_BC.shape[0] if reduction == "batchmean" else student_BC.numel()
    return divergence * temperature**2 / count


def distillation_loss(
    student_BC: Tensor,
    teacher_BC: Tensor,
    target: Tensor,
    settings: PairLossSettings | None = None,
    *,
    label_smoothing: float = 0.0,
) -> Tensor:
    """(1 - alpha) * cross-entropy with the target + alpha * KD, at the logits of two hybrids.

    Args:
        student_BC: Logits of the student hybrid.
        teacher_BC: Logits of the teacher hybrid.
        target: Class numbers [B] int64, or class probabilities [B, C].
        settings: Default: alpha 0.5, temperature 1, soft, batchmean. The boundary weight is not
            used here; see `boundary_loss`.
        label_smoothing: Of the cross-entropy.

    Returns:
        A scalar.
    """
    settings = settings or PairLossSettings()
    base = F.cross_entropy(student_BC, target, label_smoothing=label_smoothing)
    term = kd_loss(
        student_BC,
        teacher_BC,
        temperature=settings.temperature,
        kd=settings.kd,
        reduction=settings.kd_reduction,
    )
    return (1.0 - settings.alpha) * base + settings.alpha * term


def boundary_loss(student_BTD: Tensor, meta_BTD: Tensor) -> Tensor:
    """How far a student module's output is from the meta model's at the same place.

    The next student module learns on the meta model's output; a module that hands on the same makes
    the chain of modules coherent before end-to-end training. Ours, not the paper's.

    Args:
        student_BTD: What the student module and its stitch hand on, [B, T, D].
        meta_BTD: The meta model's tokens there, [B, T, D]; they get no gradient.

    Returns:
        A scalar: mean squared difference over the variance of meta_BTD within each dimension of D,
        so 1 is as bad as handing on the mean token.
    """
    meta_BTD = meta_BTD.detach()
    return F.mse_loss(student_BTD, meta_BTD) / meta_BTD.var(dim=(0, 1), correction=0).mean()
