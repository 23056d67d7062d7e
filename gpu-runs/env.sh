export PYTHONPATH=$TREE:$TREE/examples/gpt:/tmp/sp/site-packages:/tmp/sp/site-packages/nvidia_cutlass_dsl/dsl_packages
export PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 TORCH_CUDA_ARCH_LIST=9.0a OMP_NUM_THREADS=4
export LD_LIBRARY_PATH=$(python3 -c "import nvidia.cudnn as c; print(list(c.__path__)[0])")/lib:$LD_LIBRARY_PATH  # the cuDNN that torch was built with
export CAP=$(nvidia-smi --query-gpu=memory.total --format=csv,noheader,nounits | awk 'NR==1 && $1>100000 {print "--gpu-memory-gib 79.2"}')
