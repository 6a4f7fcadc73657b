"""Our models, hybrids and losses against numbers computed by the papers' published code."""

import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from m2mkd.distill import PairLossSettings, distillation_loss, freeze, run_hybrid, run_pairs
from m2mkd.errors import CheckpointError
from m2mkd.models import VMoE, official, split_vit
from m2mkd.ops import topk_gate

sys.path.insert(0, str(Path(__file__).parent))
from golden_files import Golden

VALUES = 2e-5  # float32 rounding of the published run (its own float64 run differs by 3e-6)
GRADIENTS = 1e-4

PAIRS = {"m2mkd_2mod_vmoe_idx0": 0, "m2mkd_2mod_vmoe_idxlast": 1}


def assert_near(ours: torch.Tensor, stored: torch.Tensor, tolerance: float = VALUES) -> None:
    torch.testing.assert_close(ours, stored, atol=tolerance, rtol=0)


@pytest.mark.parametrize(
    ("name", "kind"), [("vit_teacher_2_2", "vit"), ("vit_meta_1_1", "vit"), ("vmoe", "vmoe")]
)
def test_published_network_gives_its_logits(name: str, kind: str) -> None:
    golden = Golden(name)
    model = official.load(kind, golden.group("state"), golden.config)
    with torch.no_grad():
        assert_near(model(golden["in/x"]), golden["out/logits"])


@pytest.mark.parametrize("name", ["vit_teacher_2_2", "vit_meta_1_1"])
def test_stages_of_a_published_vit_give_their_outputs(name: str) -> None:
    golden = Golden(name)
    model = official.load("vit", golden.group("state"), golden.config)
    first, second = split_vit(model, golden.config["divided_depths"])
    with torch.no_grad():
        tokens = first(golden["in/x"])
        assert_near(tokens, golden["out/first_stage"])
        assert_near(second(tokens), golden["out/second_stage_logits"])


def test_stage_keys_are_the_published_ones() -> None:
    golden = Golden("vit_teacher_2_2")
    model = official.load("vit", golden.group("state"), golden.config)
    for i, stage in enumerate(split_vit(model, golden.config["divided_depths"])):
        assert sorted(stage.state_dict()) == sorted(golden.arrays[f"stage_keys/{i}"].tolist())


def test_vmoe_blocks_and_gates_give_the_published_intermediates() -> None:
    golden = Golden("vmoe")
    model = official.load("vmoe", golden.group("state"), golden.config)
    seen: dict[str, torch.Tensor] = {}
    for i, block in enumerate(model.blocks):
        block.register_forward_hook(lambda m, a, out, k=f"blocks.{i}": seen.update({k: out}))
        block.mlp.register_forward_hook(
            lambda m, a, out, k=f"blocks.{i}.moe": seen.update({k: out})
        )
        block.mlp.register_forward_pre_hook(
            lambda m, a, k=f"blocks.{i}.tokens": seen.update({k: a[0]})
        )
    with torch.no_grad():
        model(golden["in/x"])
        for i, block in enumerate(model.blocks):
            logits = block.mlp.router(seen.pop(f"blocks.{i}.tokens")).flatten(0, 1)
            assert_near(logits, golden[f"mid/blocks.{i}.gate/raw"])
            _, experts = topk_gate(logits, block.mlp.num_selected)
            stored = golden[f"mid/blocks.{i}.gate/topk_idx"]
            assert torch.equal(experts.long().sort(dim=1).values, stored.sort(dim=1).values)
    for key, value in seen.items():
        assert_near(value, golden[f"mid/{key}"])
    assert len(seen) == 2 * len(model.blocks)


def test_vmoe_gradients_are_the_published_ones() -> None:
    golden = Golden("vmoe")
    model = official.load("vmoe", golden.group("state"), golden.config)
    loss = F.cross_entropy(model(golden["in/x"]), golden["in/labels"])
    assert_near(loss.detach(), golden["out/loss_ce"])
    loss.backward()
    check_gradients(model, golden)


def check_gradients(model: torch.nn.Module, golden: Golden) -> None:
    parameters = dict(model.named_parameters())
    stored = golden.group("grad")
    assert len(stored) > 20
    for name, value in stored.items():
        ours = parameters[model.loaded_tensors[name]].grad
        assert_near(ours, torch.from_numpy(value), GRADIENTS)


def test_later_fastmoe_layout_loads_the_same_network() -> None:
    golden = Golden("vmoe")
    state: dict[str, np.ndarray] = {}
    for name, value in golden.group("state").items():
        if ".experts." not in name:
            state[name] = value
            continue
        head, tail = name.split(".experts.")
        for expert, part in enumerate(value):
            state[f"{head}.experts.{expert}.{tail}"] = part[None]
    model = official.load("vmoe", state, golden.config)
    with torch.no_grad():
        assert_near(model(golden["in/x"]), golden["out/logits"])
    name = "blocks.1.moe.experts.2.htoh4.bias"
    assert model.loaded_tensors[name] == "blocks.1.mlp.fc1_bias[2]"
    del state[name]
    with pytest.raises(CheckpointError, match=r"experts \[0, 1, 3\] are there"):
        official.load("vmoe", state, golden.config)


@pytest.mark.parametrize("change", ["extra", "missing", "shape"])
def test_tensors_that_do_not_fit_are_named(change: str) -> None:
    golden = Golden("vit_meta_1_1")
    state = golden.group("state")
    if change == "extra":
        state["fc.weight"] = np.zeros(3, dtype=np.float32)
        expected = "no place for fc.weight"
    elif change == "missing":
        del state["head.bias"]
        expected = "head.bias is missing"
    else:
        state["head.bias"] = np.zeros(7, dtype=np.float32)
        expected = r"head.bias has shape \[7\], not \[10\]"
    with pytest.raises(CheckpointError, match=expected):
        official.load("vit", state, golden.config)


def published_vmoe(**options: object) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """A V-MoE of ours with random weights, and its state dict under the published names."""
    model = VMoE(
        img_size=32,
        patch_size=8,
        embed_dim=48,
        num_heads=3,
        depth=4,
        num_classes=10,
        num_experts=4,
        norm_layer=partial(torch.nn.LayerNorm, eps=1e-6),
        **options,
    ).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    ours = {value: name for name, value in official._MOE_NAMES.items()}
    state = {}
    for name, value in model.state_dict().items():
        head, block, tail = name.split(".", 2) if name.startswith("blocks.") else ("", "", "")
        state[f"{head}.{block}.{ours[tail]}" if tail in ours else name] = value
    return model, state


@pytest.mark.parametrize(
    ("options", "config"),
    [
        ({"moe_blocks": [1, 3]}, {"moe_pos": [1, 3]}),
        (
            {"post_stitch_blocks": [1], "pre_stitch_blocks": [2], "stitch_dim": 64},
            {"post_stitch_pos": [1], "pre_stitch_pos": [2], "stitch_dim": 64},
        ),
    ],
)
def test_published_options_load_the_network_they_describe(options: dict, config: dict) -> None:
    model, state = published_vmoe(**options)
    golden = Golden("vmoe")
    loaded = official.load("vmoe", state, {**golden.config, **config})
    with torch.no_grad():
        torch.testing.assert_close(loaded(golden["in/x"]), model(golden["in/x"]))
    assert set(loaded.loaded_tensors) == set(state)


def test_a_middle_student_module_has_stitches_on_both_sides() -> None:
    model, state = published_vmoe(
        post_stitch_blocks=[3], pre_stitch_blocks=[0], stitch_dim=64, moe_blocks="all"
    )
    middle = {name: value for name, value in state.items() if name.startswith("blocks.")}
    config = {**Golden("vmoe").config, "is_student": True, "idx": 1, "stitch_dim": 64}
    config |= {"pre_stitch_pos": [0], "post_stitch_pos": [3]}
    stage = official.load("vmoe", middle, config)
    tokens = torch.randn(3, 17, 64)
    with torch.no_grad():
        torch.testing.assert_close(stage(tokens), model.blocks(tokens))


def test_repetitions_under_stages_must_repeat() -> None:
    golden = Golden("vit_teacher_2_2")
    state = golden.group("state")
    repeated = {
        alias.split("=")[0]: state[alias.split("=")[1]]
        for alias in state.pop("__aliases__").tolist()
    }
    assert len(repeated) > 20
    official.load("vit", {**state, **repeated}, golden.config)
    name = "stages.1.blocks.0.norm1.weight"
    with pytest.raises(CheckpointError, match=r"should repeat blocks\.2\.norm1\.weight"):
        official.load("vit", {**state, **repeated, name: repeated[name] + 1}, golden.config)
    with pytest.raises(CheckpointError, match=r"no place for stages\.7\.bogus"):
        official.load("vit", {**state, "stages.7.bogus": state["cls_token"]}, golden.config)


class Pair:
    """A published teaching pair: teacher and meta from the shared file, and one student module."""

    def __init__(self, name: str) -> None:
        self.golden = Golden(name)
        self.shared = Golden(self.golden.config["shared_file"].removesuffix(".npz"))
        config = self.shared.config
        teacher = official.load("vit", self.shared.group("teacher"), config)
        meta = official.load("vit", self.shared.group("meta"), config)
        self.teachers = split_vit(freeze(teacher), config["teacher_divided_depths"])
        self.meta = split_vit(freeze(meta), config["meta_divided_depths"])
        self.student = official.load("vmoe", self.golden.group("student"), self.golden.config)
        self.index = self.golden.config["teacher_tuple"][0]

    def run(self) -> tuple[torch.Tensor, torch.Tensor]:
        outputs = run_pairs(
            self.meta,
            {self.index: self.student},
            {self.index: self.teachers[self.index]},
            self.shared["in/x"],
        )[self.index]
        assert outputs.teacher_logits is not None
        return outputs.student_logits, outputs.teacher_logits


@pytest.mark.parametrize("name", PAIRS)
def test_hybrids_give_the_published_logits(name: str) -> None:
    pair = Pair(name)
    assert pair.index == PAIRS[name]
    student, teacher = pair.run()
    assert_near(student.detach(), pair.golden["mid/student_outputs"])
    assert_near(teacher, pair.golden["mid/teacher_outputs"])
    alone = run_hybrid(pair.meta, pair.index, pair.student, pair.shared["in/x"])
    assert_near(alone.detach(), pair.golden["mid/student_outputs"])


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize(
    ("key", "labels", "settings", "smoothing"),
    [
        ("soft_alpha0.5_tau1_softtarget", "soft", {}, 0.0),
        ("soft_alpha0.7_tau2_softtarget", "soft", {"alpha": 0.7, "temperature": 2.0}, 0.0),
        ("hard_alpha0.5_softtarget", "soft", {"kd": "hard"}, 0.0),
        ("base_softtarget_only", "soft", {"alpha": 0.0}, 0.0),
        ("soft_alpha0.5_tau1_labelsmoothing0.1", "hard", {}, 0.1),
        ("soft_alpha0.5_tau1_ce", "hard", {}, 0.0),
    ],
)
def test_losses_are_the_published_ones(
    name: str, key: str, labels: str, settings: dict, smoothing: float
) -> None:
    pair = Pair(name)
    student, teacher = pair.run()
    loss = distillation_loss(
        student,
        teacher,
        pair.shared[f"in/labels_{labels}"],
        PairLossSettings(kd_reduction="numel", **settings),
        label_smoothing=smoothing,
    )
    assert_near(loss.detach(), pair.golden[f"loss/{key}"])


@pytest.mark.parametrize("name", PAIRS)
def test_pair_gradients_are_the_published_ones(name: str) -> None:
    pair = Pair(name)
    student, teacher = pair.run()
    settings = PairLossSettings(kd_reduction="numel")
    distillation_loss(student, teacher, pair.shared["in/labels_soft"], settings).backward()
    check_gradients(pair.student, pair.golden)
    assert all(p.grad is None for p in [*pair.meta.parameters(), *pair.teachers.parameters()])
