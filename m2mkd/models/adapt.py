"""Published weights for images of another size or other classes: only where the user says how."""

from typing import Literal, get_args

from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from m2mkd.errors import ConfigError

GridChoice = Literal["keep", "resize", "reset"]
ClassifierChoice = Literal["keep", "reset"]

POSITIONS = ("tokenizer.grid", "pos_embed")
# Names of classifiers in our networks, with their weights' and biases' own.
_CLASSIFIERS = ("pooling.classifier.", "read_out.head.", "head.")


def adapt(
    place: str,
    tensor: Tensor,
    module: nn.Module,
    *,
    grid: GridChoice = "keep",
    classifier: ClassifierChoice = "keep",
) -> Tensor | None:
    """A published tensor as it goes into a network, or None where the network keeps its own.

    Args:
        place: Our name.
        tensor: The published values.
        module: The network.
        grid: Of positions: `keep` takes them as they are, `resize` interpolates between them for
            another number of places, `reset` starts afresh.
        classifier: `keep`, or `reset` to start afresh.

    Raises:
        ConfigError: An unknown choice.
    """
    check_choice("grid", grid, get_args(GridChoice))
    check_choice("classifier", classifier, get_args(ClassifierChoice))
    if place in POSITIONS and grid == "reset":
        return None
    if place.startswith(_CLASSIFIERS) and classifier == "reset":
        return None
    if place not in POSITIONS or grid != "resize":
        return tensor
    own = module.get_parameter(place)
    if own.shape == tensor.shape:
        return tensor
    if place == "tokenizer.grid":
        return resize_grid(tensor, (own.shape[1], own.shape[2]))
    assert isinstance(module, VisionTransformer)
    count = 0 if module.no_embed_class else module.num_prefix_tokens
    resized: Tensor = resample_abs_pos_embed(
        tensor, list(module.patch_embed.grid_size), num_prefix_tokens=count
    )
    return resized


def resize_grid(grid_GHW: Tensor, size: tuple[int, int]) -> Tensor:
    """Positions [G, H, W] for another number of places, interpolated between their neighbours."""
    resized: Tensor = F.interpolate(grid_GHW[None], size, mode="bicubic", antialias=True)[0]
    return resized


def hint(place: str) -> str:
    """What to do about a tensor of another shape, for error messages."""
    if place in POSITIONS:
        return " (images of another size: choose grid resize or reset)"
    if place.startswith(_CLASSIFIERS):
        return " (other classes: choose classifier reset)"
    return ""


def check_choice(name: str, value: str, known: tuple[str, ...]) -> None:
    """Raises ConfigError unless the value is known."""
    if value not in known:
        raise ConfigError(f"{name}={value!r} is none of {', '.join(known)}")
