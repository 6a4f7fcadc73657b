"""NAC, its layers and its pairs against numbers computed by the papers' published code."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from m2mkd.distill import (
    PairLossSettings,
    assemble_nac,
    distillation_loss,
    freeze,
    run_hybrid,
    run_pairs,
)
from m2mkd.models import official, split_vit
from m2mkd.nn import FC, LatentAttention, ModFC, WModFC
from m2mkd.ops import edge_log_affinity

sys.path.insert(0, str(Path(__file__).parent))
from golden_files import Golden

VALUES = 2e-5  # float32 rounding of the published run (its own float64 run differs by 3e-6)
GRADIENTS = 1e-4

SCALE_NORMS = ("ln", "l2", "none", "sigmoid", "tanh")
PRODUCT_NORMS = ("none", "ln", "l2")
PAIRS = {"m2mkd_2mod_nac_idx0": 0, "m2mkd_2mod_nac_idxlast": 1}
KINDS = {"readin": "nac_readin", "mediator": "nac_mediator", "readout": "nac_readout"}


def assert_near(ours: torch.Tensor, stored: torch.Tensor, tolerance: float = VALUES) -> None:
    torch.testing.assert_close(ours.detach(), stored, atol=tolerance, rtol=0)


@pytest.fixture
def golden() -> Golden:
    return Golden("nac_scale")


@pytest.fixture
def nac(golden: Golden) -> nn.Module:
    return official.load("nac", golden.group("state"), golden.config)


def as_layer_state(golden: Golden, prefix: str) -> dict[str, torch.Tensor]:
    names = {"native_weight": "weight", "native_bias": "bias", "scale_gain": "gain"}
    state = golden.group(f"{prefix}/state")
    return {
        names.get(name, name.replace("lin.", "linear.")): torch.from_numpy(value)
        for name, value in state.items()
    }


@pytest.mark.parametrize("scale_norm", SCALE_NORMS)
@pytest.mark.parametrize("product_norm", PRODUCT_NORMS)
def test_modulated_layers_give_the_published_outputs(scale_norm: str, product_norm: str) -> None:
    golden = Golden("modfc")
    layer = ModFC(
        12,
        9,
        7,
        scale_norm=scale_norm,
        product_norm=product_norm,
        learn_gain=True,
        add_one=True,
    )
    name = f"{scale_norm}_{product_norm}"
    layer.load_state_dict(as_layer_state(golden, name))
    assert_near(layer(golden["in/x"], golden["in/context"]), golden[f"{name}/out"])
    one = layer(golden["in/x"], golden["in/context_one_row"])
    assert_near(one, golden[f"{name}/out_one_row"])


@pytest.mark.parametrize("kind", [WModFC, FC])
def test_other_layers_give_the_published_outputs(kind: type[nn.Module]) -> None:
    golden = Golden("modfc")
    layer = kind(12, 9, 7)
    layer.load_state_dict(as_layer_state(golden, kind.__name__))
    assert_near(layer(golden["in/x"], golden["in/context"]), golden[f"{kind.__name__}/out"])


@pytest.mark.parametrize("part", ["train", "eval"])
def test_affinities_and_their_gradients_are_the_published_ones(part: str) -> None:
    from m2mkd.ops import Circuit

    golden = Golden("kernel_sampling")
    receivers, senders, bandwidth = (
        golden[f"in/{name}"].requires_grad_()
        for name in ("receiver_signatures", "sender_signatures", "bandwidth")
    )
    circuit = Circuit.from_dense(golden["eval/log_kernel"].isfinite())
    at = (..., circuit.receiver_of_edge.long(), circuit.sender.long())
    sampled = {"sampling": "relaxed_bernoulli", "uniforms_BN": golden["in/uniforms"][at]}
    log = edge_log_affinity(
        receivers,
        senders,
        circuit,
        bandwidth,
        temperature=golden.config["temperature"],
        **(sampled if part == "train" else {}),
    )
    assert_near(log, golden[f"{part}/log_affinity_normalised"][at])
    weight = golden["in/loss_weight"] if part == "train" else golden["in/loss_weight"][0]
    loss = (log.exp() * weight[at]).sum()
    assert_near(loss, golden[f"{part}/loss"])
    loss.backward()
    assert_near(receivers.grad, golden[f"{part}/grad_receiver_signatures"], GRADIENTS)
    assert_near(senders.grad, golden[f"{part}/grad_sender_signatures"], GRADIENTS)
    assert_near(bandwidth.grad, golden[f"{part}/grad_bandwidth"], GRADIENTS)


@pytest.mark.parametrize("impl", ["auto", "dense", "reference"])
def test_the_network_gives_the_published_logits(golden: Golden, nac: nn.Module, impl: str) -> None:
    nac.set_attention_impl(impl)
    with torch.no_grad():
        assert_near(nac(golden["in/x"]), golden["out/logits"])


def test_every_block_gives_the_published_intermediates(golden: Golden, nac: nn.Module) -> None:
    """All `mid/*` outputs of modules; ours by the path that holds the published one's weights."""
    ours = {
        "input_tokenizer": "tokenizer",
        "input_tokenizer.backbone": "tokenizer.stages",
        "input_tokenizer.backbone.downsample_layers.0": "tokenizer.stem",
        "input_tokenizer.backbone.downsample_layers.1": "tokenizer.stages.1.downsample",
        "input_tokenizer.backbone.stages.0": "tokenizer.stages.0",
        "input_tokenizer.backbone.stages.1": "tokenizer.stages.1",
        "latent_graphs.0.read_in.read_in_attention": "read_in.attention",
        "latent_graphs.0.read_in.ffn": "read_in.ffn",
        "latent_graphs.0.read_in": "read_in",
        "latent_graphs.0.read_out": "read_out",
        "latent_graphs.0.read_out.latent_attention": "read_out.attention",
        "latent_graphs.0.read_out.ffn": "read_out.ffn",
        "output_tokenizer": "pooling",
    }
    for i in range(2):
        for theirs, here in (("", ""), (".latent_attention", ".attention"), (".ffn", ".ffn")):
            ours[f"latent_graphs.0.propagators.{i}{theirs}"] = f"propagators.{i}{here}"
    seen: dict[str, torch.Tensor] = {}
    for theirs, here in ours.items():
        nac.get_submodule(here).register_forward_hook(
            lambda m, a, out, k=theirs: seen.update({k: out})
        )
    with torch.no_grad():
        nac(golden["in/x"])
    stored = {
        name: value
        for name, value in golden.group("mid").items()
        if not name.startswith(("seed_", "attention_weights")) and ".kernel/" not in name
    }
    assert set(seen) == set(stored)
    for name, value in stored.items():
        assert_near(seen[name], torch.from_numpy(value))


def test_seeds_are_the_published_ones(golden: Golden, nac: nn.Module) -> None:
    for kind in ("input", "mediator", "output"):
        codes = getattr(nac, f"{kind}_latents").codes_of(0)
        assert_near(nac.seeder(codes, 3), golden[f"mid/seed_{kind}_states"])


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_kernels_of_all_layers_are_the_published_ones(
    golden: Golden, nac: nn.Module, layer: int
) -> None:
    path = "read_out" if layer == 2 else f"propagators.{layer}"
    stored = golden.group(f"mid/latent_graphs.0.{path}.latent_attention.kernel")
    circuit = nac.circuit(layer)
    before = torch.from_numpy(stored["log_kernel_before_normalise"])
    assert torch.equal(circuit.to_dense(), before.isfinite())
    at = (circuit.receiver_of_edge.long(), circuit.sender.long())
    log_kernel = nac.kernel(layer)(*nac.signatures(layer), circuit, 3)
    assert_near(log_kernel, before[at])
    affinity = torch.from_numpy(stored["log_affinity_normalised"])
    assert_near(nac.log_affinity(layer), affinity[at])
    assert affinity[~circuit.to_dense()].isneginf().all()


def test_attention_weights_are_the_published_ones(golden: Golden, nac: nn.Module) -> None:
    """Weights are never made by our kernels; here from their queries, keys and biases."""
    inner: dict[str, torch.Tensor] = {}
    for name, module in nac.named_modules():
        if name.endswith((".attention.query", ".attention.key")):
            module.register_forward_hook(lambda m, a, out, k=name: inner.update({k: out}))
    with torch.no_grad():
        nac(golden["in/x"])
    for layer in range(3):
        path = "read_out" if layer == 2 else f"propagators.{layer}"
        q, k = (
            inner[f"{path}.attention.{part}"].unflatten(2, (2, -1)).transpose(1, 2)
            for part in ("query", "key")
        )
        circuit = nac.circuit(layer)
        bias = torch.full((circuit.num_receivers, circuit.num_senders), -torch.inf)
        bias[circuit.receiver_of_edge.long(), circuit.sender.long()] = nac.log_affinity(
            layer
        ).detach()
        weights = (q @ k.transpose(2, 3) * q.shape[3] ** -0.5 + bias).softmax(3)
        stored = "read_out" if layer == 2 else f"propagator{layer}"
        assert_near(weights, golden[f"mid/attention_weights/{stored}"])
    attention = nac.read_in.attention
    tokens = attention.sender_norm(golden["mid/input_tokenizer"])
    keys = attention.key(tokens[:, :, None].expand(-1, -1, 8, -1), nac.input_latents.codes)
    keys = keys.unflatten(3, (2, -1)).permute(0, 3, 2, 4, 1)
    q = inner["read_in.attention.query"].unflatten(2, (2, -1)).transpose(1, 2)
    weights = ((q[:, :, :, None] @ keys)[:, :, :, 0] * q.shape[3] ** -0.5).softmax(3)
    assert_near(weights, golden["mid/attention_weights/read_in"])


def check_gradients(model: nn.Module, stored: dict) -> None:
    parameters = dict(model.named_parameters())
    for name, value in stored.items():
        ours = parameters[model.loaded_tensors[name]].grad
        value = torch.from_numpy(value)
        # The published code has zeros where ours has no path at all.
        assert_near(torch.zeros_like(value) if ours is None else ours, value, GRADIENTS)


def test_gradients_are_the_published_ones(golden: Golden, nac: nn.Module) -> None:
    loss = F.cross_entropy(nac(golden["in/x"]), golden["in/labels"])
    assert_near(loss, golden["out/loss_ce"])
    loss.backward()
    stored = golden.group("grad")
    assert len(stored) > 140
    check_gradients(nac, stored)


def test_published_randomness_of_eval_mode_is_an_option(
    golden: Golden, monkeypatch: pytest.MonkeyPatch
) -> None:
    nac = official.load("nac", golden.group("state"), golden.config)
    nac.set_stochastic_eval(True)
    draws = iter([golden[f"noisy/eps_{kind}"] for kind in ("input", "mediator", "output")])
    monkeypatch.setattr(torch, "randn", lambda *shape, **options: next(draws))

    def with_given_noise(scores: torch.Tensor, tau: float, hard: bool) -> torch.Tensor:
        assert not hard
        return ((scores + golden["noisy/gumbel"]) / tau).softmax(-1)

    monkeypatch.setattr(F, "gumbel_softmax", with_given_noise)
    with torch.no_grad():
        assert_near(nac(golden["in/x"]), golden["noisy/logits"])


def test_training_mode_gives_the_published_logits_and_gradients(
    golden: Golden, nac: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With every uniform draw one half: no noise, every path kept."""
    monkeypatch.setattr(torch, "randn", lambda *shape, **options: torch.zeros(shape))
    monkeypatch.setattr(torch, "rand", lambda *shape, **options: torch.full(shape, 0.5))
    monkeypatch.setattr(torch, "rand_like", lambda like: torch.full_like(like, 0.5))
    monkeypatch.setattr(torch.Tensor, "bernoulli_", lambda self, p: self.fill_(1.0))
    monkeypatch.setattr(F, "gumbel_softmax", lambda x, tau, hard: (x / tau).softmax(-1))
    nac.train()
    biases: dict[int, torch.Tensor] = {}
    for i, kernel in enumerate([*nac.kernels, nac.read_out_kernel]):
        kernel.register_forward_hook(lambda m, a, out, k=i: biases.update({k: out}))
    logits = nac(golden["in/x"])
    assert_near(logits, golden["train_half/logits"])
    for layer in range(3):
        path = "read_out" if layer == 2 else f"propagators.{layer}"
        stored = golden.group(f"train_half/mid/latent_graphs.0.{path}.latent_attention.kernel")
        circuit = nac.circuit(layer)
        at = (..., circuit.receiver_of_edge.long(), circuit.sender.long())
        sampled = stored.get("log_kernel_after_sampling", stored["log_kernel_before_normalise"])
        assert_near(biases[layer], torch.from_numpy(sampled)[at])
    loss = F.cross_entropy(logits, golden["in/labels"])
    assert_near(loss, golden["train_half/loss_ce"])
    loss.backward()
    stored = golden.group("train_half/grad")
    assert len(stored) > 140
    check_gradients(nac, stored)


def test_every_tensor_is_accounted_for(golden: Golden, nac: nn.Module) -> None:
    assert set(nac.loaded_tensors) == {n for n in golden.group("state") if not n.startswith("__")}
    assert set(nac.loaded_tensors.values()) == set(nac.state_dict())
    assert any(isinstance(module, LatentAttention) for module in nac.modules())


class Pair:
    """A published NAC pair: teacher and meta from the shared file, and one student module."""

    def __init__(self, name: str) -> None:
        self.golden = Golden(name)
        config = self.golden.config
        self.shared = Golden(config["shared_file"].removesuffix(".npz"))
        shared = self.shared.config
        teacher = official.load("vit", self.shared.group("teacher"), shared)
        meta = official.load("vit", self.shared.group("meta"), shared)
        self.teachers = split_vit(freeze(teacher), shared["teacher_divided_depths"])
        self.meta = split_vit(freeze(meta), shared["meta_divided_depths"])
        latents = {name: self.golden[f"in/{name}"] for name in ("codes", "states")}
        self.student = official.load(
            KINDS[config["student"]], {**self.golden.group("student"), **latents}, config
        )
        self.index = config["teacher_tuple"][0]

    def run(self) -> tuple[torch.Tensor, torch.Tensor]:
        output = run_pairs(
            self.meta,
            {self.index: self.student},
            {self.index: self.teachers[self.index]},
            self.shared["in/x"],
        )[self.index]
        assert_near(output.student_boundary, self.golden["mid/student_module_output"])
        assert output.teacher_logits is not None
        return output.student_logits, output.teacher_logits


@pytest.mark.parametrize("name", PAIRS)
def test_hybrids_give_the_published_logits(name: str) -> None:
    pair = Pair(name)
    assert pair.index == PAIRS[name]
    student, teacher = pair.run()
    assert_near(student, pair.golden["mid/student_outputs"])
    assert_near(teacher, pair.golden["mid/teacher_outputs"])
    alone = run_hybrid(pair.meta, pair.index, pair.student, pair.shared["in/x"])
    assert_near(alone, pair.golden["mid/student_outputs"])


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
    assert_near(loss, pair.golden[f"loss/{key}"])


@pytest.mark.parametrize("name", PAIRS)
def test_pair_gradients_are_the_published_ones(name: str) -> None:
    pair = Pair(name)
    student, teacher = pair.run()
    settings = PairLossSettings(kd_reduction="numel")
    distillation_loss(student, teacher, pair.shared["in/labels_soft"], settings).backward()
    stored = pair.golden.group("grad")
    assert len(stored) == len(list(pair.student.parameters()))
    check_gradients(pair.student, stored)
    assert all(p.grad is None for p in [*pair.meta.parameters(), *pair.teachers.parameters()])


@pytest.mark.parametrize("name", PAIRS)
def test_student_layer_scales_start_as_published(name: str) -> None:
    """The published read-in student starts its FFN at 1e-6, the others at the configured value."""
    golden = Golden(name)
    state = {key: torch.from_numpy(value) for key, value in golden.group("student").items()}
    fresh, names = official._LOADERS[KINDS[golden.config["student"]]](state, golden.config)
    for key, value in golden.group("initial_gamma").items():
        assert_near(fresh.get_parameter(names[key]), torch.from_numpy(value), 0.0)


STUDENTS = {
    "ReadInStudent": "nac_readin",
    "MediatorStudent_1": "nac_mediator",
    "MediatorStudent_2": "nac_mediator",
    "ReadOutStudent": "nac_readout",
}


@pytest.mark.parametrize("variant", ["imagenet", "tinynet"])
def test_assembly_moves_and_leaves_what_the_published_code_does(
    variant: str, golden: Golden, nac: nn.Module
) -> None:
    students = Golden("nac_from_students")
    stored = {
        key: set(students.arrays[f"{variant}/{key}"].tolist())
        for key in ("loaded", "student_tensors_not_used", "nac_tensors_left_at_init")
    }
    modules, published = [], {}
    for i, (name, kind) in enumerate(STUDENTS.items()):
        state = students.group(f"student/{name}")
        config = Golden("m2mkd_2mod_nac_idx" + ("last" if "ReadOut" in name else "0")).config
        config = {**config, "latent_attention_kwargs": {"share_layernorm": "Mediator" in name}}
        config.pop("tokenizer_kwargs" if "Mediator" in name else "", None)
        student = official.load(kind, state, config)
        modules.append(student.state_dict())
        published |= {(i, ours): f"{name}/{key}" for key, ours in student.loaded_tensors.items()}
    choice = "keep" if variant == "imagenet" else "reset"
    before = {name: value.clone() for name, value in nac.state_dict().items()}
    report = assemble_nac(nac, modules, grid=choice, pooling=choice)
    ours_of = {ours: key for key, ours in nac.loaded_tensors.items()}
    assert {ours_of[name] for name in report.untouched} == stored["nac_tensors_left_at_init"]
    dropped = {(int(i), name) for i, name in (line.split(": ") for line in report.dropped)}
    assert {published[key] for key in dropped} == stored["student_tensors_not_used"]
    assert sum(report.transferred) == len(stored["loaded"])
    after = nac.state_dict()
    values = {
        f"{key}/{n}": v for key in STUDENTS for n, v in students.group(f"student/{key}").items()
    }
    for line in stored["loaded"]:
        place, source = line.split("=")
        assert torch.equal(after[nac.loaded_tensors[place]], torch.from_numpy(values[source]))
    for name in report.untouched:
        assert torch.equal(after[name], before[name])
