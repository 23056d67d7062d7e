#!/usr/bin/env bash
# Issue 21 on a machine of 4 GPUs, in the repository's root, with $OUT set: equal bits, then the benchmark.
# Each part has its own time limit, and its log in $OUT; a part that fails or hangs leaves the others.
# In all: about 3.5 minutes, at most 6. Needs torch, megatron-core, TransformerEngine and, for pictures, matplotlib.
set -u
export CUDA_DEVICE_MAX_CONNECTIONS=1 NCCL_NVLS_ENABLE=0 TORCH_SYMM_MEM_DISABLE_MULTICAST=1 NVSHMEM_DISABLE_NVLS=1
export UB_SKIPMC=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 OMP_NUM_THREADS=1
export TORCH_NCCL_ASYNC_ERROR_HANDLING=1 TORCH_NCCL_TRACE_BUFFER_SIZE=0
mkdir -p "$OUT/results"
started=$SECONDS
part() { # part NAME SECONDS COMMAND...
    local name=$1 limit=$2 from=$SECONDS; shift 2
    timeout --signal=TERM --kill-after=35 "$limit" "$@" >"$OUT/$name.log" 2>&1
    local status=$?
    echo "=== $name: exit $status after $((SECONDS - from)) s ($((SECONDS - started)) s in all)"
    grep -v -i warn "$OUT/$name.log" | tail -n "${TAIL:-12}"
}
ranks() { local count=$1; shift; python3 -m torch.distributed.run --standalone --nproc-per-node "$count" "$@"; }
export -f ranks

nvidia-smi topo -m >"$OUT/topology.txt" 2>&1
part bits-4 60 bash -c 'ranks 4 -m tests.tiles.check_overlap_gpu auto'
part bits-4-nccl 50 bash -c 'ranks 4 -m tests.tiles.check_overlap_gpu collectives'
TAIL=90 part bench-4 150 bash -c 'ranks 4 -m benchmarks.tp_overlap --sizes 8192x28672 4096x14336 --tokens 8192 16384 --repeats 15 --results "$OUT/results"'
TAIL=40 part bench-4-userbuffers 70 bash -c 'ranks 4 -m benchmarks.tp_overlap --sizes 8192x28672 --tokens 8192 --repeats 15 --userbuffers --results "$OUT/results"'
ls -la "$OUT/results"
