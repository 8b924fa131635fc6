"""A night's run: damaged data, kills, full disks, Ctrl-C, losses that are not finite; and what one step may cost."""
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import types
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

import hist
from test_commands import COCO_MINI, SMALL_VIT, coco_folder, here, lines, needs_coco_mini, refused  # noqa: F401

ROOT = Path(__file__).resolve().parents[1]
SHORT = "--data coco --root coco --base-steps 0 --steps 4 --batch-size 4 --eval-images 0 --save-every 2 --device cpu".split()


# ------------------------------------------------------------------------------------------------------- bad data
def bomb(path):
    """A PNG of 50,000 x 50,000 pixels in a few bytes."""
    chunk = lambda kind, data: len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")
    size = (50_000).to_bytes(4, "big")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size + size + bytes([8, 0, 0, 0, 0])) + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b""))


def damage(folder):
    """Damage eleven images of a folder, each in another way; returns {name: what its pixels should be, or None where there are none to be had}."""
    paths = sorted(folder.glob("*.jpg"))[:11]
    names = ("truncated", "zero-byte", "missing", "bomb", "text", "greyscale", "CMYK", "16-bit", "palette", "rotated", "alpha")
    p = dict(zip(names, paths))
    p["truncated"].write_bytes(p["truncated"].read_bytes()[:400])
    p["zero-byte"].write_bytes(b"")
    p["missing"].unlink()
    bomb(p["bomb"])
    p["text"].write_text("<html>404</html>")
    picture = Image.open(p["greyscale"]).convert("RGB")
    grey = np.linspace(0, 255, picture.width * picture.height).reshape(picture.height, picture.width).astype(np.uint8)
    Image.fromarray(grey).save(p["greyscale"], "PNG")
    Image.fromarray(grey).convert("CMYK").save(p["CMYK"], "TIFF")
    Image.fromarray(grey.astype(np.uint16) * 257).save(p["16-bit"], "PNG")
    Image.fromarray(grey).quantize(256).save(p["palette"], "PNG")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(grey).save(p["rotated"], "PNG", exif=exif)
    Image.fromarray(np.dstack([grey] * 4)).save(p["alpha"], "PNG")
    return {p[name]: None if i < 5 else grey for i, name in enumerate(names)}


def test_every_kind_of_picture_is_read_or_refused(tmp_path):
    for i in range(11):
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (48, 64, 3)).astype(np.uint8)).save(tmp_path / f"{i:02}.jpg")
    for path, expected in damage(tmp_path).items():
        if expected is None:
            with pytest.raises(hist.UserError, match="not readable as a picture"):
                hist.load_pixels(path)
        else:
            pixels = hist.load_pixels(path)
            assert pixels.dtype == np.uint8 and pixels.shape == (*expected.shape, 3), path
            assert np.abs(pixels.astype(int) - expected[..., None]).max() <= 2, path     # 16 bits are scaled, not cut off at white
    upright = hist.load_pixels(tmp_path / "09.jpg", upright=True)
    assert upright.shape == (64, 48, 3)                         # COCO's boxes are of the stored pixels; a person's own photograph is turned


def edit(path, change):
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def test_bad_captions_and_annotations_are_left_out_and_listed(here, capsys):
    coco_folder(here / "coco", 12)

    def captions(data):
        for i, caption in enumerate(["", "  ", None, 7, ["a cat"]]):
            data["annotations"].append({"id": 900 + i, "image_id": 1, "caption": caption})
        data["annotations"] += [{"id": 0, "image_id": 1, "caption": "an id that is there"}, {"id": 950, "image_id": 777, "caption": "of no image"},
                                {"id": 951, "image_id": 1}, {"image_id": 1, "caption": "without an id"}]
        data["images"] += [dict(data["images"][0]), {"id": 50, "file_name": "../../etc/passwd"}, {"id": 51, "file_name": "/etc/passwd"}]

    def instances(data):
        whole = {"id": 900, "image_id": 1, "category_id": 1, "bbox": [0, 0, 9, 9], "segmentation": [[0, 0, 9, 0, 9, 9]]}
        data["annotations"] += [{**whole, **change} for change in (
            {"bbox": [70, 0, 9, 9]}, {"id": 901, "bbox": [5, 5, 0, 3]}, {"id": 902, "bbox": None}, {"id": 903, "category_id": 5}, {"id": 904, "image_id": 777},
            {"id": 905, "bbox": [float("nan"), 0, 3, 3]}, {"id": 9})]
        data["annotations"] += [{**whole, "id": 910, "image_id": 2, "bbox": [50, 40, 99, 99]}, {**whole, "id": 911, "image_id": 3, "segmentation": [[1, "x"]]},
                                {**whole, "id": 912, "image_id": 4, "segmentation": {"size": [48, 64], "counts": "compressed"}},
                                {**whole, "id": 913, "image_id": 5, "segmentation": {"size": [48, 64], "counts": [1, 2]}}]
    edit(here / "coco/annotations/captions_val2017.json", captions)
    edit(here / "coco/annotations/instances_val2017.json", instances)
    o = hist.settle({"data": "coco", "root": "coco", "out": "run", "device": "cpu", "max_bad": 0.3})
    records = hist.read_coco(Path("coco"), "val", o)
    assert len(records) == 12 and "4 of 16 images" in capsys.readouterr().err
    assert records[1]["captions"] == ["A cat by dog 1.", "Two dogs"]
    listed = [entry["why"] for entry in lines("run/skipped.jsonl")]
    for why, times in (("a caption must be text", 5), ("there twice", 3), ("no image 777", 2), ("'caption' is missing", 1), ("'id' is missing", 1), ("leads out", 2),
                       ("no file missing.jpg", 1), ("no pixel in the image of 64 x 48", 3)):
        assert sum(why in line for line in listed) == times, (why, listed)
    cat = next(t for t in records[2]["targets"] if t["phrase"] == "cat")
    assert cat["boxes"][-1] == [50, 40, 64, 48]                 # a box is cut at the edge of the image
    good = hist.readable(records, o)
    assert [len(r["targets"]) for r in good[1:7]] == [2, 2, 1, 1, 1, 2]
    assert sum("run lengths" in entry["why"] for entry in lines("run/skipped.jsonl")) == 2
    before = lines("run/skipped.jsonl")
    hist.readable(hist.read_coco(Path("coco"), "val", o), o)
    assert lines("run/skipped.jsonl") == before                 # the same again is not listed twice
    o.max_bad = 0.1
    with pytest.raises(hist.UserError, match="4 of 16 images cannot be used, more than --max-bad 0.1"):
        hist.read_coco(Path("coco"), "val", o)


@pytest.mark.parametrize("text, what", [('{"images": [\n{"id": 1,}]}', "line 2"), ("", "not JSON"), ('{"images": []}', "'annotations'"), ("[1]", "'images'"), ("\xff", "utf-8")])
def test_malformed_json_gets_its_file_line_and_fault(here, capsys, text, what):
    coco_folder(here / "coco")
    (here / "coco/annotations/captions_train2017.json").write_bytes(text.encode("latin1"))
    said = refused(capsys, *SHORT)
    assert "captions_train2017.json, line" in said and what in said


def damaged_run(root, capsys, arguments):
    """Train on a damaged copy of COCO, and refuse it when it is more damaged than allowed; returns what is listed."""
    damaged = {split: damage(root / f"{split}2017") for split in ("train", "val")}
    hist.main([*arguments, "--max-bad", "0.5"])
    listed = lines("out/coco/skipped.jsonl")
    for split, pictures in damaged.items():
        for path, expected in pictures.items():
            reasons = {e["why"] for e in listed if e["kind"] == "image" and split in e["which"] and (path.name in e["which"] or path.name in e["why"])}
            assert len(reasons) == (expected is None), (split, path, reasons)
    assert "R@1" in capsys.readouterr().out
    return listed


def test_a_run_on_damaged_data_leaves_out_what_is_bad_and_stops_above_a_limit(here, capsys):
    coco_folder(here / "coco", 16)
    damaged_run(here / "coco", capsys, [*SHORT, "--steps", "8", *SMALL_VIT])
    said = refused(capsys, *SHORT, *SMALL_VIT, "--max-bad", "0.13")
    assert "images cannot be used, more than --max-bad 0.13" in said and "out/coco/skipped.jsonl" in said


@needs_coco_mini
def test_a_run_on_damaged_photographs(here, capsys):
    shutil.copytree(COCO_MINI, here / "coco")
    for path in here.rglob("*"):
        path.chmod(0o755)
    damaged_run(here / "coco", capsys, [*SHORT, "--steps", "24", "--workers", "1", *SMALL_VIT[:-2]])


def test_nothing_is_learnt_from_a_picture_that_cannot_be_read():
    records = [{"image": np.full((32, 32, 3), 40 * i, np.uint8), "captions": [c], "targets": []} for i, c in enumerate(
        ["a dog and a cat", "a red car and a bus", "two men and a boat", "a tree and a house"])]
    o = hist.Options(**{**hist.PHOTOS, "data": "x", "vit": "vit_tiny_patch16_224", "image_size": 32, "width": 64, "text_layers": 1, "fusion_layers": 1})
    vocabulary = hist.build_vocabulary([r["captions"][0] for r in records], 50)
    torch.manual_seed(0)
    model = hist.HIST(o, vocabulary)
    records[2]["image"] = "nowhere.jpg"
    samples = hist.Samples(records, vocabulary, o)
    bad = [samples[i]["bad"] != "" for i in range(4)].index(True)
    batch = hist.collate([samples[i] for i in range(4)])
    assert batch.pop("bad") == {("image", "nowhere.jpg"): samples[bad]["bad"]} and batch["good"].tolist() == [i != bad for i in range(4)]
    values = []
    for shade in (127, 0):                                      # what stands in for it changes no loss but as a wrong image, which it never is
        batch["image"][bad] = shade
        torch.manual_seed(1)
        losses, _ = hist.training_losses(model, batch, hist.LEVELS, 0.0, 0)
        values.append({k: v.item() for k, v in losses.items() if "itc" not in k})
    assert values[0] == pytest.approx(values[1], abs=1e-6) and len(values[0]) == 6


# ------------------------------------------------------------------------------------------------------ nothing lost
RUN = [sys.executable, ROOT / "hist.py", *"--base-steps 2 --steps 4 --batch-size 4 --eval-images 4 --save-every 1 --device cpu".split()]
KILLED = '''
import os, signal, sys
sys.path.insert(0, sys.argv[1])
import hist
at, when = int(sys.argv[2]), sys.argv[3]
save, replace, saves = hist.torch.save, os.replace, []
def torch_save(data, f):
    saves.append(1)
    if len(saves) == at and when == "write":                    # half of it is written
        f.write(b"half a checkpoint")
        f.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    save(data, f)
    if len(saves) == at and when == "before":
        os.kill(os.getpid(), signal.SIGKILL)
def os_replace(a, b):
    replace(a, b)
    if len(saves) == at and when == "after" and str(b).endswith(".pt"):
        os.kill(os.getpid(), signal.SIGKILL)
hist.torch.save, os.replace = torch_save, os_replace
hist.main(sys.argv[4:])
'''


def without_seconds(folder):
    """The metrics of a run, in order, but for what a clock gave."""
    return sorted((m["run"], m["step"], "evaluation" in m, str({**m, "evaluation": {k: v for k, v in m.get("evaluation", {}).items() if k != "seconds"}}))
                  for m in lines(Path(folder) / "metrics.jsonl"))


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    subprocess.run([*RUN, "--out", "run"], cwd=folder, check=True, capture_output=True)
    return folder / "run"


@pytest.mark.parametrize("at, when", [(1, "write"), (4, "before"), (8, "after")])
def test_kill_9_at_a_checkpoint_and_resume_gives_the_same_metrics(unbroken, tmp_path, at, when):
    (tmp_path / "killed.py").write_text(KILLED)
    done = subprocess.run([sys.executable, "killed.py", ROOT, str(at), when, *RUN[2:], "--out", "run"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    again = subprocess.run([*RUN[:2], "--resume", "--out", "run", "--device", "cpu"], cwd=tmp_path, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert without_seconds(tmp_path / "run") == without_seconds(unbroken)


def test_kill_9_at_random_moments_and_resume_gives_the_same_metrics(unbroken, tmp_path):
    rng, command, kills = np.random.default_rng(int(time.time())), [*RUN, "--out", "run"], 0
    while True:
        p = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        while p.poll() is None and not (tmp_path / "run/options.json").exists():
            time.sleep(0.05)
        command = [*RUN[:2], "--resume", "--out", "run", "--device", "cpu"]
        try:
            p.wait(timeout=rng.uniform(0.2, 8) if kills < 4 else 300)
        except subprocess.TimeoutExpired:
            p.kill()
            kills += 1
        if p.wait() != -signal.SIGKILL:
            break
    assert p.returncode == 0, p.stderr.read()
    assert without_seconds(tmp_path / "run") == without_seconds(unbroken)


def test_a_line_of_metrics_cut_short_does_not_stop_a_run(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"run": "a", "step": 1}\n{"run": "a", "losses": {}')
    assert hist.read_metrics(tmp_path / "metrics.jsonl") == [{"run": "a", "step": 1}]


def test_a_full_disk_is_reported_and_leaves_the_last_checkpoint(here, capsys):
    """RLIMIT_FSIZE stands in for a full disk: a write fails half-way."""
    path = here / "model.pt"
    hist.write_whole(path, {"model": torch.zeros(1000)})
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        for what in ({"model": torch.zeros(1_000_000)}, "x" * 1_000_000):
            with pytest.raises(hist.UserError, match="could not be written.*the one before is kept"):
                hist.write_whole(path, what)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before and [p.name for p in here.iterdir()] == ["model.pt"]


def test_ctrl_c_saves_and_prints_the_command_that_resumes(unbroken, tmp_path):
    p = subprocess.Popen([*RUN, "--save-every", "1000", "--workers", "1", "--steps", "3000", "--out", "a run"], cwd=tmp_path, stderr=subprocess.PIPE, text=True,
                         start_new_session=True)
    while p.poll() is None and not (tmp_path / "a run/base.pt").exists():
        time.sleep(0.1)
    time.sleep(1)
    os.killpg(p.pid, signal.SIGINT)                             # as a terminal does: to the processes that load images too
    said = p.communicate(timeout=120)[1].strip().splitlines()[-1]
    assert p.returncode == 130 and said == "hist.py: stopped; python hist.py --resume --out 'a run' --device cpu goes on"
    saved = torch.load(tmp_path / "a run/baseline.pt", weights_only=True)
    assert 0 < saved["step"] < 3000


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_loss_that_is_not_finite_stops_the_run(here, monkeypatch, capsys, where):
    losses_of, calls = hist.training_losses, []

    def broken(model, batch, *rest):
        losses, figures = losses_of(model, batch, *rest)
        calls.append(1)
        if len(calls) == 6 and where == "loss":
            losses["caption_mlm"] = losses["caption_mlm"] * torch.nan
        if len(calls) == 6 and where == "gradient":             # the root's slope at 0 is infinite
            losses["caption_itm"] = losses["caption_itm"] + (model.match_head.bias - model.match_head.bias.detach()).abs().sum().sqrt()
        return losses, figures
    monkeypatch.setattr(hist, "training_losses", broken)
    coco_folder(here / "coco", 12)
    said = refused(capsys, *SHORT, "--steps", "9", "--save-every", "4", *SMALL_VIT)
    assert f"step 6 of baseline: {'caption_mlm, ' if where == 'loss' else ''}gradient not finite" in said and said.count(".jpg") == 4
    saved = torch.load("out/coco/baseline.pt", weights_only=True)
    assert saved["step"] == 4 and "of step 4" in said and all(torch.isfinite(v).all() for v in saved["model"].values())


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), MemoryError(),
                                   RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")])
def test_out_of_memory_says_what_to_lower(here, monkeypatch, capsys, error):
    def full(*arguments):
        raise error
    monkeypatch.setattr(hist, "training_losses", full)
    said = refused(capsys, "--steps", "2", "--batch-size", "4", "--eval-images", "2", "--device", "cpu")
    assert "out of memory" in said and "--batch-size 4" in said and "--accumulate" in said


@pytest.mark.parametrize("arguments, what", [
    (["--batch-size", "6", "--accumulate", "4"], "--accumulate 4"), (["--pretrained"], "--vit NAME"), (["--accumulate", "0"], "--accumulate"), (["--max-bad", "-1"], "--max-bad"),
    (["--lr", "nan"], "--lr"), ([*SHORT, "--vit", "vit_tiny_patch16_224", "--image-size", "50"], "multiple of its patch, 16"),
    ([*SHORT, "--vit", "vit_tiny_patch16_224", "--pretrained"], "--pretrained")])
def test_options_that_cannot_be(here, monkeypatch, capsys, arguments, what):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    coco_folder(here / "coco")
    assert what in refused(capsys, *arguments)


# ------------------------------------------------------------------------------------------------------------ speed
def test_a_run_parses_its_captions_once_and_never_uses_a_stale_cache(here, monkeypatch):
    coco_folder(here / "coco")
    parsed = []
    monkeypatch.setattr(hist, "phrases_of", lambda c: parsed.append(c) or [("a cat", "cat")])
    o = hist.settle({"data": "coco", "root": "coco", "device": "cpu"})
    parses = lambda: hist.prepare(o)[0].parses
    first = parses()
    assert len(parsed) == 12 and len(list(here.glob("out/captions-*.json"))) == 2
    assert [[list(map(tuple, c)) for c in row] for row in parses()] == first and len(parsed) == 12
    edit(here / "coco/annotations/captions_train2017.json", lambda data: data["annotations"][0].update(caption="Another caption"))
    parses()
    assert len(parsed) == 24                                    # other captions
    changed = here / "parse.py"
    changed.write_text(Path(hist.parser.__file__).read_text() + "\n# changed\n")
    monkeypatch.setattr(hist, "parser", types.SimpleNamespace(**{**vars(hist.parser), "__file__": str(changed)}))
    parses()
    assert len(parsed) == 36                                    # another parser
    for path in here.glob("out/captions-*.json"):
        path.write_text('{"half')
    parses()
    assert len(parsed) == 48                                    # a cache that is damaged


def test_a_step_never_waits_for_the_device():
    """Operations whose size or result the host has to know: .item(), nonzero, masks as indices, multinomial (which checks its weights)."""
    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, f, types, arguments=(), named=None):
            name = str(f)
            masks = [i for i in arguments[1] if i is not None and i.dtype == torch.bool] if name.startswith("aten.index.") else []
            assert not masks and not any(word in name for word in ("local_scalar", "nonzero", "masked_select", "is_nonzero", "multinomial", "equal.default")), name
            return f(*arguments, **(named or {}))
    o = hist.Options(**hist.SCENES)
    records = hist.Scenes(100, o, "test", True)
    vocabulary = hist.build_vocabulary((records[i]["captions"][0] for i in range(8)), 100)
    samples, model = hist.Samples(records, vocabulary, o), hist.HIST(o, vocabulary)
    batch = hist.collate([samples[i] for i in range(8)])
    with Watch():
        losses, _ = hist.training_losses(model, batch, hist.LEVELS, 0.5, 0)
        sum(losses.values()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    assert len(losses) == 9


def test_accumulated_parts_are_one_step_of_their_mean(here):
    common = "--base-steps 0 --steps 2 --levels caption --eval-images 2 --device cpu --batch-size 8".split()
    hist.main([*common, "--accumulate", "2", "--out", "parts"])
    assert [m["step"] for m in lines("parts/metrics.jsonl")] == [1, 2, 2]
    o = hist.settle({"device": "cpu", "batch_size": 8, "accumulate": 2})
    records, _ = hist.load_data(o)
    samples = hist.Samples(records, {w: i for i, w in enumerate(torch.load("parts/baseline.pt", weights_only=True)["vocabulary"])}, o)
    torch.manual_seed(0)
    model = hist.HIST(o, samples.vocabulary)
    parts = [hist.training_losses(model, hist.collate([samples[i] for i in part]), ("caption",), 0.0, 1)[0] for part in (range(4), range(4, 8))]
    for k, v in lines("parts/metrics.jsonl")[0]["losses"].items():
        assert v == pytest.approx(sum(p[k].item() for p in parts) / 2, abs=2e-5)


def test_images_are_normalised_as_the_vit_was_trained():
    o = hist.Options(**{**hist.PHOTOS, "vit": "vit_tiny_patch16_224", "image_size": 32, "width": 64})
    for name, mean, std in (("vit_tiny_patch16_224", [0.5] * 3, [0.5] * 3), ("vit_base_patch32_clip_224", hist.timm.data.OPENAI_CLIP_MEAN, hist.timm.data.OPENAI_CLIP_STD)):
        o.vit = name
        model = hist.HIST(o, {"[PAD]": 0, "a": 1})
        seen = []
        model.vit.forward_features = lambda x: seen.append(x) or torch.zeros(1, 5, model.vit.embed_dim)
        model.encode_image(torch.full((1, 3, 32, 32), 255, dtype=torch.uint8))
        assert seen[0][0, :, 0, 0].tolist() == pytest.approx([(1 - m) / s for m, s in zip(mean, std)], rel=1e-5)


def test_bench_reports_each_part_of_a_step(tmp_path):
    done = subprocess.run([*RUN[:2], "--bench", "--batch-size", "4", "--device", "cpu"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for word in ("images/s", "tokens/s", "GiB", "data", "image", "text", "fusion", "Grad-CAM", "backward", "loader alone"):
        assert word in done.stdout, word
    rows = [line.split() for line in done.stdout.splitlines() if line.startswith(("caption ", "+ "))]
    assert [" ".join(r[:2]) for r in rows[1:]] == ["+ phrase", "+ subject", "+ composition"]
    assert not (tmp_path / "out/scenes/options.json").exists()
