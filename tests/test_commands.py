"""The commands as a person types them, on tiny settings."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from common import (
    PHOTOS,
    ROOT,
    SCENES,
    WRITTEN,
    coco_folder,
    contents,
    lines,
    own_folder,
    record,
    refused,
    typed,
)
from PIL import Image, ImageDraw

import hist


@pytest.fixture(scope="module")
def scenes_run(tmp_path_factory):
    """(folder, the finished process) of a run on scenes."""
    folder = tmp_path_factory.mktemp("scenes")
    return folder, typed(*SCENES, "--composition-start", "0.3", cwd=folder)


def assert_drawn(path, least=300):
    pixels = np.asarray(Image.open(path).convert("RGB"))
    assert min(pixels.shape[:2]) > least and pixels.std() > 10


# ----------------------------------------------------------------------------------------- scenes
def test_scenes(scenes_run):
    folder, done = scenes_run
    assert done.returncode == 0, done.stderr
    out = folder / "out/scenes"
    assert {path.name for path in out.iterdir()} == WRITTEN
    results = json.loads((out / "results.json").read_text())
    assert list(results) == ["baseline", "hist"]
    rows = [line.split() for line in done.stdout.splitlines()]
    for name, value in results["baseline"].items():
        if "_chance" not in name and name not in ("images", "phrases", "pairs"):
            (row,) = [row for row in rows if row[:1] == [name]]
            assert row[1:3] == [f"{100 * v:.1f}" for v in (value, results["hist"][name])]
    measured = "pointing_phrases pointing_subjects multi_object_iou balance vqa r1_image_to_text"
    assert set(measured.split()) | {"r10_text_to_image_itm"} <= set(results["hist"])
    metrics = lines(out / "metrics.jsonl")
    for run, composed in (("baseline", False), ("hist", True)):
        steps = [row for row in metrics if row["run"] == run]
        assert [row["step"] for row in steps] == [1, 2, 3, 4, 5, 6]
        assert any("composition" in row and "map_entropy" in row for row in steps) == composed
        assert all(("phrase_itc" in row) == composed and "caption_mlm" in row for row in steps)
    assert "caption_itc" in done.stderr and "step/s" in done.stderr  # the bar
    for picture in ("grounding.png", "worst.png", "curves.png"):
        assert_drawn(out / picture)


def test_both_trainings_start_from_the_same_weights_and_see_the_same_captions(scenes_run):
    first = [row for row in lines(scenes_run[0] / "out/scenes/metrics.jsonl") if row["step"] == 1]
    baseline, full = first
    for name in ("caption_itc", "caption_itm", "caption_mlm"):
        assert baseline[name] == full[name]


def test_ground_draws_over_a_person_s_own_picture(scenes_run, monkeypatch, capsys):
    monkeypatch.chdir(scenes_run[0])
    picture = Image.new("RGB", (300, 200), "white")
    ImageDraw.Draw(picture).ellipse([30, 50, 110, 130], fill="red")
    picture.save("mine.png")
    hist.main(["--ground", "mine.png", "a red circle", "a blue zebra", "--device", "cpu"])
    said = capsys.readouterr().out
    assert "zebra" in said and said.splitlines()[-1] == "out/scenes/ground.png"
    assert_drawn("out/scenes/ground.png", 200)
    assert "at least one phrase" in refused(capsys, "--ground", "mine.png")
    assert "yours.png" in refused(capsys, "--ground", "yours.png", "a cat")
    Path("text.png").write_text("no picture at all")
    assert "text.png" in refused(capsys, "--ground", "text.png", "a cat")


def test_ground_uses_the_last_model_and_the_phrases_that_are_asked(scenes_run, monkeypatch):
    monkeypatch.chdir(scenes_run[0])
    exif, drawn = Image.Exif(), []
    exif[0x0112] = 6  # lying on its side, as a telephone stores it
    Image.new("RGB", (20, 30)).save("mine.png", exif=exif)
    monkeypatch.setattr(hist, "draw_grounding", lambda *arguments: drawn.append(arguments))
    hist.main(["--ground", "mine.png", "a ring", "a star", "--device", "cpu"])
    ((models, _, (asked,), _, path),) = drawn
    assert list(models) == ["hist"] and asked["ask"] == ["a ring", "a star"]
    assert path == Path("out/scenes/ground.png") and asked["image"].shape == (30, 30, 3)
    upright = hist.load_pixels("mine.png", upright=True)
    assert upright.shape == (20, 30, 3) and (asked["image"][5:25] == upright).all()
    state = torch.load("out/scenes/hist.pt", weights_only=True)["model"]
    for name, value in models["hist"].state_dict().items():
        assert torch.equal(value, state[name])


def test_eval_only_gives_the_table_of_the_run(scenes_run, monkeypatch, capsys):
    folder, done = scenes_run
    monkeypatch.chdir(folder)
    path = Path("out/scenes/results.json")
    before = path.read_text()
    path.unlink()
    hist.main(["--eval-only", "--device", "cpu"])
    assert path.read_text() == before
    said = capsys.readouterr().out.splitlines()
    shown = [line for line in done.stdout.splitlines() if line.startswith(("pointing", "r1"))]
    assert len(shown) > 5 and set(shown) <= set(said)


@pytest.mark.parametrize("bad_before", [False, True])
def test_eval_only_of_a_run_on_other_records(scenes_run, tmp_path, monkeypatch, capsys, bad_before):
    """The benchmark: a run's models on a JSONL file, split by split."""
    shutil.copytree(scenes_run[0] / "out", tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    own_folder(tmp_path)
    bad = [json.dumps({"kind": "image", "which": f"{i}.jpg", "why": "bad"}) for i in range(30)]
    if bad_before:  # the run met 30 bad images of its own; they are not these twelve's
        Path("out/scenes/skipped.jsonl").write_text("\n".join(bad) + "\n")
    text = Path("my.jsonl").read_text().replace('"val"', '"testA"', 1)
    Path("my.jsonl").write_text(text)
    command = "--eval-only --data my.jsonl --out out/scenes --device cpu".split()
    hist.main(command)
    said = capsys.readouterr().out
    assert re.search("my.jsonl.* testA.* 1 images", said)
    assert re.search("my.jsonl.* val.* 2 images", said)
    own = Path("out/scenes/results.json").read_text()
    assert own == (scenes_run[0] / "out/scenes/results.json").read_text()
    results = json.loads(Path("out/scenes/on-my/results.json").read_text())
    assert set(results["hist"]) == {"testA", "val"}
    assert "pointing_phrases" in results["baseline"]["val"]
    options = json.loads(Path("out/scenes/options.json").read_text())
    assert options["data"] == "scenes"  # a look at other data leaves the run as it was


def test_levels_caption_trains_the_baseline_alone(here):
    hist.main([*SCENES, "--steps", "2", "--levels", "caption", "--out", "alone"])
    assert list(json.loads(Path("alone/results.json").read_text())) == ["baseline"]
    assert not Path("alone/hist.pt").exists()


def test_a_new_run_forgets_the_old_one_and_resume_keeps_it(here):
    """In the same folder: checkpoints, metrics and what was skipped are of the new run alone."""
    own_folder(here)
    command = ["--data", "my.jsonl", *PHOTOS, "--steps", "1", "--levels", "caption"]
    Path("out/my").mkdir(parents=True)
    Path("out/my/skipped.jsonl").write_text('{"kind": "image", "which": "old", "why": "old"}\n')
    Path("out/my/hist.pt").write_text("old")
    Path("out/my/metrics.jsonl").write_text('{"run": "old", "step": 1}\n')
    hist.main(command)
    files = {path.name for path in Path("out/my").iterdir()}
    assert "hist.pt" not in files and "skipped.jsonl" not in files
    assert [row["run"] for row in lines("out/my/metrics.jsonl")] == ["baseline"]
    before = Path("out/my/baseline.pt").stat().st_mtime_ns
    hist.main("--resume --out out/my --device cpu".split())
    assert Path("out/my/baseline.pt").stat().st_mtime_ns == before
    saved = json.loads(Path("out/my/options.json").read_text())
    assert saved["steps"] == 1 and "resume" not in saved and "device" not in saved


# ----------------------------------------------------------------------- runs and their folders
@pytest.fixture
def run_here(scenes_run, here):
    """A copy of the scenes' run, six steps long, in out/scenes of an empty folder."""
    shutil.copytree(scenes_run[0] / "out", here / "out")
    return here / "out/scenes"


REFUSED = "--image-size 48, --data other.jsonl --out out/scenes, --batch-size 16, --seed 1, "
REFUSED += "--base-steps 2, --steps 5, --steps 0, --levels caption, --width 64, --vocab-size 9, "
REFUSED += "--pretrained, --root elsewhere"


@pytest.mark.parametrize("typed", REFUSED.split(", "))
def test_what_a_resumed_run_cannot_change_is_refused_before_anything_is_written(
    run_here, capsys, typed
):
    before = contents(run_here)
    said = refused(capsys, "--resume", "--device", "cpu", *typed.split())
    assert typed.split()[0] in said and contents(run_here) == before
    for flag in ("--steps", "--lr", "--save-every", "--workers", "--eval-images", "--max-bad"):
        assert flag in said  # what may be changed


def test_what_a_resumed_run_may_change_is_applied(run_here):
    typed = "--steps 8 --save-every 1 --lr 0.001 --eval-images 6 --max-bad 0.5 --batch-size 8"
    hist.main(["--resume", "--device", "cpu", *typed.split()])
    told = json.loads((run_here / "options.json").read_text())
    assert (told["steps"], told["lr"], told["eval_images"], told["max_bad"]) == (8, 0.001, 6, 0.5)
    for name in ("baseline", "hist"):
        steps = [row["step"] for row in lines(run_here / "metrics.jsonl") if row["run"] == name]
        assert steps == [1, 2, 3, 4, 5, 6, 7, 8]
        state = torch.load(run_here / f"{name}.pt", weights_only=True)
        assert state["step"] == 8 and state["options"]["lr"] == 0.001
    assert json.loads((run_here / "results.json").read_text())["hist"]["images"] == 6


def test_other_captions_are_seen_before_a_resumed_run_is_changed(here, capsys):
    own_folder(here)
    hist.main(["--data", "my.jsonl", *PHOTOS, "--steps", "1", "--levels", "caption"])
    Path("my.jsonl").write_text(Path("my.jsonl").read_text().replace("cat and dog", "bird and fox"))
    before = contents("out/my")
    said = refused(capsys, "--resume", "--out", "out/my", "--device", "cpu", "--steps", "9")
    assert "out/my/baseline.pt: of other captions" in said and contents("out/my") == before


def test_a_folder_with_a_run_on_other_data_is_left_alone(here, capsys):
    """Both files are called train.jsonl, and out/train would be the folder of both."""
    for folder in ("a", "b"):
        (here / folder).mkdir()
        own_folder(here / folder)
        (here / folder / "my.jsonl").rename(here / folder / "train.jsonl")
    command = [*PHOTOS, "--steps", "1", "--levels", "caption"]
    hist.main(["--data", "a/train.jsonl", *command])
    before = contents("out/train")
    said = refused(capsys, "--data", "b/train.jsonl", *command)
    assert "out/train holds a run on a/train.jsonl" in said and "--out" in said
    assert contents("out/train") == before
    refused(capsys, "--data", "a/train.jsonl", *command, "--vit", "nonsense")
    assert contents("out/train") == before
    hist.main(["--data", "./a/train.jsonl", *command])  # of the same data: deleted, with a word
    said = capsys.readouterr().err
    for name in ("baseline.pt", "metrics.jsonl"):
        assert f"out/train/{name}, of an older run, is deleted" in said


def test_two_runs_do_not_write_into_one_folder(run_here, capsys):
    """The process that waits for this one stands in for another run."""
    (run_here / "running").write_text(str(os.getppid()))
    before = contents(run_here)
    for command in (SCENES, ["--resume", "--device", "cpu", "--steps", "9"]):
        said = refused(capsys, *command)
        assert f"another run writes into out/scenes, process {os.getppid()}" in said
        assert "out/scenes/running" in said and contents(run_here) == before


def test_a_run_of_another_person_holds_its_folder_too(run_here, capsys, monkeypatch):
    def kill(number, signal):
        raise PermissionError

    monkeypatch.setattr(os, "kill", kill)
    (run_here / "running").write_text("123456")
    assert "process 123456" in refused(capsys, "--resume", "--device", "cpu", "--steps", "9")


@pytest.mark.parametrize("left", ["a process that is gone", "its own number", "nothing", "a word"])
def test_the_lock_of_a_run_that_was_killed_does_not_hold(run_here, left):
    """Its own number: of a container that was started again."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    number = {"its own number": os.getpid(), "nothing": "", "a word": left}.get(left, ended.pid)
    (run_here / "running").write_text(str(number))
    hist.main(["--resume", "--device", "cpu"])
    assert not (run_here / "running").exists()


def test_a_run_that_is_refused_leaves_no_folder(here, capsys):
    assert "nothing.jsonl" in refused(capsys, "--data", "nothing.jsonl", *PHOTOS)
    assert not Path("out/nothing").exists()


READ_ONLY = "mount --bind there there && mount -o remount,bind,ro there && exec "


@pytest.mark.skipif(
    not shutil.which("unshare") or subprocess.run(["unshare", "-rm", "true"]).returncode != 0,
    reason="needs a mount of its own",
)
def test_a_read_only_folder_is_good_enough_to_look_at(run_here):
    (run_here.parents[1] / "there").mkdir()
    run_here.rename("there/run")
    own_folder(Path("there"))
    Path("there/9.png").write_text("no picture")  # it is listed, elsewhere
    before = contents("there/run")
    for command, said in (
        ("--eval-only --out there/run --data there/my.jsonl", "r1_image_to_text"),
        ("--ground there/8.png circle --out there/run", "ground.png"),
        (f"--data there/my.jsonl {' '.join(PHOTOS)} --steps 1 --out run", "in run: "),
    ):
        line = f"{READ_ONLY}{sys.executable} {ROOT / 'hist.py'} {command} --device cpu"
        how = dict(capture_output=True, text=True)
        done = subprocess.run(["unshare", "-rm", "sh", "-c", line], **how)
        assert done.returncode == 0 and said in done.stdout, done.stderr
    assert contents("there/run") == before


# --------------------------------------------------------------------------------------- consoles
@pytest.mark.parametrize("encoding", ["ascii", "cp437"])
def test_a_console_that_lacks_letters_ends_no_run(here, encoding):
    own_folder(here)
    Path("my.jsonl").rename("mes données ✓.jsonl")
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    command = ["--data", "mes données ✓.jsonl", *PHOTOS, "--steps", "1", "--levels", "caption"]
    for arguments in (["--help"], command):
        how = dict(capture_output=True, env=environment)
        done = subprocess.run([sys.executable, ROOT / "hist.py", *arguments], **how)
        assert done.returncode == 0, done.stderr
    assert b"mes donn" in done.stdout and b"r1_image_to_text" in done.stdout
    assert Path("out/mes données ✓/results.json").exists()


# --------------------------------------------------------------------------------- your own images
def test_own_images(here, capsys):
    own_folder(here)
    hist.main(["--data", "my.jsonl", *PHOTOS])
    assert {path.name for path in Path("out/my").iterdir()} == WRITTEN
    assert "pointing_subjects" in capsys.readouterr().out
    hist.main(["--ground", "9.png", "a cat", "--out", "out/my", "--device", "cpu"])
    assert_drawn("out/my/ground.png", 200)


def test_of_own_images_without_targets_retrieval_is_measured(here, capsys):
    own_folder(here)
    kept = []
    for row in filter(None, Path("my.jsonl").read_text().split("\n")):
        row = json.loads(row)
        kept.append(json.dumps({name: row[name] for name in ("image", "captions")}))
    Path("plain.jsonl").write_text("\n".join(kept))
    hist.main(["--data", "plain.jsonl", *PHOTOS, "--levels", "caption,phrase"])
    said = capsys.readouterr().out
    assert "0 phrases" in said and "held out" in said and "r1_image_to_text" in said
    assert "pointing" not in json.dumps(json.loads(Path("out/plain/results.json").read_text()))
    full = lines("out/plain/metrics.jsonl")[-1]
    assert full["run"] == "hist" and "phrase_itm" in full and "subject_itm" not in full
    assert Path("out/plain/grounding.png").exists() and not Path("out/plain/worst.png").exists()


def test_parses_of_another_parser_are_named_where_they_are_wrong(here, capsys):
    own_folder(here)
    row = (
        '{"caption": "a cat and dog number 8", "phrases": [{"text": "a bird", "subject": "bird"}]}'
    )
    Path("parses.jsonl").write_text(row)
    command = ["--data", "my.jsonl", *PHOTOS, "--parses"]
    assert "parses.jsonl:1:" in refused(capsys, *command, "parses.jsonl")
    assert "no.jsonl" in refused(capsys, *command, "no.jsonl")
    assert "--parses" in refused(capsys, *SCENES, "--parses", "parses.jsonl")


def test_blip(here, capsys):
    hist.main([*SCENES, "--base", "blip", "--steps", "2", "--composition-start", "0"])
    said = capsys.readouterr().out
    assert "vqa_colour" in said and Path("out/scenes-blip/hist.pt").exists()
    assert "caption_lm" in lines("out/scenes-blip/metrics.jsonl")[0]
    Image.new("RGB", (30, 40), "white").save("photo.png")
    hist.main(["--ground", "photo.png", "a ring", "--out", "out/scenes-blip", "--device", "cpu"])
    assert Path("out/scenes-blip/ground.png").exists()


# ----------------------------------------------------------------------------------------- presets
def test_presets(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    scenes = hist.parse_options([])
    assert (scenes.text_layers, scenes.fusion_layers, scenes.out) == (2, 1, "out/scenes")
    assert (scenes.base_steps, scenes.steps, scenes.device) == (400, 500, "cpu")
    coco = hist.parse_options(["--data", "coco", "--width", "64"])
    assert coco.vit == "vit_tiny_patch16_224" and coco.out == "out/coco" and coco.width == 64
    assert (coco.base_steps, coco.image_size) == (0, 160)
    blip = hist.parse_options(["--data", "a/my.jsonl", "--base", "blip"])
    assert blip.text_layers == 0 and blip.out == "out/my-blip"
    assert blip.fusion_layers == coco.text_layers + coco.fusion_layers
    for o in (scenes, coco, blip):
        assert 0 <= o.cam_layer < o.fusion_layers
    assert (blip.cam_layer, coco.cam_layer) == (1, 0)  # the middle
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    one = hist.parse_options(["--data", "coco", "--fusion-layers", "1", "--device", "cpu"])
    assert (one.text_layers, one.fusion_layers, one.cam_layer) == (4, 1, 0)
    with pytest.raises(hist.UserError, match="--text-layers: BLIP"):
        hist.parse_options(["--base", "blip", "--text-layers", "2", "--device", "cpu"])


def test_ten_epochs_where_no_steps_are_asked_for(here):
    own_folder(here)
    command = ["--data", "my.jsonl", *PHOTOS, "--steps", "0", "--batch-size", "4"]
    o = hist.parse_options(command)
    samples, held_out = hist.prepare(o)
    assert (len(samples), len(held_out), o.steps) == (9, 3, 22)


def test_what_a_run_was_told_is_remembered_and_what_is_typed_counts(here):
    Path("run").mkdir()
    Path("run/options.json").write_text('{"width": 128, "lr": 0.5, "out": "elsewhere"}')
    o = hist.parse_options(["--resume", "--out", "run", "--lr", "0.25"])
    assert (o.width, o.lr, o.out, o.resume) == (128, 0.25, "run", True)
    assert hist.parse_options(["--out", "run"]).width == 64


# ----------------------------------------------------------------------------------------- threads
def test_omp_num_threads_overrules_the_free_cores(here, monkeypatch, capsys):
    """The first line says how many threads there are."""
    asked = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: asked[-1] if asked else 5)
    monkeypatch.setattr(hist, "run", lambda options: None)
    monkeypatch.setattr(hist, "free_cores", lambda: 3)
    for given, threads in (("5", 5), (None, 3)):
        if given:
            monkeypatch.setenv("OMP_NUM_THREADS", given)
        else:
            monkeypatch.delenv("OMP_NUM_THREADS")
        hist.main([*SCENES])
        first = capsys.readouterr().err.splitlines()[0]
        assert first.startswith("hist.py on cpu") and re.search(rf"\b{threads}\b", first)
        assert "OMP_NUM_THREADS" in first and "out/scenes" in first
    assert asked == [3]


@pytest.mark.parametrize("idle, cores", [(100, 4), (75, 3), (60, 2), (0, 1)])
def test_free_cores_are_those_that_were_idle(monkeypatch, idle, cores):
    """Of four cores and 100 ticks between two looks at /proc/stat."""
    looks = iter([[5, 0, 5, 50, 0, 0, 0, 0], [105 - idle, 0, 5, 50 + idle, 0, 0, 0, 0]])
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setattr(hist.time, "sleep", lambda seconds: None)

    def read_text(path):
        assert str(path) == "/proc/stat"
        return "cpu  " + " ".join(map(str, next(looks))) + " 0 0\ncpu0 1 2 3\n"

    monkeypatch.setattr(Path, "read_text", read_text)
    assert hist.free_cores() == cores


def test_without_proc_all_cores_are_free(monkeypatch):
    def read_text(path):
        raise FileNotFoundError(path)

    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    monkeypatch.setattr(Path, "read_text", read_text)
    assert hist.free_cores() == 6


# -------------------------------------------------------------------------------- hist.py by itself
def test_hist_py_needs_no_tests(tmp_path):
    """hist.py and parse.py alone in a folder train on scenes and on COCO."""
    for name in ("hist.py", "parse.py"):
        shutil.copy(ROOT / name, tmp_path)
    imports = re.findall(r"^\s*(?:import|from)\s+(\S+)", (ROOT / "hist.py").read_text(), re.M)
    assert "parse" in imports and not any(name.startswith("tests") for name in imports)
    coco_folder(tmp_path / "data/coco")
    code = "import sys, hist\nfor command in sys.argv[1:]:\n    hist.main(command.split())\n"
    code += "assert 'tests' not in sys.modules\n"
    commands = [" ".join([*SCENES, "--steps", "1"])]
    commands.append(" ".join(["--data", "coco", *PHOTOS, "--steps", "1"]))
    environment = {**os.environ, "PYTHONPATH": ""}
    how = dict(cwd=tmp_path, capture_output=True, text=True, env=environment)
    done = subprocess.run([sys.executable, "-c", code, *commands], **how)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (tmp_path / "out/scenes").iterdir()} == WRITTEN
    found = {path.name for path in (tmp_path / "out/coco").iterdir()}
    assert found == WRITTEN | {"skipped.jsonl"} and "multi_object_iou" in done.stdout


# ---------------------------------------------------------------------------------- first mistakes
@pytest.mark.parametrize(
    "command, what",
    [
        ("--levels caption,phrases", "--levels"),
        ("--levels composition", "needs another"),
        ("--batch-size 0", "--batch-size"),
        ("--steps -1", "--steps"),
        ("--steps many", "--steps"),
        ("--steps 0", "no epoch"),
        ("--save-every 0", "--save-every"),
        ("--data nothing.jsonl", "nothing.jsonl"),
        ("--vit vit_enormous", "vit_enormous"),
        ("--vit resnet18", "resnet18"),
        ("--device tpu", "tpu"),
        ("--bach-size 3", "--help"),
        ("--resume", "no run in out/scenes"),
        ("--eval-only --out nowhere", "no run in nowhere"),
        ("--ground x.png cat", "no run in"),
        ("--cam-layer 7", "--cam-layer"),
        ("--width 400", "multiple of 6"),
        ("--batch-size 6 --accumulate 4", "--accumulate"),
        ("--pretrained", "--vit NAME"),
        ("--accumulate 0", "--accumulate"),
        ("--max-bad -1", "--max-bad"),
        ("--lr nan", "--lr"),
        ("--vit vit_tiny_patch16_224 --image-size 50", "multiple of the patch, 16"),
        ("--image-size 64", "multiple of the patch, 6"),
    ],
)
def test_first_mistakes_get_one_line(here, capsys, command, what):
    assert what in refused(capsys, "--eval-images", 2, "--device", "cpu", *command.split())
    assert not list(here.glob("out/*/*.pt"))


def test_another_base_is_refused(here, capsys):
    assert "clip" in refused(capsys, *SCENES, "--base", "clip")


def test_pretrained_weights_need_a_network(here, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    coco_folder(here / "coco")
    command = ["--data", "coco", "--root", "coco", *PHOTOS, "--pretrained"]
    assert "no network" in refused(capsys, *command)


def test_a_run_without_checkpoints_says_so(here, capsys):
    Path("out/scenes").mkdir(parents=True)
    Path("out/scenes/options.json").write_text("{}")
    said = refused(capsys, "--eval-only", "--eval-images", "2", "--device", "cpu")
    assert "train first" in said
    Path("out/scenes/hist.pt").write_bytes(b"not a checkpoint")
    said = refused(capsys, "--eval-only", "--eval-images", "2", "--device", "cpu")
    assert "hist.pt is no checkpoint" in said


def test_help_explains_every_option(capsys):
    with pytest.raises(SystemExit) as stop:
        hist.main(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and "[400]" in text and "python hist.py --ground" in text
    for field in hist.fields(hist.Options):
        flag = f"--{field.name.replace('_', '-')}"
        assert re.search(rf"^  {flag}\b", text, re.M), flag
        assert field.metadata["help"][:20] in " ".join(text.split()), flag


# ---------------------------------------------------------------------------------------- pictures
def test_a_grounding_has_a_row_a_record_and_a_cell_a_text(here, monkeypatch):
    """Phrases: those asked; else two targets'; else the caption's. Regions only of targets."""
    asked, drawn = [], []

    def maps_of(model, tokenizer, image, texts, cam_layer):
        asked.append(texts)
        return np.random.default_rng(0).random((len(texts), 24, 24)), [0.5] * len(texts)

    monkeypatch.setattr(hist, "maps_of", maps_of)
    draw_map = hist.draw_map
    monkeypatch.setattr(hist, "draw_map", lambda *a: drawn.append(a) or draw_map(*a))
    box = {"boxes": [[0, 0, 12, 12]]}
    targets = [box | {"phrase": phrase} for phrase in ("a cat", "a dog", "a cow")]
    records = [
        record("a $x^ thing"),
        record("a red ball on a blue mat", targets=targets),
        record("a red ball on a blue mat"),
        record("running"),
        record("x", ask=["one thing"]),
    ]
    o = hist.Options(device="cpu", image_size=24)
    hist.draw_grounding({"hist": None}, None, records, o, Path("all.png"))
    assert asked[1:] == [
        ["a cat", "a dog", "a cat and a dog"],
        ["a red ball", "a blue mat", "a red ball and a blue mat"],
        ["one thing"],
    ]
    titles = [arguments[1] for arguments in drawn]
    assert "hist: a cat and a dog (0.50)" in titles and "running" in titles
    regions = {a[1]: a[4] for a in drawn}
    assert regions["hist: a cat and a dog (0.50)"].sum() == 144
    assert regions["hist: a red ball (0.50)"] is None
    assert_drawn("all.png")


def test_curves_have_a_line_a_training_and_a_part_a_loss(here, monkeypatch):
    rows = []
    for run, losses in (("baseline", ["itc"]), ("hist", ["itc", "itm"])):
        for step in range(1, 201):
            rows.append({"run": run, "step": step} | {loss: 1.0 * step for loss in losses})
    Path("metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    figures, make = [], hist.Figure
    monkeypatch.setattr(hist, "Figure", lambda **how: figures.append(make(**how)) or figures[-1])
    hist.draw_curves(Path("metrics.jsonl"))
    plots = [ax for ax in figures[0].axes if ax.lines]
    assert [ax.get_title() for ax in plots] == ["itc", "itm"]
    assert [line.get_label() for line in plots[0].lines] == ["baseline", "hist"]
    x, y = plots[1].lines[0].get_data()
    assert len(x) == 50 and list(x) == list(y) == [2.5 + 4 * i for i in range(50)]
    assert Path("curves.png").exists()


def test_arguments_of_main_are_the_command_line(monkeypatch, here, capsys):
    monkeypatch.setattr(sys, "argv", ["hist.py", "--steps", "-3"])
    with pytest.raises(SystemExit) as stop:
        hist.main()
    assert stop.value.code == 2 and "--steps -3" in capsys.readouterr().err
