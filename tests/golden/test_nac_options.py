"""Published options that no golden file has: our NAC against a literal one in the same layout."""

import copy
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F

from m2mkd.errors import CheckpointError, ConfigError
from m2mkd.models import NAC, official
from m2mkd.models.official_nac import nac_arguments

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from golden_files import Golden
from literal_nac import PUBLISHED, Literal, published_config

VALUES = 1e-5  # two float32 computations of the same sums in another order

HEAD = {"use_head": True, "pre_output_layernorm": True}
OPTIONS: dict[str, dict[str, Any]] = {
    "as published": {},
    "kept stitches": {"stitch_dim": 24, "stitch_ckpt_path": "stitches.pth"},
    "GELU": {"use_geglu": False},
    "biases of queries, keys and values": {"qkv_bias_in_attention": True},
    "capacity 1": {"ffn_capacity_factor": 1.0},
    "separate sender norms": {
        "propagator_kwargs": {"latent_attention_kwargs": {"kernel_kwargs": {"truncation": 0.9}}}
    },
    "no truncation": {"propagator_kwargs": {"latent_attention_kwargs": {"share_layernorm": True}}},
    "learned first states": {"use_latent_seeder": False},
    "no residual in the read-in": {"read_in_kwargs": {}},
    "read-out residual": {
        "read_out_kwargs": {"include_residual_in_latent_attention": True, "use_head": False}
    },
    "head with norm and first latent as logits": {
        "read_out_kwargs": HEAD,
        "output_tokenizer_type": "FirstSlotAsLogits",
        "output_tokenizer_kwargs": None,
    },
    "head without norm": {
        "read_out_kwargs": {**HEAD, "pre_output_layernorm": False},
        "output_tokenizer_type": "FirstSlotAsLogits",
        "output_tokenizer_kwargs": None,
    },
    "default modulation": {"mod_fc_kwargs": None},
    "fixed gain": {"mod_fc_kwargs": {"scale_gain": 0.3}},
    "inputs to the first propagator alone": {
        "enable_persistent_input_mediator_communication": False,
        "enable_input_output_communication": False,
    },
    "codes per layer": {"share_codes_between_iterations": False},
    "one propagator for all layers": {"share_propagator_weights": True},
    "plain softmax": {"output_tokenizer_kwargs": {"softmax_type": "vanilla"}},
}
ALL_AT_ONCE = {
    key: value
    for name in (
        "kept stitches",
        "GELU",
        "biases of queries, keys and values",
        "capacity 1",
        "separate sender norms",
        "learned first states",
        "no residual in the read-in",
        "default modulation",
        "inputs to the first propagator alone",
        "head with norm and first latent as logits",
    )
    for key, value in OPTIONS[name].items()
}
ALL_AT_ONCE["read_out_kwargs"] = {**HEAD, "include_residual_in_latent_attention": True}
OPTIONS["many at once"] = ALL_AT_ONCE


def make_config(options: dict[str, Any]) -> dict[str, Any]:
    config = copy.deepcopy(Golden("nac_scale").config)
    for key, value in options.items():
        is_top = key in config or key.startswith("stitch")
        (config if is_top else config["latent_graph_kwargs"])[key] = value
    return config


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(3, 3, 32, 32)


def test_the_literal_nac_gives_the_published_logits() -> None:
    golden = Golden("nac_scale")
    state = {n: torch.from_numpy(v) for n, v in golden.group("state").items() if n[0] != "_"}
    logits = Literal(golden.config, state).logits(golden["in/x"])
    torch.testing.assert_close(logits, golden["out/logits"], atol=VALUES, rtol=0)


def test_the_literal_nac_trains_as_published(monkeypatch: pytest.MonkeyPatch) -> None:
    """With every uniform draw one half: no noise, every path kept."""
    golden = Golden("nac_scale")
    state = {n: torch.from_numpy(v) for n, v in golden.group("state").items() if n[0] != "_"}
    literal = Literal(golden.config, state)
    literal.training = True
    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)
    monkeypatch.setattr(torch, "rand", lambda *shape: torch.full(shape, 0.5))
    monkeypatch.setattr(torch, "rand_like", lambda like: torch.full_like(like, 0.5))
    monkeypatch.setattr(torch.Tensor, "bernoulli_", lambda self, p: self.fill_(1.0))
    monkeypatch.setattr(F, "gumbel_softmax", lambda x, dim: x.softmax(dim))
    logits = literal.logits(golden["in/x"])
    torch.testing.assert_close(logits, golden["train_half/logits"], atol=VALUES, rtol=0)


@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_gives_the_literal_logits_and_gradients(name: str, images: torch.Tensor) -> None:
    literal = Literal(make_config(OPTIONS[name]))
    literal.logits(images)  # draws the state
    literal.draws = False
    loaded = {k: v.detach().clone() for k, v in literal.state.items()}
    nac = official.load("nac", loaded, literal.config).double()
    literal.state = {k: v.double().requires_grad_() for k, v in literal.state.items()}
    images = images.double()
    expected = literal.logits(images)
    logits = nac(images)
    torch.testing.assert_close(logits, expected, atol=1e-10, rtol=1e-10)
    expected.square().mean().backward()
    logits.square().mean().backward()
    parameters = dict(nac.named_parameters())
    assert set(nac.loaded_tensors) == set(literal.state)
    for key, value in literal.state.items():
        ours = parameters[nac.loaded_tensors[key]].grad
        theirs = value.grad if value.grad is not None else torch.zeros_like(value)
        ours = torch.zeros_like(value) if ours is None else ours
        torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=1e-9, msg=key)


STUDENT = {
    "state_dim": 32,
    "code_dim": 32,
    "num_heads": 2,
    "head_dim": 16,
    "stitch_dim": 48,
    "ffn_capacity_factor": 2.0,
    "layer_scale_initial_value": 0.1,
}
STUDENT_OPTIONS: dict[str, dict[str, Any]] = {
    "as published": {
        "use_geglu": True,
        "qkv_bias_in_attention": False,
        "latent_attention_kwargs": {"share_layernorm": True},
        "mod_fc_kwargs": {
            "scale_gain": 0.1,
            "learnable_scale_gain": True,
            "add_one_to_scale": True,
        },
    },
    "defaults": {},
    "no residual": {"include_residual_in_latent_attention": False},
}


@pytest.mark.parametrize("name", STUDENT_OPTIONS)
def test_a_mediator_student_gives_the_literal_tokens(name: str) -> None:
    literal = Literal({**STUDENT, **STUDENT_OPTIONS[name]})
    tokens, codes = torch.randn(3, 17, 48), torch.randn(1, 32)
    expected = literal.mediator(tokens, codes)
    stage = official.load("nac_mediator", {**literal.state, "codes": codes}, literal.config)
    torch.testing.assert_close(stage(tokens), expected, atol=VALUES, rtol=1e-5)


def test_a_read_out_student_with_a_head_gives_the_literal_logits() -> None:
    literal = Literal({**STUDENT, "output_dim": 10, "include_residual_in_latent_attention": False})
    tokens, codes, states = torch.randn(3, 17, 48), torch.randn(1, 32), torch.randn(3, 1, 32)
    expected = literal.read_out_student(tokens, states, codes)
    state = {**literal.state, "codes": codes, "states": states}
    stage = official.load("nac_readout", state, literal.config)
    torch.testing.assert_close(stage(tokens), expected, atol=VALUES, rtol=1e-5)


SIZES = {
    "three stages": {
        "capacity_preset": "femto",
        "num_stages": 3,
        "positional_grid_kwargs": {"dim": 6, "grid_size": [2, 2]},
    },
    "more blocks, and a grid that is not square": {
        "capacity_preset": "micro",
        "num_stages": 2,
        "positional_grid_kwargs": {"dim": 4, "grid_size": [4, 2]},
    },
}


@pytest.mark.parametrize("name", SIZES)
def test_other_sizes_give_the_literal_logits(name: str) -> None:
    """No two widths alike, so that none can stand in for another."""
    config = make_config({"code_dim": 20, "signature_dim": 10, "num_heads": 3, "head_dim": 8})
    config |= {"state_dim": 48, "output_dim": 7, "input_tokenizer_kwargs": SIZES[name]}
    config["latent_graph_kwargs"]["read_in_kwargs"] = {"path_drop_prob": 0.0}
    config["latent_graph_kwargs"] |= {"num_iterations": 3, "num_mediator_latents": 13}
    images = torch.randn(2, 3, 32, 32 if name == "three stages" else 16)
    literal = Literal(config)
    literal.logits(images)  # draws the weights
    literal.state = {key: value.double() for key, value in literal.state.items()}
    nac = official.load("nac", literal.state, config).double()
    expected = literal.logits(images.double())
    torch.testing.assert_close(nac(images.double()), expected, atol=1e-10, rtol=1e-10)


PRESETS = {
    "barabasi-albert": ({"n": 256, "m": 2}, "barabasi_albert", {"m": 2}),
    "erdos-renyi": ({"n": 256, "p": 0.1}, "erdos_renyi", {"p": 0.1}),
    "ring-of-cliques": (
        {"num_cliques": 8, "clique_size": 32},
        "ring_of_cliques",
        {"num_cliques": 8},
    ),
    "planted-partition": (
        {"l": 8, "k": 32, "p_in": 0.9, "p_out": 0.2},
        "planted_partition",
        {"num_clusters": 8, "p_in": 0.9, "p_out": 0.2},
    ),
}


def published_file(name: str, preset: str) -> dict[str, Any]:
    """The published experiment's file of a model, as far as it describes the network."""
    config = published_config(name)
    config["latent_graph_kwargs"]["mediator_latent_kwargs"] = {
        "graph_preset": preset,
        "graph_generator_kwargs": PRESETS[preset][0],
    }
    return {"model": {"name": "NeuralCompiler", "kwargs": config}, "training": {"num_epochs": 400}}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_files_describe_our_models_of_that_name(name: str) -> None:
    arguments = nac_arguments(published_file(name, "barabasi-albert"))
    with torch.device("meta"):
        theirs, ours = NAC(**arguments), timm.create_model(name, prior="none")
    assert {n: p.shape for n, p in theirs.named_parameters()} == {
        n: p.shape for n, p in ours.named_parameters()
    }
    block, expected = theirs.propagators[0].options, ours.propagators[0].options
    assert replace(block, drop_path=0.0, ffn_fc=block.fc) == replace(expected, ffn_fc=expected.fc)
    assert theirs.read_out.options == replace(ours.read_out.options, ffn_fc=block.fc)
    assert theirs.read_in.options == replace(
        ours.read_in.options, ffn_fc=block.fc, share_norm=theirs.read_in.options.share_norm
    )
    assert theirs.kernels[0].options == ours.kernels[0].options
    assert arguments["drop_path_rate"] == 0.1


@pytest.mark.parametrize("preset", PRESETS)
def test_graph_presets_are_our_priors(preset: str) -> None:
    file = published_file("nac_tiny_imagenet", preset)
    arguments = nac_arguments(file, with_prior=True)
    _, prior, options = PRESETS[preset]
    assert (arguments["prior"], arguments["prior_args"]) == (prior, options)
    assert "prior" not in nac_arguments(file)


def test_another_model_is_not_a_nac() -> None:
    with pytest.raises(ConfigError, match="not a NeuralCompiler"):
        nac_arguments({"model": {"name": "PerceiverIO", "kwargs": {}}})


def test_repetitions_of_a_shared_propagator_are_checked(images: torch.Tensor) -> None:
    """The published layout lists a shared propagator once for every layer."""
    literal = Literal(make_config(OPTIONS["one propagator for all layers"]))
    expected = literal.logits(images)
    first = "latent_graphs.0.propagators.0."
    repeated = {
        name.replace(first, first.replace("0.", "1.", 2).replace("graphs.1", "graphs.0")): value
        for name, value in literal.state.items()
        if name.startswith(first)
    }
    assert all(name.startswith("latent_graphs.0.propagators.1.") for name in repeated)
    state = {**literal.state, **repeated}
    nac = official.load("nac", state, literal.config)
    torch.testing.assert_close(nac(images), expected, atol=VALUES, rtol=1e-5)
    name = "latent_graphs.0.propagators.1.ffn.layernorm.weight"
    assert nac.loaded_tensors[name] == "propagators.0.ffn.norm.weight"
    with pytest.raises(CheckpointError, match="should repeat"):
        official.load("nac", {**state, name: state[name] + 1}, literal.config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_gelu": True}, r"latent_graph_kwargs has an unknown key 'use_gelu'; did you mean"),
        ({"mod_fc_cls": "ModFF"}, r"no layer ModFF; did you mean 'ModFC'"),
        ({"disable_input_mediator_communication": True}, "is not supported"),
        ({"mediator_latent_kwargs": {"learnable_codes": False}}, "is not supported"),
        ({"read_out_kwargs": {"use_head": True}}, "does not go with this output tokenizer"),
        ({"num_input_latents": 9}, r"signatures_ has shape \[8, 16\], not \[9, 16\]"),
        ({"num_iterations": 3}, r"propagators\.2\..* is missing"),
    ],
)
def test_configs_that_do_not_fit_say_why(change: dict[str, Any], message: str) -> None:
    golden = Golden("nac_scale")
    config = make_config(change)
    with pytest.raises((ConfigError, CheckpointError), match=message):
        official.load("nac", golden.group("state"), config)


def test_a_missing_size_is_named() -> None:
    golden = Golden("nac_scale")
    config = make_config({})
    del config["latent_graph_kwargs"]["signature_dim"]
    with pytest.raises(ConfigError, match=r"latent_graph_kwargs lacks 'signature_dim'"):
        official.load("nac", golden.group("state"), config)


def test_a_tensor_without_a_place_is_named_as_published() -> None:
    golden = Golden("nac_scale")
    state = {**golden.group("state"), "latent_graphs.0.bogus": torch.zeros(1)}
    with pytest.raises(CheckpointError, match=r"no place for latent_graphs\.0\.bogus"):
        official.load("nac", state, golden.config)
