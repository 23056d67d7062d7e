"""apex's amp_C and fused_layer_norm_cuda, beside its Python: build_apex_all.py SOURCE OUT."""
import shutil, sys, threading
from pathlib import Path
from torch.utils.cpp_extension import load
root, out = Path(sys.argv[1]), Path(sys.argv[2])
out.mkdir(parents=True, exist_ok=True)
shutil.copytree(root / "apex", out / "apex", dirs_exist_ok=True)
csrc = root / "csrc"
names = {
    "amp_C": ["amp_C_frontend.cpp", *sorted(f.name for f in csrc.glob("multi_tensor_*.cu")), "update_scale_hysteresis.cu"],
    "fused_layer_norm_cuda": ["layer_norm_cuda.cpp", "layer_norm_cuda_kernel.cu"],
}
def build(name):
    place = out / f"build_{name}"; place.mkdir(exist_ok=True)
    load(name, [str(csrc / n) for n in names[name]], extra_include_paths=[str(csrc)], extra_cflags=["-O3"],
         extra_cuda_cflags=["-O3", "--use_fast_math"], build_directory=str(place), verbose=False)
    shutil.copy(place / f"{name}.so", out)
threads = [threading.Thread(target=build, args=(name,)) for name in names]
for t in threads: t.start()
for t in threads: t.join()
print("built", sorted(p.name for p in out.glob("*.so")))
