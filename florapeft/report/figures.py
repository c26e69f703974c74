"""The figures: matplotlib's, as SVG that takes its colours from the page, or as PNG by themselves.

A figure is drawn in colours that stand for roles; in SVG they become CSS custom properties, in PNG the light theme's.
One unit of length is one CSS pixel.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from xml.etree import ElementTree

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator, PercentFormatter
from torch import Tensor

from florapeft.report.measure import Filter
from florapeft.report.run import Curve, Method

# By role: for light and for dark. ramp-0 … ramp-7 go from weak to strong.
THEME = {
    "paper": ("#ffffff", "#14181d"),
    "ink": ("#1c2329", "#e4e8ec"),
    "muted": ("#65707b", "#93a0ac"),
    "line": ("#dfe3e7", "#2c343c"),
    "series-0": ("#2f6fb7", "#6aaaf0"),
    "series-1": ("#cf6a1e", "#f09a52"),
    "series-2": ("#23866a", "#4fc3a1"),
    "series-3": ("#8d4fa8", "#c48be0"),
    "series-4": ("#8f7a13", "#d3bb4a"),
    "ramp-0": ("#eaf1f9", "#1b2733"),
    "ramp-1": ("#d3e3f3", "#1f3449"),
    "ramp-2": ("#b3cfe9", "#244564"),
    "ramp-3": ("#8cb5dc", "#2a547b"),
    "ramp-4": ("#6298cc", "#2f6899"),
    "ramp-5": ("#3a75b2", "#5596d2"),
    "ramp-6": ("#275f9c", "#7db3e6"),
    "ramp-7": ("#16437a", "#b4d7f7"),
}
SERIES = [role for role in THEME if role.startswith("series")]
RAMP = [role for role in THEME if role.startswith("ramp")]
POSITIVE, NEGATIVE = (0.23, 0.50, 0.78), (0.88, 0.48, 0.16)  # of taps; their size is the opacity, on any paper
WIDTH = 340
_NUMBERED = 49  # taps up to which each has its number written in it

_STYLE = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # names come from files; a $ in them is a dollar
    "font.family": "sans-serif",
    "font.size": 11,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "ytick.minor.size": 0,
    "xtick.minor.size": 0,
    "path.simplify_threshold": 0.5,
}
_SVG = "{http://www.w3.org/2000/svg}"  # the name of the format
_LOOKS = ("fill", "stroke", "stroke-width", "opacity", "fill-opacity", "stroke-opacity", "text-anchor")
# What most shapes look like; the page says it once.
USUAL = {
    "text": {"fill": "var(--muted)", "text-anchor": "middle", "font-size": "10.5px"},
    "path": {"fill": "none", "stroke": "var(--line)", "stroke-width": "0.8"},
}
# One colour per role, which no figure has by chance.
_STANDS_FOR = {role: f"#00f{number:03x}" for number, role in enumerate(THEME)}
_ROLE_OF = {color: f"var(--{role})" for role, color in _STANDS_FOR.items()}


class Drawing:
    """A figure before it is drawn: the same call makes it for the page and for a file."""

    def __init__(self, width: float, height: float, draw: Callable[..., None], *arguments: object) -> None:
        self.width, self.height, self.draw, self.arguments = width, height, draw, arguments

    def svg(self) -> str:
        """One `<svg>` element for a page that has the styles `USUAL`; its colours are `var(--role)`, it has no ids."""
        file = io.StringIO()
        with matplotlib.rc_context(_STYLE):
            self._figure(_STANDS_FOR).savefig(file, format="svg", transparent=True, metadata={"Date": None})
        return _for_page(file.getvalue(), self.width, self.height)

    def png(self, path: Path) -> None:
        """Writes the figure in the light theme, at twice the screen's resolution."""
        with matplotlib.rc_context(_STYLE):
            figure = self._figure({role: light for role, (light, _) in THEME.items()})
            figure.savefig(path, format="png", dpi=144, facecolor=THEME["paper"][0])

    def _figure(self, colors: dict[str, str]) -> Figure:
        roles = ("ink", "text.color"), ("muted", "xtick.color"), ("muted", "ytick.color"), ("line", "axes.edgecolor")
        with matplotlib.rc_context({parameter: colors[role] for role, parameter in roles}):
            figure = Figure(figsize=(self.width / 72, self.height / 72))
            self.draw(figure, colors, *self.arguments)
        return figure


def spectra(modes: Sequence[str], energies: Sequence[Tensor]) -> Drawing:
    """Singular values of every mode's unfolding, relative to the first, and the share of the energy that those keep.

    Args:
        modes: a name for each mode; the two of a matrix have the same singular values, and share a line.
        energies: for each mode the squared singular values, descending; not all zero.
    """
    if len(modes) == 2:
        modes, energies = [" and ".join(modes)], energies[:1]
    return Drawing(WIDTH, 176, _draw_spectra, modes, [values.numpy() for values in energies])


def _draw_spectra(figure: Figure, colors: dict[str, str], modes: Sequence[str], energies: list) -> None:
    left, right = (_axes(figure, colors, x, 46, 134, 106) for x in (34, 204))
    for number, (mode, squares) in enumerate(zip(modes, energies, strict=True)):
        color = colors[SERIES[number % len(SERIES)]]
        sizes, shares, steps = np.sqrt(squares), squares.cumsum() / squares.sum(), np.arange(1, len(squares) + 1)
        marker = {"marker": "o", "markersize": 3} if len(sizes) <= 8 else {}
        visible = sizes > sizes[0] * 1e-6
        left.plot(
            steps[visible], sizes[visible] / sizes[0], color=color, label=mode, linewidth=1.6, clip_on=False, **marker
        )
        right.plot(steps, shares, color=color, linewidth=1.6, clip_on=False, **marker)
    left.set_yscale("log")
    bottom = min(left.get_ylim()[0], 0.09)
    left.set_ylim(bottom, 1)
    exponents = np.arange(0, np.floor(np.log10(bottom)), -1 if bottom > 1e-4 else -2)
    left.set_yticks(10.0**exponents, ["1" if e == 0 else f"{10.0**e:g}" for e in exponents])
    left.set_yticks([], minor=True)
    right.set_ylim(0, 1)
    right.yaxis.set_major_formatter(PercentFormatter(1.0))
    right.set_yticks([0, 0.5, 0.9, 1], ["0%", "50%", "90%", ""])
    for axes, title in ((left, "singular values"), (right, "energy kept")):
        axes.set_title(title, loc="left", fontsize=11.5, color=colors["muted"], pad=9)
        axes.set_xlim(0.9, max(map(len, energies)) + 0.1)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    _legend(figure, *left.get_legend_handles_labels())


def kernel(taps: Tensor) -> Drawing:
    """Root mean square of dW at every tap of the kernel; a 3-D kernel's slices along its first axis side by side."""
    slices = _slices(taps.numpy())
    rows, columns = slices[0].shape
    cell = min(30.0, (WIDTH - 8 * len(slices)) / (columns * len(slices)))
    return Drawing(
        (cell * columns + 8) * len(slices), cell * rows + (14 if len(slices) > 1 else 2), _draw_kernel, slices, cell
    )


def _draw_kernel(figure: Figure, colors: dict[str, str], slices: list[np.ndarray], cell: float) -> None:
    top = max(part.max() for part in slices) or 1.0
    columns = slices[0].shape[1]
    for number, part in enumerate(slices):
        axes = _picture(figure, number * (cell * columns + 8) + 1, 1, part / top, cell, colors["line"])
        if len(slices) > 1:
            axes.set_title(f"{number + 1} of {len(slices)}", fontsize=9, color=colors["muted"], pad=2)
        if cell >= 22 and part.size * len(slices) <= _NUMBERED:
            for (row, column), value in np.ndenumerate(part / top):
                axes.text(column, row, f"{value:.2f}".lstrip("0"), ha="center", va="center", fontsize=9)


def filters(strongest: Sequence[Filter]) -> Drawing:
    """Leading spatial patterns of the strongest output filters; blue adds, orange takes away."""
    parts = [(found.index, _slices(found.pattern.numpy())) for found in strongest]
    rows, columns = parts[0][1][0].shape
    count = len(parts[0][1])
    space = WIDTH / max(4, len(parts)) - 6
    cell = min(24.0, space / (columns * count), 72 / rows if rows <= 72 else 1)
    return Drawing(WIDTH, cell * rows + 18, _draw_filters, parts, cell, space)


def _draw_filters(figure: Figure, colors: dict[str, str], parts: list, cell: float, space: float) -> None:
    for number, (index, slices) in enumerate(parts):
        top = max(np.abs(part).max() for part in slices) or 1.0
        for place, part in enumerate(slices):
            x = number * (space + 6) + place * (cell * part.shape[1] + 2) + 1
            axes = _picture(figure, x, 1, part / top, cell, colors["line"])
            if place == 0:
                axes.set_title(f"{index}", fontsize=9, color=colors["muted"], pad=3, loc="left")


def curves(found: Sequence[Curve]) -> list[Drawing]:
    """One figure per quantity of a training; the two losses share one."""
    losses = [curve for curve in found if "loss" in curve.metric]
    rest = [curve for curve in found if "loss" not in curve.metric]
    return [Drawing(WIDTH, 210, _draw_curves, group) for group in (losses, rest) if group]


def _draw_curves(figure: Figure, colors: dict[str, str], found: Sequence[Curve]) -> None:
    axes = _axes(figure, colors, 34, 56, WIDTH - 46, 128)
    role = _roles(curve.label or curve.metric for curve in found)
    for curve in found:
        name = curve.label or curve.metric
        marker = {"marker": "o", "markersize": 3} if len(curve.steps) <= 12 else {}
        color = colors[role[name]]
        axes.plot(curve.steps, curve.values, color=color, linewidth=1.5, label=name, **marker)
    metrics = {curve.metric for curve in found}
    axes.set_title(metrics.pop() if len(metrics) == 1 else "loss", loc="left", fontsize=11.5, color=colors["muted"])
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.set_xlabel("step", fontsize=11.5, color=colors["muted"], loc="right", labelpad=1)
    handles = {line.get_label(): line for line in axes.lines}
    _legend(figure, handles.values(), handles.keys())


def comparison(metric: str, methods: Sequence[Method]) -> Drawing:
    """The figure of every seed as a dot, their mean as a line, for every method."""
    return Drawing(WIDTH, 50 + 32 * len(methods), _draw_comparison, metric, methods)


def _draw_comparison(figure: Figure, colors: dict[str, str], metric: str, methods: Sequence[Method]) -> None:
    axes = _axes(figure, colors, 112, 24, WIDTH - 126, 32 * len(methods))
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", color=colors["line"], linewidth=0.8)
    role = _roles(method.label for method in methods)
    for row, method in enumerate(methods):
        color = colors[role[method.label]]
        seeds = list(method.values.values()) or [method.mean]
        axes.plot(seeds, [row] * len(seeds), "o", color=color, markersize=5, alpha=0.55, clip_on=False)
        axes.plot([method.mean] * 2, [row - 0.3, row + 0.3], color=color, linewidth=2, clip_on=False)
    axes.set_yticks(range(len(methods)), [_short(method.label, 19) for method in methods], color=colors["ink"])
    axes.set_ylim(len(methods) - 0.5, -0.5)
    axes.margins(x=0.06)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    if metric == "accuracy":
        low, high = axes.get_xlim()
        axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0 if high - low > 0.04 else 1))
    axes.set_title(f"{metric}, one dot per seed", loc="left", fontsize=11.5, color=colors["muted"])


def network(blocks: Sequence[tuple[str, Sequence[int | None]]], low: str, high: str) -> Drawing:
    """The map of the network, for a file: blocks as rows, a cell per weight with its step of the ramp.

    Args:
        blocks: the name of each block, and for each of its weights the step; None where it has no update.
        low: what the ramp's first step stands for.
        high: what its last one stands for.
    """
    widest = max(12, *(len(steps) for _, steps in blocks))
    return Drawing(180 + 24 * widest, 56 + 24 * len(blocks), _draw_network, blocks, widest, low, high)


def _draw_network(figure: Figure, colors: dict[str, str], blocks: Sequence, widest: int, low: str, high: str) -> None:
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.set_xlim(-180 / 24, widest)
    axes.set_ylim(len(blocks) + 46 / 24, -10 / 24)

    def cell(row: float, column: float, step: int | None) -> None:
        fill, edge = ("none", colors["line"]) if step is None else (colors[RAMP[step]],) * 2
        axes.add_patch(Rectangle((column + 0.06, row + 0.06), 0.88, 0.88, facecolor=fill, edgecolor=edge))

    for row, (name, steps) in enumerate(blocks):
        axes.text(-0.3, row + 0.5, _short(name, 26), ha="right", va="center")
        for column, step in enumerate(steps):
            cell(row, column, step)
    last = len(blocks) + 0.6
    axes.text(-0.3, last + 0.5, low, ha="right", va="center", color=colors["muted"])
    for step in range(len(RAMP)):
        cell(last, step, step)
    axes.text(len(RAMP) + 0.3, last + 0.5, high, ha="left", va="center", color=colors["muted"])


def _roles(names: Iterable[str]) -> dict[str, str]:
    """A colour by name, the same in every figure: the first for FLoRA, the others in their order."""
    ordered = sorted(dict.fromkeys(names), key=lambda name: "flora" not in name.lower())
    return {name: SERIES[place % len(SERIES)] for place, name in enumerate(ordered)}


def _legend(figure: Figure, lines: Iterable[Line2D], names: Iterable[str]) -> None:
    """A row of names at the lower edge, with as much room as the width leaves."""
    names = list(names)
    spacing = (
        {"handlelength": 1.2, "columnspacing": 1.2} if len(names) < 5 else {"handlelength": 0.7, "columnspacing": 0.7}
    )
    figure.legend(
        lines,
        names,
        loc="lower left",
        bbox_to_anchor=(0.0, -0.03),
        ncols=len(names),
        frameon=False,
        fontsize=11,
        handletextpad=0.5,
        **spacing,
    )


def _axes(figure: Figure, colors: dict[str, str], x: float, y: float, width: float, height: float) -> Axes:
    """Axes at a place in pixels from the lower left, with a light grid."""
    across, up = figure.get_size_inches() * 72
    axes = figure.add_axes((x / across, y / up, width / across, height / up))
    axes.grid(axis="y", color=colors["line"], linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines["left"].set_visible(False)
    axes.tick_params(labelsize=10.5)
    return axes


def _picture(figure: Figure, x: float, y: float, values: np.ndarray, cell: float, edge: str) -> Axes:
    """Values in [-1, 1] as cells, their sign as the hue and their size as the opacity."""
    across, up = figure.get_size_inches() * 72
    rows, columns = values.shape
    axes = figure.add_axes((x / across, y / up, cell * columns / across, cell * rows / up))
    rgba = np.empty((*values.shape, 4))
    rgba[..., :3] = np.where(values[..., None] >= 0, POSITIVE, NEGATIVE)
    rgba[..., 3] = np.abs(values) * 0.85
    axes.imshow(rgba, interpolation="none", aspect="auto")
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(True)
        spine.set_color(edge)
    return axes


def _slices(kernel: np.ndarray) -> list[np.ndarray]:
    """A kernel of any order as matrices: a row, one matrix, or one per place along its leading axes."""
    if kernel.ndim == 1:
        return [kernel[None]]
    return list(kernel.reshape(-1, *kernel.shape[-2:]))


def _short(text: str, length: int) -> str:
    return text if len(text) <= length else f"…{text[1 - length :]}"


def _for_page(text: str, width: float, height: float) -> str:
    """matplotlib's SVG, reduced to what an HTML page needs: no groups, no ids, nothing that is referred to."""
    root = ElementTree.fromstring(text)
    # A marker is a path that is used at many places; ours are all circles, whose paths begin at (0, radius).
    radii = {f"#{e.get('id')}": e.get("d", "").split()[2] for e in root.iter(f"{_SVG}path") if e.get("id")}
    page = ElementTree.Element(
        "svg", {"viewBox": f"0 0 {width:g} {height:g}", "style": f"width:{width:g}px", "aria-hidden": "true"}
    )
    page.extend(_shapes(root, radii))
    return ElementTree.tostring(page, encoding="unicode")


def _shapes(parent: ElementTree.Element, radii: dict[str, str]) -> Iterator[ElementTree.Element]:
    for element in parent:
        tag = element.tag.removeprefix(_SVG)
        given = {key.rpartition("}")[2]: value for key, value in element.attrib.items()}
        style = dict(part.split(": ", 1) for part in given.get("style", "").split("; ") if ": " in part)
        looks = {key: style[key] for key in _LOOKS if key in style}
        if tag == "g":
            yield from _shapes(element, radii)
        elif tag == "text":
            looks["font-size"] = re.search(r"[\d.]+px", style.get("font-size") or style["font"])[0]
            shape = _shape("text", looks, x=given["x"], y=given["y"])
            shape.text = element.text
            yield shape
        elif tag == "use":
            yield _shape("circle", looks, cx=given["x"], cy=given["y"], r=radii[given["href"]])
        elif tag == "path" and looks != {"fill": "none"}:
            yield _shape("path", looks, d=" ".join(given["d"].split()))
        elif tag == "image":
            place = {key: "".join(given[key].split(" ")) for key in ("href", "width", "height")}
            yield ElementTree.Element("image", {**place, "transform": given["transform"], "style": given["style"]})


def _shape(tag: str, looks: dict[str, str], **numbers: str) -> ElementTree.Element:
    """An element whose coordinates are given to a tenth of a pixel, with what is unusual of its looks."""
    shape = ElementTree.Element(tag, {key: re.sub(r"(\d+\.\d)\d+", r"\1", value) for key, value in numbers.items()})
    named = {key: _ROLE_OF.get(value, value) for key, value in looks.items()}
    if style := ";".join(f"{key}:{value}" for key, value in named.items() if USUAL.get(tag, {}).get(key) != value):
        shape.set("style", style)
    return shape
