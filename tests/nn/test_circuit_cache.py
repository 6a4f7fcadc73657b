"""Circuits that are kept until signatures change."""

import timm
import torch

import m2mkd.models  # noqa: F401  (registers nac_digits)


def test_a_circuit_built_in_inference_mode_serves_training() -> None:
    model = timm.create_model("nac_digits").eval()
    images = torch.randn(2, 1, 8, 8)
    with torch.inference_mode():
        model(images)
    circuit = model.circuit(0)
    model.train()(images).sum().backward()
    assert model.circuit(0) is circuit
    assert model.mediator_latents.signatures.grad.abs().sum() > 0
