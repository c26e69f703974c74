"""The tables of docs/performance.md, from benchmarks/results/speed.json and memory.json; tables.py writes them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
LINEAR = ("convnextv2-pointwise", "bert", "llama")  # networks of which linear layers alone are adapted
OURS = ("FLoRA", "FLoRA:lean")
OTHERS = ("released", "LoRA", "DoRA", "LoHa", "LoKr", "LoCon", "LoCon:bypass")
Row = dict[str, Any]
Lines = tuple[list[str], list[list[str]]]


def steps() -> Lines:
    """A training step of each method relative to the frozen network's."""
    header, lines = _grid("speed", ("full", *OURS, *OTHERS), lambda row: spread(row["step"]))
    for line in lines:
        line.insert(1, f"{1e3 * _rows('speed', line[0])['frozen']['step']['seconds']:.0f}")
    return [header[0], "frozen, ms", *header[1:]], lines


def forwards() -> Lines:
    """The same for a forward pass without gradients."""
    columns = ("FLoRA:merged", *OURS, *OTHERS)
    return _grid("speed", columns, lambda row: spread(row["forward"]))


def routes() -> Lines:
    """FLoRA with each route forced, and how far its own choice is from the best of them."""
    forced = [name for name in next(iter(_networks("speed").values()))["methods"] if _is_route(name)]
    header, lines = _grid("speed", ("FLoRA", *forced), lambda row: spread(row["step"]))
    for line in lines:
        rows = _rows("speed", line[0])
        best = min(forced, key=lambda name: rows[name]["step"]["ratio"])
        above = rows["FLoRA"]["step"]["ratio"] / rows[best]["step"]["ratio"] - 1
        line += [best.removeprefix("FLoRA:"), f"{100 * above:+.0f}%"]
    return [name.removeprefix("FLoRA:") for name in header] + ["best", "FLoRA above it"], lines


def arithmetic() -> Lines:
    """Floating-point operations of a step relative to the frozen network's: what no implementation can do without."""
    columns, lines = ("full", *OURS, *OTHERS), []
    for network in _networks("speed"):
        rows = _rows("speed", network)
        frozen = rows["frozen"]["flops"]
        lines.append([network, *("—" if "error" in rows[n] else f"{rows[n]['flops'] / frozen:.2f}" for n in columns)])
    return ["network", *columns], lines


def rivals() -> Lines:
    """FLoRA's step relative to that of those it is to beat."""
    lines = []
    for network in _networks("speed"):
        rows = _rows("speed", network)
        own = rows["FLoRA"]["step"]
        found = {name: rows[name].get("step", {}).get("ratio") for name in ("released", "full")}
        relative = [f"{own['ratio'] / other:.2f}" if other else "—" for other in found.values()]
        to_lora = [spread(rows[name]["step"]["to_lora"]) if "to_lora" in own else "—" for name in OURS]
        lines.append([network, *to_lora, *relative])
    return ["network", "to LoRA", "lean to LoRA", "to the released computation", "to full fine-tuning"], lines


def memory(key: str) -> Callable[[], Lines]:
    """Bytes of one kind relative to the frozen network's."""

    def build() -> Lines:
        bound = ("bound",) if key == "saved" else ()
        columns = (*bound, "full", *OURS, *OTHERS)
        header, lines = _grid("memory", columns, lambda row: f"{row[f'{key}_ratio']:.2f}")
        for line in lines:
            line.insert(1, f"{_rows('memory', line[0])['frozen'][key] / 1e6:.0f}")
        return [header[0], "frozen, MB", *header[1:]], lines

    return build


def memory_routes() -> Lines:
    """Bytes kept for the backward pass by each route."""
    forced = [name for name in next(iter(_networks("memory").values()))["methods"] if _is_route(name)]
    header, lines = _grid("memory", ("bound", "LoRA", "FLoRA", *forced), lambda row: f"{row['saved_ratio']:.2f}")
    return [name.removeprefix("FLoRA:") for name in header], lines


def bars() -> Lines:
    """What was to be reached, and where it was."""

    def step(name: str, reference: str) -> Callable[[str], float]:
        def value(network: str) -> float:
            rows = _rows("speed", network)
            if reference == "LoRA":
                return rows[name]["step"]["to_lora"]["ratio"]
            return rows[name]["step"]["ratio"] / rows[reference]["step"]["ratio"]

        return value

    def held(key: str, name: str, reference: str) -> Callable[[str], float]:
        return lambda network: _rows("memory", network)[name][key] / _rows("memory", network)[reference][key]

    def choice(network: str) -> float:
        rows = _rows("speed", network)
        return rows["FLoRA"]["step"]["ratio"] / min(rows[name]["step"]["ratio"] for name in rows if _is_route(name))

    def forward(name: str) -> Callable[[str], float]:
        return lambda network: _rows("speed", network)[name]["forward"]["ratio"]

    everywhere, remembered = list(_networks("speed")), list(_networks("memory"))
    conv = [network for network in everywhere if network not in LINEAR]
    linear = [network for network in everywhere if network in LINEAR]
    large = [network for network in everywhere if network != "resnet20"]
    near = ("resnet18-128-channels-last", "convnextv2", "bert", "llama", "unet3d")
    tried = [
        ("step, of LoRA's, where convolutions are adapted", 0.95, conv, step("FLoRA", "LoRA")),
        ("step, of LoRA's, where only linear layers are", 1.0, linear, step("FLoRA", "LoRA")),
        ("step, of the released computation's", 0.5, conv, step("FLoRA", "released")),
        ("step, of full fine-tuning's", 1.0, large, step("FLoRA", "full")),
        ("step, of the frozen network's", 1.15, [n for n in everywhere if n in near], step("FLoRA", "frozen")),
        ("step, of the best forced route's", 1.05, everywhere, choice),
        ("saved bytes, of LoRA's", 1.1, remembered, held("saved", "FLoRA", "LoRA")),
        ("peak bytes, of LoRA's", 1.1, remembered, held("peak", "FLoRA", "LoRA")),
        ("lean: saved bytes, of the bound", 1.02, remembered, held("saved", "FLoRA:lean", "bound")),
        ("lean: saved bytes, of LoRA's", 1.0, remembered, held("saved", "FLoRA:lean", "LoRA")),
        ("lean: step, of LoRA's", 1.02, everywhere, step("FLoRA:lean", "LoRA")),
        ("forward, of the base's", 1.1, everywhere, forward("FLoRA")),
    ]
    lines = []
    for bar, limit, networks, value in tried:
        found = {network: value(network) for network in networks}
        met = ", ".join(f"{network} {ratio:.2f}" for network, ratio in found.items() if ratio <= limit)
        missed = ", ".join(f"{network} {ratio:.2f}" for network, ratio in found.items() if ratio > limit)
        lines.append([bar, f"{limit:.2f}", met or "—", missed or "—"])
    return ["FLoRA's", "at most", "met", "not met"], lines


def once(file: str, key: str, factor: float) -> Callable[[], Lines]:
    """What is paid once: seconds of attaching or merging, bytes of the file."""
    return lambda: _grid(file, ("FLoRA", *OTHERS), lambda row: f"{factor * row[key]:,.0f}")


def parameters() -> Lines:
    """Trainable parameters; how far from FLoRA's where that is more than 2%."""

    def cell(row: Row) -> str:
        off = row.get("off", 0.0)
        return f"{row['parameters']:,}" + (f" ({100 * off:+.0f}%)" if abs(off) > 0.02 else "")

    return _grid("speed", ("full", "FLoRA", *OTHERS), cell)


def notes() -> Lines:
    """What did not run, and what ran on a part of the layers alone."""
    lines = []
    for network in _networks("speed"):
        for name, row in _rows("speed", network).items():
            if "error" in row:
                lines.append([network, name, "nothing", _quoted(row["error"])])
            elif "without_grouped" in row:
                part = f"{row['layers']} layers, the grouped ones left out"
                lines.append([network, name, part, _quoted(row["without_grouped"])])
    return ["network", "method", "measured", "why"], lines


def conditions() -> Lines:
    """Where and how the numbers came about."""
    clocks = {"perf_counter": "wall clock", "process_time": "the process's own time"}
    lines = []
    for network, found in _networks("speed").items():
        place = found["environment"]
        shape = " × ".join(map(str, found["shape"]))
        how = f"{clocks[found['clock']]}, {place['threads']} of {place['cores']} cores, {place['device']}"
        memory = _networks("memory").get(network, found)["environment"]["commit"]
        commits = " and ".join(dict.fromkeys((place["commit"], memory)))
        lines.append([network, shape, str(found["rank"]), str(found["repetitions"]), how, commits])
    return ["network", "input", "FLoRA's r", "repetitions", "time", "commit"], lines


TABLES: dict[str, Callable[[], Lines]] = {
    "speed-bars": bars,
    "speed-step": steps,
    "speed-rivals": rivals,
    "speed-arithmetic": arithmetic,
    "speed-routes": routes,
    "speed-forward": forwards,
    "memory-saved": memory("saved"),
    "memory-peak": memory("peak"),
    "memory-routes": memory_routes,
    "attach-milliseconds": once("speed", "attach_seconds", 1e3),
    "merge-milliseconds": once("speed", "merge_seconds", 1e3),
    "file-kilobytes": once("memory", "file", 1e-3),
    "speed-parameters": parameters,
    "speed-notes": notes,
    "speed-conditions": conditions,
}


def read(name: str) -> dict[str, Any]:
    """The results file of this name."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def _networks(file: str) -> dict[str, Any]:
    return read(file)["networks"]


def _rows(file: str, network: str) -> dict[str, Row]:
    return _networks(file)[network]["methods"]


def _grid(file: str, columns: tuple[str, ...], cell: Callable[[Row], str]) -> Lines:
    """One line per network; a dash where a method does not run."""
    lines = []
    for network, found in _networks(file).items():
        rows = [found["methods"].get(name, {"error": ""}) for name in columns]
        lines.append([network, *("—" if "error" in row else cell(row) for row in rows)])
    return ["network", *columns], lines


def spread(found: Row) -> str:
    """The median of a ratio, and half the distance between its quartiles."""
    low, high = found["quartiles"]
    return f"{found['ratio']:.2f} ± {(high - low) / 2:.2f}"


def _is_route(name: str) -> bool:
    return name.startswith("FLoRA:") and name not in ("FLoRA:merged", "FLoRA:lean")


def _quoted(message: str) -> str:
    return "`" + message.replace("|", "\\|").replace("`", "'") + "`"
