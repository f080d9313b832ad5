#!/usr/bin/env bash
# Everything that continuous integration runs, in order; it stops at the first failure. `make test` prepares the environment.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export OMP_NUM_THREADS=1 MPLBACKEND=agg WANDB_MODE=offline HF_HUB_OFFLINE=1

stage() { printf '\n=== %s (%d s so far)\n' "$1" "$SECONDS"; }
copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT

stage "modules are in step with the notebooks, notebooks are clean"
python -c 'import nbdev; print("nbdev", nbdev.__version__)'
cp -RL settings.ini nbs looped_nbs "$copy"  # compared with a copy: works in a dirty tree and without git
(cd "$copy" && nbdev_export && nbdev_clean)
diff -r -x __pycache__ looped_nbs "$copy/looped_nbs" || { echo 'run nbdev_export and commit the modules'; exit 1; }
diff -rq -x .ipynb_checkpoints nbs "$copy/nbs" || { echo 'run nbdev_clean and commit the notebooks'; exit 1; }

stage "ruff"
python -m ruff check looped_nbs tests setup.py

stage "notebooks"
nbdev_test --n_workers 2 --timing

stage "pages"
python -m looped_nbs.tools.docs

if command -v nvcc > /dev/null; then
  stage "CUDA sources"
  python -m looped_nbs.tools.doctor
fi

stage "tests"
python -m pytest tests -q "$@"
