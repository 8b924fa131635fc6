"""A night's run as its own processes: kills, Ctrl-C, damaged photographs, too little memory."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from common import COCO_MINI, PHOTOS, ROOT, SMALL, coco_folder, contents, lines, refused
from PIL import Image
from test_data import READABLE, UNREADABLE, damage

import hist

# ------------------------------------------------------------------------------------- bad data
COCO = ["--data", "coco", "--root", "coco", *PHOTOS]


def damaged(root):
    """Damage eleven images of each split, each in another way: {path: whether it can be read}."""
    found = {}
    for split in ("train", "val"):
        paths = sorted((root / f"{split}2017").glob("*.jpg"))
        for path, how in zip(paths, UNREADABLE + READABLE):
            damage(path, how)
            found[path] = how in READABLE
    return found


def listed_as_damaged(found):
    """Whether skipped.jsonl lists the pictures that cannot be read, and no other."""
    rows = lines("out/coco/skipped.jsonl")
    for path, readable in found.items():
        names = (path.name, path.parent.name)
        by_path = [row for row in rows if all(name in row["which"] for name in names)]
        by_name = [row for row in rows if f"no file {path.name}" in row["why"]]
        assert bool(by_path or by_name) != readable, path
    return {row["which"] for row in rows if row["kind"] == "image"}


def test_a_run_on_damaged_data_goes_on_without_it_and_stops_above_a_limit(here, capsys):
    coco_folder(here / "coco", 16)
    found = damaged(here / "coco")
    hist.main([*COCO, "--steps", "6", "--max-bad", "0.9"])
    listed = listed_as_damaged(found)
    said = capsys.readouterr().out
    assert f"{len(listed)} images could not be used" in said
    assert "r1_text_to_image" in said and "out/coco/skipped.jsonl" in said
    before = contents("out/coco")
    said = refused(capsys, *COCO, "--max-bad", "0.1")
    assert "images cannot be used, more than --max-bad 0.1" in said
    assert "out/coco/new.skipped.jsonl lists them" in said
    after = contents("out/coco")
    assert after.pop("new.skipped.jsonl") and after == before  # the run there is as it was
    hist.main([*COCO, "--steps", "2", "--levels", "caption", "--max-bad", "0.9"])
    assert "new.skipped.jsonl" not in contents("out/coco")
    assert listed_as_damaged(found) == listed


@pytest.mark.skipif(not COCO_MINI.exists(), reason="needs coco-mini")
def test_a_run_on_damaged_photographs_with_workers(here, capsys):
    shutil.copytree(COCO_MINI, here / "coco")
    for path in here.rglob("*"):
        path.chmod(0o755)
    found = damaged(here / "coco")
    hist.main([*COCO, "--steps", "11", "--workers", "1", "--eval-images", "12"])
    listed = {row["which"] for row in lines("out/coco/skipped.jsonl")}
    bad = [str(path.relative_to(here)) for path, readable in found.items() if not readable]
    there = [name for name in bad if "train2017" in name and Path(name).exists()]
    assert len(there) == 4 and set(there) <= listed
    assert "pointing_phrases" in capsys.readouterr().out


# ---------------------------------------------------------------------------------- nothing lost
RUN = [sys.executable, ROOT / "hist.py", *SMALL, "--image-size", "24", "--eval-images", "4"]
RUN += "--vit-steps 2 --base-steps 2 --steps 6 --save-every 2".split()
RUN += "--composition-start 0.4 --out run".split()
RESUME = [sys.executable, ROOT / "hist.py", "--resume", "--out", "run", "--device", "cpu"]
KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
import hist
at, save, replace, saves = int(sys.argv[2]), hist.torch.save, os.replace, []

def torch_save(data, file):
    saves.append(1)
    if len(saves) == at:  # half of it is written
        file.write(b"half a checkpoint")
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    save(data, file)

hist.torch.save = torch_save
hist.main(sys.argv[3:])
"""


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    hist.main([*RUN[2:-1], str(folder / "run")])
    return folder / "run"


def assert_same_end(one, other):
    """Metrics, results and weights of two runs are equal, bit for bit."""
    assert lines(one / "metrics.jsonl") == lines(other / "metrics.jsonl")
    assert (one / "results.json").read_text() == (other / "results.json").read_text()
    for name in ("baseline.pt", "hist.pt"):
        states = [torch.load(run / name, weights_only=True) for run in (one, other)]
        for part in ("model", "teacher"):
            if states[0][part]:
                for key, value in states[0][part].items():
                    assert torch.equal(value, states[1][part][key]), (name, part, key)
    assert states[0]["teacher"]


def test_kill_9_while_a_checkpoint_is_written_and_resume_ends_the_same(unbroken, tmp_path):
    """The base has one checkpoint, the baseline three; at the sixth HIST has no teacher saved."""
    (tmp_path / "killed.py").write_text(KILLED)
    command = [sys.executable, "killed.py", ROOT, "6", *RUN[2:]]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert torch.load(tmp_path / "run/hist.pt", weights_only=True)["step"] == 2
    again = subprocess.run(RESUME, cwd=tmp_path, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert_same_end(tmp_path / "run", unbroken)


def test_kill_9_at_a_random_moment_and_resume_ends_the_same(unbroken, tmp_path):
    """Once somewhere in the trainings, once more in what goes on."""
    rng, command, run = np.random.default_rng(), RUN, None
    for _ in range(2):
        run = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
        while run.poll() is None and not (tmp_path / "run/metrics.jsonl").exists():
            time.sleep(0.02)
        try:
            run.communicate(timeout=rng.uniform(0, 1.5))
        except subprocess.TimeoutExpired:
            run.kill()
            run.communicate()
        command = RESUME
    again = subprocess.run(RESUME, cwd=tmp_path, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert_same_end(tmp_path / "run", unbroken)


def test_ctrl_c_prints_the_command_that_resumes(tmp_path):
    command = [*RUN, "--save-every", "5", "--workers", "1", "--steps", "9000", "--out", "a run"]
    how = dict(cwd=tmp_path, stderr=subprocess.PIPE, text=True, start_new_session=True)
    run = subprocess.Popen(command, **how)
    while run.poll() is None and not (tmp_path / "a run/baseline.pt").exists():
        time.sleep(0.05)
    os.killpg(run.pid, signal.SIGINT)  # as a terminal does: to the processes that load images too
    said = run.communicate(timeout=120)[1].strip()
    assert run.returncode == 130 and "Traceback" not in said
    expected = "hist.py: stopped; python hist.py --resume --out 'a run' goes on"
    assert said.splitlines()[-1] == expected
    assert torch.load(tmp_path / "a run/baseline.pt", weights_only=True)["step"] % 5 == 0


# ------------------------------------------------------------------------------------ lost batches
def lost(monkeypatch, how):
    """Pictures that are not read but lose the process that reads them, or its batch."""
    main, read = os.getpid(), hist.read_image

    def read_image(image, side, crop=None):
        if os.getpid() != main and how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if os.getpid() != main:
            time.sleep(60)
        return read(image, side, crop)

    monkeypatch.setattr(hist, "read_image", read_image)


@pytest.mark.parametrize("how, patience", [("killed", 50), ("never there", 1)])
def test_a_batch_that_a_worker_loses_ends_the_run_with_a_sentence(
    here, monkeypatch, capsys, how, patience
):
    monkeypatch.setattr(hist, "PATIENCE", patience)
    lost(monkeypatch, how)
    began = time.time()
    said = refused(capsys, *SMALL, *"--image-size 24 --workers 1 --out run".split())
    assert "--workers" in said and "shared memory" in said and "--shm-size" in said
    assert time.time() - began < 40


def said_of(error, monkeypatch, capsys):
    """What a run says whose first step ends in an error."""

    def failing(*arguments):
        raise error

    monkeypatch.setattr(hist, "hist_losses", failing)
    return refused(capsys, *SMALL, "--image-size", "24", "--eval-images", "2", "--out", "run")


@pytest.mark.parametrize(
    "error",
    [
        ConnectionResetError(104, "Connection reset by peer"),
        OSError(24, "Too many open files"),
        RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error."),
        RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: (28)"),
        RuntimeError("DataLoader timed out after 50 seconds"),
    ],
)
def test_too_little_shared_memory_says_what_to_lower(here, monkeypatch, capsys, error):
    """Or too few files that may be open."""
    said = said_of(error, monkeypatch, capsys)
    assert "--workers" in said and "shared memory" in said and "out of memory" not in said
    assert "ulimit" in said


# -------------------------------------------------------------------------------- too little memory
@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9 bytes"),
    ],
)
def test_out_of_memory_says_what_to_lower(here, monkeypatch, capsys, error):
    said = said_of(error, monkeypatch, capsys)
    assert "out of memory" in said and "--batch-size" in said and "--accumulate" in said


def test_a_fault_of_the_program_s_own_keeps_its_traceback(here, monkeypatch):
    def broken(*arguments):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(hist, "hist_losses", broken)
    with pytest.raises(RuntimeError, match="shapes"):
        hist.main([*SMALL, "--image-size", "24", "--eval-images", "2", "--out", "run"])


def test_a_picture_that_vanishes_while_workers_read_is_one_line(here, capsys):
    """A worker's UserError comes with its traceback; the person sees the sentence."""
    Image.new("RGB", (32, 32)).save("0.png")
    row = '{"image": "0.png", "captions": ["a dog"], "split": "SPLIT"}\n'
    Path("my.jsonl").write_text(row.replace("SPLIT", "train") * 4 + row.replace("SPLIT", "val"))
    load, write = hist.load_data, []

    def then_gone(*arguments):
        found = load(*arguments)
        write.append(found)
        Path("gone.png").write_bytes(b"")
        for record in found[0]:
            record["image"] = Path("gone.png")
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hist, "load_data", then_gone)
        said = refused(capsys, "--data", "my.jsonl", *PHOTOS, "--workers", "1")
    assert said == "hist.py: none of the 4 pictures to train on can be read"
