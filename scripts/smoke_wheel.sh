#!/usr/bin/env bash
# Build the wheel, unpack it into a folder of its own and use it outside the repository.
#   scripts/smoke_wheel.sh [PYTHON]     an interpreter that has the `dev` extra
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
python=${1:-python3}
case $python in */*) python=$(cd "$(dirname "$python")" && pwd)/$(basename "$python") ;; esac
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

"$python" -m build --wheel --no-isolation --outdir "$work/dist" "$root" >"$work/log" 2>&1 || {
    cat "$work/log"
    exit 1
}
"$python" -m pip install -qq --disable-pip-version-check --no-deps --no-index --target "$work/site" "$work"/dist/*.whl

# PYTHONPATH precedes the repository that an editable install puts on the path.
mkdir "$work/run"
cd "$work/run"
export HF_HUB_OFFLINE=1 PYTHONPATH=$work/site
"$python" "$root/scripts/smoke_wheel.py" "$work/site" "$root"
"$work/site/bin/flora" --help >"$work/log"
echo "$(basename "$work"/dist/*.whl), $(du -k "$work"/dist/*.whl | cut -f1) KiB: works outside the tree"
