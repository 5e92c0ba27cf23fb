#!/usr/bin/env bash
# Text from the shipped model, then two models timed next to transformers. $1: the folder of the environment's programs.
set -euo pipefail
cd "$(dirname "$0")/.."
bin=$1
out=demo-out
mkdir -p $out .cache
say() { printf '\n\033[1m%s\033[0m\n' "$*" >&2; }

say '1/3  Text from assets/moe-3m (2.9M parameters: expect local sense only)'
prompt='It is a truth universally acknowledged, that'
text=$("$bin/monde" generate assets/moe-3m "$prompt" -n 60 --temperature 0.7 --seed 3) # whole, lest progress bars cut in
printf '\n%s%s\n' "$prompt" "$text"

say '2/3  assets/moe-3m next to transformers'
"$bin/monde" bench assets/moe-3m -p 512 -n 32 -r 3 --baseline transformers:best --plot $out/moe-3m.png

say '3/3  A model of 1.05 B parameters in bf16, made on the spot, next to transformers'
[ -f .cache/demo-model/model.safetensors.index.json ] || "$bin/python" bench/make_model.py .cache/demo-model
"$bin/monde" bench .cache/demo-model -p 512 -n 16 -r 2 --baseline transformers:best --plot $out/demo-model.png \
  | tee $out/demo-model.md

say "Plots: $out/moe-3m.png $out/demo-model.png; table: $out/demo-model.md"
