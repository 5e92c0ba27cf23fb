#!/usr/bin/env bash
# Every benchmark, as artefacts in bench/results. $1: the folder of the environment's programs.
set -euo pipefail
cd "$(dirname "$0")/.."
bin=$1
mkdir -p .cache bench/results
"$bin/python" bench/host_kernels.py
[ -f .cache/demo-model/model.safetensors.index.json ] || "$bin/python" bench/make_model.py .cache/demo-model
"$bin/monde" bench .cache/demo-model -p 512 -n 64 -r 5 --baseline transformers:best \
  -o json --plot bench/results/whole-model.png > bench/results/whole-model.json
if "$bin/python" -c 'import sys, torch, cupy; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
  "$bin/python" -m bench.decode.layers
  "$bin/python" -m bench.prefill
  "$bin/python" -m bench.decode
  "$bin/python" -m bench.monde_hardware
fi
