#!/usr/bin/env bash
# The GPU list in one go; see gpu.py. Uses this very checkout, whatever its folder is called and whatever is installed.
#
#   benchmarks/gpu.sh [FOLDER]             results to FOLDER (gpu_results), after every item
#   benchmarks/gpu.sh --dry-run [FOLDER]   every item at a tiny size on the CPU
#   PYTHON=.venv/bin/python benchmarks/gpu.sh ...
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
links=$(mktemp -d "${TMPDIR:-/tmp}/vidgen-gpu.XXXXXX")
trap 'rm -rf "$links"' EXIT
ln -s "$root" "$links/vidgen"
export PYTHONPATH=$links${PYTHONPATH:+:$PYTHONPATH}
# A step at full size fills the card: pieces that do not fit together would cost what they leave between them.
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
"${PYTHON:-python3}" -m vidgen.benchmarks.gpu "$@"
