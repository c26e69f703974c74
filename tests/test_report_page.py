"""The page of `flora report`: complete, safe to open, small, with its source's numbers; in a browser too."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import peft
import pytest
import safetensors.torch
import torch
from commands import flora
from torch import nn

from florapeft import FloraConfig
from florapeft.report import figures, write_report
from florapeft.report.page import (
    Block,
    Cell,
    block_name,
    common_prefix,
    percent,
    ramp,
    shared_labels,
    short,
    shown_block,
    size,
)

VOID = {"meta", "input", "br", "wbr", "path", "circle", "image", "link", "img"}


class Page(HTMLParser):
    """What a browser would see: elements with their attributes, and texts; tags must be closed in order."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.elements, self.texts = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append((self.open[-1] if self.open else "", data))

    def all(self, tag, **attributes):
        return [
            a for t, a in self.elements if t == tag and all(a.get(k.rstrip("_")) == v for k, v in attributes.items())
        ]


def network():
    layers = [nn.Conv2d(3, 8, 3), nn.Conv1d(4, 6, 5), nn.Conv3d(2, 4, 3), nn.Linear(8, 6), nn.Linear(6, 6)]
    return nn.Sequential(*layers)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A run's folder with results, curves and an adapter; beside it the weights of its base."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    base = network()
    safetensors.torch.save_file(base.state_dict(), folder / "base.safetensors")
    config = FloraConfig(r=2, target_modules=["0", "1", "2", "3"], init_weights=False)
    peft.get_peft_model(base, config).save_pretrained(folder / "adapter")
    for place in (folder, folder / "adapter"):
        (place / "job.yaml").write_text("task: causal-lm\n")
    methods = [
        {
            "label": label,
            "accuracy_mean": mean,
            "accuracy_std": 0.01,
            "parameters": 10,
            "share_of_network": 0.5,
            "seconds_mean": 1.5,
            "bytes": 5000,
            "runs": [{"seed": s, "accuracy": mean + 0.01 * s, "losses": [[1, 2.0], [2, 1.0]]} for s in (-1, 0, 1)],
        }
        for label, mean in (("FLoRA", 0.9), ("<i>full</i>", 0.95))
    ]
    results = {"methods": methods, "versions": {"torch": "2.13"}, "description": "Real & small"}
    (folder / "results.json").write_text(json.dumps(results))
    return folder


@pytest.fixture(scope="module")
def made(adapter, tmp_path_factory):
    """The page of that run, parsed, and the record that `write_report` returned."""
    file = tmp_path_factory.mktemp("page") / "report.html"
    record = write_report(adapter, file, base=str(adapter / "base.safetensors"))
    return Page(file.read_text(encoding="utf-8")), record, file


class TestPage:
    def test_holds_everything_that_it_shows(self, made):
        page, _, file = made
        text = file.read_text(encoding="utf-8")
        assert "http://" not in text
        assert "https://" not in text
        assert "@import" not in text
        assert "url(" not in text
        for tag, attributes in page.elements:
            assert tag not in ("link", "iframe", "object", "embed", "base")
            for name in ("src", "href"):
                if name in attributes:
                    assert attributes[name].startswith(("#", "data:image/png;base64,")), attributes
            assert not any(name.startswith("on") for name in attributes)

    def test_ids_are_unique_and_links_lead_somewhere(self, made):
        page, _, _ = made
        ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
        assert len(ids) == len(set(ids))
        targets = [attributes["href"] for attributes in page.all("a")]
        assert {target.removeprefix("#") for target in targets} <= set(ids)
        assert len(targets) == 8  # four layers, on the map and in the table

    def test_numbers_are_the_records(self, made):
        page, record, _ = made
        shown = [float(a["data-v"]) for a in page.all("td") if "data-v" in a]
        for layer in record["layers"]:
            for key in ("parameters", "share", "norm", "relative"):
                assert layer[key] in shown
        tips = [a["title"] for a in page.all("a") if "title" in a]
        assert f"‖ΔW‖ / ‖W‖ = {record['layers'][0]['relative']:.10g}" in tips[0]
        assert record["bytes"] == made[2].stat().st_size

    def test_has_every_part(self, made):
        page, _, _ = made
        headings = [text for tag, text in page.texts if tag == "h2"]
        assert headings == [
            "Where the network changes",
            "Training",
            "The plan and what came of it",
            "Layer by layer",
            "To do it again",
        ]
        assert len(page.all("details")) == 4 + 2
        assert len(page.all("details", open=None)) >= 1
        # spectra of four layers, kernel and filters of none (their modes are not known), a comparison and losses
        drawn = [a["viewbox"] for a in page.all("svg")]
        assert len(drawn) == 4 + 3 + 2
        assert "svg text { fill: var(--muted); text-anchor: middle; font-size: 10.5px; " in made[2].read_text()
        assert len([a for a in page.all("span") if a.get("class") == "cell other"]) == 1
        texts = [text for _, text in page.texts]
        assert "90.0% ± 1.0%" in " ".join(" ".join(texts).split())

    def test_can_be_used_with_a_keyboard(self, made):
        page, _, _ = made
        focusable = {"a", "button", "input", "summary"}
        for tag, attributes in page.elements:
            if "title" in attributes and tag not in ("td", "p"):  # a row's link has all numbers of its cells
                assert tag in focusable or attributes.get("tabindex") == "0"
        assert all("scope" in attributes for attributes in page.all("th"))

    def test_colours_have_contrast(self):
        def luminance(color):
            parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
            linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
            return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

        def contrast(one, other, theme):
            light, dark = sorted((luminance(figures.THEME[role][theme]) for role in (one, other)), reverse=True)
            return (light + 0.05) / (dark + 0.05)

        for theme in (0, 1):
            assert contrast("ink", "paper", theme) > 12
            assert contrast("muted", "paper", theme) > 4.5
            for step, role in enumerate(figures.RAMP):
                assert contrast("ink" if step < 5 else "paper", role, theme) > 4.5, (role, theme)
            for role in figures.SERIES:
                assert contrast(role, "paper", theme) > 3, role


NAMES = ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "a&b", "$x_{1", "{{ 7 * 7 }}", "'"]


def test_names_from_files_are_text(tmp_path):
    folder = tmp_path / "<b>adapter" / "adapter"
    tensors = {}
    for name in NAMES:
        prefix = f"base_model.model.{name}.layer"
        tensors[f"{prefix}.flora_core.weight"] = torch.randn(2, 2, 3, 3)
        tensors |= {f"{prefix}.flora_factors.{mode}.weight": torch.randn(5, 2) for mode in (0, 1)}
    folder.mkdir(parents=True)
    safetensors.torch.save_file(tensors, folder / "adapter_model.safetensors")
    config = FloraConfig(base_model_name_or_path="<script>alert(2)</script>", target_modules=NAMES)
    config.save_pretrained(folder)
    write_report(folder, tmp_path / "r.html", png=tmp_path / "figures")
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    page = Page(text)
    assert len(page.all("script")) == 1
    assert not page.all("img")
    assert "<b>adapter" not in text
    for name in NAMES:
        assert any(f"{name}.layer" == a["title"].split("\n")[0] for a in page.all("a")), name
    assert "49" not in {text.strip() for _, text in page.texts}
    # the one script is ours, and nothing of a file stands in it
    script = "".join(text for tag, text in page.texts if tag == "script")
    assert script.strip() == (Path(figures.__file__).parent / "page.js").read_text().strip()
    assert len(list((tmp_path / "figures").iterdir())) == 1 + 2 * len(NAMES)


def test_characters_that_are_no_text_are_replaced(adapter, tmp_path):
    """Issue: a figure could not be made of a label that holds a control character."""
    run = shutil.copytree(adapter, tmp_path / "run")
    results = json.loads((run / "results.json").read_text())
    results["methods"][1]["label"] = "LoRA\x01\ud800\uffff é\U0001f600"
    results["description"] = "digits\x1b\udfff"
    (run / "results.json").write_text(json.dumps(results))
    write_report(run, tmp_path / "r.html", png=tmp_path / "figures")
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert text.count("LoRA\ufffd\ufffd\ufffd é\U0001f600") >= 2  # in the table and in figures
    assert "digits\ufffd\ufffd" in text


def test_a_fresh_adapter_has_a_page_that_says_so(tmp_path):
    peft.get_peft_model(network(), FloraConfig(r=2, target_modules=["0", "3"])).save_pretrained(tmp_path / "a")
    write_report(tmp_path / "a", tmp_path / "r.html")
    texts = [text for _, text in Page((tmp_path / "r.html").read_text()).texts]
    assert "Every update is zero: this adapter has not been trained." in texts
    assert texts.count("The update is zero.") == 2


def test_a_base_that_has_only_some_of_the_weights(adapter, tmp_path):
    weight = torch.ones(8, 3, 3, 3)
    safetensors.torch.save_file({"0.weight": weight}, tmp_path / "base.safetensors")
    record = write_report(adapter, tmp_path / "r.html", base=str(tmp_path / "base.safetensors"))
    first, *others = record["layers"]
    assert first["relative"] == pytest.approx(first["norm"] / weight.norm().item())
    assert [layer["relative"] for layer in others] == [None] * 3
    page = Page((tmp_path / "r.html").read_text())
    shown = short(first["relative"])
    assert f"median; {shown} to {shown}" in [text for _, text in page.texts]
    assert [a["data-v"] for a in page.all("td", class_="bar")][1:] == ["-1"] * 3


def many_layers(folder, count):
    """An adapter of a large ConvNet, without the network."""
    tensors = {}
    for number in range(count):
        prefix = f"base_model.model.stages.{number // 10}.blocks.{number % 10}.conv"
        tensors[f"{prefix}.flora_core.weight"] = torch.randn(32, 32, 3, 3)
        tensors |= {f"{prefix}.flora_factors.{mode}.weight": torch.randn(256, 32) for mode in (0, 1)}
    folder.mkdir()
    safetensors.torch.save_file(tensors, folder / "adapter_model.safetensors")
    FloraConfig(r=32, target_modules=["conv"]).save_pretrained(folder)
    return folder


def test_size_per_layer(tmp_path):
    """Two hundred layers, all of them convolutions, in under 3 MB: what ten and twenty layers differ by."""
    sizes = [
        write_report(many_layers(tmp_path / str(count), count), tmp_path / f"{count}.html")["bytes"]
        for count in (5, 15)
    ]
    assert sizes[1] + (200 - 15) * (sizes[1] - sizes[0]) / 10 < 3_000_000


@pytest.mark.slow
def test_two_hundred_layers_take_less_than_3_mb(tmp_path):
    record = write_report(many_layers(tmp_path / "a", 200), tmp_path / "r.html")
    assert len(record["layers"]) == 200
    assert record["bytes"] < 3_000_000
    assert len(Page((tmp_path / "r.html").read_text()).all("details")) == 201


class TestParts:
    def test_blocks(self):
        assert block_name("model.layers.3.self_attn.q_proj") == "model.layers.3"
        assert block_name("encoder.stages.1.downsampling_layer.1") == "encoder.stages.1"
        assert block_name("model.embed_tokens") == "model"
        assert block_name("classifier") == ""
        assert common_prefix(["a.b.c.x", "a.b.d.y"]) == "a.b."
        assert common_prefix(["a.b", "a.b"]) == "a."

    def test_what_the_cells_of_a_block_are_called(self):
        def block(*labels):
            return Block("x", [Cell(None, label) for label in labels])

        same = [block("q", "k")] * 3
        assert shared_labels([block("embed"), *same]) == ["q", "k"]
        assert shared_labels([*same, block(*"abcdefgh")]) == []
        assert shown_block("model.layers.3", "model.layers.") == "3"
        assert shown_block("model", "model.layers.") == "model"
        assert shown_block("model.layers", "model.layers.") == "top level"
        assert shown_block("", "") == "top level"

    def test_ramp(self):
        step = ramp([0.1, 0.2, 0.8])
        assert [step(value) for value in (None, 0.0, 0.1, 0.2, 0.4, 0.8)] == [0, 0, 1, 2, 4, 7]
        step = ramp([1e-4, 1e-2, 1.0])
        assert [step(value) for value in (1e-4, 1e-2, 1.0)] == [0, 4, 7]
        assert ramp([0.0])(0.0) == 0
        assert ramp([2.0])(2.0) == 7

    def test_numbers(self):
        shown = [short(value) for value in (None, 0, 0.5, 12.345, 123.45, 1234.5, 1.2e-5, 3e7)]
        assert shown == ["–", "0", "0.500", "12.3", "123", "1,234", "1.2e-05", "3.0e+07"]
        assert [percent(value) for value in (None, 0, 0.5, 0.012, 0.0012)] == ["–", "0.0%", "50.0%", "1.2%", "0.12%"]
        assert [size(count) for count in (12, 50464, 6.5e6, 1.2e9)] == ["12 bytes", "50.5 kB", "6.5 MB", "1.2 GB"]

    def test_a_figure_takes_its_colours_from_the_page(self):
        drawing = figures.spectra(
            ("out", "in", "tap"), [torch.tensor([2.0, 1.0]), torch.tensor([2.0, 0.0]), torch.ones(1)]
        )
        svg = drawing.svg()
        assert not re.search(r"#[0-9a-f]{6}", svg)
        assert set(re.findall(r"var\(--([\w-]+)\)", svg)) == {"ink", "series-0", "series-1", "series-2"}
        assert [looks["fill"] for looks in figures.USUAL.values()] == [
            "var(--muted)",
            "none",
        ]  # what the page says once
        assert 'viewBox="0 0 340 ' in svg
        assert " id=" not in svg


class TestCommand:
    def test_page_figures_and_record(self, adapter, tmp_path):
        page, pictures = tmp_path / "r.html", tmp_path / "figures"
        base = adapter / "base.safetensors"
        stdout, _ = flora("report", adapter, "--base", base, "-o", page, "--png", pictures, "--json")
        record = json.loads(stdout)
        assert record["bytes"] == page.stat().st_size
        assert [layer["name"] for layer in record["layers"]] == ["0", "1", "2", "3"]
        assert sorted(file.name for file in pictures.iterdir()) == [
            "comparison.png",
            "layer-001-kernel.png",
            "layer-001-spectra.png",
            "layer-002-kernel.png",
            "layer-002-spectra.png",
            "layer-003-kernel.png",
            "layer-003-spectra.png",
            "layer-004-spectra.png",
            "network.png",
            "training-1.png",
        ]
        assert all(file.read_bytes().startswith(b"\x89PNG") for file in pictures.iterdir())
        before = page.read_bytes()
        _, stderr = flora("report", adapter, "-o", page, code=1)
        assert stderr == f"error: {page} exists; give another output, or replace it with --overwrite\n"
        _, stderr = flora("report", adapter, "-o", tmp_path / "new.html", "--png", pictures, code=1)
        assert stderr.startswith(f"error: {pictures} exists")
        assert page.read_bytes() == before
        assert not (tmp_path / "new.html").exists()
        stdout, _ = flora("report", adapter, "-o", page, "--png", pictures, "--overwrite")
        assert f"page: {page} (" in stdout
        assert f"figures: {pictures}" in stdout

    def test_nothing_else_is_replaced(self, adapter, tmp_path):
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "thesis.txt").touch()
        _, stderr = flora(
            "report", adapter, "-o", tmp_path / "r.html", "--png", tmp_path / "mine", "--overwrite", code=1
        )
        assert stderr == f"error: {tmp_path}/mine holds other things than figures; give another folder\n"
        _, stderr = flora("report", adapter, "-o", tmp_path / "mine", "--overwrite", code=1)
        assert stderr.startswith(f"error: output {tmp_path}/mine is a folder; a file such as")
        _, stderr = flora("report", tmp_path / "none", "-o", tmp_path / "r.html", code=1)
        assert stderr == f"error: adapter not found: {tmp_path}/none\n"
        assert [path.name for path in tmp_path.iterdir()] == ["mine"]


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
class TestInABrowser:
    def browse(self, url, *options):
        command = [
            CHROMIUM,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            "--virtual-time-budget=1500",
        ]
        command += ["--allow-file-access-from-files", "--timeout=20000", *options, url]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout

    def test_light_and_dark(self, made, tmp_path):
        from PIL import Image, ImageStat

        brightness = []
        for theme in ("1", "0"):
            file = tmp_path / f"{theme}.png"
            self.browse(
                made[2].as_uri(),
                f"--blink-settings=preferredColorScheme={theme}",
                "--window-size=1000,1200",
                f"--screenshot={file}",
            )
            picture = ImageStat.Stat(Image.open(file).convert("L"))
            assert picture.stddev[0] > 10  # there is something on it
            brightness.append(picture.mean[0])
        assert brightness[0] > 200
        assert brightness[1] < 60

    def test_it_works(self, made, tmp_path):
        """Sorting, search, tooltips and links to layers, at the width of a phone, where nothing may stick out."""
        script = """
        const frame = document.querySelector("iframe");
        frame.onload = () => {
          const page = frame.contentDocument, at = (what) => page.querySelector(what);
          const rows = () => [...page.querySelectorAll("#layers tbody tr")];
          const order = () => rows().map((row) => row.cells[0].textContent).join();
          const found = {width: page.documentElement.scrollWidth, opened: at("#layer-3").open};
          at("#layers th:nth-child(8) button").click();
          found.sorted = order();
          at("#layers th:nth-child(8) button").click();
          found.turned = order();
          at("#search").value = "3-d";
          at("#search").dispatchEvent(new frame.contentWindow.Event("input", {bubbles: true}));
          found.count = at("output").textContent;
          found.rows = rows().filter((row) => !row.hidden).length;
          found.panels = [...page.querySelectorAll("#details > details")].filter((panel) => !panel.hidden).length;
          at(".map a").focus();
          found.tip = at("#tip").textContent;
          document.title = JSON.stringify(found);
        };
        """
        outer = tmp_path / "outer.html"
        outer.write_text(
            "<!doctype html><title>-</title>"
            f'<iframe src="{made[2].as_uri()}#layer-3" style="width:390px;height:800px;border:0"></iframe>'
            f"<script>{script}</script>",
            encoding="utf-8",
        )
        seen = Page(self.browse(outer.as_uri(), "--dump-dom"))
        found = json.loads(next(text for tag, text in seen.texts if tag == "title"))
        layers = made[1]["layers"]
        by_norm = sorted(range(4), key=lambda n: -layers[n]["norm"])
        assert found.pop("tip").startswith("0\n")
        assert found == {
            "width": 390,
            "opened": True,
            "sorted": ",".join(str(n + 1) for n in by_norm),
            "turned": ",".join(str(n + 1) for n in reversed(by_norm)),
            "count": "1 of 4",
            "rows": 1,
            "panels": 1,
        }
