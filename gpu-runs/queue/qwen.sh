#!/usr/bin/env bash
# Longest context of a Qwen3-30B-A3B-shaped model, 4 layers, one GPU. In the repository's root, with $OUT set.
# PYTHON: the interpreter, by default python. Files: $OUT/DATE-longest-context-qwen3-30b-a3b.{json,md,png}.
set -euo pipefail
mkdir -p "$OUT"
timeout 290 "${PYTHON:-python}" -m benchmarks.longest_context \
    --layers 4 --hidden-size 2048 --heads 32 --query-groups 4 --vocabulary 151936 \
    --experts 128 --top-k 8 --moe-ffn-hidden-size 768 --attention flash $CAP --sequence 131072 \
    --repeats 4 --time-limit 170 --results "$OUT" --name longest-context-qwen3-30b-a3b \
    --settings stock 'stock, recompute moe_act' 'stock, recompute moe' 'stock, full recompute' \
    'tiled: output alone' 'tiled: output alone, recompute moe' 'tiled: default' 'tiled: keep 0'
