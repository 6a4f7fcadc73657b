"""A V-MoE that starts as a dense ViT."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from m2mkd.errors import CheckpointError
from m2mkd.models import VMoE, create_vit, upcycle, upcycle_from
from m2mkd.models.checkpoint import write_checkpoint

SHAPE = {"num_classes": 5, "image_size": 16, "channels": 3}
SMALL = {"patch_size": 4, "embed_dim": 32, "depth": 4, "num_heads": 2}


def dense_vit(**args: Any) -> torch.nn.Module:
    vit = create_vit("vit_tiny_patch16_224", {**SMALL, **args}, **SHAPE).eval()
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return vit


def student(**args: Any) -> VMoE:
    shape = {**SHAPE, **{name: args.pop(name) for name in list(args) if name in SHAPE}}
    model = create_vit("vmoe_tiny_patch16_224", {**SMALL, "num_experts": 3, **args}, **shape)
    assert isinstance(model, VMoE)
    return model.eval()


@pytest.mark.parametrize(
    "args",
    [
        {"gate": "softmax_selected"},
        {"gate": "softmax_all_renorm", "num_selected": 3},
        {"moe_blocks": "every_2"},
        {"moe_blocks": "last_1", "num_selected": 1},
        {"qkv_bias": False, "class_token": False, "global_pool": "avg", "init_values": 1e-1},
    ],
    ids=str,
)
def test_it_computes_what_the_dense_vit_computes(args: dict[str, Any]) -> None:
    own = {"moe_blocks", "gate", "num_selected"}
    vit = dense_vit(**{name: value for name, value in args.items() if name not in own}).double()
    model = student(**args).double()
    images = torch.randn(3, 3, 16, 16, dtype=torch.float64)
    assert not torch.allclose(model(images), vit(images))
    upcycle(model, vit.state_dict())
    torch.testing.assert_close(model(images), vit(images), rtol=1e-12, atol=1e-12)


def test_experts_are_copies_that_training_moves_apart() -> None:
    model = student().train()
    upcycle(model, dense_vit().state_dict())
    mlp = model.blocks[1].mlp
    assert torch.equal(mlp.fc1_weight[0], mlp.fc1_weight[2])
    model(torch.randn(3, 3, 16, 16)).square().sum().backward()
    assert not torch.equal(mlp.fc1_weight.grad[0], mlp.fc1_weight.grad[2])


def test_router_stitches_and_a_head_for_other_classes_stay_fresh() -> None:
    model = student(num_classes=7, pre_stitch_blocks=[2], post_stitch_blocks=[1], stitch_dim=24)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    upcycle(model, dense_vit().state_dict())
    same = {name for name, value in model.state_dict().items() if torch.equal(value, before[name])}
    assert all(
        any(part in name for part in ("router", "stitch", "head"))
        for name in same
        if "norm" not in name
    )
    assert {"blocks.0.mlp.router.weight", "head.weight", "blocks.2.pre_stitch.fc.weight"} <= same


def test_a_file_is_adapted_to_image_size_and_channels(tmp_path: Path) -> None:
    vit = dense_vit()
    save_file(vit.state_dict(), tmp_path / "vit.safetensors")
    model = student(image_size=24, channels=1)
    upcycle_from(model, tmp_path / "vit.safetensors")
    assert torch.equal(model.blocks[3].mlp.fc2_weight[1], vit.blocks[3].mlp.fc2.weight)
    assert model.pos_embed.shape[1] == 37


def test_a_stage_folder_of_a_run_will_do(tmp_path: Path) -> None:
    vit = dense_vit()
    write_checkpoint(tmp_path / "teacher", 3, vit.state_dict(), meta={})
    model = student()
    upcycle_from(model, tmp_path / "teacher")
    images = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(model(images), vit(images))


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    cases = {
        "has no blocks.0.mlp.fc1.weight": student().state_dict(),
        "has no blocks.3.mlp.fc1.weight": dense_vit(depth=3).state_dict(),
        "no place for blocks.4": dense_vit(depth=5).state_dict(),
        "size mismatch": dense_vit(embed_dim=48).state_dict(),
    }
    for message, weights in cases.items():
        with pytest.raises(CheckpointError, match=message):
            upcycle(student(), weights)
    with pytest.raises(CheckpointError, match="does not exist"):
        upcycle_from(student(), tmp_path / "nothing.pth")
    (tmp_path / "text.pth").write_text("no weights")
    with pytest.raises(CheckpointError, match=r"student.upcycle_from .*text.pth is not a readable"):
        upcycle_from(student(), tmp_path / "text.pth")
