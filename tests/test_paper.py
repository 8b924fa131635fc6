"""The paper's experiments on tiny settings: the ablation and its table, captions, choices, cost."""

import importlib
import json
import math
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import hist
from tests.paper import ablate, caption, choices, cost

TINY = "--vit-steps 2 --base-steps 2 --steps 2 --batch-size 8 --eval-images 8 --device cpu".split()
SMALL_BLIP = (
    "--base blip --vit-steps 2 --width 32 --fusion-layers 2 --image-size 24 --device cpu".split()
)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def refused(capsys, main, *arguments):
    """What a command says when it is refused: one line, status 2."""
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    assert stop.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def rows_of(text):
    """{first cell: its other cells} of a Markdown table in a text."""
    rows = {}
    for line in text.splitlines():
        if line.startswith("|"):
            cells = line.strip("|").split("|")
            first, *others = [cell.strip() for cell in cells]
            rows[first] = others
    return rows


# ----------------------------------------------------------------------------------- the ablation
def test_table_by_hand():
    """Differences of 2, 4 and 6 points: mean 4, sd 2, t(0.975, 2) = 4.30, so 4 ± 4.97."""
    seeds = []
    for vqa, more in ((0.5, 0.02), (0.6, 0.04), (0.7, 0.06)):
        seed = {}
        for row in ablate.ROWS:
            seed[row] = {"vqa": vqa, "vqa_chance": 0.3, "seconds": 7, "phrases": 9, "steps": 2}
        seed["all"]["vqa"] = vqa + more
        seeds.append(seed)
    seeds[0]["caption, same time"]["vqa"] = 0.52
    main, gains = ablate.table(seeds).split("\n\n")
    table, gains = rows_of(main), rows_of(gains)
    assert table[""] == [*ablate.ROWS, "chance"]
    assert gains["vqa"] == ["+4.0 [-1.0, +9.0]", "+3.3 [-4.3, +10.9]"]  # 0, 4, 6: sd 3.06
    assert set(table) == {"", "---", "vqa", "seconds"}
    named = dict(zip(table[""], table["vqa"]))
    assert named["caption"] == "60.0 ± 10.0"
    assert named["all"] == "64.0 ± 12.0<br>+4.0 [-1.0, +9.0]"
    assert named["chance"] == "30.0"
    assert table["seconds"][0] == "7.0 ± 0.0"
    one = rows_of(ablate.table(seeds[:1]))
    assert one["vqa"][:2] == ["+2.0", "+0.0"]  # the last table's: gains
    two = [{row: seed[row] for row in ("caption", "all")} for seed in seeds]
    brief = rows_of(ablate.table(two))
    assert brief[""] == ["caption", "all", "chance"]
    assert brief["vqa"] == [named["caption"], named["all"], "30.0"]


def test_where_a_point_lies():
    """Boxes in an image of 48 pixels, where 4 beside an object are still beside it."""
    cat, dog = {"boxes": [[10, 10, 20, 20]]}, {"boxes": [[22, 10, 30, 20], [40, 40, 44, 44]]}
    points = {(10, 19): "own", (20, 12): "beside", (22, 12): "other", (41, 43): "other"}
    points |= {(15, 23): "beside", (15, 24): "elsewhere", (0, 0): "elsewhere"}
    for (x, y), expected in points.items():
        assert ablate.where(x, y, cat, [cat, dog], 48) == expected


def test_maps_that_know_point_at_what_captions_say(monkeypatch):
    """Maps that are right about what a caption says, and point at the first object otherwise."""
    options = hist.Options(device="cpu")
    records = [hist.Scenes(10, options, "said", True)[i] for i in range(6)]
    by_pixels = {record["image"].tobytes(): record for record in records}

    def maps_of(model, tokenizer, image, texts, cam_layer):
        record = by_pixels[image.permute(1, 2, 0).numpy().tobytes()]
        named, targets = len(record["targets"]), record["targets"]
        shown = [0] * named + [number for _, number in record["said"]]
        return np.array([targets[number]["mask"] for number in shown], float), None

    monkeypatch.setattr(hist, "maps_of", maps_of)
    found = ablate.point_at(None, None, records, options)
    objects = sum(len(record["targets"]) for record in records)
    assert found["pointing_said"] == 1 and 1 / 6 <= found["pointing_said_chance"] <= 1 / 3
    assert found["error_own"] == pytest.approx(len(records) / objects)
    assert found["error_other"] == pytest.approx(1 - found["error_own"])


def test_equal_values_share_a_rank():
    ranks = ablate.ranks(torch.tensor([5.0, 1.0, 5.0, 9.0]))
    assert ranks.tolist() == [2.0, 0.5, 2.0, 3.5]


class Oracle(torch.nn.Module):
    """A model whose match logit is a weighted sum of the four patches of an image, and whose
    attention has these weights, or (wrong) has them reversed."""

    prefix, grid = 0, (2, 2)
    weight = torch.tensor([4.0, 3, 2, 1])

    def __init__(self, right):
        super().__init__()
        self.seen = self.weight if right else self.weight.flip(0)

    def encode_image(self, images):
        grey = images.float().mean(1)
        patches = torch.nn.functional.adaptive_avg_pool2d(grey, 2)
        return None, patches.flatten(1)

    def project_image(self, V):
        return [V[None]]

    def encode_text(self, ids):
        return torch.zeros(*ids.shape, 1), ids >= 0, None

    def match(self, T, mask, image_kv):
        patches = image_kv[0][0]  # (n, 4)
        A = self.seen.repeat(len(patches), 1, T.shape[1], 1).requires_grad_()
        score = patches @ self.weight
        score += A.mean((1, 2, 3))  # the same for all images
        return torch.stack([-score, score], 1), [A]


@pytest.mark.parametrize("right", [True, False])
def test_occlusion_agrees_with_a_map_of_what_is_read_and_not_with_its_reverse(right):
    pixels = np.uint8([[250, 240], [230, 225]]).repeat(8, 0).repeat(8, 1)
    picture = np.stack([pixels] * 3, 2)
    options = SimpleNamespace(image_size=16, device="cpu", cam_layer=0)
    tokenizer = hist.Tokenizer.build(["a circle"], 10)
    agreement = ablate.occlusion_agreement(Oracle(right), tokenizer, picture, "a circle", options)
    # The mean is 236; greying the patches drops the score by 4 * 14, 3 * 4, 2 * -6 and 1 * -11.
    drops = [3, 2, 0, 1]
    weights = [3, 2, 1, 0]
    if not right:
        weights.reverse()
    expected = np.corrcoef(weights, drops)[0, 1]
    assert agreement == pytest.approx(expected, abs=1e-5)


def test_subjects_found():
    scenes = hist.Scenes(200, hist.Options(), "subjects", True)
    records = [scenes[i] for i in range(len(scenes))]
    precision, recall = ablate.subjects_found(records)
    assert recall == 1
    assert 0.97 < precision <= 1
    for record in records:
        record["said"] = [(f"{phrase} dog", number) for phrase, number in record["said"]]
    assert ablate.subjects_found(records) == (0, 0)
    record = {"captions": ["a red ring and a blue star"], "said": [("a red ring", 0)]}
    assert ablate.subjects_found([record]) == (0.5, 1)


def first_losses(out):
    """{training: its first step's caption_itc}."""
    found = {}
    for line in (out / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        found.setdefault(row["run"], row["caption_itc"])
    return found


def test_every_row_goes_on_from_one_base_and_what_is_done_is_kept(capsys):
    command = ["--seeds", "2", *TINY]
    ablate.main(["--brief", "--seeds", "1", *TINY])
    two = json.loads(Path("out/ablation/seed0/results.json").read_text())
    assert list(two) == ["caption", "all"]
    capsys.readouterr()
    ablate.main(command)
    shown = rows_of(capsys.readouterr().out.split("\n\n")[0])
    assert shown[""][:-1] == list(ablate.ROWS)
    assert " ± " in shown["pointing_phrases"][0]
    assert "occlusion" in shown
    top = Path("out/ablation")
    for out in (top / "seed0", top / "seed1"):
        done = json.loads((out / "results.json").read_text())
        begun = two if out.name == "seed0" else {}
        assert list(done) == [*begun, *(row for row in ablate.ROWS if row not in begun)]
        assert done | begun == done
        ratio = done["all"]["seconds"] / done["caption"]["seconds"]
        assert done["caption, same time"]["steps"] == max(1, round(2 * ratio))
        first = first_losses(out)
        base = first.pop("base")
        assert len(first) == 7
        assert len(set(first.values())) == 1
        assert base not in first.values()
        assert Image.open(out / "balance.png").size == (1500, 450)
    files = list(top.glob("*/*"))
    written = [path.stat().st_mtime_ns for path in files]
    ablate.main(command)
    assert written == [path.stat().st_mtime_ns for path in files]
    assert rows_of(capsys.readouterr().out.split("\n\n")[0]) == shown

    # One that was stopped before its last row goes on; with other options it does not.
    path = top / "seed0/results.json"
    kept = json.loads(path.read_text())
    last = kept.popitem()[0]
    path.write_text(json.dumps(kept))
    ablate.main(["--seeds", "1", *TINY])
    again = json.loads(path.read_text())
    assert again.pop(last)["steps"] > 0
    assert again == kept
    said = refused(capsys, ablate.main, *command, "--lr", 0.5)
    assert "--lr 0.002" in said
    assert "another --out" in said
    assert "1 to 10" in refused(capsys, ablate.main, "--seeds", 0)
    (top / "seed0/running").write_text(str(os.getppid()))
    assert "another run writes into" in refused(capsys, ablate.main, "--seeds", "1", *TINY)


def test_divisions_by_hand(monkeypatch):
    """A map that is 1 everywhere divides as the areas do."""
    options = hist.Options(device="cpu")
    record = hist.Scenes(10, options, "divisions", True)[0]

    def flat(model, tokenizer, image, texts, cam_layer):
        return np.ones((len(texts), *image.shape[1:])), []

    monkeypatch.setattr(hist, "maps_of", flat)
    found = ablate.divisions(None, None, [record], options)
    assert found
    for division in found:
        assert division.area >= 0.5
        assert division.mass == pytest.approx(division.area)
        assert division.balance == pytest.approx((1 - division.area) / division.area)


# ------------------------------------------------------------------------------ captions, and more
def test_captions_what_it_was_taught():
    """Two pictures and what is said of each: after 60 steps of LM alone, the likeliest words and a
    small nucleus say it; the whole nucleus never leaves the words."""
    torch.manual_seed(0)
    taught = ["a red circle", "the blue star is small"]
    tokenizer = hist.Tokenizer.build(taught, 100)
    options = hist.parse_options(SMALL_BLIP)
    model = hist.BLIP(options, tokenizer)
    model.vit.eval()  # batch norm, of two pictures
    images = torch.tensor([30, 220], dtype=torch.uint8)
    images = images[:, None, None, None].expand(-1, 3, 24, 24)
    text = {"ids": tokenizer.batch(taught), "exists": torch.tensor([True, True])}
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(60):
        optimizer.zero_grad()
        image_kv = model.project_image(model.encode_image(images)[1])
        model.language_loss(text, image_kv).backward()
        optimizer.step()
    for top_p in (0, 0.3):
        said = [caption.generate(model, tokenizer, image, top_p) for image in images]
        assert said == taught
    untaught = hist.BLIP(options, tokenizer)
    said = caption.generate(untaught, tokenizer, images[0], 1.0)
    words = said.split()
    assert len(words) < hist.MAX_TOKENS
    assert not set(tokenizer.SPECIAL) & set(words)


def test_caption_of_a_run(capsys):
    Image.fromarray(np.full((30, 40, 3), 200, np.uint8)).save("photo.png")
    hist.main([*TINY, *SMALL_BLIP, "--out", "blip"])
    capsys.readouterr()
    caption.main(["blip", "photo.png"])
    likeliest = capsys.readouterr().out
    caption.main(["blip", "photo.png"])
    assert capsys.readouterr().out == likeliest
    assert likeliest.count("\n") == 1
    caption.main(["blip", "photo.png", "--top-p", "0.9", "--seed", "1"])
    assert capsys.readouterr().out.count("\n") == 1
    assert "no run" in refused(capsys, caption.main, "nowhere", "photo.png")
    assert "picture" in refused(capsys, caption.main, "blip", "nowhere.png")
    hist.main([*TINY, "--levels", "caption", "--out", "albef"])
    assert "--base blip" in refused(capsys, caption.main, "albef", "photo.png")


def test_a_wide_picture_is_not_squeezed(monkeypatch, capsys):
    pixels = np.full((30, 60, 3), 200, np.uint8)
    pixels[10:20, 20:30] = 0
    Image.fromarray(pixels).save("wide.png")
    hist.main([*TINY, *SMALL_BLIP, "--out", "blip"])
    shown = []
    monkeypatch.setattr(
        caption, "generate", lambda model, tokenizer, image, top_p: shown.append(image)
    )
    caption.main(["blip", "wide.png"])
    dark = (shown[0] < 100).all(0)
    assert shown[0].shape == (3, 24, 24) and dark.any(0).sum() == dark.any(1).sum() == 4


def test_choices(capsys):
    choices.main(TINY)
    rows = rows_of(capsys.readouterr().out)
    assert set(choices.VARIANTS) < set(rows)
    assert "base: layer 0, rows of [CLS]" in rows
    assert "v0: layer 0, rows of [CLS]" in rows
    assert "v0: layer 0, rows of words" not in rows


def test_over_maximum_by_hand():
    """(1, 0) and (0, 1) ask for (1, 1); the whole (2, 1) is (1, 1/2): off by 0 and 1/2."""
    part1 = torch.tensor([[[1.0, 0]]])
    part2 = torch.tensor([[[0, 3.0]]])
    whole = torch.tensor([[[2.0, 1]]])
    loss = choices.over_maximum(part1, part2, whole, torch.ones(1))
    assert loss.item() == pytest.approx(0.25)


def test_peak_memory_is_not_known_on_windows(monkeypatch):
    assert cost.peak_memory("cpu") > 2**20
    monkeypatch.setitem(sys.modules, "resource", None)
    monkeypatch.delitem(sys.modules, cost.__name__)
    assert math.isnan(importlib.import_module(cost.__name__).peak_memory("cpu"))


def test_cost(capsys):
    original = hist.grad_cam, torch.Tensor.backward
    cost.main(["--batch-size", "8", "--eval-images", "8", "--device", "cpu"])
    table = rows_of(capsys.readouterr().out)
    assert list(table) == ["levels", "---", "caption", "+ phrase", "+ subject", "+ composition"]
    shares = [float(cell[:-1]) for cell in table["+ composition"] if "%" in cell]
    assert len(shares) == len(cost.PARTS) + 1
    assert sum(shares) == pytest.approx(100, abs=0.5)
    assert (hist.grad_cam, torch.Tensor.backward) == original
    assert "--accumulate" in refused(capsys, cost.main, "--accumulate", 2)
