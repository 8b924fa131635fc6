"""Two processes with half a batch each, against one process with all of it; and a whole run under torchrun."""
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
STEP = '''
import sys
import numpy as np, torch
sys.path.insert(0, sys.argv[1])
import hist
if hist.RANKS > 1:
    torch.distributed.init_process_group("gloo")
rng = np.random.default_rng(0)
captions = ["a dog and a cat", "a red car near a blue house", "running quickly", "a dog", "two men on a boat", "a dog and a tall tree", "a cat", "a red car"]
records = [{"image": rng.integers(0, 255, (32, 32, 3)).astype(np.uint8), "captions": [c], "targets": []} for c in captions]
if len(sys.argv) > 4:                                           # a picture that is not there
    records[2]["image"] = records[6]["image"] = "nowhere.jpg"
o = hist.Options(**{**hist.PHOTOS, "data": "x", "base": sys.argv[3], "vit": "vit_tiny_patch16_224", "image_size": 32, "width": 64, "text_layers": 1, "fusion_layers": 2, "batch_size": 8})
torch.manual_seed(0)
vocabulary = hist.build_vocabulary(captions, 100)
model, teacher = hist.HIST(o, vocabulary), hist.HIST(o, vocabulary).eval()
samples = hist.Samples(records, vocabulary, o)
whole = torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=True) if hist.RANKS > 1 else model
every = [samples[i] for i in range(8)]
assert sum(s["image"] is not None for s in every) == 8 // hist.RANKS
torch.manual_seed(1)
losses, _ = whole(hist.collate(every), hist.LEVELS, 0.5, 0, teacher)
sum(losses.values()).backward()
values = torch.stack(list(losses.values())).detach()
if hist.RANKS > 1:
    torch.distributed.all_reduce(values)
    values /= hist.RANKS
if not hist.RANK:
    torch.save({"losses": dict(zip(losses, values)), "gradients": {k: p.grad for k, p in model.named_parameters() if p.grad is not None}}, sys.argv[2])
if hist.RANKS > 1:
    del whole, losses                                           # what outlives the group can abort the process as it ends
    torch.distributed.destroy_process_group()
'''


def ranks(n, *command, cwd):
    """Start a command as n ranks of one group, as torchrun does; returns what they say."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    group = [subprocess.Popen([sys.executable, *map(str, command)], cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={
        **os.environ, "RANK": str(r), "LOCAL_RANK": str(r), "WORLD_SIZE": str(n), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"})
        for r in range(n)]
    said = [p.communicate(timeout=300) for p in group]
    assert all(p.returncode == 0 for p in group), said
    return said


@pytest.mark.parametrize("how", [["albef"], ["albef", "damaged"], ["blip"]])
def test_two_ranks_of_half_a_batch_give_the_losses_and_gradients_of_one(tmp_path, how):
    (tmp_path / "step.py").write_text(STEP)
    for n in (1, 2):
        ranks(n, tmp_path / "step.py", ROOT, f"{n}.pt", *how, cwd=tmp_path)
    one, two = (torch.load(tmp_path / f"{n}.pt", weights_only=True) for n in (1, 2))
    assert len(one["losses"]) == 9 and list(one["losses"]) == list(two["losses"])
    for k, v in one["losses"].items():
        torch.testing.assert_close(two["losses"][k], v, rtol=1e-5, atol=1e-5, msg=k)
    assert one["gradients"].keys() == two["gradients"].keys() and len(one["gradients"]) > 50
    for k, v in one["gradients"].items():
        torch.testing.assert_close(two["gradients"][k], v, rtol=1e-5, atol=1e-5, msg=k)


def test_a_run_of_two_ranks(tmp_path):
    """The first steps have the losses of one process (same images, same draws); rank 0 alone logs, saves and evaluates."""
    from PIL import Image
    with open(tmp_path / "my.jsonl", "w") as f:
        for i in range(20):
            Image.fromarray(np.random.default_rng(i).integers(0, 255, (40, 40, 3)).astype(np.uint8)).save(tmp_path / f"{i}.png")
            f.write(json.dumps({"image": f"{i}.png", "captions": [f"a red car and a dog number {i}"]}) + "\n")
    command = [ROOT / "hist.py", *("--data my.jsonl --vit vit_tiny_patch16_224 --image-size 32 --width 64 --text-layers 1 --fusion-layers 2 --workers 0 "
                                   "--batch-size 8 --accumulate 2 --steps 4 --eval-images 4 --save-every 2 --device cpu").split()]
    alone, both = ranks(1, *command, "--out", "one", cwd=tmp_path), ranks(2, *command, "--out", "two", cwd=tmp_path)
    assert "R@1" in both[0][0] and both[1][0] == "" and "R@1" in alone[0][0]
    one, two = ([json.loads(line) for line in open(tmp_path / name / "metrics.jsonl")] for name in ("one", "two"))
    assert len(one) == len(two) == 10 and all((tmp_path / "two" / name).exists() for name in ("baseline.pt", "hist.pt", "results.json"))
    for a, b in zip(one[:3], two[:3]):
        assert a["losses"] == pytest.approx(b["losses"], abs=1e-3)
