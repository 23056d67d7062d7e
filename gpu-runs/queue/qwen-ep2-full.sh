#!/usr/bin/env bash
# Longest context of a Qwen3-30B-A3B-shaped model with full recompute, up to 131072 tokens, 8 layers, two GPUs, EP=2.
# In the repository's root, with $OUT set.
# PYTHON: the interpreter, by default python. Files: $OUT/DATE-longest-context-qwen3-30b-a3b-ep2-full.{json,md,png}.
set -euo pipefail
mkdir -p "$OUT"
timeout 290 "${PYTHON:-python}" -m torch.distributed.run --standalone --nproc-per-node 2 \
    -m benchmarks.longest_context --expert-parallel 2 \
    --layers 8 --hidden-size 2048 --heads 32 --query-groups 4 --vocabulary 151936 \
    --experts 128 --top-k 8 --moe-ffn-hidden-size 768 --attention flash $CAP --sequence 131072 \
    --repeats 5 --time-limit 170 --results "$OUT" --name longest-context-qwen3-30b-a3b-ep2-full \
    --settings 'stock, full recompute' 'tiled: output alone, full recompute' 'tiled: keep 0, full recompute'
