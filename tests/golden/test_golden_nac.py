"""NAC, its layers and its pairs against numbers computed by the papers' published code."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from m2mkd.models import official
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
