"""Hybrids, pair training and assembly on small networks."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from m2mkd.distill import (
    PairLossSettings,
    PairsTask,
    assemble,
    boundary_loss,
    freeze,
    kd_loss,
    pair_name,
    run_hybrid,
    run_pairs,
    stitch_args,
)
from m2mkd.errors import CheckpointError, ConfigError, ShapeError
from m2mkd.models import create_vit, split_vit

SHAPE = {"num_classes": 5, "image_size": 8, "channels": 1}
TEACHER = {"patch_size": 4, "embed_dim": 32, "depth": 6, "num_heads": 2}
STUDENT = {"patch_size": 4, "embed_dim": 16, "depth": 4, "num_heads": 2, "num_experts": 3}
DEPTHS = [1, 2, 1]
JOINT = 1e-5  # joint and separate runs differ by float32 rounding of batched products


def teacher_stages() -> nn.ModuleList:
    return freeze(split_vit(create_vit("vit_tiny_patch16_224", TEACHER, **SHAPE), [2, 2, 2]))


def meta_stages() -> nn.ModuleList:
    args = {**TEACHER, "depth": 3}
    return freeze(split_vit(create_vit("vit_tiny_patch16_224", args, **SHAPE), [1, 1, 1]))


def student(stitch: str = "norm_linear", assembly: str | None = None, **extra: object) -> nn.Module:
    args = stitch_args(DEPTHS, TEACHER["embed_dim"], stitch=stitch, assembly=assembly)
    return create_vit("vmoe_tiny_patch16_224", {**STUDENT, **args, **extra}, **SHAPE)


def batch(count: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    targets = F.one_hot(torch.arange(count) % 5, 5).float()
    return torch.randn(count, 1, 8, 8), targets


def gradients(task: PairsTask) -> dict[str, torch.Tensor]:
    found = {n: p.grad for n, p in task.trainable_module.named_parameters() if p.grad is not None}
    return {name: grad.clone() for name, grad in found.items()}


@pytest.mark.parametrize("with_teacher", [True, False])
@pytest.mark.parametrize("boundary_weight", [0.0, 0.7])
def test_joint_and_separate_training_have_the_same_gradients(
    with_teacher: bool, boundary_weight: float
) -> None:
    meta = meta_stages()
    modules = dict(enumerate(split_vit(student(importance_weight=0.1), DEPTHS)))
    teachers = dict(enumerate(teacher_stages())) if with_teacher else {}
    settings = PairLossSettings(boundary_weight=boundary_weight)
    images, targets = batch()

    joint = PairsTask(meta, modules, teachers, settings).train()
    result = joint(images, targets)
    result["loss"].backward()
    together = gradients(joint)
    assert len(together) == len(list(joint.trainable_module.parameters()))
    for i, module in modules.items():
        module.zero_grad()
        one_teacher = {i: teachers[i]} if teachers else {}
        alone = PairsTask(meta, {i: module}, one_teacher, settings).train()
        loss = alone(images, targets)["loss"]
        torch.testing.assert_close(loss, result[f"{pair_name(i)}/loss"], atol=JOINT, rtol=JOINT)
        loss.backward()
        for name, grad in gradients(alone).items():
            torch.testing.assert_close(grad, together[name], atol=JOINT, rtol=JOINT)


def test_a_student_equal_to_its_teacher_has_no_kd_loss() -> None:
    meta, teachers = meta_stages(), teacher_stages()
    images, _ = batch()
    outputs = run_pairs(
        meta, dict(enumerate(copy.deepcopy(teachers))), dict(enumerate(teachers)), images
    )
    for output in outputs.values():
        assert kd_loss(output.student_logits, output.teacher_logits).abs() < 1e-6


def test_boundary_term_compares_with_what_the_next_module_is_trained_on() -> None:
    meta, images = meta_stages(), batch()[0]
    copies = dict(enumerate(copy.deepcopy(meta)))
    outputs = run_pairs(meta, copies, {}, images, boundaries=True)
    for i in (0, 1):
        assert outputs[i].meta_boundary is not None
        assert boundary_loss(outputs[i].student_boundary, outputs[i].meta_boundary) < 1e-9
    assert outputs[2].meta_boundary is None
    alone = run_pairs(meta, {1: copies[1]}, {}, images, boundaries=True)
    torch.testing.assert_close(alone[1].meta_boundary, outputs[1].meta_boundary)
    assert run_pairs(meta, copies, {}, images)[0].meta_boundary is None
    mean = outputs[0].meta_boundary.mean(dim=(0, 1)).expand_as(outputs[0].meta_boundary)
    torch.testing.assert_close(boundary_loss(mean, outputs[0].meta_boundary), torch.tensor(1.0))


def test_pairs_equal_hybrids_run_one_by_one() -> None:
    meta, teachers = meta_stages(), teacher_stages()
    modules = split_vit(student().eval(), DEPTHS)
    images, _ = batch()
    outputs = run_pairs(meta, dict(enumerate(modules)), dict(enumerate(teachers)), images)
    for i, output in outputs.items():
        torch.testing.assert_close(
            output.student_logits, run_hybrid(meta, i, modules[i], images), atol=JOINT, rtol=JOINT
        )
        torch.testing.assert_close(
            output.teacher_logits, run_hybrid(meta, i, teachers[i], images), atol=JOINT, rtol=JOINT
        )


def test_training_a_pair_leaves_meta_and_teacher_as_they_were() -> None:
    meta, teachers = meta_stages(), teacher_stages()
    before = [p.clone() for p in [*meta.parameters(), *teachers.parameters()]]
    module = split_vit(student(), DEPTHS)[1]
    task = PairsTask(meta, {1: module}, {1: teachers[1]}).train()
    optimizer = torch.optim.SGD(task.trainable_module.parameters(), lr=1.0)
    start = [p.clone() for p in module.parameters()]
    task(*batch())["loss"].backward()
    optimizer.step()
    after = [*meta.parameters(), *teachers.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(start, module.parameters(), strict=True))
    assert not any(m.training for m in [*meta.modules(), *teachers.modules()])


def test_numel_reduction_is_batchmean_over_the_classes() -> None:
    s, t = torch.randn(4, 5), torch.randn(4, 5)
    torch.testing.assert_close(kd_loss(s, t, reduction="numel") * 5, kd_loss(s, t))
    by_hand = (t.softmax(1) * (t.log_softmax(1) - s.log_softmax(1))).sum() / 4
    torch.testing.assert_close(kd_loss(s, t), by_hand)


def test_a_pair_that_does_not_exist_is_named() -> None:
    with pytest.raises(ConfigError, match="pair 7 does not exist"):
        run_pairs(meta_stages(), {7: nn.Identity()}, {}, batch()[0])


def test_a_student_of_another_width_is_named() -> None:
    module = split_vit(create_vit("vmoe_tiny_patch16_224", STUDENT, **SHAPE), DEPTHS)[0]
    with pytest.raises(ShapeError, match="pair 0: the student module gives"):
        run_pairs(meta_stages(), {0: module}, {0: teacher_stages()[0]}, batch()[0])


def distilled(stitch: str) -> tuple[nn.ModuleList, list[dict[str, torch.Tensor]]]:
    stages = split_vit(student(stitch).eval(), DEPTHS)
    return stages, [stage.state_dict() for stage in stages]


def chain(stages: nn.ModuleList, images: torch.Tensor) -> torch.Tensor:
    for stage in stages:
        images = stage(images)
    return images


@pytest.mark.parametrize(("stitch", "assembly"), [("norm_linear", "keep"), ("linear", "fold")])
def test_keep_and_fold_compute_what_the_distilled_modules_compute(
    stitch: str, assembly: str
) -> None:
    stages, weights = distilled(stitch)
    network = student(stitch, assembly).eval()
    report = assemble(network, DEPTHS, weights, assembly)
    images, _ = batch()
    torch.testing.assert_close(network(images), chain(stages, images), atol=JOINT, rtol=JOINT)
    assert report.untouched == [] and report.dropped == []
    assert report.folded == ([(0, 1), (1, 2)] if assembly == "fold" else [])


def test_drop_moves_everything_but_the_stitches() -> None:
    _, weights = distilled("norm_linear")
    network = student(assembly="drop").eval()
    report = assemble(network, DEPTHS, weights, "drop")
    assert sum(report.transferred) == len(network.state_dict())
    assert len(report.dropped) == 4 * 4  # two boundaries, two stitches each, norm and fc
    assert all("stitch" in name for name in report.dropped)
    assert report.untouched == []
    assert torch.equal(network.head.weight, weights[2]["head.weight"])


def test_a_tensor_without_a_place_is_an_error() -> None:
    _, weights = distilled("norm_linear")
    with pytest.raises(CheckpointError, match="module 0: no place in the network"):
        assemble(student(assembly="drop"), DEPTHS, weights, "keep")
