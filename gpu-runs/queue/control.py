"""Dense from dense: is the stack itself exact after a resume? And tiled from tiled twice."""
import tempfile
from pathlib import Path
from tests.support.training import losses
import os, sys
if sys.argv[1] == "te":
    import tests.trainer.test_training_gpu as t
    def train(kind, extra, folder): return losses(t.train("distributed optimizer", kind, extra, folder))
else:
    import tests.trainer.test_apex_gpu as t
    def train(kind, extra, folder): return t.train(kind, extra, folder)
folder = Path(tempfile.mkdtemp())
whole = train("dense", ["--save", str(folder / "saved"), "--save-interval", "10"], folder)
print("whole", whole[10:])
print("again", train("again", ["--load", str(folder / "saved"), "--ckpt-step", "10"], folder), flush=True)
