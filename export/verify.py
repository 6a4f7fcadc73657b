"""Whether a file computes what the PyTorch model computes.

A router that is nearly undecided between two experts may be tipped by rounding, and then a whole
token is computed by another expert. So an image whose logits differ is excused where one of its
routers was that close, but never more than half of the images. Letters: B images, C classes,
T tokens, E experts, K choices.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from m2mkd.export.errors import ActivationError, AgreementError, InterfaceError, ParityError
from m2mkd.export.onnx_ops import moe_layers
from m2mkd.export.session import Floats, run_session
from m2mkd.nn import MoEMlp

# Largest difference of logits, as a fraction of the largest logit. Measured on untrained networks
# of 2 and 12 blocks: rounding moves logits by 1e-6 to 3e-5 in float32 and by 1e-3 to 1e-2 in
# float16, a GELU of the wrong form by 2e-4 to 4e-3.
TOLERANCE = {"fp32": 1e-4, "fp16": 3e-2}
# Router logits closer than this may change order in the given precision.
TIE_MARGIN = {"fp32": 1e-4, "fp16": 2e-2}
# Batches other than the traced one first; their sum is the least number of images.
BATCH_SIZES = (1, 3, 8)
MIN_IMAGES = sum(BATCH_SIZES)
# How many images with a clear best class may be given another by the file.
MAX_DISAGREEMENT = 0.1


@dataclass
class Reference:
    """What PyTorch computes in float32.

    Attributes:
        images: [B, channels, H, W].
        logits: [B, C].
        margins: Smallest distance in any router between the last chosen and the first not chosen
            expert, [B]; infinite without experts.
        tanh_logits: [B, C] with the tanh form of GELU, where the experts have the erf form.
    """

    images: Floats
    logits: Floats
    margins: Floats
    tanh_logits: Floats | None = None


@dataclass
class Parity:
    """What verification measured.

    Attributes:
        max_difference: Largest difference of logits, over images that were not excused.
        tolerance: What it may be at most; both are fractions of the largest logit.
        images: Number of images.
        excused: Images over the tolerance with a nearly undecided router.
        clear: Images whose best class is ahead by more than the tolerance allows to change.
        agreeing: How many of these the file gives the same best class.
        inputs: What the images were, `samples` of the run or `noise`.
        provider: Execution provider that ran the file.
        runtime: Version of ONNX Runtime.
    """

    max_difference: float
    tolerance: float
    images: int
    excused: int
    clear: int
    agreeing: int
    inputs: str
    provider: str
    runtime: str

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values."""
        return asdict(self)


def reference_outputs(model: nn.Module, images: Floats, *, has_tanh_twin: bool) -> Reference:
    """Runs a float32 model in eval mode on the images [B, channels, H, W].

    Args:
        model: The network, on the CPU.
        images: Prepared images.
        has_tanh_twin: Whether to compute the logits with the tanh form of GELU in the experts too.
    """
    logits, margins = _run(model, images)
    if not has_tanh_twin:
        return Reference(images, logits, margins)
    with _tanh_experts(model):
        tanh_logits, _ = _run(model, images)
    return Reference(images, logits, margins, tanh_logits)


def compare(
    session: Any,
    reference: Reference,
    *,
    precision: str,
    tolerance: float | None,
    inputs: str,
) -> Parity:
    """Runs a file on the reference's images and compares.

    Args:
        session: The file in ONNX Runtime.
        reference: What PyTorch computed.
        precision: `fp32` or `fp16`; decides the default tolerance and what counts as a tie.
        tolerance: Accepted difference as a fraction of the largest logit; None for the default.
        inputs: What the images are, for the record.

    Raises:
        InterfaceError: Outputs of another shape or type.
        ParityError: Values differ, or the images cannot show whether they do.
        ActivationError: They differ because of the form of GELU, by however little, and no
            tolerance was given.
        AgreementError: Other classes are chosen.
    """
    import onnxruntime  # an optional dependency, present where there is a session

    default = TOLERANCE[precision]
    allowed = default if tolerance is None else tolerance
    scale = float(np.abs(reference.logits).max())
    if not np.ptp(reference.logits, axis=0).max() > default * scale:
        raise ParityError(
            f"the model gives all {len(reference.images)} test images ({inputs}) the same logits, "
            "so nothing can be verified; is it trained? --no-verify writes the file anyway"
        )
    logits = _run_file(session, reference)
    differences = np.abs(logits - reference.logits).max(axis=1) / scale
    if tolerance is None:
        _check_activation(logits, reference, differences)
    is_over = ~(differences <= allowed)  # so that NaN counts as a difference
    is_tied = reference.margins < TIE_MARGIN[precision]
    excused = is_over & is_tied
    if (is_over & ~is_tied).any() or excused.sum() > len(excused) // 2:
        raise _difference(logits, reference, differences, allowed)
    clear, agreeing = _agreement(logits, reference.logits, 2 * default * scale)
    if clear - agreeing > MAX_DISAGREEMENT * clear:
        raise AgreementError(
            f"the file gives {clear - agreeing} of {clear} images with a clear class another class "
            f"than PyTorch does ({inputs})"
        )
    return Parity(
        max_difference=float(differences[~excused].max()),
        tolerance=allowed,
        images=len(differences),
        excused=int(excused.sum()),
        clear=clear,
        agreeing=agreeing,
        inputs=inputs,
        provider=session.get_providers()[0],
        runtime=onnxruntime.__version__,
    )


def _agreement(logits: Floats, expected: Floats, gap: float) -> tuple[int, int]:
    """Counts images whose expected best class leads by more than `gap`, and equal answers."""
    best_two = np.sort(expected, axis=1)[:, -2:]
    is_clear = np.ptp(best_two, axis=1) > gap
    is_same = logits.argmax(axis=1) == expected.argmax(axis=1)
    return int(is_clear.sum()), int((is_clear & is_same).sum())


def _check_activation(logits: Floats, reference: Reference, differences: Floats) -> None:
    """Refuses the tanh form of GELU for the erf form, even where they differ by little."""
    if reference.tanh_logits is None:
        return
    scale = np.abs(reference.logits).max()
    from_tanh = np.abs(logits - reference.tanh_logits).max(axis=1) / scale
    # Medians, because a router in a tie can send any image either way.
    if np.median(from_tanh) < np.median(differences) / 10:
        found = float(differences.max())
        raise ActivationError(
            "the experts were trained with the erf form of GELU, but the MoE operator of this "
            f"runtime computes the tanh form: logits differ by up to {found:.1e} of the largest; "
            "export with --target cpu, train with act_layer: gelu_tanh, or accept it with "
            f"--tolerance {_round_up(found)}"
        )


def _difference(
    logits: Floats, reference: Reference, differences: Floats, allowed: float
) -> ParityError:
    worst = int(np.nan_to_num(differences, nan=np.inf).argmax())
    return ParityError(
        f"logits of the file differ from PyTorch's by {differences[worst]:.1e} of the largest, "
        f"more than {allowed:.1e}; first at image {worst}, class "
        f"{int(np.abs(logits[worst] - reference.logits[worst]).argmax())}"
    )


def _round_up(value: float) -> str:
    """Twice the value, with one digit: a tolerance that leaves room for other images."""
    return f"{2 * value:.0e}"


def _run_file(session: Any, reference: Reference) -> Floats:
    parts = []
    for part in _batches(reference.images):
        logits = run_session(session, part)
        expected = (len(part), reference.logits.shape[1])
        if logits.shape != expected or logits.dtype != np.float32:
            raise InterfaceError(
                f"a batch of {len(part)} images gave {logits.dtype} {logits.shape}, expected "
                f"float32 {expected}"
            )
        parts.append(logits)
    return np.concatenate(parts)


def _batches(images: Floats) -> Iterator[Floats]:
    start = 0
    sizes = iter(BATCH_SIZES)
    while start < len(images):
        size = next(sizes, BATCH_SIZES[-1])
        yield images[start : start + size]
        start += size


@torch.inference_mode()
def _run(model: nn.Module, images: Floats) -> tuple[Floats, Floats]:
    """Logits [B, C] and the smallest router margins [B]."""
    margins: list[npt.NDArray[np.float32]] = []
    with _recorded_margins(model) as recorded:
        logits = []
        for part in _batches(images):
            recorded.clear()
            logits.append(model(torch.from_numpy(part)).numpy())
            no_router = torch.full((len(part),), torch.inf)
            margins.append(torch.stack([no_router, *recorded]).amin(dim=0).numpy())
    return np.concatenate(logits), np.concatenate(margins)


@contextmanager
def _recorded_margins(model: nn.Module) -> Iterator[list[torch.Tensor]]:
    """Collects, for every MoE layer that runs, the smallest margin of each image, [B]."""
    recorded: list[torch.Tensor] = []

    def record(layer: MoEMlp, args: tuple[torch.Tensor, ...]) -> None:
        tokens_BTD = args[0]
        if layer.num_selected == layer.num_experts:
            return
        logits_TE, _ = layer._logits(tokens_BTD.flatten(0, 1))
        ordered = logits_TE.sort(dim=1, descending=True).values
        margin_T = ordered[:, layer.num_selected - 1] - ordered[:, layer.num_selected]
        recorded.append(margin_T.view(tokens_BTD.shape[:2]).amin(dim=1))

    hooks = [layer.register_forward_pre_hook(record) for layer in moe_layers(model).values()]
    try:
        yield recorded
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _tanh_experts(model: nn.Module) -> Iterator[None]:
    changed = [layer for layer in moe_layers(model).values() if layer.activation == "gelu"]
    for layer in changed:
        layer.activation = "gelu_tanh"
    try:
        yield
    finally:
        for layer in changed:
            layer.activation = "gelu"
