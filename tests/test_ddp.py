"""Two processes with half a batch each against one with all of it; and a whole run of two."""

import json
import os
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch
from common import PHOTOS, ROOT, WRITTEN, lines
from PIL import Image

CAPTIONS = [
    "a dog and a cat",
    "a red car near a blue house",
    "running quickly",
    "a dog",
    "two men on a boat",
    "a dog and a tall tree",
    "a cat",
    "a red car",
]
# One step's contrast of each level, of a model whose batch norm does not look across the batch;
# and all its losses, which must be finite and find their way through DistributedDataParallel.
STEP = """
import sys
sys.path[:0] = sys.argv[1:3]
import torch
import hist
from common import options, record, samples_of

def step(base):
    o = options(data="x", base=base, batch_size=8)
    records = [record(caption, 25 * i) for i, caption in enumerate(sys.argv[3:])]
    samples = samples_of(o, records)
    torch.manual_seed(0)
    model = hist.MODELS[base](o, samples.tokenizer).eval()
    wrapped, teacher = model, hist.make_teacher(model)
    if hist.WORLD > 1:
        wrapped = torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    (batch,) = hist.loader(samples, o, 0, 8)
    assert len(batch["image"]) == 8 // hist.WORLD
    losses, figures = wrapped(batch, [*hist.LEVELS, "composition"], 0.5, 0, teacher)
    assert all(torch.isfinite(value) for value in (losses | figures).values())
    assert len(losses) == 9
    itc = {name: value for name, value in losses.items() if name.endswith("itc")}
    (sum(itc.values()) + 0 * sum(losses.values())).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    state = {"losses": {k: v.detach() for k, v in itc.items()}, "gradients": gradients}
    torch.save(state, f"{base}.{hist.WORLD}.{hist.RANK}.pt")

if hist.WORLD > 1:
    torch.distributed.init_process_group("gloo")
for base in hist.MODELS:
    step(base)
if hist.WORLD > 1:
    torch.distributed.destroy_process_group()
"""


def ranks(n, *command, cwd):
    """Start a command as n ranks of one group, as torchrun does; returns what they say."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    group, pipes = [], dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    for rank in range(n):
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(n)}
        environment = os.environ | where | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        how = dict(cwd=cwd, text=True, env=environment | {"OMP_NUM_THREADS": "1"})
        group.append(subprocess.Popen([sys.executable, *map(str, command)], **pipes, **how))
    said = [process.communicate(timeout=300) for process in group]
    assert all(process.returncode == 0 for process in group), said
    return said


@pytest.fixture(scope="module")
def stepped(tmp_path_factory):
    folder = tmp_path_factory.mktemp("step")
    (folder / "step.py").write_text(STEP)
    for n in (1, 2):
        ranks(n, "step.py", ROOT, ROOT / "tests", *CAPTIONS, cwd=folder)
    return folder


@pytest.mark.parametrize("base", ["albef", "blip"])
def test_contrast_of_two_ranks_is_that_of_one_in_value_and_gradient(stepped, base):
    names = [f"{base}.{which}.pt" for which in ("1.0", "2.0", "2.1")]
    one, *two = (torch.load(stepped / name, weights_only=True) for name in names)
    assert list(one["losses"]) == ["caption_itc", "phrase_itc", "subject_itc"]
    for rank in two:
        for name, value in one["losses"].items():
            torch.testing.assert_close(rank["losses"][name], value, rtol=1e-5, atol=1e-5)
        assert rank["gradients"].keys() == one["gradients"].keys() and len(one["gradients"]) > 40
        for name, value in one["gradients"].items():
            torch.testing.assert_close(rank["gradients"][name], value, rtol=1e-5, atol=1e-5)
    assert max(value.abs().max() for value in one["gradients"].values()) > 1e-2


def test_a_run_of_two_ranks(tmp_path):
    """Rank 0 alone logs, saves, evaluates and draws; both list what they could not read."""
    rows = []
    for i in range(20):
        pixels = np.random.default_rng(i).integers(0, 255, (40, 40, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
        row = {"image": f"{i}.png", "captions": [f"a red car and a dog number {i}"]}
        row["targets"] = [{"phrase": "a dog", "boxes": [[0, 0, 20, 40]]}]
        row["targets"].append({"phrase": "a red car", "boxes": [[20, 0, 40, 40]]})
        row["split"] = "val" if i > 15 else "train"
        rows.append(json.dumps(row))
    for name in ("3.png", "8.png"):
        (tmp_path / name).write_text("no picture")
    (tmp_path / "my.jsonl").write_text("\n".join(rows))
    command = [ROOT / "hist.py", "--data", "my.jsonl", *PHOTOS, "--accumulate", "2"]
    command += ["--base-steps", "2", "--save-every", "2", "--composition-start", "0"]
    (said, _), (other, _) = ranks(2, *command, cwd=tmp_path)
    assert other == "" and "pointing_phrases" in said and "r1_text_to_image_itm" in said
    assert "2 images could not be used" in said
    out = tmp_path / "out/my"
    found = {path.name for path in out.iterdir()}
    assert found == WRITTEN | {"base.pt", "skipped.jsonl"}
    metrics = lines(out / "metrics.jsonl")
    steps = [(row["run"], row["step"]) for row in metrics]
    expected = [("base", 1), ("base", 2)]
    expected += [(run, step) for run in ("baseline", "hist") for step in (1, 2, 3, 4)]
    assert steps == expected and "composition" in metrics[-1]
    first = {row["run"]: row["caption_itc"] for row in metrics if row["step"] == 1}
    assert first["baseline"] == first["hist"] != first["base"]
    hist_state = torch.load(out / "hist.pt", weights_only=True)
    assert hist_state["step"] == 4 and not any("module" in name for name in hist_state["model"])
