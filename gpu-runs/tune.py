import itertools, statistics, random, torch
from megatron_tiling.tiles.kernels import softmax as k
from megatron_tiling.tiles.softmax import LogitScale, Statistics, TokenGradients
dev = "cuda"
def ms(run, n=20):
    for _ in range(3): run()
    ts = []
    for _ in range(n):
        a, b = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        a.record(); run(); b.record(); b.synchronize(); ts.append(a.elapsed_time(b))
    return statistics.median(ts)
print(torch.cuda.get_device_name())
for tokens, width in ((8192, 16384), (8192, 9216), (8192, 12288), (8192, 30208), (4096, 20480)):
    z = torch.randn(tokens, width, device=dev, dtype=torch.bfloat16)
    cols = torch.randint(0, width, (tokens, 1), device=dev)
    best = []
    for block, warps in itertools.product((2048, 4096, 8192, 16384, 32768), (4, 8, 16, 32)):
        if block // warps > 2048 or block // warps < 128: continue
        row = []
        for weighted in (False, True):
            s = Statistics.of_no_logits(cols, torch.float32, weighted=weighted)
            k.STATISTICS_BLOCK, k.STATISTICS_WARPS = block, warps
            t = ms(lambda: k.update_statistics(z, 0, cols, LogitScale(), s))
            row.append(t)
        best.append((row, block, warps))
    gb = z.numel() * 2 / 1e9
    print("statistics", tokens, width, f"{gb:.2f} GB")
    for row, block, warps in sorted(best)[:8] + [b for b in best if b[1:] == (4096, 8)]:
        print(f"   {block:6d} {warps:3d}  {row[0]:.3f} ms {gb/row[0]:.2f} TB/s   weighted {row[1]:.3f} ms {gb/row[1]:.2f} TB/s")
    lse = torch.full((tokens,), 12.0, device=dev); g = torch.rand(tokens, 1, device=dev); e = torch.rand(tokens, device=dev)
    best = []
    for block, warps in itertools.product((2048, 4096, 8192, 16384), (4, 8, 16)):
        if block // warps > 1024 or block // warps < 128: continue
        k.GRADIENT_BLOCK, k.GRADIENT_WARPS = block, warps
        row = []
        for ent in (None, e):
            gr = TokenGradients(lse, g, ent, e if ent is not None else None)
            row.append(ms(lambda: k.logits_to_gradient(z, z, 0, cols, LogitScale(), gr)))
        z.normal_()
        best.append((row, block, warps))
    print("gradient", tokens, width)
    for row, block, warps in sorted(best)[:5] + [b for b in best if b[1:] == (4096, 8)]:
        print(f"   {block:6d} {warps:3d}  {row[0]:.3f} ms {2*gb/row[0]:.2f} TB/s   entropy {row[1]:.3f} ms {2*gb/row[1]:.2f} TB/s")
k.STATISTICS_BLOCK, k.STATISTICS_WARPS, k.GRADIENT_BLOCK, k.GRADIENT_WARPS = 4096, 8, 4096, 8
from megatron_tiling import tiled_scores
hidden = torch.randn(8192, 1, 4096, device=dev, dtype=torch.bfloat16)
weight = torch.randn(128256, 4096, device=dev, dtype=torch.bfloat16) / 64
labels = torch.randint(0, 128256, (8192, 1), device=dev)
with torch.no_grad():
    run = lambda: tiled_scores(hidden, weight, labels, entropy=True)
    for _ in range(5): run()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]) as p:
        for _ in range(3): run()
        torch.cuda.synchronize()
    spans = sorted((e.time_range.start, e.time_range.end) for e in p.events() if e.device_type == torch.autograd.DeviceType.CUDA)
    busy, end = 0.0, spans[0][0]
    for a, b in spans: busy += max(0.0, b - max(a, end)); end = max(end, b)
    print("forward x3: busy", busy / 1000, "of", (end - spans[0][0]) / 1000)
    for e in sorted(p.key_averages(), key=lambda e: -e.device_time_total)[:10]: print("  ", e.key[:80], e.count, e.device_time_total / 1000)
    logits = torch.empty(8192, 128256, device=dev, dtype=torch.bfloat16)
    whole = lambda: torch.mm(hidden[:, 0], weight.t(), out=logits)
    for name, r in (("scores", run), ("gemm", whole), ("scores", run), ("gemm", whole)):
        for _ in range(5): r()
        a, b = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        a.record()
        for _ in range(30): r()
        b.record(); b.synchronize(); print(name, a.elapsed_time(b) / 30)
from transformer_engine.pytorch.constants import DType
from transformer_engine.pytorch.tensor.float8_tensor import Float8Quantizer
from megatron_tiling.resident.fp8_operands import WeightCopies
def q(): return Float8Quantizer(torch.tensor(200.0, device="cuda"), torch.zeros(1, device="cuda"), DType.kFloat8E4M3)
for h, f, tile in ((4096, 14336, 3584), (4096, 14336, 1792), (8192, 28672, 3584)):
    w = torch.randn(2 * f, h, device=dev, dtype=torch.bfloat16)
    ranges = [slice(tile, 2 * tile), slice(f + tile, f + 2 * tile)]
    copies = WeightCopies(q(), hold=False); copies.note(w)
    theirs = q(); theirs.internal = True
    def te(columns):
        theirs.set_usage(rowwise=True, columnwise=columns)
        return [theirs(w[r]) for r in ranges]
    for columns in (False, True):
        a, b = ms(lambda: copies.rows(w, ranges, columnwise=columns), 30), ms(lambda: te(columns), 30)
        gb = 2 * tile * h * (3 + columns) / 1e9
        print(f"cast of gate's and up's {tile} rows of {h}, columns {columns}: ours {a:.4f} ms {gb/a:.2f} TB/s, TransformerEngine's two, not joined {b:.4f} ms")
    w2 = torch.randn(h, f, device=dev, dtype=torch.bfloat16)
    copies = WeightCopies(q(), hold=False); copies.note(w2)
    a = ms(lambda: copies.columns(w2, slice(tile, 2 * tile)), 30)
    def te2():
        theirs.set_usage(rowwise=True, columnwise=True)
        return theirs(w2[:, tile:2 * tile].contiguous())
    print(f"columns of {tile} features of fc2: ours {a:.4f} ms, TransformerEngine's with a copy {ms(te2, 30):.4f} ms")
