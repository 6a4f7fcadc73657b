"""Pictures of a circuit, and of its statistics over training. Letters: U receivers, V senders."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from m2mkd.models.checkpoint import write_failure
from m2mkd.nn.circuit_statistics import circuit_statistics, num_inputs
from m2mkd.ops import Circuit

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_INPUT, _OWN = "#d95f02", "#1f4e79"
# More lines than these would be one grey patch.
_DRAWN_EDGES = 30_000


def plot_circuit(circuit: Circuit, path: Path, title: str = "Circuit") -> None:
    """Draws a propagator's circuit: its adjacency, its degrees and a layout of its receivers.

    Args:
        circuit: U receivers by V senders: V - U inputs, then the receivers themselves.
        path: File to write; its ending says whether PNG, PDF or SVG.
        title: First line above the picture.

    Raises:
        ShapeError: Fewer senders than receivers.
        CheckpointError: The file cannot be written.
    """
    figure = _figure(14, 5)
    figure.suptitle(f"{title}\n{_caption(circuit)}", fontsize=11)
    adjacency, degrees, layout = figure.subplots(1, 3, width_ratios=(1.2, 0.9, 1))
    mask_UV = circuit.to_dense().cpu()
    outside = num_inputs(circuit)
    _draw_adjacency(adjacency, mask_UV, outside)
    _draw_degrees(degrees, mask_UV, outside)
    _draw_layout(layout, mask_UV[:, outside:])
    _save(figure, path)


def plot_circuit_history(lines: Sequence[dict[str, Any]], path: Path) -> None:
    """Draws how a circuit changed over training.

    Args:
        lines: Of metrics.jsonl; those with `validation.circuit`, which holds what
            `circuit_statistics` returned after an epoch, are drawn.
        path: File to write; it is not where there are none.

    Raises:
        CheckpointError: The file cannot be written.
    """
    from matplotlib.ticker import MaxNLocator

    found = [
        (line["epoch"] + 1, line["validation"]["circuit"])
        for line in lines
        if "circuit" in line.get("validation", {})
    ]
    if not found:
        return
    epochs = [epoch for epoch, _ in found]
    figure = _figure(14, 3.6)
    panels = {
        "edges / pairs": ("density",),
        "senders per receiver": ("degree_min", "degree_mean", "degree_max"),
        "share": ("clustering", "reciprocity", "hub_share"),
        "count": ("components", "isolated", "self_only", "unheard"),
    }
    for axes, (label, names) in zip(figure.subplots(1, 4), panels.items(), strict=True):
        highest = max(statistics[name] for _, statistics in found for name in names)
        for name in names:
            values = [statistics[name] for _, statistics in found]
            axes.plot(epochs, values, marker=".", label=name.replace("_", " "))
        axes.set(xlabel="epoch", ylabel=label, ylim=(0, 1.1 * highest or 1))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=9)
    _save(figure, path)


def _caption(circuit: Circuit) -> str:
    numbers = circuit_statistics(circuit)
    inputs = f" and {numbers['inputs']} inputs" if numbers["inputs"] else ""
    return (
        f"{numbers['receivers']} modules{inputs}, {numbers['edges']:,} edges "
        f"(density {numbers['density']:.3f}), components {numbers['components']}, "
        f"clustering {numbers['clustering']:.2f}, reciprocity {numbers['reciprocity']:.2f}, "
        f"isolated {numbers['isolated']}, hear only themselves {numbers['self_only']}"
    )


def _draw_adjacency(axes: "Axes", mask_UV: Tensor, outside: int) -> None:
    """One square per pair; inputs' columns in their own colour."""
    from matplotlib.colors import ListedColormap

    shade_UV = mask_UV.to(torch.uint8)
    shade_UV[:, :outside] *= 2
    colours = ListedColormap(["white", _OWN, _INPUT])
    axes.imshow(
        shade_UV.numpy(), cmap=colours, vmin=0, vmax=2, interpolation="nearest", aspect="equal"
    )
    label = "sender (inputs, then modules)" if outside else "sender"
    axes.set(xlabel=label, ylabel="receiver", title="Adjacency")
    if outside:
        axes.axvline(outside - 0.5, color="grey", linewidth=0.8)


def _draw_degrees(axes: "Axes", mask_UV: Tensor, outside: int) -> None:
    """How many senders receivers have, and how many receivers inputs have."""
    from matplotlib.ticker import MaxNLocator

    receivers, inputs = mask_UV.sum(dim=1).tolist(), mask_UV[:, :outside].sum(dim=0).tolist()
    low, high = min(receivers + inputs, default=0), max(receivers + inputs, default=0)
    step = -(-(high - low + 1) // 40)
    bins = [low - 0.5 + step * i for i in range((high - low) // step + 2)]
    axes.hist(receivers, bins=bins, color=_OWN, label="senders of a module")
    if outside:
        label = "receivers of an input"
        axes.hist(inputs, bins=bins, histtype="step", color=_INPUT, linewidth=1.6, label=label)
    mean = sum(receivers) / max(1, len(receivers))
    axes.axvline(mean, ymax=0.8, color="grey", linestyle="--", label=f"mean of modules {mean:.1f}")
    axes.set(xlabel="degree", ylabel="count", title="Degrees")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    # Room for the legend above the bars.
    axes.set_ylim(top=1.25 * axes.get_ylim()[1])
    axes.legend(frameon=False, fontsize=9, loc="upper right")


def _draw_layout(axes: "Axes", linked_UU: Tensor) -> None:
    """Receivers placed by their links, larger and darker with their degree."""
    from matplotlib.collections import LineCollection

    linked_UU = (linked_UU | linked_UU.T).fill_diagonal_(False)
    degree_U = linked_UU.sum(dim=1)
    place_U2 = layout(linked_UU)
    edges_M2 = linked_UU.triu().nonzero()
    if len(edges_M2) > _DRAWN_EDGES:
        generator = torch.Generator().manual_seed(0)
        edges_M2 = edges_M2[torch.randperm(len(edges_M2), generator=generator)[:_DRAWN_EDGES]]
    if len(edges_M2):
        lines = list(place_U2[edges_M2].numpy())
        ink = _ink(linked_UU, edges_M2).numpy()
        axes.add_collection(
            LineCollection(lines, colors="black", linewidths=0.5, alpha=ink, rasterized=True)
        )
    share_U = degree_U / degree_U.max().clamp_min(1)
    size_U = min(160.0, 9000 / max(1, len(degree_U))) * (0.3 + 0.7 * share_U)
    # Without the palest third of the colours.
    across_U, up_U = place_U2.numpy().T
    axes.scatter(
        across_U,
        up_U,
        s=size_U.numpy(),
        c=(0.35 + 0.65 * share_U).numpy(),
        cmap="YlGnBu",
        vmin=0,
        vmax=1,
        edgecolors="white",
        linewidths=0.3,
        zorder=3,
    )
    axes.set_aspect("equal")
    axes.axis("off")
    all_links = int(degree_U.sum()) // 2
    drawn = f" ({_DRAWN_EDGES:,} of {all_links:,} links)" if all_links > _DRAWN_EDGES else ""
    axes.set_title(f"Modules by their links{drawn}")


def _ink(linked_UU: Tensor, edges_M2: Tensor) -> Tensor:
    """Opacity of each drawn link: less the more there are, more for links between clusters.

    A link between clusters joins nodes with few common neighbours.
    """
    links_UU = linked_UU.float()
    first, second = edges_M2.unbind(1)
    common_M = (links_UU @ links_UU)[first, second]
    degree_U = links_UU.sum(dim=1)
    overlap_M = (common_M + 0.1) / torch.minimum(degree_U[first], degree_U[second])
    ink = min(0.4, 300 / max(1, len(edges_M2)))
    return (ink * overlap_M.mean() / overlap_M).clamp(0.012, 0.4)


def layout(linked_UU: Tensor, steps: int = 100) -> Tensor:
    """Places nodes such that links are short and clusters stand apart.

    The force model of LinLog with repulsion between edges (Noack, arXiv 0807.4052), whose optima
    separate clusters of high modularity: a link pulls with a constant force, any two nodes push
    each other with the product of their degrees over their distance. It begins with the leading
    eigenvectors of the normalised adjacency, so that the result does not depend on luck.

    Args:
        linked_UU: Links, [U, U], bool, symmetric, without a diagonal.
        steps: How often every node moves, by ever less.

    Returns:
        Places, [U, 2], float32.
    """
    num = linked_UU.shape[0]
    links_UU = linked_UU.float()
    # A node without links also has some weight, or it would never come to rest.
    weight_U1 = links_UU.sum(dim=1, keepdim=True) + 1
    push_UU = weight_U1 * weight_U1.T / weight_U1.sum()
    place_U2 = torch.randn(num, 2, generator=torch.Generator().manual_seed(0))
    if num > 3:
        scale_U1 = weight_U1.rsqrt()
        _, vectors = torch.linalg.eigh(scale_U1 * links_UU * scale_U1.T)
        leading_U2 = vectors[:, -3:-1] * scale_U1
        place_U2 = leading_U2 / leading_U2.std(dim=0).clamp_min(1e-6) + 0.1 * place_U2
    for step in range(steps):
        distance_UU = torch.cdist(place_U2, place_U2).clamp_min_(1e-3)
        force_UU = push_UU / distance_UU.square() - links_UU / distance_UU
        move_U2 = (force_UU.sum(1, keepdim=True) * place_U2 - force_UU @ place_U2) / weight_U1
        length_U1 = move_U2.norm(dim=1, keepdim=True).clamp_min(1e-9)
        longest = 0.3 * (1 - step / steps) * place_U2.std()
        place_U2 = place_U2 + move_U2 * (longest / length_U1).clamp_max(1)
    return place_U2


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: "Figure", path: Path) -> None:
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise write_failure(path, error) from error
