# A run that dies of memory, and the one that its last line asks for.
set -u
M=$(nvidia-smi --query-gpu=memory.total --format=csv,noheader,nounits | head -1)
S=32768; [ "$M" -gt 100000 ] && S=126976
ARGS="--num-layers 8 --hidden-size 4096 --ffn-hidden-size 14336 --num-attention-heads 32 --group-query-attention --num-query-groups 8 --swiglu --disable-bias-linear --normalization RMSNorm --position-embedding-type rope --untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0 --vocab-size 128255 --bf16 --lr 1e-4 --seed 1234 --mock-data --tokenizer-type NullTokenizer --train-iters 3 --log-interval 1 --eval-interval 1000000 --eval-iters 0 --micro-batch-size 1 --global-batch-size 1 --seq-length $S --max-position-embeddings $S --transformer-impl transformer_engine --attention-backend flash --no-create-attention-mask-in-dataloader --cross-entropy-loss-fusion"
export CUDA_DEVICE_MAX_CONNECTIONS=1
run() { python3 -m torch.distributed.run --standalone --nproc-per-node 1 -m megatron_tiling examples/gpt/pretrain_gpt.py $ARGS "$@"; }
mkdir -p $OUT/oom
echo "GPU of $M MiB, $S tokens" > $OUT/oom/about.txt
run --use-tiled-linear > $OUT/oom/first.txt 2>&1; echo "first rc $?" >> $OUT/oom/about.txt
FLAGS=$(grep -o "What fits best, at [0-9.]*: .*, in the place" $OUT/oom/first.txt | head -1 | sed 's/.*[0-9]: //; s/, in the place//')
echo "flags: $FLAGS" >> $OUT/oom/about.txt
[ -n "$FLAGS" ] && { run $FLAGS > $OUT/oom/second.txt 2>&1; echo "second rc $?" >> $OUT/oom/about.txt; grep -E "iteration +3/|max alloc" $OUT/oom/second.txt | tail -3 >> $OUT/oom/about.txt; }
grep "megatron_tiling: rank" $OUT/oom/first.txt >> $OUT/oom/about.txt; cat $OUT/oom/about.txt
