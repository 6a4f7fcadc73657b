"""NAC modules in the meta model's place, joint and alone, and put together again."""

import pytest
import torch
from torch import Tensor, nn

from m2mkd.distill import PairsTask, assemble_nac, freeze, run_hybrid, run_pairs
from m2mkd.errors import CheckpointError, ConfigError, ShapeError
from m2mkd.models import NAC, create_vit, split_nac, split_vit

TEACHER_DIM = 24
SIZES = {
    "tokenizer_depths": (1,),
    "tokenizer_dims": (12,),
    "patch_size": 4,
    "grid_dim": 4,
    "state_dim": 16,
    "code_dim": 12,
    "signature_dim": 8,
    "num_inputs": 3,
    "num_mediators": 6,
    "num_outputs": 2,
    "depth": 2,
    "num_heads": 2,
    "head_dim": 8,
}


def make_nac(**options: object) -> NAC:
    return NAC(img_size=16, in_chans=3, num_classes=5, **{**SIZES, **options})


@pytest.fixture
def nac() -> NAC:
    return make_nac().eval()


@pytest.fixture
def stages(nac: NAC) -> nn.ModuleList:
    return split_nac(nac, TEACHER_DIM).eval()


def make_vit(depth: int) -> nn.Module:
    args = {"patch_size": 4, "embed_dim": TEACHER_DIM, "depth": depth, "num_heads": 2}
    return create_vit("vit_tiny_patch16_224", args, num_classes=5, image_size=16, channels=3)


@pytest.fixture
def meta() -> nn.ModuleList:
    return split_vit(freeze(make_vit(4)), [1, 1, 1, 1])


@pytest.fixture
def teachers() -> nn.ModuleList:
    return split_vit(freeze(make_vit(8)), [2, 2, 2, 2])


def gradients(stages: nn.ModuleList) -> list[Tensor | None]:
    found = [None if p.grad is None else p.grad.clone() for p in stages.parameters()]
    stages.zero_grad()
    return found


def test_joint_pairs_are_separate_pairs_though_the_read_in_hands_on_one_token(
    meta: nn.ModuleList, teachers: nn.ModuleList, stages: nn.ModuleList
) -> None:
    images = torch.randn(3, 3, 16, 16)
    students, seniors = dict(enumerate(stages)), dict(enumerate(teachers))
    joint = run_pairs(meta, students, seniors, images, boundaries=True)
    assert joint[0].student_boundary.shape == (3, 1, TEACHER_DIM)
    assert joint[0].meta_boundary is None  # 17 tokens cannot be compared with one
    assert joint[1].meta_boundary is not None and joint[1].student_boundary.shape[1] == 17
    torch.stack(
        [output.student_logits.square().sum() for output in joint.values()]
    ).sum().backward()
    together = gradients(stages)
    for i, stage in enumerate(stages):
        logits = run_hybrid(meta, i, stage, images)
        torch.testing.assert_close(joint[i].student_logits, logits)
        torch.testing.assert_close(
            joint[i].teacher_logits, run_hybrid(meta, i, teachers[i], images)
        )
        logits.square().sum().backward()
    for one, other in zip(together, gradients(stages), strict=True):
        torch.testing.assert_close(one, other)


def test_pairs_train_every_parameter_they_have(
    meta: nn.ModuleList, teachers: nn.ModuleList, stages: nn.ModuleList
) -> None:
    task = PairsTask(meta, dict(enumerate(stages)), dict(enumerate(teachers)))
    task.train()
    task(torch.randn(3, 3, 16, 16), torch.eye(5)[:3])["loss"].backward()
    missing = [name for name, p in stages.named_parameters() if p.grad is None]
    assert missing == []


def test_stages_share_the_parameters_of_the_nac(nac: NAC, stages: nn.ModuleList) -> None:
    shared = {id(p) for p in nac.parameters()}
    own = [name for name, p in stages.named_parameters() if id(p) not in shared]
    assert all("stitch" in name for name in own)
    left = shared - {id(p) for p in stages.parameters()}
    names = {name for name, p in nac.named_parameters() if id(p) in left}
    assert {name.split(".")[0] for name in names} == {
        "input_latents",
        "mediator_latents",
        "output_latents",
        "seeder",
        "kernels",
        "read_out_kernel",
    }


def test_a_middle_module_lets_every_token_hear_all_others(stages: nn.ModuleList) -> None:
    stage = stages[1]
    tokens = torch.randn(2, 5, TEACHER_DIM)
    order = torch.tensor([3, 0, 4, 1, 2])
    torch.testing.assert_close(stage(tokens)[:, order], stage(tokens[:, order]))
    alone = stage(tokens[:, :1])
    assert not torch.allclose(stage(tokens)[:, :1], alone)


def test_codes_and_states_can_be_given(stages: nn.ModuleList) -> None:
    images = torch.randn(3, 3, 16, 16)
    before = stages[0](images)
    stages[0].set_latents(torch.randn(1, 12), torch.randn(3, 1, 16))
    after = stages[0](images)
    assert not torch.allclose(before, after)
    stages[0].set_latents(states=stages[0].states[:1])
    torch.testing.assert_close(stages[0](images)[0], after[0])


@pytest.mark.parametrize(
    ("stage", "latents", "message"),
    [
        (0, {"codes": torch.randn(1, 5)}, r"codes \(1, 5\) instead of \(1, 12\)"),
        (1, {"states": torch.randn(1, 1, 16)}, r"states \(1, 1, 16\) instead of None"),
    ],
)
def test_latents_that_do_not_fit_are_refused(
    stages: nn.ModuleList, stage: int, latents: dict, message: str
) -> None:
    with pytest.raises(ShapeError, match=message):
        stages[stage].set_latents(**latents)


def test_states_of_another_batch_size_are_refused(stages: nn.ModuleList) -> None:
    stages[0].set_latents(states=torch.randn(4, 1, 16))
    with pytest.raises(ShapeError, match="batches of 4 images met one of 3"):
        stages[0](torch.randn(3, 3, 16, 16))


def test_layers_that_share_one_propagator_cannot_be_taught_apart() -> None:
    with pytest.raises(ConfigError, match="share_propagators"):
        split_nac(make_nac(share_propagators=True), TEACHER_DIM)


def trained(stages: nn.ModuleList) -> list[dict[str, Tensor]]:
    return [{name: torch.randn_like(w) for name, w in s.state_dict().items()} for s in stages]


def test_kept_stitches_become_residual_pairs(stages: nn.ModuleList) -> None:
    nac = make_nac(stitch_dim=TEACHER_DIM)
    modules = trained(stages)
    report = assemble_nac(nac, modules)
    assert report.dropped == []
    assert {name for name in report.untouched if name.startswith("stitches")} == {
        "stitches.norm.weight",
        "stitches.norm.bias",
    }
    for i in range(3):
        assert torch.equal(nac.stitches.post[i].weight, modules[i]["post_stitch.weight"])
        assert torch.equal(nac.stitches.pre[i].bias, modules[i + 1]["pre_stitch.bias"])


def test_another_grid_and_other_classes_need_a_choice(stages: nn.ModuleList) -> None:
    modules = trained(stages)
    larger = NAC(img_size=32, in_chans=3, num_classes=7, **SIZES)
    with pytest.raises(CheckpointError, match="grid 'resize' or 'reset'"):
        assemble_nac(larger, modules, pooling="reset")
    with pytest.raises(CheckpointError, match="pooling 'reset'"):
        assemble_nac(larger, modules, grid="resize")
    before = larger.tokenizer.grid.detach().clone()
    report = assemble_nac(larger, modules, grid="reset", pooling="reset")
    assert torch.equal(larger.tokenizer.grid, before)
    assert {"0: tokenizer.grid", "3: pooling.classifier.weight"} <= set(report.dropped)
    assemble_nac(larger, modules, grid="resize", pooling="reset")
    resized, small = larger.tokenizer.grid, modules[0]["tokenizer.grid"]
    assert resized.shape == (4, 8, 8)
    torch.testing.assert_close(resized.mean((1, 2)), small.mean((1, 2)), atol=0.05, rtol=0)
    with pytest.raises(ConfigError, match="grid='crop'"):
        assemble_nac(larger, modules, grid="crop")


def test_a_foreign_tensor_is_named(nac: NAC, stages: nn.ModuleList) -> None:
    modules = trained(stages)
    modules[1]["propagator.bogus"] = torch.zeros(1)
    with pytest.raises(CheckpointError, match=r"module 1: propagator\.bogus has no place"):
        assemble_nac(nac, modules)
