#!/usr/bin/env bash
# The journey at full size on one GPU: InternVL2-2B shapes with random weights, the embedded drawings, LoRA in bfloat16. It shows that every
# step runs there and what each takes; the weights are random, so the answers mean nothing. Needs about 20 GB of disk.
#   bash bench/gpu_journey.sh WORK_FOLDER
set -euo pipefail
cd "$(dirname "$0")/.."
work=$1
mkdir -p "$work"
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}"

step() {
  printf '\n$ %s\n' "$*"
  local begun=$SECONDS
  "$@"
  printf '[%s s]\n' $((SECONDS - begun))
}

cat > "$work/recipe.yaml" <<YAML
model: $work/base
out: $work/run
data: {train: $work/data/train.jsonl, eval: $work/data/eval.jsonl, max_tiles: 6, min_tiles: 4, workers: 8}
lora: {rank: 128, alpha: 256, dropout: 0.05, targets: llm+head}
train: {max_steps: 20, batch_size: 4, accumulation: 2, learning_rate: 3.0e-5, save_steps: 10}
YAML

python -c "import torch; print(torch.__version__, torch.cuda.get_device_name())"
step python -m intervale doctor
step python -m intervale init "$work/base" --preset internvl2-2b
step python -m intervale prepare foodieqa foodemoji "$work/data"
step python -m intervale train "$work/recipe.yaml" --dry-run
step python -m intervale train "$work/recipe.yaml"
step python -m intervale train "$work/recipe.yaml" --out "$work/live" --set train.features=live --set train.checkpointing=on --set train.max_steps=6
step python -m intervale evaluate "$work/run" "$work/data/eval.jsonl" --out "$work/after" --limit 64 --mode likelihood
step python -m intervale evaluate "$work/run" "$work/data/eval.jsonl" --out "$work/strict" --limit 4 --max-new-tokens 16
step python -m intervale export "$work/run" "$work/tuned" --format hf
step python -m intervale chat "$work/tuned" -i "$(find "$work/data/images" -type f | sort | head -1)" "图片中的食物通常属于哪个菜系?" --max-new-tokens 16
step python -m intervale info "$work/tuned"
