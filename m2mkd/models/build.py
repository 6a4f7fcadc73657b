"""Creating the three networks of a run by name, through timm's registry.

Students, teachers and meta models are all timm vision transformers; ours are registered by
importing this package.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import adapt_input_conv, load_state_dict
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor

from m2mkd.errors import CheckpointError, ConfigError, did_you_mean, first_line
from m2mkd.models import vmoe as _vmoe  # noqa: F401  (registers students)
from m2mkd.models.nac import NAC
from m2mkd.models.stages import balanced_depths, check_depths, cut_evenly, split_vit

DEFAULT_MODULES = 4
_FAMILIES = "timm's VisionTransformer family (vit_*, deit_*, deit3_*, vmoe_*)"


def create_network(
    name: str,
    model_args: dict[str, Any],
    *,
    num_classes: int,
    image_size: int,
    channels: int,
    drop_path: float = 0.0,
    **extra: Any,
) -> VisionTransformer | NAC:
    """Creates a freshly initialised network: a vision transformer or a NAC.

    Args:
        name: A timm model name.
        model_args: The user's arguments for `timm.create_model`.
        num_classes: Outputs of the head.
        image_size: Height and width of the images, in pixels.
        channels: Channels of the images.
        drop_path: Stochastic depth rate.
        extra: Arguments set by us, which win over the user's.

    Raises:
        ConfigError: Unknown model, arguments it does not take, or of another kind.
    """
    args = {
        **model_args,
        "num_classes": num_classes,
        "img_size": image_size,
        "in_chans": channels,
        "drop_path_rate": drop_path,
        **extra,
    }
    if not timm.is_model(name):
        known = [n for kind in ("vit_*", "deit*", "vmoe_*", "nac*") for n in timm.list_models(kind)]
        raise ConfigError(f"timm has no model '{name}'{did_you_mean(name, known)}")
    try:
        model = timm.create_model(name, **args)
    except (TypeError, AssertionError, LookupError, ZeroDivisionError, RuntimeError) as error:
        reason = f"no {error}" if isinstance(error, LookupError) else str(error)
        raise ConfigError(
            f"model {name} cannot be built with {model_args}: {reason}; it must be one of "
            f"{_FAMILIES}, or a nac_*"
        ) from None
    if not isinstance(model, (VisionTransformer, NAC)):
        raise ConfigError(
            f"model {name} is a {type(model).__name__}; modules are cut from {_FAMILIES}, and nac_*"
        )
    if isinstance(model, VisionTransformer) and model.patch_embed.num_patches == 0:
        raise ConfigError(
            f"model {name} has patches of {model.patch_embed.patch_size[0]} pixels, more than "
            f"images of {image_size} have; set patch_size in its model_args, or data.image_size"
        )
    return model


def create_vit(name: str, model_args: dict[str, Any], **shape: Any) -> VisionTransformer:
    """`create_network` for places that only a vision transformer can take.

    Raises:
        ConfigError: As `create_network`, or a NAC.
    """
    model = create_network(name, model_args, **shape)
    if not isinstance(model, VisionTransformer):
        raise ConfigError(
            f"model {name} is a {type(model).__name__}; modules are cut from {_FAMILIES}"
        )
    return model


def load_pretrained_vit(
    name: str,
    model_args: dict[str, Any],
    *,
    num_classes: int,
    image_size: int,
    channels: int,
    checkpoint: Path | None,
    drop_path: float = 0.0,
    will_train: bool = True,
) -> VisionTransformer:
    """Creates a ViT with published weights, from the hub or a local file.

    What differs is adapted as timm does: positions are resampled to the image size, the patch
    embedding to the channels, and a head for another number of classes starts afresh.

    Args:
        checkpoint: A .safetensors or .pth file; None takes the weights from the hub.
        will_train: Whether the network is trained before it is used; if not, a fresh head is an
            error.

    Raises:
        CheckpointError: The file is missing, corrupt or of another model; the hub gives nothing.
        ConfigError: The head would be fresh and never trained.
    """
    shape: dict[str, Any] = {
        "num_classes": num_classes,
        "image_size": image_size,
        "channels": channels,
        "drop_path": drop_path,
    }
    if checkpoint is not None:
        model = create_vit(name, model_args, **shape)
        weights = read_weights(model, checkpoint, setting="teacher.checkpoint")
        has_head = place_weights(model, weights, source=f"teacher.checkpoint {checkpoint}")
        _check_head(name, has_head or will_train, num_classes)
        return model
    published = timm.get_pretrained_cfg(name)
    has_head = published is not None and published.num_classes == num_classes
    _check_head(name, has_head or will_train, num_classes)
    try:
        return create_vit(name, model_args, pretrained=True, **shape)
    except ConfigError:
        raise
    except Exception as error:  # hub clients raise many unrelated types
        raise CheckpointError(
            f"cannot load weights of {name} from the hub: {first_line(error)}; without network "
            "access, name a local file in teacher.checkpoint"
        ) from error


def _check_head(name: str, is_usable: bool, num_classes: int) -> None:
    if not is_usable:
        raise ConfigError(
            f"the weights of teacher {name} have no head for {num_classes} classes, so its "
            "predictions would be noise; set teacher.finetune to train one"
        )


def read_weights(model: VisionTransformer, path: Path, *, setting: str) -> dict[str, Tensor]:
    """Reads a .safetensors or .pth file of a ViT and adapts it to a model's images, as timm does.

    Args:
        model: Where the weights shall go.
        path: The file.
        setting: The recipe key that named it.

    Raises:
        CheckpointError: It is missing, corrupt or no ViT.
    """
    if not path.is_file():
        raise CheckpointError(f"{setting} {path} does not exist")
    try:
        weights: dict[str, Tensor] = checkpoint_filter_fn(
            load_state_dict(str(path), weights_only=True), model
        )
    except Exception as error:  # unpicklers and safetensors raise many unrelated types
        reason = f"{type(error).__name__}: {first_line(error)[:200]}"
        raise CheckpointError(
            f"{setting} {path} is not a readable ViT checkpoint ({reason}); it must be whole, and "
            "hold tensors by name, as torch.save(model.state_dict(), ...) writes them"
        ) from error
    stem = "patch_embed.proj.weight"
    if stem not in weights:
        there = ", ".join(map(str, list(weights)[:3])) or "nothing"
        raise CheckpointError(
            f"{setting} {path} has no {stem}, as timm's ViTs do; it starts with {there}; take a "
            "file that timm wrote, of a ViT"
        )
    if odd := [name for name, weight in weights.items() if not weight.isfinite().all()]:
        raise CheckpointError(f"{setting} {path} holds NaN or infinite values, in {odd[0]}")
    weights[stem] = adapt_input_conv(model.in_chans, weights[stem])
    return weights


def place_weights(
    model: VisionTransformer,
    weights: dict[str, Tensor],
    *,
    source: str,
    fresh: Sequence[str] = (),
) -> bool:
    """Loads weights into a model, except a head for other classes; all else has to fit.

    Args:
        model: It is changed.
        weights: By the model's names.
        source: Where they came from, for messages.
        fresh: Parts of the names that may be missing, besides the head.

    Returns:
        Whether the head fitted.

    Raises:
        CheckpointError: Weights that have no place, are missing or of other shapes.
    """
    head = {name for name in weights if name.startswith("head.")}
    own = model.state_dict()
    if any(name not in own or own[name].shape != weights[name].shape for name in head):
        weights = {name: w for name, w in weights.items() if name not in head}
    try:
        missing, unplaced = model.load_state_dict(weights, strict=False)
    except RuntimeError as error:
        detail = " ".join(str(error).split())[:300]
        message = f"{source} does not fit the model and its model_args: {detail}"
        raise CheckpointError(message) from None
    problems = [f"no place for {name}" for name in unplaced]
    problems += [
        f"{name} is missing"
        for name in missing
        if not name.startswith("head.") and not any(part in name for part in fresh)
    ]
    if problems:
        raise CheckpointError(f"{source} does not fit the model: {'; '.join(problems[:5])}")
    return not any(name.startswith("head.") for name in missing)


def create_meta(
    name: str,
    model_args: dict[str, Any],
    *,
    num_modules: int,
    num_classes: int,
    image_size: int,
    channels: int,
    drop_path: float = 0.0,
) -> VisionTransformer:
    """Creates the meta model: the teacher's architecture with one block per module.

    m2mKD section 3 (arXiv 2402.16918), after Deep Incubation (arXiv 2212.04129).
    """
    return create_vit(
        name,
        model_args,
        num_classes=num_classes,
        image_size=image_size,
        channels=channels,
        drop_path=drop_path,
        depth=num_modules,
    )


@torch.no_grad()
def start_as_teacher(
    meta: VisionTransformer, teacher: VisionTransformer, depths: Sequence[int]
) -> None:
    """Gives the meta model the teacher's input and output parts, and one block of each module.

    It is the first block with the same tensors: in a V-MoE teacher, the meta model's block
    may have experts where the module's first has none. Without such a block it stays as it was.

    Args:
        meta: The teacher's architecture with one block per module; it is changed.
        teacher: The teacher.
        depths: Its blocks per module.
    """
    own_stages, teacher_stages = split_vit(meta, [1] * len(depths)), split_vit(teacher, depths)
    for own, theirs, depth in zip(own_stages, teacher_stages, depths, strict=True):
        own.load_state_dict(_matching(own.state_dict(), theirs.state_dict(), depth))


def _matching(
    own: dict[str, Tensor], theirs: dict[str, Tensor], num_blocks: int
) -> dict[str, Tensor]:
    """What a stage of one block takes from one of several; its own where nothing fits the block."""
    block = [name for name in own if name.startswith("blocks.0.")]
    found = {name: theirs[name] for name in own if name not in block}
    for i in range(num_blocks):
        names = {name: name.replace("blocks.0.", f"blocks.{i}.", 1) for name in block}
        if all(n in theirs and theirs[n].shape == own[name].shape for name, n in names.items()):
            return found | {name: theirs[n] for name, n in names.items()}
    return found | {name: own[name] for name in block}


def resolve_depths(
    depths: list[int] | str,
    num_blocks: int,
    *,
    what: str,
    num_modules: int | None = None,
    costs: Sequence[float] | None = None,
) -> list[int]:
    """Returns the blocks per module; `auto` cuts evenly into the given number (default 4).

    Args:
        depths: What the recipe says.
        num_blocks: Blocks of the model.
        what: Its recipe key.
        num_modules: As many as the other network has.
        costs: Of each block, for `auto` to balance; None counts blocks.

    Raises:
        ConfigError: Depths that do not fit the model, or not `num_modules` of them.
    """
    if isinstance(depths, str):
        count = num_modules or min(DEFAULT_MODULES, num_blocks)
        if count > num_blocks:
            raise ConfigError(
                f"{what} auto: {count} modules need at least as many blocks, but this model has "
                f"{num_blocks}; give it more, or set teacher.depths and student.depths"
            )
        return balanced_depths(num_blocks, count) if costs is None else cut_evenly(costs, count)
    check_depths(depths, num_blocks, what=what)
    if num_modules is not None and len(depths) != num_modules:
        raise ConfigError(
            f"{what} {depths} has {len(depths)} modules, but the teacher is cut into "
            f"{num_modules}; each student module learns from one teacher module"
        )
    return depths
