"""The package as a package: what an import costs, what is public, what it depends on, how the house is laid out."""

import ast
import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import florapeft

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = Path(florapeft.__file__).parent
SOURCES = sorted(PACKAGE.rglob("*.py"))

# Public names of the finished design; the ones of this release must all be there.
PUBLIC_NOW = {"FloraConfig", "FloraModel", "FloraLayer", "Tucker", "hosvd", "hooi"}
PUBLIC_NOW |= {"plan", "allocate", "initialize_from_gradients", "keep_orthonormal", "extract"}
PUBLIC_LATER = {"export", "load_official"}

# The modules in dependency order: each imports only from those before it.
HOUSE = [
    "_peft_type",
    "tucker",
    "contract",
    "joined",
    "updated",
    "rank",
    "budget",
    "config",
    "init",
    "tensors",
    "layer",
    "kinds",
    "parameters",
]
HOUSE += ["batch_norm", "checkpoint", "mixed", "combine", "support", "targets", "target_ranks", "checks", "model"]
HOUSE += ["_register", "planning", "gradient_sums", "gradients", "retraction"]
HOUSE += ["sources", "extracted", "survey", "extraction", "structure", "convert", "train", "report", "cli"]

# Brought by the extras; the core must not import them.
EXTRAS_ONLY = ["transformers.trainer", "datasets", "sklearn", "tensorboard", "matplotlib", "typer", "rich"]


def run_python(code: str) -> subprocess.CompletedProcess:
    """Run `code` in a fresh interpreter; `loaded()` in it prints those of `EXTRAS_ONLY` that are loaded by then."""
    loaded = f"import sys\ndef loaded():\n    print(*[m for m in {EXTRAS_ONLY!r} if m in sys.modules])\n"
    command = [sys.executable, "-c", loaded + code]
    return subprocess.run(command, capture_output=True, text=True, check=True)


class TestImport:
    def test_is_silent_and_brings_no_extra(self):
        run = run_python(
            "import torch, peft\nloaded()\nprint('ours:', file=sys.stderr)\nimport florapeft\nloaded()\n"
            "import importlib\nimportlib.reload(florapeft)\n"  # registers a second time
        )
        assert run.stderr.endswith("ours:\n")  # PEFT imports torchao and bitsandbytes, which are not silent
        theirs, ours = run.stdout.splitlines()  # some releases of transformers import scikit-learn
        assert ours == theirs

    def test_check_can_fail(self):
        run = run_python("loaded()\nimport sklearn, rich\nloaded()")
        assert run.stdout.splitlines() == ["", "sklearn rich"]


class TestPublicNames:
    def test_version_is_the_metadata(self):
        assert florapeft.__version__ == importlib.metadata.version("florapeft")

    def test_all_is_the_design(self):
        names = set(florapeft.__all__) - {"__version__"}
        assert names >= PUBLIC_NOW
        assert names <= PUBLIC_NOW | PUBLIC_LATER

    @pytest.mark.parametrize("name", sorted(set(florapeft.__all__) - {"__version__"}))
    def test_documented(self, name):
        assert len((getattr(florapeft, name).__doc__ or "").strip()) > 20
        assert not getattr(florapeft, name).__doc__.startswith(f"{name}("), "a dataclass's generated docstring"

    def test_typed(self):
        assert (PACKAGE / "py.typed").is_file()


def internal_imports(path: Path) -> set[str]:
    """Top-level modules of the package that a source file imports at module level (not inside functions)."""
    here = ("florapeft", *path.relative_to(PACKAGE).parts[:-1])
    found = set()
    for node in ast.iter_child_nodes(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{module}.{alias.name}" for alias in node.names]
        else:
            continue
        found |= {name.split(".")[1] for name in names if name.startswith("florapeft.")}
    return found


class TestHouse:
    @pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
    def test_files_are_short(self, path):
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 450

    @pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
    def test_imports_point_up(self, path):
        part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if part in ("__init__", "__main__"):
            return
        above = HOUSE[: HOUSE.index(part)]
        own = [part] if path.parent != PACKAGE else []
        assert internal_imports(path) & set(HOUSE) <= {*above, *own}

    def test_import_check_can_fail(self, tmp_path, monkeypatch):
        monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path)
        (tmp_path / "cli").mkdir()
        file = tmp_path / "cli" / "one.py"
        file.write_text(
            "import torch\nfrom florapeft.layer import x\nfrom ..rank import y\nfrom .. import model\n"
            "from . import other\nimport florapeft.tucker\ndef f():\n    from florapeft.config import z\n"
        )
        assert internal_imports(file) == {"layer", "rank", "model", "cli", "tucker"}


def requirements(distribution: str, extra: str) -> set[str]:
    """Names of everything that installing `distribution[extra]` installs, for this interpreter."""
    found: set[str] = set()
    queue = [(canonicalize_name(distribution), frozenset([extra]))]
    seen = set()
    while queue:
        name, extras = queue.pop()
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        found.add(name)
        for text in importlib.metadata.requires(name) or []:
            needed = Requirement(text)
            if needed.marker is None or any(needed.marker.evaluate({"extra": e}) for e in {*extras, ""}):
                queue.append((canonicalize_name(needed.name), frozenset(needed.extras)))
    return found - {canonicalize_name(distribution)}


class TestDependencies:
    LINES = [
        line
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line.strip() and not line.startswith("#")
    ]

    def test_every_package_is_pinned(self):
        pins = [Requirement(line) for line in self.LINES]
        pinned = {canonicalize_name(pin.name) for pin in pins if pin.marker is None or pin.marker.evaluate()}
        missing = requirements("florapeft", "dev") - pinned
        # A CUDA build of torch pins the packages of its platform exactly and by itself.
        assert {name for name in missing if not re.match(r"nvidia-|cuda-|triton$", name)} == set()

    def test_pins_are_exact_and_name_no_place(self):
        for line in self.LINES:
            assert re.fullmatch(r"[\w.-]+==[\w.]+(; python_version (<|>=) \"3\.\d+\")?", line), line

    def test_core_needs_torch_and_peft_alone(self):
        core = [Requirement(text) for text in importlib.metadata.requires("florapeft")]
        assert {r.name for r in core if r.marker is None or r.marker.evaluate({"extra": ""})} == {
            "torch",
            "peft",
        }

    def test_every_dependency_has_its_reason(self):
        reasons = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
        direct = {Requirement(text).name for text in importlib.metadata.requires("florapeft")} - {"florapeft"}
        assert {name for name in direct if f"| `{name}` |" not in reasons} == set()
