#!/usr/bin/env bash
# Issue 20, plan --measure, on a machine of 2 GPUs, in the repository's root, with $OUT set to a folder for results.
# One GPU and the GPU tests side by side (a GPU each), then TP=2. About 3.5 minutes; at most 5, by the limits below.
# Needs torch, megatron-core, TransformerEngine with flash attention, pytest; matplotlib for the pictures.
# PYTHON: the interpreter, by default python3.
set -u
PYTHON=${PYTHON:-python3}
export PYTHONPATH="$PWD:$PWD/examples/gpt${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 OMP_NUM_THREADS=1
export NCCL_NVLS_ENABLE=0 TORCH_NCCL_ASYNC_ERROR_HANDLING=1
mkdir -p "$OUT"
started=$SECONDS
MODEL="--num-layers 4 --hidden-size 4096 --ffn-hidden-size 14336 --num-attention-heads 32 --group-query-attention
    --num-query-groups 8 --seq-length 4096 --max-position-embeddings 4096 --micro-batch-size 1 --global-batch-size 2
    --vocab-size 128256 --tokenizer-type NullTokenizer --mock-data --bf16 --swiglu --disable-bias-linear
    --normalization RMSNorm --position-embedding-type rope --untie-embeddings-and-output-weights --attention-dropout 0
    --hidden-dropout 0 --lr 1e-4 --train-iters 100 --log-interval 1 --eval-interval 1000 --eval-iters 0
    --transformer-impl transformer_engine --attention-backend flash --no-create-attention-mask-in-dataloader
    --distributed-timeout-minutes 5 --save $OUT/must-not-be-written --save-interval 1 --use-tiled-linear"

part() { # part NAME SECONDS GPUS COMMAND...
    local name=$1 limit=$2 gpus=$3 from=$SECONDS; shift 3
    CUDA_VISIBLE_DEVICES=$gpus timeout --signal=TERM --kill-after=20 "$limit" "$@" >"$OUT/$name.log" 2>&1
    echo "exit $? after $((SECONDS - from)) s" >"$OUT/$name.status"
}
show() { echo "=== $1: $(cat "$OUT/$1.status") ($((SECONDS - started)) s in all)"; grep -v -i warn "$OUT/$1.log" | tail -n "$2"; }
measured() { # measured NAME SECONDS GPUS FLAGS...
    local name=$1 limit=$2 gpus=$3 picture=""; shift 3
    if "$PYTHON" -c "import matplotlib" 2>/dev/null; then picture="--picture $OUT/$name.png"; fi
    # shellcheck disable=SC2086
    part "$name" "$limit" "$gpus" "$PYTHON" -m megatron_tiling plan --measure $picture examples/gpt/pretrain_gpt.py $MODEL "$@"
}

measured tp2 230 "$CUDA_VISIBLE_DEVICES" --tensor-model-parallel-size 2 --sequence-parallel --tiled-tp-overlap 4
show tp2 70
[ -e "$OUT/must-not-be-written" ] && echo "WRITTEN: $OUT/must-not-be-written"
