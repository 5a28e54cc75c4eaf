#!/usr/bin/env bash
# The whole journey on drawn plates and a tiny random model: what `make demo` runs. Needs `intervale` on PATH; writes demo-out/.
set -euo pipefail
cd "$(dirname "$0")/.."
rm -rf demo-out && mkdir demo-out

step() {
  printf '\n$ %s\n' "$*"
  "$@"
}

step python demo/draw.py demo-out/plates
step intervale init demo-out/base --preset tiny
step intervale prepare foodieqa demo-out/plates demo-out/data
step intervale check demo-out/data --model demo-out/base
step intervale evaluate demo-out/base demo-out/data/eval.jsonl --out demo-out/before --mode likelihood
step intervale train recipes/demo.yaml
step intervale evaluate demo-out/run demo-out/data/eval.jsonl --out demo-out/after --mode likelihood
step intervale compare demo-out/before demo-out/after --out demo-out/report
step intervale export demo-out/run demo-out/tuned --format hf
step intervale chat demo-out/tuned -i demo-out/plates/images/plate-000.png "图片中的食物通常属于哪个菜系?"

printf '(plate 000 is 川菜; its name was made up, so no model can know it)\n'
printf '\nopen demo-out/report/report.html and demo-out/run/loss.png to see it\n'
