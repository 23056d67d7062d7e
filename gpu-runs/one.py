import runpy
J = runpy.run_path("/tmp/tree/.dev/pack/jobs.py")
JOBS = [dict(name="whole-3", limit=150, needs=J["FLASH"], run="python3 -m benchmarks.whole_model --layers 3 --more --attention flash --repeats 20 --results $OUT --name whole-model-h100-fewer-tiles")]
