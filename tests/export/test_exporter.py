"""Exporting whole networks: what is written, what is refused, and that refusal leaves nothing."""

import copy
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from m2mkd.errors import ExportError
from m2mkd.export import exporter, inventory
from m2mkd.export.errors import (
    ActivationError,
    ConversionError,
    InterfaceError,
    InventoryError,
    LayoutError,
    ParityError,
    RuntimeLoadError,
    UnsupportedModelError,
)
from m2mkd.export.exporter import Exported, export_model, export_run
from m2mkd.export.onnx_ops import moe_layers
from m2mkd.export.session import OnnxClassifier, open_session
from m2mkd.export.verify import TOLERANCE
from m2mkd.models.checkpoint import load_model

sys.path.insert(0, str(Path(__file__).parent))
from small_runs import EXPERTS, NAMES, PREPROCESSING, SIZE, make_card, make_network, write_run

KINDS = [(target, precision) for target in ("cuda", "cpu") for precision in ("fp32", "fp16")]
FOUR = pytest.mark.parametrize("kind", KINDS, ids="-".join)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("run"), make_card(), num_samples=14)


@pytest.fixture(scope="module")
def exported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Any], Exported]:
    """A function from (target, precision) to the exported run; each is made once."""
    folder = tmp_path_factory.mktemp("files")
    made: dict[tuple[str, str], Exported] = {}

    def make(kind: tuple[str, str]) -> Exported:
        if kind not in made:
            target, precision = kind
            out = folder / f"{target}-{precision}.onnx"
            made[kind] = export_run(run, out, target=target, precision=precision)  # type: ignore[arg-type]
        return made[kind]

    return make


def node_counts(path: Path) -> dict[str, int]:
    nodes = onnx.load(path).graph.node
    names = [f"{node.domain}.{node.op_type}".lstrip(".") for node in nodes]
    return {name: names.count(name) for name in set(names)}


@FOUR
def test_a_file_computes_the_network_for_any_batch_size(
    kind: Any, exported: Any, run: Path
) -> None:
    network, _ = load_model(run)
    file = OnnxClassifier(exported(kind).path)
    for batch in (1, 2, 5):
        images = torch.randn(batch, 1, SIZE, SIZE)
        expected = network(images).detach().numpy()
        found = file.logits(images.numpy())
        assert found.dtype == np.float32
        allowed = TOLERANCE[kind[1]] * np.abs(expected).max()
        np.testing.assert_allclose(found, expected, rtol=0, atol=allowed)


@FOUR
def test_the_graph_holds_the_experts_in_the_form_of_the_target(kind: Any, exported: Any) -> None:
    counts = node_counts(exported(kind).path)
    assert counts == exported(kind).operators
    assert counts.get("com.microsoft.MoE", 0) == (1 if kind[0] == "cuda" else 0)
    assert counts.get("NonZero", 0) == (0 if kind[0] == "cuda" else 1)
    if kind[0] == "cpu":
        assert not any("." in name for name in counts)


@FOUR
def test_weights_have_the_precision_and_routers_stay_float32(kind: Any, exported: Any) -> None:
    weights = {
        item.name: item.data_type for item in onnx.load(exported(kind).path).graph.initializer
    }
    expected = onnx.TensorProto.FLOAT if kind[1] == "fp32" else onnx.TensorProto.FLOAT16
    for name in ("blocks.1.mlp.fc1_weight", "blocks.1.mlp.fc2_weight", "patch_embed.proj.weight"):
        assert weights[name] == expected
    assert weights["blocks.1.mlp.router.weight"] == onnx.TensorProto.FLOAT


def test_input_and_output_are_named_float32_with_a_free_batch(exported: Any) -> None:
    session = open_session(exported(("cuda", "fp16")).path)
    (image,), (logits,) = session.get_inputs(), session.get_outputs()
    assert (image.name, image.type, image.shape[1:]) == ("image", "tensor(float)", [1, SIZE, SIZE])
    assert (logits.name, logits.type, logits.shape[1:]) == ("logits", "tensor(float)", [len(NAMES)])
    assert image.shape[0] == logits.shape[0] == "batch"


def test_nodes_are_named_after_modules(exported: Any) -> None:
    nodes = onnx.load(exported(("cuda", "fp32")).path).graph.node
    names = [node.name for node in nodes]
    assert len(set(names)) == len(names)
    assert {"blocks.1.mlp/MoE", "blocks.0.attn.qkv/MatMul", "patch_embed.proj/Conv"} <= set(names)


@FOUR
def test_a_file_says_what_serving_needs(kind: Any, exported: Any) -> None:
    metadata = OnnxClassifier(exported(kind).path).metadata
    assert metadata == exported(kind).metadata
    assert (metadata.target, metadata.precision) == kind
    assert metadata.preprocessing == PREPROCESSING
    assert metadata.class_names == NAMES
    assert metadata.recipe == "abc"
    assert metadata.moe_form == ("contrib" if kind[0] == "cuda" else "sorted")
    assert metadata.activation == "gelu_tanh"
    assert metadata.versions["exported"]["torch"] == torch.__version__.partition("+")[0]
    assert metadata.data is not None and metadata.data["dataset"] == "digits"
    parity = metadata.parity
    assert parity is not None
    assert parity["inputs"] == "samples" and parity["images"] == 14
    assert 0 < parity["max_difference"] <= parity["tolerance"] == TOLERANCE[kind[1]]
    assert 0 < parity["agreeing"] == parity["clear"]


@FOUR
def test_a_file_holds_no_path_of_the_machine_that_wrote_it(kind: Any, exported: Any) -> None:
    content = exported(kind).path.read_bytes()
    assert b"mlp.fc1_weight" in content
    for trace in (b"site-packages", b".py", str(Path.cwd()).encode()):
        assert trace not in content


def test_a_plain_vit_is_exported_for_either_target(tmp_path: Path) -> None:
    card = make_card("vit_tiny_patch16_224")
    made = export_model(make_network(card), card, tmp_path / "vit.onnx")
    assert made.metadata.moe_form is None and made.metadata.activation is None
    assert made.metadata.parity is not None and made.metadata.parity["inputs"] == "noise"
    assert not any("." in name for name in made.operators)


def test_the_network_is_left_as_it_was(tmp_path: Path) -> None:
    card = make_card()
    network = make_network(card).train()
    before = copy.deepcopy(network.state_dict())
    forward = {name: layer.forward.__func__ for name, layer in moe_layers(network).items()}
    images = torch.randn(2, 1, SIZE, SIZE)
    # A network in training keeps the loss of its last pass, which cannot be copied.
    network(images).sum().backward()
    export_model(network, card, tmp_path / "a.onnx", precision="fp16", verify=False)
    assert network.training
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())
    assert {n: layer.forward.__func__ for n, layer in moe_layers(network).items()} == forward
    assert not network._forward_hooks and not network._forward_pre_hooks


def test_an_unverified_file_says_so(tmp_path: Path) -> None:
    card = make_card()
    made = export_model(make_network(card), card, tmp_path / "a.onnx", verify=False)
    assert OnnxClassifier(made.path).metadata.parity is None


def test_erf_gelu_does_not_pass_for_the_tanh_form_unless_accepted(tmp_path: Path) -> None:
    card = make_card(act_layer="gelu")
    network = make_network(card)
    out = tmp_path / "a.onnx"
    with pytest.raises(ActivationError, match=r"erf form of GELU.*--target cpu.*--tolerance") as no:
        export_model(network, card, out)
    assert list(tmp_path.iterdir()) == []
    tolerance = float(str(no.value).rpartition(" ")[2])
    made = export_model(network, card, out, tolerance=tolerance)
    parity = made.metadata.parity
    assert parity is not None and parity["tolerance"] == tolerance
    assert 1e-6 < parity["max_difference"] <= tolerance


def test_a_network_that_drops_tokens_is_refused(tmp_path: Path) -> None:
    card = make_card(eval_capacity_factor=1.0)
    with pytest.raises(UnsupportedModelError, match=r"eval_capacity_factor=1\.0"):
        export_model(make_network(card), card, tmp_path / "a.onnx")


def test_a_network_whose_experts_choose_is_refused(tmp_path: Path) -> None:
    card = make_card(gate="expert_choice")
    with pytest.raises(UnsupportedModelError, match="gate: expert_choice"):
        export_model(make_network(card), card, tmp_path / "a.onnx")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"crop_mode": "squash"}, "squash"),
        ({"interpolation": "lanczos"}, "lanczos"),
        ({"input_size": [1, 8, 9]}, "9"),
    ],
)
def test_preprocessing_that_serving_cannot_do_is_refused(
    change: dict[str, Any], named: str, tmp_path: Path
) -> None:
    card = make_card()
    card = replace(card, preprocessing={**card.preprocessing, **change})
    with pytest.raises(UnsupportedModelError, match=named):
        export_model(make_network(card), card, tmp_path / "a.onnx")


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    card = make_card()
    with pytest.raises(ExportError, match=r"nowhere for a\.onnx does not exist"):
        export_model(make_network(card), card, tmp_path / "nowhere" / "a.onnx")


def failing_stages() -> dict[str, tuple[str, Exception]]:
    """Functions of the exporter by stage, and what they raise in the next test."""
    return {
        "conversion": ("_convert", ConversionError("stop")),
        "file": ("check_file", InventoryError("stop")),
        "load": ("open_session", RuntimeLoadError("stop")),
        "interface": ("check_interface", InterfaceError("stop")),
        "values": ("compare", ParityError("stop")),
        "metadata": ("_add_metadata", OSError(28, "stop: no space left")),
        "interrupt": ("compare", KeyboardInterrupt("stop")),  # type: ignore[dict-item]
    }


@pytest.mark.parametrize("stage", failing_stages())
def test_a_failure_leaves_an_earlier_file_and_nothing_else(
    stage: str, exported: Any, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draft = exported(("cpu", "fp32")).path.read_bytes()
    name, error = failing_stages()[stage]
    out = tmp_path / "a.onnx"
    out.write_text("earlier")

    def fail(*_: Any, **__: Any) -> None:
        assert len(list(tmp_path.iterdir())) == 2, "the draft is beside the file"
        raise error

    monkeypatch.setattr(exporter, "_convert", lambda *_: None)
    monkeypatch.setattr(exporter, "_write", lambda _, path: path.write_bytes(draft))
    monkeypatch.setattr(exporter, name, fail)
    expected = ExportError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected, match="stop"):
        export_run(run, out, target="cpu")
    assert [path.name for path in tmp_path.iterdir()] == ["a.onnx"]
    assert out.read_text() == "earlier"


def test_what_the_exporter_chokes_on_is_one_line(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def choke(*_: Any, **__: Any) -> None:
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr(torch.onnx, "export", choke)
    with pytest.raises(ConversionError, match=r"vmoe_tiny_patch16_224: first line; -v"):
        export_run(run, tmp_path / "a.onnx")
    assert list(tmp_path.iterdir()) == []


def test_weights_over_the_limit_of_one_file_go_beside_it(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporter, "_MAX_EMBEDDED_BYTES", 1000)
    made = export_run(run, tmp_path / "a.onnx")
    assert [path.name for path in made.files] == ["a.onnx", "a.onnx.data"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.onnx", "a.onnx.data"]
    images = np.zeros((1, 1, SIZE, SIZE), np.float32)
    whole = OnnxClassifier(made.path).logits(images)
    (tmp_path / "a.onnx.data").unlink()
    with pytest.raises(RuntimeLoadError):
        OnnxClassifier(made.path)
    assert np.isfinite(whole).all()


def edited(path: Path, folder: Path, edit: Callable[[onnx.ModelProto], None]) -> Path:
    """A copy of a file with something changed."""
    file = onnx.load(path)
    edit(file)
    onnx.save(file, folder / "edited.onnx")
    return folder / "edited.onnx"


def initializer(file: onnx.ModelProto, name: str) -> onnx.TensorProto:
    return next(item for item in file.graph.initializer if item.name == name)


def test_transposed_experts_are_caught_though_the_runtime_takes_them(
    exported: Any, run: Path, tmp_path: Path
) -> None:
    def transpose(file: onnx.ModelProto) -> None:
        for name in ("blocks.1.mlp.fc1_weight", "blocks.1.mlp.fc2_weight"):
            item = initializer(file, name)
            values = np.ascontiguousarray(onnx.numpy_helper.to_array(item).transpose(0, 2, 1))
            item.CopyFrom(onnx.numpy_helper.from_array(values, name))

    path = edited(exported(("cuda", "fp32")).path, tmp_path, transpose)
    open_session(path).run(None, {"image": np.zeros((1, 1, SIZE, SIZE), np.float32)})
    network, _ = load_model(run)
    with pytest.raises(LayoutError, match=r"fc1_weight has shape \[3, 16, 32\], expected \[E, H"):
        inventory.check_file(path, network, form="contrib", precision="fp32")


@pytest.mark.parametrize("kind", [("cuda", "fp32"), ("cpu", "fp16")], ids="-".join)
def test_changed_experts_are_caught(
    kind: tuple[str, str], exported: Any, run: Path, tmp_path: Path
) -> None:
    def swap(file: onnx.ModelProto) -> None:
        item = initializer(file, "blocks.1.mlp.fc2_weight")
        values = onnx.numpy_helper.to_array(item)[::-1].copy()
        item.CopyFrom(onnx.numpy_helper.from_array(values, item.name))

    path = edited(exported(kind).path, tmp_path, swap)
    network, _ = load_model(run)
    form = exported(kind).metadata.moe_form
    inventory.check_file(exported(kind).path, network, form=form, precision=kind[1])
    with pytest.raises(LayoutError, match="fc2_weight in the graph differs"):
        inventory.check_file(path, network, form=form, precision=kind[1])


@pytest.mark.parametrize(
    ("kind", "form", "precision", "match"),
    [
        (("cuda", "fp32"), "sorted", "fp32", "has 1 com.microsoft.MoE nodes, but 0 were expected"),
        (("cpu", "fp32"), "contrib", "fp32", "has 0 com.microsoft.MoE nodes, but 1 were expected"),
        (("cuda", "fp32"), "contrib", "fp16", "fc1_weight"),
        (("cuda", "fp16"), "contrib", "fp32", "fc1_weight"),
    ],
)
def test_a_graph_of_another_kind_than_asked_for_is_caught(
    kind: Any, form: Any, precision: str, match: str, exported: Any, run: Path
) -> None:
    network, _ = load_model(run)
    with pytest.raises((InventoryError, LayoutError), match=match):
        inventory.check_file(exported(kind).path, network, form=form, precision=precision)


def test_a_float_weight_in_a_half_file_is_caught(exported: Any, run: Path, tmp_path: Path) -> None:
    def widen(file: onnx.ModelProto) -> None:
        item = initializer(file, "patch_embed.proj.weight")
        values = onnx.numpy_helper.to_array(item).astype(np.float32)
        item.CopyFrom(onnx.numpy_helper.from_array(values, item.name))

    path = edited(exported(("cpu", "fp16")).path, tmp_path, widen)
    network, _ = load_model(run)
    with pytest.raises(InventoryError, match=r"patch_embed\.proj\.weight is FLOAT"):
        inventory.check_file(path, network, form="sorted", precision="fp16")


@pytest.mark.parametrize(("attribute", "value"), [("k", 1), ("normalize_routing_weights", 0)])
def test_an_expert_node_with_other_settings_is_caught(
    attribute: str, value: int, exported: Any, run: Path, tmp_path: Path
) -> None:
    def change(file: onnx.ModelProto) -> None:
        (node,) = (node for node in file.graph.node if node.op_type == "MoE")
        next(item for item in node.attribute if item.name == attribute).i = value

    path = edited(exported(("cuda", "fp32")).path, tmp_path, change)
    network, _ = load_model(run)
    with pytest.raises(InventoryError, match=rf"blocks\.1\.mlp: the MoE node has .*{attribute}"):
        inventory.check_file(path, network, form="contrib", precision="fp32")


@pytest.mark.parametrize("part", ["name", "batch", "classes", "type"])
def test_another_interface_is_caught(part: str, exported: Any, tmp_path: Path) -> None:
    def change(file: onnx.ModelProto) -> None:
        if part == "name":
            file.graph.output[0].name = "scores"
            next(n for n in file.graph.node if "logits" in n.output).output[0] = "scores"
        elif part == "batch":
            file.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2

    kind = ("cpu", "fp32")
    session = open_session(edited(exported(kind).path, tmp_path, change))
    num_classes = 11 if part == "classes" else len(NAMES)
    size = [3, SIZE, SIZE] if part == "type" else [1, SIZE, SIZE]
    with pytest.raises(InterfaceError, match="expected"):
        inventory.check_interface(session, input_size=size, num_classes=num_classes)
    inventory.check_interface(
        open_session(exported(kind).path), input_size=[1, SIZE, SIZE], num_classes=len(NAMES)
    )


def test_exports_print_nothing_of_their_libraries(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    card = make_card(**{**EXPERTS, "moe_blocks": [0]})
    export_model(make_network(card), card, tmp_path / "a.onnx", target="cpu", verify=False)
    assert capfd.readouterr() == ("", "")
