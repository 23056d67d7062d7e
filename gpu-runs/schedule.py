"""Run jobs on the host's GPUs: schedule.py JOBS.py [-NAME ...] [+NAME ...] (skip / only)."""
import os, runpy, subprocess, sys, time
from pathlib import Path

spec = runpy.run_path(sys.argv[1])
jobs = spec["JOBS"]
skip = {a[1:] for a in sys.argv[2:] if a[0] == "-"}
only = [a[1:] for a in sys.argv[2:] if a[0] == "+"]
jobs = [j for j in jobs if j["name"] not in skip and (not only or j["name"] in only)]
out = Path("/tmp/q"); (out / "log").mkdir(parents=True, exist_ok=True)
n = int(os.environ.get("GPUS", 0)) or int(subprocess.run("nvidia-smi -L | wc -l", shell=True, capture_output=True, text=True).stdout or 0)
free = {g: 1.0 for g in range(n)}
jobs = [j for j in jobs if j.get("gpus", 1) <= n]
running = []
T0 = time.time()
def family(pid):  # workers of torchrun are in sessions of their own
    children = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True).stdout.split()
    return [pid, *(one for child in children for one in family(int(child)))]
def note(s):
    with open(out / "log" / "schedule.txt", "a") as f: f.write(f"{time.time()-T0:6.0f} {s}\n")
note(f"{n} GPUs, {len(jobs)} jobs")
while jobs or running:
    for r in list(running):
        p, j, gpus, t = r
        rc = p.poll()
        if rc is None and time.time() - t > j.get("limit", 400):
            subprocess.run(["kill", "-9", *map(str, family(p.pid))]); rc = p.wait()
        if rc is not None:
            running.remove(r)
            for g in gpus: free[g] += j.get("share", 1.0)
            note(f"end {j['name']} rc {rc} {time.time()-t:.0f} s")
    quiet = any(j.get("quiet") for _, j, _, _ in running)
    noisy = any(j.get("noisy") for _, j, _, _ in running)
    for j in list(jobs):
        want, share = j.get("gpus", 1), j.get("share", 1.0)
        if (j.get("quiet") and noisy) or (j.get("noisy") and quiet): continue
        if not all(Path(f).exists() for f in j.get("needs", [])): continue
        fit = [g for g in sorted(free, key=lambda g: free[g]) if free[g] >= share - 1e-6][:want]
        if len(fit) < want:
            if want > 1 and j.get("first"): break
            continue
        for g in fit: free[g] -= share
        env = dict(os.environ, CUDA_VISIBLE_DEVICES=",".join(map(str, fit)), TREE=j.get("tree", "/tmp/tree"), OUT=str(out), MASTER_PORT=str(29500 + len(jobs)), TORCH_EXTENSIONS_DIR=f"/tmp/ext/{fit[0]}", TRITON_CACHE_DIR=f"/tmp/triton/{fit[0]}", TORCHINDUCTOR_CACHE_DIR=f"/tmp/inductor/{j['name']}")
        log = open(out / "log" / f"{j['name']}.txt", "w")
        p = subprocess.Popen(["bash", "-c", ". /tmp/tree/.dev/pack/env.sh; cd $TREE; " + j["run"]], stdout=log, stderr=subprocess.STDOUT, env=env, start_new_session=True)
        note(f"start {j['name']} on {fit}")
        running.append((p, j, fit, time.time()))
        jobs.remove(j)
        quiet = quiet or bool(j.get("quiet")); noisy = noisy or bool(j.get("noisy"))
    time.sleep(0.5)
note("ALL DONE")
