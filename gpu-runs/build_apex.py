import sys
from pathlib import Path
from torch.utils.cpp_extension import load
root, out = Path(sys.argv[1]), Path(sys.argv[2])
out.mkdir(parents=True, exist_ok=True)
names = ("fused_weight_gradient_dense.cpp", "fused_weight_gradient_dense_cuda.cu", "fused_weight_gradient_dense_16bit_prec_cuda.cu")
load("fused_weight_gradient_mlp_cuda", [str(root / "csrc/megatron" / n) for n in names], extra_include_paths=[str(root / "csrc")],
     extra_cflags=["-O3"], extra_cuda_cflags=["-O3", "-U__CUDA_NO_HALF_OPERATORS__", "-U__CUDA_NO_HALF_CONVERSIONS__",
     "--expt-relaxed-constexpr", "--expt-extended-lambda", "--use_fast_math"], build_directory=str(out), verbose=False)
