"""NAC as a whole: circuits that follow signatures, modes, tracing, checkpoints, timm."""

import copy
from pathlib import Path

import pytest
import timm
import torch

from m2mkd.errors import ConfigError
from m2mkd.models import NAC, create_network, create_vit
from m2mkd.models.checkpoint import ModelCard, load_model, write_checkpoint

SIZES = {
    "tokenizer_depths": (1,),
    "tokenizer_dims": (12,),
    "patch_size": 4,
    "grid_dim": 4,
    "state_dim": 16,
    "code_dim": 12,
    "signature_dim": 8,
    "num_inputs": 3,
    "num_mediators": 7,
    "num_outputs": 2,
    "depth": 2,
    "num_heads": 2,
    "head_dim": 8,
}
OPTIONS = {
    "as published": {},
    "inputs once": {"inputs_to": "first", "inputs_to_read_out": False},
    "codes per layer": {"per_layer_codes": True},
    "one propagator": {"share_propagators": True},
    "learned states": {"seeding": "learned"},
    "first latent": {"pooling": "first"},
    "kept stitches": {"stitch_dim": 10},
    "plain layers": {"fc": {"kind": "fc"}, "gated": False, "qkv_bias": True},
}


def make(**options: object) -> NAC:
    return NAC(img_size=8, in_chans=1, num_classes=5, **{**SIZES, **options})


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(3, 1, 8, 8)


@pytest.mark.parametrize("name", OPTIONS)
def test_every_parameter_is_trained_and_eval_mode_repeats_itself(
    name: str, images: torch.Tensor
) -> None:
    nac = make(**OPTIONS[name])
    logits = nac(images)
    assert logits.shape == (3, 5)
    logits.square().sum().backward()
    idle = {name for name, p in nac.named_parameters() if p.grad is None}
    assert idle == set()
    nac.eval()
    assert torch.equal(nac(images), nac(images))
    assert torch.equal(nac(images)[:1], nac(images[:1])) or torch.allclose(
        nac(images)[:1], nac(images[:1]), atol=1e-6
    )


def test_published_randomness_of_eval_mode_can_be_had(images: torch.Tensor) -> None:
    nac = make(stochastic_eval=True).eval()
    assert not torch.equal(nac(images), nac(images))
    nac.set_stochastic_eval(False)
    assert torch.equal(nac(images), nac(images))


def test_training_draws_another_network_each_time(images: torch.Tensor) -> None:
    nac = make()
    assert not torch.equal(nac(images), nac(images))


@pytest.mark.parametrize("impl", ["auto", "dense", "reference"])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_latents_that_hear_nobody_keep_going(images: torch.Tensor, impl: str, mode: str) -> None:
    """Opposite signatures: mediator 0 hears itself alone; outputs hear nobody at all."""
    nac = make(read_out_kernel={"truncation": 0.1})
    with torch.no_grad():
        nac.mediator_latents.signatures.fill_(1.0)
        nac.input_latents.signatures.fill_(1.0)
        nac.mediator_latents.signatures[0] = -1.0
        nac.output_latents.signatures.fill_(-1.0)
        nac.mediator_latents.signatures[0, 0] = 1.0
    nac.set_attention_impl(impl)
    nac.train(mode == "train")
    assert nac.circuit(0).row_ptr.diff()[0] == 1
    assert nac.circuit(nac.depth).num_edges == 0
    logits = nac(images)
    logits.sum().backward()
    assert logits.isfinite().all()
    assert all(p.grad.isfinite().all() for p in nac.parameters() if p.grad is not None)


def test_a_circuit_without_edges_gives_logits(images: torch.Tensor) -> None:
    nac = make(kernel={"truncation": 0.0}).eval()
    with torch.no_grad():
        nac.mediator_latents.signatures.copy_(torch.randn(7, 8))
    edges = nac.circuit(0).num_edges
    assert edges <= 7
    assert nac(images).isfinite().all()


def test_moved_signatures_change_circuit_and_logits(images: torch.Tensor) -> None:
    nac = make().eval()
    before, circuit = nac(images), nac.circuit(0)
    assert nac.circuit(0) is circuit
    nac.load_state_dict(make().state_dict())
    assert nac.circuit(0) != circuit
    assert not torch.allclose(nac(images), before)


def test_an_optimiser_step_is_seen_in_the_next_forward_pass(images: torch.Tensor) -> None:
    nac = make()
    optimizer = torch.optim.SGD(nac.parameters(), lr=5.0)
    nac(images).square().sum().backward()
    with torch.no_grad():
        nac.mediator_latents.signatures.grad.normal_()
    before = nac.circuit(0)
    optimizer.step()
    nac(images)
    fresh = make()
    fresh.load_state_dict(nac.state_dict())
    assert nac.circuit(0) == fresh.circuit(0) != before


def test_a_change_of_mode_ends_fixed_circuits(images: torch.Tensor) -> None:
    nac = make().eval()
    nac.fix_circuits()
    circuit = nac.circuit(0)
    with torch.no_grad():
        nac.mediator_latents.signatures.normal_()
    assert nac.circuit(0) is circuit
    nac.eval()
    assert nac.circuit(0) != circuit


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_bfloat16_regions_are_near_float32(images: torch.Tensor, mode: str) -> None:
    nac = make(kernel={"sampling": "none"}, pooling_args={"gumbel": False}).train(mode == "train")
    nac.seeder.eval()
    torch.manual_seed(1)
    expected = nac(images)
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16):
        logits = nac(images)
    torch.testing.assert_close(logits.float(), expected, atol=0.05, rtol=0.05)
    logits.float().sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in nac.parameters())


def test_checkpointed_blocks_give_the_same_gradients(images: torch.Tensor) -> None:
    nac = make()
    gradients = []
    for enable in (False, True):
        nac.set_grad_checkpointing(enable)
        assert all(stage.grad_checkpointing is enable for stage in nac.tokenizer.stages)
        torch.manual_seed(0)
        nac(images).square().sum().backward()
        gradients.append([p.grad.clone() for p in nac.parameters()])
        nac.zero_grad()
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_a_fixed_circuit_compiles_as_one_graph(images: torch.Tensor) -> None:
    nac = make().eval()
    with torch.no_grad():
        expected = nac(images)
        nac.fix_circuits()
        compiled = torch.compile(nac, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(images), expected)


@pytest.mark.parametrize("impl", ["auto", "dense"])
def test_a_fixed_circuit_is_exported_for_batches_of_any_size(impl: str) -> None:
    nac = make(depth=1).eval()
    nac.set_attention_impl(impl)
    nac.fix_circuits()
    images = torch.randn(5, 1, 8, 8)
    batch = torch.export.Dim("batch", min=1, max=64)
    with torch.no_grad():
        program = torch.export.export(nac, (images,), dynamic_shapes=({0: batch},))
        for count in (1, 3, 5):
            torch.testing.assert_close(program.module()(images[:count]), nac(images[:count]))


# torch's own tracer asks a tensor for a gradient it does not have.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_a_compiled_model_in_training_follows_its_signatures(images: torch.Tensor) -> None:
    nac = make(kernel={"sampling": "none"}, pooling_args={"gumbel": False}, code_noise=0.0, depth=1)
    nac.seeder.eval()
    compiled = torch.compile(nac, backend="eager")
    for _ in range(2):
        torch.testing.assert_close(compiled(images), nac(images))
        with torch.no_grad():
            nac.mediator_latents.signatures.normal_()


def test_a_copy_has_circuits_of_its_own(images: torch.Tensor) -> None:
    nac = make().eval()
    expected = nac(images)
    other = copy.deepcopy(nac)
    with torch.no_grad():
        other.mediator_latents.signatures.normal_()
        other(images)
    assert torch.equal(nac(images), expected)


NAMES = {"nac_digits": (8, 1), "nac_fashion": (28, 1)}


@pytest.mark.parametrize("name", NAMES)
def test_timm_creates_and_a_checkpoint_restores(name: str, tmp_path: Path) -> None:
    size, channels = NAMES[name]
    shape = {"num_classes": 4, "image_size": size, "channels": channels}
    nac = create_network(name, {"depth": 2}, drop_path=0.1, **shape).eval()
    assert isinstance(nac, NAC) and nac.depth == 2
    card = ModelCard(name, {"depth": 2}, [1, 1, 1, 1], class_names=["a"], preprocessing={}, **shape)
    write_checkpoint(tmp_path, 3, nac.state_dict(), meta={"card": card.__dict__})
    restored, checkpoint = load_model(tmp_path)
    images = torch.randn(2, channels, size, size)
    assert torch.equal(restored(images), nac(images))
    assert checkpoint.card.depths == [1, 1, 1, 1]


@pytest.mark.parametrize("name", ["nac_tiny_imagenet", "nac_imagenet"])
def test_published_sizes_are_those_of_the_papers(name: str) -> None:
    with torch.device("meta"):
        nac = timm.create_model(name, prior="none")
    count = sum(p.numel() for p in nac.parameters())
    expected = {"nac_tiny_imagenet": 26_703_342, "nac_imagenet": 37_589_294}[name]
    assert count == expected
    assert nac.pretrained_cfg["classifier"] == "pooling.classifier"


def test_a_prior_shapes_the_circuit_of_a_new_model() -> None:
    torch.manual_seed(3)
    nac = timm.create_model("nac_digits", kernel={"truncation": 0.8})
    torch.manual_seed(3)
    again = timm.create_model("nac_digits", kernel={"truncation": 0.8})
    mediators = nac.circuit(0).to_dense()[:, 8:]
    assert torch.equal(mediators, mediators.T)
    assert mediators.diagonal().all()
    degrees = mediators.sum(1) - 1
    assert degrees.min() >= 2 and degrees.sum() == 2 * (24 - 2) * 2  # m edges for each new node
    assert nac.circuit(0) == again.circuit(0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_mediator": 7}, "unknown option 'num_mediator'; did you mean 'num_mediators'"),
        ({"read_out": {"residul": True}}, "unknown option 'residul'; did you mean 'residual'"),
        ({"kernel": {"truncate": 0.9}}, "did you mean 'truncation'"),
        ({"seeding": "noise"}, "seeding='noise' is none of codes, learned"),
        ({"prior": "small_world"}, "unknown graph prior"),
    ],
)
def test_options_that_do_not_exist_are_named(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(**options)


def test_only_transformers_are_cut_into_vit_modules() -> None:
    with pytest.raises(ConfigError, match="is a NAC"):
        create_vit("nac_digits", {}, num_classes=3, image_size=8, channels=1)


def test_a_new_classifier_replaces_the_old_one(images: torch.Tensor) -> None:
    nac = make().eval()
    nac.reset_classifier(9)
    assert nac(images).shape == (3, 9) and nac.get_classifier().out_features == 9
    nac.reset_classifier(0)
    features = nac.forward_head(nac.forward_features(images), pre_logits=True)
    assert torch.equal(nac(images), features)
    with pytest.raises(ConfigError, match="no classifier to reset"):
        make(pooling="first").reset_classifier(3)


def test_positions_and_signatures_do_not_decay() -> None:
    names = make(seeding="learned").no_weight_decay()
    parameters = dict(make(seeding="learned").named_parameters())
    assert names <= set(parameters) and "mediator_latents.signatures" in names


@pytest.mark.parametrize("attribute", ["signatures", "codes"])
def test_latents_can_be_left_as_they_are(attribute: str) -> None:
    nac = make(**{f"learn_{attribute}": False})
    assert not getattr(nac.mediator_latents, attribute).requires_grad
