"""Attach, train, save, load and merge a small adapter with an installed florapeft; `smoke_wheel.sh` runs this.

Usage: smoke_wheel.py SITE REPOSITORY, with the folder that the package must come from and the one it was built from.
"""

import copy
import sys
import tempfile
from pathlib import Path

import peft
import torch
from torch import nn

import florapeft

site, repository = (Path(argument).resolve() for argument in sys.argv[1:])
package = Path(florapeft.__file__).resolve().parent
assert package == site / "florapeft", f"imported from {package}, not from the wheel in {site}"


def files(folder: Path) -> set[str]:
    return {
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


missing = files(repository / "florapeft") - files(package)
assert not missing, f"not in the wheel: {sorted(missing)}"

torch.manual_seed(0)
base = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 6 * 6, 5))
inputs = torch.randn(4, 3, 6, 6)
before = base(inputs)

model = peft.get_peft_model(copy.deepcopy(base), florapeft.FloraConfig(r=2, target_modules=["0", "3"]))
assert torch.equal(model(inputs), before), "a fresh adapter changes the output"
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
for _ in range(3):
    optimizer.zero_grad()
    model(inputs).square().mean().backward()
    optimizer.step()
model.eval()
after = model(inputs)
assert not torch.allclose(after, before), "training changes nothing"

with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()
    assert torch.equal(loaded(inputs), after), "the loaded adapter differs from the saved one"
merged = loaded.merge_and_unload()
assert type(merged[0]) is nn.Conv2d
torch.testing.assert_close(merged(inputs), after)
