"""Writes a network as an ONNX file, and puts it in its place only after it was verified."""

import ast
import copy
import logging
import math
import os
import shutil
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import onnx_ir
import torch
from PIL import Image
from torch import Tensor, nn

import m2mkd
from m2mkd.errors import ExportError
from m2mkd.export.errors import ConversionError, UnsupportedModelError
from m2mkd.export.inventory import check_file, check_interface
from m2mkd.export.metadata import Metadata, MoEForm
from m2mkd.export.nac_graph import (
    NAC_CUDA_OPSET,
    check_nac,
    fold,
    nac_translations,
    use_constant_graph,
    without_unheard,
)
from m2mkd.export.onnx_ops import OPSET, moe_layers, translations, use_export_op
from m2mkd.export.preprocess import check_preprocessing, prepare, read_image
from m2mkd.export.session import INPUT, OUTPUT, open_session
from m2mkd.export.sources import run_data, run_folder
from m2mkd.export.verify import MIN_IMAGES, Parity, Reference, compare, reference_outputs
from m2mkd.models import NAC
from m2mkd.models.checkpoint import ModelCard, load_model

Target = Literal["cuda", "cpu"]
Precision = Literal["fp32", "fp16"]

_FORMS: dict[Target, MoEForm] = {"cuda": "contrib", "cpu": "sorted"}
# The oldest versions that were seen to run such files on the CPU: 1.17 refuses the IR version, and
# 1.22 has no CPU kernel for MoE.
_MIN_FOR_ATTENTION = "1.23"
_MIN_ONNXRUNTIME: dict[MoEForm | None, str] = {None: "1.18", "sorted": "1.18", "contrib": "1.23"}
_TRACED_BATCH = 2
_MAX_SAMPLES = 32
# A protobuf message ends at 2 GiB; larger weights go to a file beside it.
_MAX_EMBEDDED_BYTES = 2**31 - 2**24
_SCOPES = "pkg.torch.onnx.name_scopes"
_LOGGERS = ("torch.onnx", "onnxscript", "onnx_ir")


@dataclass
class Exported:
    """A finished export.

    Attributes:
        path: The ONNX file.
        files: All files written; more than one where weights exceed the 2 GiB of one file.
        metadata: What the file says about itself; `parity` is None where it was not verified.
        operators: How often each operator occurs; empty where it was not verified.
    """

    path: Path
    files: list[Path]
    metadata: Metadata
    operators: dict[str, int]


def export_run(
    source: Path,
    out: Path,
    *,
    target: Target = "cuda",
    precision: Precision = "fp32",
    tolerance: float | None = None,
    verify: bool = True,
    verbose: bool = False,
) -> Exported:
    """Exports the network of a run or checkpoint folder; see `export_model`.

    Verification uses the run's held-out samples, `samples/*.png`, where it has them.
    """
    model, checkpoint = load_model(source)
    run = run_folder(source)
    data = None
    samples: list[Path] = []
    if run is not None:
        data = run_data(run, checkpoint.stage).model_dump(mode="json")
        samples = sorted((run / "samples").glob("*.png"))[:_MAX_SAMPLES]
    return export_model(
        model,
        checkpoint.card,
        out,
        target=target,
        precision=precision,
        tolerance=tolerance,
        verify=verify,
        samples=samples,
        data=data,
        verbose=verbose,
    )


def export_model(
    model: nn.Module,
    card: ModelCard,
    out: Path,
    *,
    target: Target = "cuda",
    precision: Precision = "fp32",
    tolerance: float | None = None,
    verify: bool = True,
    samples: Sequence[Path] = (),
    data: dict[str, Any] | None = None,
    verbose: bool = False,
) -> Exported:
    """Writes a network as an ONNX file that was compared with it, or writes nothing.

    The file has one input `image` [batch, channels, size, size] and one output `logits`
    [batch, classes], both float32 in either precision, and any batch size.

    Args:
        model: The trained network; it stays as it is.
        card: Describes it.
        out: The file to write; it is replaced when everything has passed.
        target: `cuda` writes experts as `com.microsoft.MoE`, `cpu` as standard operators on rows
            sorted by expert.
        precision: Of weights and arithmetic; routers stay float32.
        tolerance: Accepted difference of logits, as a fraction of the largest; the default depends
            on the precision.
        verify: Whether to check the file at all.
        samples: Image files to verify with; smooth noise where there are none.
        data: Data section of the recipe, for the metadata.
        verbose: Whether to let the libraries print their logs and warnings.

    Raises:
        ExportError: A child from `m2mkd.export.errors` for every kind of failure.
    """
    check_preprocessing(card.preprocessing)
    _check_routing(model)
    if isinstance(model, NAC):
        check_nac(model)
    if not out.parent.is_dir():
        raise ExportError(f"folder {out.parent} for {out.name} does not exist; make it first")
    twin = _fresh_copy(model, card)
    metadata = _metadata(card, twin, target=target, precision=precision, data=data)
    reference = _reference(twin, card, metadata, samples) if verify else None

    with _scratch_folder(out) as scratch:
        draft = scratch / out.name
        with _quiet(verbose):
            _write(_convert(twin, card, metadata), draft)
        operators: dict[str, int] = {}
        if reference is not None:
            form = _FORMS[target]
            operators = check_file(
                draft, model, form=form, precision=precision, opset=metadata.opset
            )
            parity = _verify(draft, reference, metadata, card, tolerance, bool(samples))
            metadata.parity = parity.to_dict()
        _add_metadata(draft, metadata)
        files = _move_into_place(scratch, draft, out)
    return Exported(out, files, metadata, operators)


def _check_routing(model: nn.Module) -> None:
    for name, layer in moe_layers(model).items():
        if layer.gate == "expert_choice":
            raise UnsupportedModelError(
                f"{name} has gate: expert_choice, with which an image's result depends on the rest "
                "of its batch; the ONNX forms know gates where tokens choose experts, so train the "
                "student with one of those to export it"
            )
        if layer.eval_capacity_factor is not None:
            raise UnsupportedModelError(
                f"{name} drops tokens over a capacity at evaluation (eval_capacity_factor="
                f"{layer.eval_capacity_factor}), and the ONNX forms drop none; export needs "
                "eval_capacity_factor: null, which changes the network, so evaluate it again"
            )


def _fresh_copy(model: nn.Module, card: ModelCard) -> nn.Module:
    """An own copy on the CPU in eval mode (a trained module cannot always be deep-copied)."""
    twin = card.build()
    twin.load_state_dict(model.state_dict())
    return twin.eval()


def _metadata(
    card: ModelCard,
    model: nn.Module,
    *,
    target: Target,
    precision: Precision,
    data: dict[str, Any] | None,
) -> Metadata:
    activations = {layer.activation for layer in moe_layers(model).values()}
    form = _FORMS[target] if activations else None
    opset = NAC_CUDA_OPSET if isinstance(model, NAC) and target == "cuda" else OPSET
    writers = {name: version(name) for name in ("torch", "onnx", "onnxscript", "timm")}
    return Metadata(
        task="image-classification",
        model=card.model,
        preprocessing=card.preprocessing,
        class_names=card.class_names,
        recipe=card.recipe,
        versions={"trained": card.versions, "exported": {"m2mkd": m2mkd.__version__, **writers}},
        target=target,
        precision=precision,
        opset=opset,
        moe_form=form,
        activation=", ".join(sorted(activations)) or None,
        min_onnxruntime=_MIN_ONNXRUNTIME[form] if opset == OPSET else _MIN_FOR_ATTENTION,
        parity=None,
        data=data,
    )


def _reference(
    model: nn.Module, card: ModelCard, metadata: Metadata, samples: Sequence[Path]
) -> Reference:
    if samples:
        images = [prepare(read_image(path, card.channels), card.preprocessing) for path in samples]
    else:
        images = [prepare(image, card.preprocessing) for image in _noise(card.channels)]
    # Few samples are repeated, so that every batch size is tried.
    repeats = math.ceil(MIN_IMAGES / len(images))
    has_tanh_twin = metadata.moe_form == "contrib" and "gelu" == metadata.activation
    return reference_outputs(model, np.stack(images * repeats), has_tanh_twin=has_tanh_twin)


def _noise(channels: int) -> list[Image.Image]:
    """Images that differ in scale as well as in content: random grids of 2 x 2 and more cells."""
    generator = np.random.default_rng(0)
    shape = () if channels == 1 else (channels,)
    return [
        Image.fromarray(generator.integers(0, 256, (cells, cells, *shape), dtype=np.uint8))
        for cells in [2, 3, 5, 8, 16, 32] * 4
    ]


def _convert(model: nn.Module, card: ModelCard, metadata: Metadata) -> onnx_ir.Model:
    """Traces the model, which is changed, and returns its graph."""
    is_nac = isinstance(model, NAC)
    if isinstance(model, NAC):
        model = without_unheard(model)
        use_constant_graph(model)
    if metadata.precision == "fp16":
        _halve(model)
    use_export_op(model)
    tables = translations(metadata.moe_form or "sorted") | nac_translations(metadata.opset)
    image = torch.zeros(_TRACED_BATCH, card.channels, card.image_size, card.image_size)
    try:
        program = torch.onnx.export(
            model,
            (image,),
            dynamo=True,
            opset_version=metadata.opset,
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
            custom_translation_table=tables,
            verbose=False,
        )
    except Exception as error:  # the exporter wraps whatever a model raises in types of its own
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        raise ConversionError(
            f"PyTorch's ONNX exporter failed on {card.model}: {reason}; -v shows all of it"
        ) from error
    if program is None:
        raise ConversionError(f"PyTorch's ONNX exporter returned nothing for {card.model}")
    return _tidy(fold(program.model) if is_nac else program.model)


def _halve(model: nn.Module) -> None:
    """Makes weights and arithmetic float16, except the routers, the input and the output."""
    routers = {name: copy.deepcopy(layer.router) for name, layer in moe_layers(model).items()}
    model.half()
    for name, layer in moe_layers(model).items():
        layer.router = routers[name]

    def to_half(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0].half(), *args[1:])

    def to_float(_: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
        return out.float()

    model.register_forward_pre_hook(to_half)
    model.register_forward_hook(to_float)


def _tidy(graph_model: onnx_ir.Model) -> onnx_ir.Model:
    """Names nodes `module.path/Operator`, and drops traces that hold paths of this machine."""
    names: Counter[str] = Counter()
    for node in graph_model.graph:
        scopes = ast.literal_eval(node.metadata_props.get(_SCOPES, "[]"))
        module = scopes[-2] if len(scopes) > 1 and not scopes[-2].startswith("_") else ""
        name = f"{module}/{node.op_type}" if module else node.op_type
        node.name = f"{name}_{names[name]}" if names[name] else name
        names[name] += 1
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*graph_model.graph.inputs, *graph_model.graph.initializers.values()):
        value.metadata_props.clear()
    graph_model.graph.metadata_props.clear()
    graph_model.metadata_props.clear()
    return graph_model


def _write(graph_model: onnx_ir.Model, path: Path) -> None:
    sizes = [
        value.const_value.nbytes
        for value in graph_model.graph.initializers.values()
        if value.const_value is not None
    ]
    external = f"{path.name}.data" if sum(sizes) > _MAX_EMBEDDED_BYTES else None
    onnx_ir.save(graph_model, path, format="protobuf", external_data=external)


def _verify(
    path: Path,
    reference: Reference,
    metadata: Metadata,
    card: ModelCard,
    tolerance: float | None,
    has_samples: bool,
) -> Parity:
    session = open_session(path, use_cuda=metadata.target == "cuda")
    input_size = [card.channels, card.image_size, card.image_size]
    check_interface(session, input_size=input_size, num_classes=card.num_classes)
    return compare(
        session,
        reference,
        precision=metadata.precision,
        tolerance=tolerance,
        inputs="samples" if has_samples else "noise",
    )


def _add_metadata(path: Path, metadata: Metadata) -> None:
    """Writes the metadata into the file; the graph and the weights stay byte for byte."""
    file = onnx.load(path, load_external_data=False)
    onnx.helper.set_model_props(file, metadata.to_props())
    path.write_bytes(file.SerializeToString())


def _move_into_place(scratch: Path, draft: Path, out: Path) -> list[Path]:
    """Moves all files beside `out`, the graph last, so that it never lacks its weights."""
    others = [path for path in sorted(scratch.iterdir()) if path != draft]
    files = []
    for path in [*others, draft]:
        with path.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(path, out.parent / path.name)
        files.append(out.parent / path.name)
    return files[::-1]


@contextmanager
def _scratch_folder(out: Path) -> Iterator[Path]:
    """A folder beside `out` that is gone at the end, whatever happens."""
    try:
        folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    except OSError as error:
        raise ExportError(f"cannot write to {out.parent}: {error.strerror}") from None
    try:
        yield folder
    except OSError as error:
        if isinstance(error, ExportError):
            raise
        raise ExportError(f"cannot write {out}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _quiet(verbose: bool) -> Iterator[None]:
    """Silences the exporter's libraries, whose warnings are about their own internals."""
    if verbose:
        yield
        return
    levels = {name: logging.getLogger(name).level for name in _LOGGERS}
    for name in _LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
