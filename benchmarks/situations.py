"""More tables of docs/performance.md: what grows how, adapters at work, a model that is not in memory, a retraction."""

from __future__ import annotations

from collections.abc import Callable

from performance import Lines, read, spread


def exponents() -> Lines:
    """Of step time, added arithmetic and bytes kept, by size and method."""
    results = read("scaling")
    point = results["point"]
    lines = []
    for size, curve in results["curves"].items():
        values = list(curve["points"])
        for name, fit in curve["exponents"].items():
            cells = [f"{fit[key]:.2f}" if key in fit else "—" for key in ("seconds", "added", "saved")]
            given = f"{size}, {values[0]} to {values[-1]} (else {point[size]})" if name == "frozen" else ""
            lines.append([given, name, *cells])
    return ["size", "method", "step time", "arithmetic beyond frozen", "bytes kept"], lines


def inference() -> Lines:
    """Forward passes with merged, active and mixed adapters relative to the base model's."""
    networks = read("inference")["networks"]
    methods = [name for name in next(iter(networks.values())) if name != "base"]
    lines = []
    for name in methods:
        cells = [spread(rows[name]) if name in rows else "—" for rows in networks.values()]
        lines.append([name, *cells])
    return ["adapters", *networks], lines


def large() -> Lines:
    """Seconds and resident bytes of attaching and loading."""
    results = read("large")
    lines = []
    for name, row in results["methods"].items():
        seconds = [f"{row[key]:.2f}" for key in ("meta_seconds", "attach_seconds", "load_seconds")]
        size = [f"{row[key] / 1e6:,.0f}" for key in ("adapter_bytes", "attach_bytes", "load_bytes")]
        lines.append([name, f"{row['parameters']:,}", *seconds, *size])
    columns = ["on meta, s", "attach, s", "load, s", "the adapter, MB", "attach: grown by, MB", "load: grown by, MB"]
    return ["method", "parameters", *columns], lines


def retraction() -> Lines:
    """Training steps that keep the factors orthonormal, relative to the same steps that do not."""
    networks = read("retraction")["networks"]
    ways = list(next(iter(networks.values())))
    lines = [
        [name, f"{1000 * rows[ways[0]]['seconds']:.0f}", *(spread(rows[way]) for way in ways[1:])]
        for name, rows in networks.items()
    ]
    return ["network", f"{ways[0]}, ms", *ways[1:]], lines


TABLES: dict[str, Callable[[], Lines]] = {
    "scaling-exponents": exponents,
    "inference": inference,
    "large": large,
    "retraction": retraction,
}
