"""NACs as graphs: constants folded, latents nobody hears left out, links as biases."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from small_runs import NAMES, PREPROCESSING, SIZE

from m2mkd.export.errors import UnsupportedModelError
from m2mkd.export.exporter import export_model
from m2mkd.export.nac_graph import use_constant_graph, without_unheard
from m2mkd.models import NAC
from m2mkd.models.checkpoint import ModelCard

SIZES = {
    "tokenizer_dims": (8,),
    "grid_dim": 4,
    "state_dim": 16,
    "code_dim": 8,
    "signature_dim": 8,
    "num_inputs": 4,
    "num_mediators": 8,
    "num_outputs": 2,
    "depth": 2,
    "head_dim": 8,
}


def make_card(**model_args: Any) -> ModelCard:
    """A small NAC's card."""
    args = {**SIZES, **model_args}
    return ModelCard(
        "nac_digits", args, [1] * 4, len(NAMES), SIZE, 1, NAMES, dict(PREPROCESSING), "abc"
    )


def make_nac(card: ModelCard) -> NAC:
    """The card's NAC with weights large enough for every part to matter."""
    torch.manual_seed(0)
    nac = card.build().eval()
    assert isinstance(nac, NAC)
    with torch.no_grad():
        for name, parameter in nac.named_parameters():
            if "signatures" not in name:
                parameter += 0.2 * torch.randn_like(parameter)
    return nac


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """The same NAC for both targets, and in float16."""
    folder = tmp_path_factory.mktemp("nac")
    card = make_card()
    nac = make_nac(card)
    paths = {}
    for target, precision in (("cpu", "fp32"), ("cuda", "fp32"), ("cpu", "fp16")):
        path = folder / f"{target}-{precision}.onnx"
        export_model(nac, card, path, target=target, precision=precision)  # type: ignore[arg-type]
        paths[f"{target} {precision}"] = path
    yield paths


@pytest.mark.parametrize(
    ("name", "opset", "attentions", "tolerance"),
    [("cpu fp32", 20, 0, 1e-5), ("cuda fp32", 23, 3, 1e-5), ("cpu fp16", 20, 0, 2e-2)],
)
def test_files_give_the_network_s_logits_at_any_batch_size(
    exported: dict[str, Path], name: str, opset: int, attentions: int, tolerance: float
) -> None:
    file = onnx.load(exported[name])
    assert {entry.domain: entry.version for entry in file.opset_import}[""] == opset
    assert sum(node.op_type == "Attention" for node in file.graph.node) == attentions
    session = onnxruntime.InferenceSession(exported[name], providers=["CPUExecutionProvider"])
    nac = make_nac(make_card())
    for batch in (1, 2, 5):
        images = torch.randn(batch, 1, SIZE, SIZE)
        (found,) = session.run(None, {"image": images.numpy()})
        with torch.no_grad():
            expected = nac(images).numpy()
        assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()


def test_codes_signatures_and_seeds_are_gone_from_the_file(exported: dict[str, Path]) -> None:
    for path in exported.values():
        names = [tensor.name for tensor in onnx.load(path).graph.initializer]
        assert any(name.startswith("propagators.") for name in names)
        gone = ("codes", "signatures", "seeder", "gain", "bandwidth", ".scale.")
        assert not [name for name in names if any(part in name for part in gone)]


def test_latents_that_nobody_hears_are_left_out_and_the_logits_stay() -> None:
    card = make_card(
        read_out_kernel={"truncation": 0.9}, num_mediators=12, kernel={"truncation": 0.5}
    )
    nac = make_nac(card)
    with torch.no_grad():
        mediators = nac.mediator_latents.signatures
        # Outputs hear mediator 0, which hears 1 and input 0; 2 hears 1, but is heard by nobody.
        basis = torch.eye(8)
        for latents in (nac.input_latents.signatures, mediators, nac.output_latents.signatures):
            latents.copy_(basis[7].expand_as(latents))
        nac.output_latents.signatures.copy_(basis[0].expand(2, -1))
        mediators[0] = basis[0]
        mediators[1] = basis[0] + 0.8 * basis[1]
        nac.input_latents.signatures[0] = basis[0] + 0.1 * basis[2]
    smaller = without_unheard(nac)
    assert smaller.mediator_latents.num_latents == 2
    assert smaller.input_latents.num_latents == 1
    images = torch.randn(3, 1, SIZE, SIZE)
    with torch.no_grad():
        torch.testing.assert_close(smaller(images), nac(images))


def test_receivers_without_links_send_no_message_in_the_graph_either() -> None:
    nac = make_nac(make_card(read_out_kernel={"truncation": 0.5}))
    with torch.no_grad():
        nac.mediator_latents.signatures.copy_(torch.eye(8))
        nac.input_latents.signatures.copy_(torch.eye(8)[:4])
        nac.output_latents.signatures.copy_(torch.stack([torch.eye(8)[1], -torch.ones(8)]))
    assert nac.circuit(2).row_ptr.diff().tolist() == [2, 0]
    images = torch.randn(3, 1, SIZE, SIZE)
    with torch.no_grad():
        expected = nac(images)
        constant = without_unheard(nac)
        use_constant_graph(constant)
        torch.testing.assert_close(constant(images), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"fc": {"kind": "wmodfc"}},
        {"fc": {"product_norm": "ln"}},
        {"fc": {"kind": "fc"}, "qkv_bias": True},
        {"pooling": "first", "stitch_dim": 12, "per_layer_codes": True, "inputs_to": "first"},
        {"share_propagators": True, "gated": False, "seeding": "learned"},
        {"kernel": {"truncation": None, "eval_sampling": "threshold"}},
    ],
    ids=str,
)
def test_every_kind_of_nac_keeps_its_logits_as_a_constant_graph(options: dict[str, Any]) -> None:
    nac = make_nac(make_card(**options))
    images = torch.randn(3, 1, SIZE, SIZE)
    with torch.no_grad():
        expected = nac(images)
        constant = without_unheard(nac)
        use_constant_graph(constant)
        torch.testing.assert_close(constant(images), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [{"stochastic_eval": True}, {"kernel": {"eval_sampling": "relaxed_bernoulli"}}],
    ids=str,
)
def test_random_numbers_in_eval_mode_are_refused(tmp_path: Path, options: dict[str, Any]) -> None:
    card = make_card(**options)
    with pytest.raises(UnsupportedModelError, match="draws random numbers in eval mode"):
        export_model(make_nac(card), card, tmp_path / "nac.onnx")
    assert not list(tmp_path.iterdir())
