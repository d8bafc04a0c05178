#!/usr/bin/env bash
# Measure one GPU in at most 9 minutes: bash benchmarks/gpu.sh [--output=DIR] [--small]
# Needs `pip install -c constraints.txt -e '.[cuda]'` in the Python that PYTHON names (.venv's), and torch with CUDA
# and transformers for the rows that compare with them.
set -euo pipefail
cd "$(dirname "$0")/.."
exec "${PYTHON:-.venv/bin/python}" benchmarks/gpu.py "$@"
