"""Cutting ViTs into modules, and creating networks by name."""

import argparse
import itertools
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.utils import CheckpointSaver

from m2mkd.errors import CheckpointError, ConfigError
from m2mkd.models import (
    balanced_depths,
    count_flops,
    create_meta,
    create_network,
    create_vit,
    cut_evenly,
    load_pretrained_vit,
    resolve_depths,
    split_vit,
)

SHAPE = {"num_classes": 5, "image_size": 16, "channels": 3}
SMALL = {"patch_size": 4, "embed_dim": 32, "depth": 4, "num_heads": 2}

FAMILIES = {
    "class token": ("vit_tiny_patch16_224", SMALL),
    "average pool": ("vit_tiny_patch16_224", {**SMALL, "class_token": False, "global_pool": "avg"}),
    "registers": ("vit_tiny_patch16_224", {**SMALL, "reg_tokens": 3, "no_embed_class": True}),
    "layer scale": ("deit3_small_patch16_224", SMALL),
    "pre-norm": ("vit_tiny_patch16_224", {**SMALL, "pre_norm": True}),
    "attention pool": (
        "vit_tiny_patch16_224",
        {**SMALL, "class_token": False, "global_pool": "map"},
    ),
    "experts": ("vmoe_tiny_patch16_224", {**SMALL, "moe_blocks": "last_1"}),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("depths", [[4], [1, 3], [1, 1, 1, 1]])
def test_stages_in_a_row_are_the_network(family: str, depths: list[int]) -> None:
    vit = create_vit(FAMILIES[family][0], FAMILIES[family][1], **SHAPE).eval()
    images = torch.randn(2, 3, 16, 16)
    x = images
    stages = split_vit(vit, depths)
    for stage in stages:
        x = stage(x)
    torch.testing.assert_close(x, vit(images))
    owned = [p for stage in stages for p in stage.parameters()]
    assert {id(p) for p in owned} == {id(p) for p in vit.parameters()}
    assert len(owned) == len(list(vit.parameters()))


@pytest.mark.parametrize(
    ("depths", "message"),
    [
        ([2, 3], "sums to 5, but the model has 4 blocks; [2, 2] would fit"),
        ([1, 1, 1, 1, 1], "asks for 5 modules of a model with 4 blocks"),
        ([], "sums to 0"),
        ([0, 4], "would fit"),
    ],
)
def test_depths_that_do_not_fit_say_what_would(depths: list[int], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        split_vit(create_vit("vit_tiny_patch16_224", SMALL, **SHAPE), depths)
    assert message in str(caught.value)


def test_a_vit_with_parts_of_no_module_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"dist_token.*belong to none"):
        split_vit(create_vit("deit_tiny_distilled_patch16_224", SMALL, **SHAPE), [2, 2])


def test_balanced_depths_give_the_remainder_to_early_modules() -> None:
    assert balanced_depths(7, 3) == [3, 2, 2]
    with pytest.raises(ConfigError, match="8 modules need"):
        balanced_depths(7, 8)


def test_operations_of_a_block_are_those_of_its_matrices() -> None:
    first, middle, *_, last = count_flops(create_vit("vit_tiny_patch16_224", SMALL, **SHAPE), 16)
    tokens, width = 17, 32  # 4 x 4 patches and the class token
    mlp = 2 * tokens * width * 4 * width * 2
    attention = 2 * tokens * width * (3 * width + width) + 2 * 2 * tokens * tokens * width
    assert middle == mlp + attention
    assert first - middle == 2 * 16 * (3 * 4 * 4) * width  # patch embedding
    assert last - middle == 2 * width * 5  # head


@pytest.mark.parametrize(
    ("costs", "num_modules", "depths"),
    [
        ([1, 1, 1, 1], 2, [2, 2]),
        ([3, 1, 1, 1], 2, [1, 3]),
        ([1, 1, 1, 1, 4], 3, [2, 2, 1]),
        ([1.2, 1, 1, 1, 1], 2, [2, 3]),
        ([5, 1, 1], 3, [1, 1, 1]),
        ([1, 2, 3], 1, [3]),
    ],
)
def test_modules_are_cut_where_their_costs_are_most_alike(
    costs: list[float], num_modules: int, depths: list[int]
) -> None:
    assert cut_evenly(costs, num_modules) == depths


def test_no_other_cut_has_a_smaller_sum_of_squares() -> None:
    costs = torch.rand(9, generator=torch.Generator().manual_seed(0)).tolist()

    def squares(ends: tuple[int, ...]) -> float:
        return sum(sum(costs[a:b]) ** 2 for a, b in itertools.pairwise((0, *ends, 9)))

    least = min(map(squares, itertools.combinations(range(1, 9), 3)))
    ends = tuple(itertools.accumulate(cut_evenly(costs, 4)))[:-1]
    assert squares(ends) == pytest.approx(least)
    with pytest.raises(ConfigError, match="10 modules need"):
        cut_evenly(costs, 10)


def test_module_counts_of_teacher_and_student_must_agree() -> None:
    with pytest.raises(ConfigError, match="has 2 modules, but the teacher is cut into 4"):
        resolve_depths([2, 2], 4, what="student.depths", num_modules=4)


def test_meta_model_has_one_block_per_module_and_the_teachers_width() -> None:
    meta = create_meta("vit_tiny_patch16_224", SMALL, num_modules=3, **SHAPE)
    assert len(meta.blocks) == 3 and meta.embed_dim == SMALL["embed_dim"]


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("vit_tinny_patch16_224", {}, "did you mean 'vit_tiny_patch16_224'"),
        ("resnet18", {}, "it must be one of timm"),
        ("vit_tiny_patch16_224", {"widht": 3}, "cannot be built"),
        ("vmoe_tiny_patch16_224", {"moe_blocks": "last_9"}, "none of: all, every_2"),
        ("vmoe_tiny_patch16_224", {"moe_blocks": [12]}, "blocks go from 0 to 11"),
        ("vmoe_tiny_patch16_224", {"num_selected": 9}, "not between 1 and num_experts=8"),
        ("vmoe_tiny_patch16_224", {"load_weight": 1.0}, "needs router_noise"),
        ("vmoe_tiny_patch16_224", {"act_layer": "hard_swish"}, "experts have no activation"),
        ("vmoe_tiny_patch16_224", {"gate": "softmax_al"}, "did you mean 'softmax_all'"),
        ("vmoe_tiny_patch16_224", {"router_noise": "high"}, "router_noise='high' is not a number"),
    ],
)
def test_models_that_cannot_be_built_say_why(name: str, args: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        create_vit(name, args, num_classes=5, image_size=32, channels=3)


def test_every_registered_vmoe_is_found_by_timm() -> None:
    names = timm.list_models("vmoe_*")
    assert "vmoe_base_patch16_224" in names and len(names) >= 7
    with torch.device("meta"):
        base = timm.create_model("vmoe_base_patch16_224")
    assert sum(p.numel() for p in base.parameters()) == pytest.approx(483e6, rel=0.01)


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_teacher_weights_come_from_a_local_file(tmp_path, suffix: str) -> None:
    source = create_vit("vit_tiny_patch16_224", SMALL, **SHAPE)
    path = tmp_path / f"weights.{suffix}"
    if suffix == "pth":
        torch.save(source.state_dict(), path)
    else:
        save_file(source.state_dict(), path)
    loaded = load_pretrained_vit("vit_tiny_patch16_224", SMALL, checkpoint=path, **SHAPE)
    assert all(torch.equal(v, source.state_dict()[k]) for k, v in loaded.state_dict().items())

    other = {**SHAPE, "num_classes": 3, "image_size": 32, "channels": 1}
    adapted = load_pretrained_vit("vit_tiny_patch16_224", SMALL, checkpoint=path, **other)
    assert adapted.head.weight.shape[0] == 3 and adapted.pos_embed.shape[1] == 65
    assert torch.equal(adapted.blocks[2].mlp.fc1.weight, source.blocks[2].mlp.fc1.weight)


@pytest.mark.parametrize("num_classes", [5, 7])
def test_checkpoints_of_timms_training_script_are_read(tmp_path: Path, num_classes: int) -> None:
    source = create_vit("vit_tiny_patch16_224", SMALL, **SHAPE)
    optimizer = torch.optim.AdamW(source.parameters())
    args = argparse.Namespace(model="vit_tiny_patch16_224", lr=1e-3)
    folder = str(tmp_path)
    CheckpointSaver(
        source, optimizer, args=args, checkpoint_dir=folder, recovery_dir=folder
    ).save_checkpoint(0, 1.0)
    shape = {**SHAPE, "num_classes": num_classes}
    file = tmp_path / "model_best.pth.tar"
    loaded = load_pretrained_vit("vit_tiny_patch16_224", SMALL, checkpoint=file, **shape)
    own, theirs = loaded.state_dict(), source.state_dict()
    body = [name for name in own if not name.startswith("head.")]
    assert all(torch.equal(own[name], theirs[name]) for name in body)
    assert own["head.weight"].shape == (num_classes, 32)
    assert torch.equal(own["head.weight"], theirs["head.weight"]) == (num_classes == 5)


def test_a_teacher_file_is_read_as_weights_and_runs_nothing(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (Path(tmp_path / "ran"),)

    file = tmp_path / "payload.pth"
    torch.save({"state_dict": Payload()}, file)
    with pytest.raises(CheckpointError, match=r"payload\.pth is not a readable ViT checkpoint"):
        load_pretrained_vit("vit_tiny_patch16_224", SMALL, checkpoint=file, **SHAPE)
    assert not (tmp_path / "ran").exists()


def test_teacher_files_that_are_no_weights_are_named(tmp_path) -> None:
    load = lambda path: load_pretrained_vit(  # noqa: E731
        "vit_tiny_patch16_224", SMALL, checkpoint=path, **SHAPE
    )
    with pytest.raises(CheckpointError, match="does not exist"):
        load(tmp_path / "no.safetensors")
    garbage = tmp_path / "garbage.safetensors"
    garbage.write_bytes(b"not a checkpoint at all")
    with pytest.raises(
        CheckpointError, match=r"garbage\.safetensors is not a readable ViT checkpoint"
    ):
        load(garbage)
    foreign = tmp_path / "foreign.safetensors"
    save_file({"some.weight": torch.zeros(3)}, foreign)
    with pytest.raises(CheckpointError, match=r"foreign\.safetensors has no patch_embed.*some\.we"):
        load(foreign)
    weights = timm.create_model(
        "vit_tiny_patch16_224", **SMALL, num_classes=SHAPE["num_classes"],
        img_size=SHAPE["image_size"], in_chans=SHAPE["channels"],
    ).state_dict()  # fmt: skip
    weights["norm.bias"][0] = float("nan")
    torch.save({"model": weights}, tmp_path / "broken.pth")
    with pytest.raises(CheckpointError, match=r"NaN or infinite values, in norm\.bias"):
        load(tmp_path / "broken.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(CheckpointError, match="hold tensors by name"):
        load(tmp_path / "list.pth")


def test_patches_larger_than_the_image_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"patches of 16 pixels, more than images of 8 have"):
        create_network("vit_tiny_patch16_224", {}, num_classes=2, image_size=8, channels=1)
