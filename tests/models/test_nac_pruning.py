"""Pruning a NAC: who carries traffic, and what is left without the others."""

from typing import Any

import pytest
import timm
import torch
from torch.nn import functional as F

from m2mkd.errors import ConfigError
from m2mkd.models.nac import NAC
from m2mkd.models.nac_pruning import (
    keep_latents,
    keep_layers,
    latent_traffic,
    least_missed_layers,
    output_weights,
)


def make(**options: Any) -> NAC:
    """A small NAC whose read-out has learned links too."""
    torch.manual_seed(0)
    model: NAC = timm.create_model("nac_digits", **{"layer_scale": 1.0, **options}).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def logits(model: NAC) -> torch.Tensor:
    images = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        out: torch.Tensor = model(images)
    return out


OPTIONS = [
    {},
    {"per_layer_codes": True},
    {"seeding": "learned"},
    {"inputs_to": "first", "inputs_to_read_out": False},
    {"share_propagators": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_mediators_that_nobody_hears_can_go_without_a_trace(options: dict[str, Any]) -> None:
    model = make(read_out_kernel={"truncation": 0.9}, **options)
    signatures = {
        name: getattr(model, f"{name}_latents").signatures.data
        for name in ("input", "mediator", "output")
    }
    for signature in signatures.values():
        signature[:, 0] = signature.norm(dim=1) + 1  # within 0.9 of each other
    signatures["mediator"][4:] *= -1  # these hear only each other
    kept = range(4)
    torch.testing.assert_close(logits(keep_latents(model, mediators=kept)), logits(model))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_pruned_nac_is_the_one_that_its_options_build(options: dict[str, Any]) -> None:
    pruned = keep_latents(make(**options), mediators=[5, 1, 7], inputs=[0, 3], outputs=[2])
    sizes = {"num_mediators": 3, "num_inputs": 2, "num_outputs": 1, "prior": "none"}
    built = timm.create_model("nac_digits", **sizes, **{"layer_scale": 1.0, **options})
    built.load_state_dict(pruned.state_dict())
    assert {name: getattr(pruned.options, name) for name in sizes} == sizes
    assert (pruned.circuit(0).num_receivers, pruned.circuit(0).num_senders) == (3, 5)
    assert torch.equal(logits(built.eval()), logits(pruned))


def test_the_order_in_which_mediators_are_named_does_not_matter() -> None:
    model = make()
    first, second = (keep_latents(model, mediators=kept) for kept in ([5, 1], torch.tensor([1, 5])))
    assert torch.equal(first.mediator_latents.codes, model.mediator_latents.codes[[1, 5]])
    assert torch.equal(first.mediator_latents.codes, second.mediator_latents.codes)
    assert model.mediator_latents.num_latents == 24


def test_traffic_is_the_attention_that_others_are_expected_to_pay() -> None:
    # One output, one input and two mediators; only the read-out hears the input.
    sizes = {"num_inputs": 1, "num_mediators": 2, "num_outputs": 1, "signature_dim": 2}
    model = make(depth=2, prior="none", **sizes)
    model.input_latents.signatures.data = torch.tensor([[-1.0, -1.0]])
    model.mediator_latents.signatures.data = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    model.output_latents.signatures.data = torch.tensor([[1.0, 0.0]])
    for kernel in (*model.kernels, model.read_out_kernel):
        kernel.bandwidth.data.fill_(1.0)
    near = torch.tensor(-0.4).exp()  # of the mediators, whose distance is 0.4
    far = torch.tensor(-1 - 0.5**0.5).exp()  # of output and input
    from_output = torch.stack([torch.tensor(1.0), near]) / (1 + near + far)
    from_each_other = near / (1 + near)
    inputs, mediators = latent_traffic(model)
    torch.testing.assert_close(mediators, from_output + 2 * from_each_other)
    torch.testing.assert_close(inputs, far[None] / (1 + near + far))


def test_inputs_that_are_not_heard_can_go_without_a_trace() -> None:
    model = make(inputs_to_read_out=False)
    signatures = model.input_latents.signatures.data
    signatures[3:] = -model.mediator_latents.signatures.data.mean(dim=0)
    model.mediator_latents.signatures.data += 10 * model.mediator_latents.signatures.data.mean(0)
    inputs, _ = latent_traffic(model)
    assert (inputs[3:] == 0).all()
    torch.testing.assert_close(logits(keep_latents(model, inputs=range(3))), logits(model))


@pytest.mark.parametrize("options", [*OPTIONS, {"stitch_dim": 16}], ids=str)
def test_a_nac_of_fewer_layers_is_the_one_that_its_options_build(options: dict[str, Any]) -> None:
    pruned = keep_layers(make(depth=3, **options), [2, 0])
    built = timm.create_model("nac_digits", depth=2, **{"layer_scale": 1.0, **options})
    built.load_state_dict(pruned.state_dict())
    assert pruned.options.depth == 2
    assert torch.equal(logits(built.eval()), logits(pruned))


@pytest.mark.parametrize("options", [*OPTIONS[:4], {"stitch_dim": 16}], ids=str)
def test_a_layer_that_changes_nothing_can_go_without_a_trace(options: dict[str, Any]) -> None:
    model = make(depth=3, **options)
    silent = model.block(1)
    for layer in (silent.attention, silent.ffn):
        layer.layer_scale.gamma.data.zero_()
    if model.stitches is not None:
        for part in (model.stitches.pre[2].weight, model.stitches.pre[2].bias):
            part.data.zero_()
    torch.testing.assert_close(logits(keep_layers(model, [0, 2])), logits(model))


def test_layers_go_one_by_one_by_the_loss_without_them() -> None:
    model = make(depth=3)
    images, labels = torch.randn(4, 1, 8, 8), torch.arange(4)

    def best(choices: list[list[int]]) -> list[int]:
        with torch.no_grad():
            return min(
                choices, key=lambda c: F.cross_entropy(keep_layers(model, c)(images), labels)
            )

    two = best([[0, 1], [0, 2], [1, 2]])
    assert least_missed_layers(model, images, labels, 3) == [0, 1, 2]
    assert least_missed_layers(model, images, labels, 2) == two
    assert least_missed_layers(model, images, labels, 1) == best([[layer] for layer in two])


def test_an_output_without_weight_in_the_pooling_can_go_without_a_trace() -> None:
    model = make()
    states = torch.randn(3, 4, 64)
    direction = model.pooling.confidence.weight.data[0]
    states[:, 2] -= 200 * direction / direction.square().sum()
    model.forward_features = lambda images: states  # type: ignore[method-assign]
    weights = output_weights(model, torch.zeros(3, 1, 8, 8))
    assert weights[2] == 0 and weights[[0, 1, 3]].gt(0).all()
    torch.testing.assert_close(weights.sum(), torch.tensor(1.0))
    kept = model.pooling(states[:, [0, 1, 3]])
    torch.testing.assert_close(kept, model.pooling(states))


def test_where_the_first_output_gives_the_logits_all_others_can_go() -> None:
    model = make(pooling="first", num_outputs=3)
    assert output_weights(model, torch.zeros(2, 1, 8, 8)).tolist() == [1, 0, 0]
    torch.testing.assert_close(logits(keep_latents(model, outputs=[0])), logits(model))


def test_keeping_no_latent_or_one_that_is_not_there_is_refused() -> None:
    for kept in ([], [24], [-1]):
        with pytest.raises(ConfigError, match="of mediators 0 to 23"):
            keep_latents(make(), mediators=kept)
    with pytest.raises(ConfigError, match=r"cannot keep \[2, 9\] of layers 0 to 1"):
        keep_layers(make(), [9, 2])
    with pytest.raises(ConfigError, match="cannot keep none of outputs 0 to 3"):
        keep_latents(make(), outputs=[])
    with pytest.raises(ConfigError, match=r"cannot keep \[8\] of inputs 0 to 7"):
        keep_latents(make(), inputs=[8])
