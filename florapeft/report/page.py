"""Writes the page: a template filled with the numbers and figures of a report."""

from __future__ import annotations

import math
import shlex
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import count, groupby, takewhile
from math import prod
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from florapeft.report import figures
from florapeft.report.collect import Layer, Other, Report, collect
from florapeft.report.measure import SHARES
from florapeft.train.save import atomic_folder, atomic_write, to_json

_NAMED = 60  # weights up to which the map's cells have their names in them
_SPREAD = 30.0  # the largest over the smallest strength from which the map's ramp goes by its logarithm


@dataclass
class Cell:
    """A weight on the map: `number` and `step` of the ramp are None for one without an update."""

    part: Layer | Other
    label: str
    number: int | None = None
    step: int | None = None


@dataclass
class Block:
    """Weights that stand together in the network."""

    name: str
    cells: list[Cell]


def write_report(
    adapter: str | Path,
    output: str | Path,
    *,
    base: str | None = None,
    png: str | Path | None = None,
    overwrite: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Writes one HTML file about an adapter, which needs nothing but a browser.

    Args:
        adapter: an adapter folder, or the output folder of a run.
        output: the file to write.
        base: folder, safetensors file or hub id of the base model; by default the one the adapter names, where it is
            on this machine.
        png: a folder for the figures alone, as PNG files.
        overwrite: replace what is there.
        say: called with a line at each stage.

    Returns:
        The numbers of the page, as plain data.

    Raises:
        ValueError, OSError: no adapter, one that cannot be read, or an output that exists; nothing is written then.
    """
    output, pictures = Path(output), None if png is None else Path(png)
    if output.is_dir():
        raise IsADirectoryError(f"output {output} is a folder; a file such as {output / 'report.html'} is needed")
    for path in (output, pictures):
        if path is not None and path.exists() and not overwrite:
            raise FileExistsError(f"{path} exists; give another output, or replace it with --overwrite")
    if (
        pictures is not None
        and pictures.exists()
        and (not pictures.is_dir() or any(file.suffix != ".png" for file in pictures.iterdir()))
    ):
        raise FileExistsError(f"{pictures} holds other things than figures; give another folder")
    report = collect(Path(adapter), base=base, say=say)
    blocks = list(blocks_of(report))
    command = ["flora", "report", str(adapter), *(["--base", base] if base else []), "-o", str(output)]
    page = render(report, blocks, shlex.join(command), say)
    atomic_write(output, page)
    record = summary(report) | {"report": str(output), "bytes": len(page.encode())}
    if pictures is not None:
        record["png"] = str(pictures)
        say("writing the figures")
        with atomic_folder(pictures, replace=True) as folder:
            for name, drawing in pictures_of(report, blocks):
                drawing.png(folder / f"{name}.png")
    return record


def render(report: Report, blocks: list[Block], command: str, say: Callable[[str], None]) -> str:
    """The page as text; names and texts from files are escaped by the template."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("florapeft.report", ""),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"short": short, "exact": exact, "count": "{:,}".format, "percent": percent}
    environment.filters |= {"figure": figure, "fact": fact, "share": "{:.0%}".format}
    layers = [cell for block in blocks for cell in block.cells if cell.number is not None]
    strengths = report.strengths
    run, prefix = report.run, common_prefix([layer.slot.name for layer in report.layers])
    return environment.get_template("page.html").render(
        report=report,
        run=run,
        blocks=blocks,
        layers=layers,
        details=details(layers, say),
        opened=max(layers, key=lambda cell: report.strength(cell.part) or 0.0).number,
        with_names=len(report.network) <= _NAMED,
        has_saved=any(isinstance(part, Other) and part.is_saved for part in report.network),
        has_others=any(isinstance(part, Other) and not part.is_saved for part in report.network),
        ramp_ends=(min(strengths), max(strengths)),
        is_log=is_logarithmic(strengths),
        theme=figures.THEME,
        usual=figures.USUAL,
        ramp=figures.RAMP,
        series=figures.SERIES,
        shares=SHARES,
        title=title(report),
        lead=lead(report),
        tiles=tiles(report),
        prefix=prefix,
        label_width=min(24, max(len(shown_block(block.name, prefix)) for block in blocks)),
        columns=shared_labels(blocks),
        curves=[_svg(drawing) for drawing in figures.curves(run.curves)],
        comparison=_svg(figures.comparison(run.metric, run.methods)) if run.methods else "",
        versions={"florapeft": version("florapeft"), "peft": report.config.peft_version} | run.versions,
        config=to_json(report.config.to_dict()),
        command=command,
        tip=lambda cell: tip(cell.part),
        shown_block=shown_block,
        size=size,
    )


def blocks_of(report: Report) -> Iterator[Block]:
    """The network cut where the numbers in its names change: a block per layer of a transformer, stage of a ConvNet."""
    step = ramp(report.strengths)
    numbers = count(1)
    for name, parts in groupby(report.network, key=lambda part: block_name(part.slot.name)):
        cells = []
        for part in parts:
            label = part.slot.name.removeprefix(f"{name}.") if name else part.slot.name
            if isinstance(part, Layer):
                cells.append(Cell(part, label, next(numbers), step(report.strength(part))))
            else:
                cells.append(Cell(part, label))
        yield Block(name, cells)


def block_name(name: str) -> str:
    """The name up to the last number before its last part; else all of it but the last part."""
    parts = name.split(".")[:-1]
    numbered = [place for place, part in enumerate(parts) if part.isdecimal()]
    return ".".join(parts[: numbered[-1] + 1] if numbered else parts)


def shown_block(name: str, prefix: str) -> str:
    """A block's name without what all names begin with."""
    return f"{name}.".removeprefix(prefix).strip(".") or "top level"


def shared_labels(blocks: Sequence[Block]) -> list[str]:
    """What the cells of a block are called, one after the other, where most cells are in blocks that agree on it."""
    (labels, count), *_ = Counter(tuple(cell.label for cell in block.cells) for block in blocks).most_common(1)
    return list(labels) if count > 2 and count * len(labels) > sum(len(block.cells) for block in blocks) / 2 else []


def is_logarithmic(strengths: Sequence[float]) -> bool:
    """Whether strengths differ so much that the map's steps stand for equal ratios."""
    known = [value for value in strengths if value]
    return bool(known) and max(known) > _SPREAD * min(known)


def ramp(strengths: Sequence[float]) -> Callable[[float | None], int]:
    """Which step of the map's ramp stands for a strength: the first for none, the last for the largest."""
    known = [value for value in strengths if value]
    scale: Callable[[float], float] = math.log if is_logarithmic(strengths) else float
    bottom = scale(min(known)) if scale is math.log else 0.0
    top = scale(max(known, default=1.0))
    steps = len(figures.RAMP)

    def step(strength: float | None) -> int:
        return min(steps - 1, int((scale(strength) - bottom) / (top - bottom) * steps)) if strength else 0

    return step


def details(layers: Sequence[Cell], say: Callable[[str], None]) -> dict[int, dict[str, Any]]:
    """The panel of every layer, by its number; most of the time that a page takes goes into their figures."""
    panels = {}
    say(f"drawing {len(layers)} layers")
    for done, cell in enumerate(layers):
        if done and done % 25 == 0:
            say(f"{done} of {len(layers)} layers drawn")
        panels[cell.number] = detail(cell.part)
    return panels


def detail(layer: Layer) -> dict[str, Any]:
    """What the panel of a layer shows: a row per mode, and its figures."""
    measures = layer.measures
    modes = [
        (name, layer.slot.shape[mode], layer.rank[mode], [ranks[mode] for ranks in measures.ranks.values()])
        for mode, name in enumerate(layer.slot.modes)
    ]
    return {"modes": modes, "figures": {name: _svg(drawing) for name, drawing in drawings(layer)}}


def drawings(layer: Layer) -> Iterator[tuple[str, figures.Drawing]]:
    """The figures of one layer by name; none for an update of zero."""
    measures = layer.measures
    if not measures.norm:
        return
    if measures.energies:
        yield "spectra", figures.spectra(layer.slot.modes, measures.energies)
    if measures.taps is not None and measures.taps.numel() > 1:
        yield "kernel", figures.kernel(measures.taps)
        if measures.filters:
            yield "filters", figures.filters(measures.filters)


def pictures_of(report: Report, blocks: list[Block]) -> Iterator[tuple[str, figures.Drawing]]:
    """Every figure of the page with the name of its file."""
    prefix = common_prefix([layer.slot.name for layer in report.layers])
    steps = [(shown_block(block.name, prefix), [cell.step for cell in block.cells]) for block in blocks]
    strengths = report.strengths
    measured = "‖ΔW‖ / ‖W‖" if report.is_relative else "‖ΔW‖"
    yield "network", figures.network(steps, f"{measured}: {short(min(strengths))}", short(max(strengths)))
    for number, drawing in enumerate(figures.curves(report.run.curves), start=1):
        yield f"training-{number}", drawing
    if report.run.methods:
        yield "comparison", figures.comparison(report.run.metric, report.run.methods)
    for number, layer in enumerate(report.layers, start=1):
        for name, drawing in drawings(layer):
            yield f"layer-{number:03}-{name}", drawing


def summary(report: Report) -> dict[str, Any]:
    """The numbers of the page as plain data."""
    return {
        "adapter": str(report.folder),
        "base": report.base,
        "parameters": report.parameters,
        "base_parameters": report.base_size,
        "layers": [
            {
                "name": layer.slot.name,
                "kind": layer.slot.kind,
                "shape": list(layer.slot.shape),
                "rank": list(layer.rank),
                "parameters": layer.parameters,
                "share": layer.share,
                "scale": layer.scale,
                "norm": layer.measures.norm,
                "weight_norm": layer.weight_norm,
                "relative": layer.relative,
                "ranks_at_energy": {f"{share:.2f}": list(ranks) for share, ranks in layer.measures.ranks.items()},
            }
            for layer in report.layers
        ],
        "notes": report.notes,
    }


def title(report: Report) -> str:
    """What the adapter is called: its folder, or its run's where that is just called adapter."""
    folder = report.folder.resolve()
    return folder.parent.name if folder.name == "adapter" else folder.name


def lead(report: Report) -> str:
    """The adapter in one sentence."""
    base = Path(report.base).name if report.base else None
    of = f"{report.model} ({base})" if report.model and base else report.model or base or "a base that it does not name"
    count = len(report.layers)
    return f"Low-rank Tucker updates of {count} {'weight' if count == 1 else 'weights'} in {of}."


def tiles(report: Report) -> list[tuple[str, str, str]]:
    """The figures at the top: what, how much, and a remark."""
    share = f"{percent(report.parameters / report.base_size)} of the base" if report.base_size else ""
    others = len(report.network) - len(report.layers)
    found = [
        ("trained parameters", f"{report.parameters:,}", share),
        ("weights adapted", str(len(report.layers)), f"of {len(report.network)}" if others else ""),
    ]
    strengths = sorted(report.strengths)
    what = "‖ΔW‖ / ‖W‖" if report.is_relative else "‖ΔW‖"
    spread = f"median; {short(strengths[0])} to {short(strengths[-1])}"
    found.append((what, short(statistics.median(strengths)), spread))
    extra = ", ".join(f"{kind} {number:,}" for kind, number in report.saved.items())
    found.append(("saved", size(report.file_size), f"with {extra}" if extra else ""))
    own = next((method for method in report.run.methods if "flora" in method.label.lower()), None)
    if own is not None:
        seeds = len(own.values)
        spread = f"± {figure(own.deviation, report.run.metric)}, {seeds} seeds" if seeds > 1 else "one seed"
        found.append((report.run.metric, figure(own.mean, report.run.metric), spread))
    for name in ("accuracy", "perplexity"):
        if (value := report.run.facts.get(f"validation {name}")) is not None:
            found.append((name, figure(value, name), "on the validation split"))
    return found


def common_prefix(names: Sequence[str]) -> str:
    """What all names begin with, up to a dot; nothing of a name's last part."""
    parts = zip(*(name.split(".")[:-1] for name in names), strict=False)
    return "".join(f"{part[0]}." for part in takewhile(lambda part: len(set(part)) == 1, parts))


def tip(part: Layer | Other) -> str:
    """The exact numbers of a weight, a line each."""
    slot = part.slot
    lines = [slot.name, f"{slot.kind}, {'×'.join(map(str, slot.shape))}"]
    if isinstance(part, Other):
        return "\n".join([*lines, "saved in full with the adapter" if part.is_saved else "not adapted"])
    lines.append(f"ranks {'×'.join(map(str, part.rank))}")
    lines.append(f"{part.parameters:,} parameters, {percent(part.share)} of {prod(slot.shape):,}")
    lines.append(f"‖ΔW‖ = {exact(part.measures.norm)}")
    if part.weight_norm is not None:
        lines.append(f"‖W‖ = {exact(part.weight_norm)}")
    if part.relative is not None:
        lines.append(f"‖ΔW‖ / ‖W‖ = {exact(part.relative)}")
    return "\n".join(lines)


def short(value: float | None) -> str:
    """A number to three figures."""
    if value is None:
        return "–"
    if value == 0:
        return "0"
    return (
        f"{value:#.3g}".rstrip(".")
        if 1e-3 <= abs(value) < 1e3
        else f"{value:,.0f}"
        if 1e3 <= abs(value) < 1e6
        else f"{value:.1e}"
    )


def exact(value: float) -> str:
    return f"{value:.10g}"


def percent(share: float | None) -> str:
    if share is None:
        return "–"
    return f"{share:.1%}" if share >= 0.01 or share == 0 else f"{100 * share:.2g}%"


def figure(value: float, metric: str) -> str:
    """A measured figure: an accuracy in percent, another to four digits."""
    return f"{value:.1%}" if metric == "accuracy" else f"{value:.4g}"


def fact(value: float | str) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if isinstance(value, float) else value


def size(count: int) -> str:
    """Bytes in the unit that suits them."""
    for unit, step in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= step:
            return f"{count / step:.3g} {unit}"
    return f"{count} bytes"


def _svg(drawing: figures.Drawing) -> Markup:
    return Markup(drawing.svg())  # made by ElementTree, which escapes texts
