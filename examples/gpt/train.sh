#!/usr/bin/env bash
# Train a small GPT twice, with tiled linear layers and dense, and lay the two loss curves over each other.
#
#   examples/gpt/train.sh [MEGATRON FLAGS for both runs, e.g. --train-iters 400]
#   TILING="--use-tiled-linear --tile-factor 8" examples/gpt/train.sh
#   READY_PYTHON=python3 examples/gpt/train.sh     with an environment that has everything: no .venv
#   TRAIN_DATA=PREFIX TRAIN_OUT=FOLDER examples/gpt/train.sh     data of prepare_data.py; where logs and picture go
#
# Sets itself up first: .venv, and data from Python's own standard library. Two GPUs or more: tensor parallelism
# over two of them, bf16, NCCL. One GPU: no tensor parallelism. None: two processes on the CPU, fp32, gloo, and a
# smaller model. Leaves the logs and loss.png in examples/gpt/out.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
if [[ -z ${READY_PYTHON:-} ]]; then
    tools/setup.sh
fi

here=examples/gpt
data=${TRAIN_DATA:-$here/data/stdlib}
out=${TRAIN_OUT:-$here/out}
python=${READY_PYTHON:-.venv/bin/python}
mkdir -p "$out"
export PYTHONWARNINGS=ignore PYTHONUNBUFFERED=1
export CUDA_DEVICE_MAX_CONNECTIONS=1 # Megatron asks for it where TP > 1

if [[ ! -e $data.model ]]; then # written last
    echo "== data: the source of Python's standard library"
    $python $here/prepare_data.py --output $data --vocab-size 4096 --overwrite
fi

gpus=$($python -c 'import torch; print(torch.cuda.device_count())')
if ((gpus >= 1)); then
    processes=$((gpus >= 2 ? 2 : 1))
    size=(--num-layers 8 --hidden-size 1024 --ffn-hidden-size 2816 --num-attention-heads 16 --kv-channels 64
        --seq-length 1024 --max-position-embeddings 1024 --micro-batch-size 8 --global-batch-size 8 --bf16)
else
    processes=2
    cores=$(getconf _NPROCESSORS_ONLN)
    export OMP_NUM_THREADS=$((cores > 2 ? cores / 2 : 1))
    size=(--num-layers 4 --hidden-size 256 --ffn-hidden-size 704 --num-attention-heads 8 --kv-channels 32
        --seq-length 64 --max-position-embeddings 64 --micro-batch-size 16 --global-batch-size 16)
fi
model=(--swiglu --normalization RMSNorm --group-query-attention --num-query-groups 4
    --position-embedding-type rope --disable-bias-linear --untie-embeddings-and-output-weights
    --attention-dropout 0 --hidden-dropout 0)
# Plain torch, since neither TransformerEngine nor apex need be there; both runs alike, to compare like with like.
plain=(--transformer-impl local --no-persist-layer-norm --no-rope-fusion --no-masked-softmax-fusion
    --no-gradient-accumulation-fusion)
training=(--train-iters 220 --lr 1e-3 --min-lr 1e-4 --lr-decay-style cosine --lr-warmup-iters 20
    --weight-decay 0.1 --adam-beta2 0.95 --clip-grad 1.0 --seed 1234
    --eval-interval 1000000 --eval-iters 0 --log-interval 1)
corpus=(--data-path $data --split 990,10,0
    --tokenizer-type GPTSentencePieceTokenizer --tokenizer-model $data.model)

train() { # train NAME FLAGS...: the whole log goes to a file, the table and the loss to the terminal
    local name=$1
    shift
    echo "== $name: tensor parallel size $processes, $gpus GPUs"
    if ! $python -m torch.distributed.run --standalone --nproc-per-node $processes \
        -m megatron_tiling $here/pretrain_gpt.py --tensor-model-parallel-size $processes \
        "${size[@]}" "${model[@]}" "${plain[@]}" "${training[@]}" "${corpus[@]}" "$@" 2>&1 |
        tee "$out/$name.log" | $python $here/plot_loss.py follow; then
        grep -E '(Error|Exception|error): ' "$out/$name.log" | grep -v ChildFailed | sort -u | head -n 5 || true
        echo "train.sh: the $name run failed; its log is $out/$name.log" >&2
        exit 1
    fi
}

# So small an MLP would be one tile by itself.
read -ra tiling <<<"${TILING:---use-tiled-linear --tile-factor 4}"
train tiled "${tiling[@]}" "$@"
train dense "$@"
$python $here/plot_loss.py compare "$out/tiled.log" "$out/dense.log" "$out/loss.png"
