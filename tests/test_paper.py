"""The paper's experiments on tiny settings: the ablation and its table, captions, choices, cost."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import hist
from tests.paper import ablate, caption, choices, cost

TINY = "--base-steps 2 --steps 2 --batch-size 8 --eval-images 8 --device cpu".split()
SMALL_BLIP = "--base blip --width 32 --fusion-layers 2 --image-size 24 --device cpu".split()


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(capsys, main, *arguments):
    """What a command says when it is refused: one line, status 2."""
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    assert stop.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


# ----------------------------------------------------------------------------------- the ablation
def test_table_by_hand():
    """Differences of 2, 4 and 6 points: mean 4, sd 2, t(0.975, 2) = 4.30, so 4 ± 4.97."""
    seeds = []
    for seed in range(3):
        same = {"vqa": 0.5 + 0.1 * seed, "vqa_chance": 0.3, "seconds": 7, "r10_image_to_text": 1}
        rows = {row: dict(same) for row in ablate.ROWS}
        rows["all"]["vqa"] += 0.02 * (seed + 1)
        seeds.append(rows)
    head, _, vqa, seconds = ablate.table(seeds).splitlines()
    cells = [cell.strip() for cell in vqa.strip("|").split("|")]
    assert cells[0] == "vqa" and cells[1] == "60.0 ± 10.0" and cells[-1] == "30.0"
    everything = [cell.strip() for cell in head.split("|")].index("all") - 1
    assert cells[everything] == "64.0 ± 12.0<br>+4.0 [-1.0, +9.0]"
    assert seconds.startswith("| seconds | 7.0 ± 0.0 | 7.0 ± 0.0<br>+0.0 [+0.0, +0.0] |")
    one = ablate.table(seeds[:1]).splitlines()[2]
    assert one.startswith("| vqa | 50.0 | 50.0 |") and one.endswith("| 52.0 | 50.0 | 30.0 |")


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
        grey = images.float().mean(1, keepdim=True)
        return None, torch.nn.functional.avg_pool2d(grey, images.shape[-1] // 2).flatten(1)

    def project_image(self, V):
        return [V[None]]

    def encode_text(self, ids):
        return torch.zeros(*ids.shape, 1), ids >= 0, None

    def match(self, T, mask, image_kv):
        patches = image_kv[0][0]  # (n, 4)
        A = self.seen.expand(len(patches), 1, T.shape[1], 4).clone().requires_grad_()
        score = patches @ self.weight + A.mean((1, 2, 3)) - A.detach().mean((1, 2, 3))
        return torch.stack([-score, score], 1), [A]


@pytest.mark.parametrize("right", [True, False])
def test_occlusion_agrees_with_a_map_of_what_is_read_and_not_with_its_reverse(right):
    picture = np.zeros((16, 16, 3), np.uint8)
    for number, value in enumerate((250, 240, 230, 225)):
        y, x = 8 * (number // 2), 8 * (number % 2)
        picture[y : y + 8, x : x + 8] = value
    options = SimpleNamespace(image_size=16, device="cpu", cam_layer=0)
    tokenizer = hist.Tokenizer.build(["a circle"], 10)
    agreement = ablate.occlusion_agreement(Oracle(right), tokenizer, picture, "a circle", options)
    grey = 236  # the mean, 236.25, as a pixel; so greying drops 4 * 14, 3 * 4, 2 * -6, 1 * -11
    drops = [4 * (250 - grey), 3 * (240 - grey), 2 * (230 - grey), 225 - grey]
    assert sorted(drops) == [-12, -11, 12, 56]
    ranks = {True: [3, 2, 1, 0], False: [0, 1, 2, 3]}[right]
    assert agreement == pytest.approx(np.corrcoef(ranks, [3, 2, 0, 1])[0, 1], abs=1e-5)


def test_subjects_found():
    scenes = hist.Scenes(200, hist.Options(), "subjects", True)
    records = [scenes[i] for i in range(len(scenes))]
    precision, recall = ablate.subjects_found(records)
    assert recall == 1 and 0.97 < precision <= 1
    wrong = [
        record | {"said": [f"{phrase} dog" for phrase in record["said"]]} for record in records
    ]
    assert ablate.subjects_found(wrong) == (0, 0)
    less = {"captions": ["a red ring and a blue star"], "said": ["a red ring"]}
    more = {"captions": ["a red ring"], "said": ["a red ring", "a blue star"]}
    assert ablate.subjects_found([less]) == (0.5, 1) and ablate.subjects_found([more]) == (1, 0.5)


def test_every_row_goes_on_from_one_base_and_what_is_done_is_kept(here, capsys):
    command = ["--seeds", "2", *TINY]
    ablate.main(command)
    shown = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert [cell.strip() for cell in shown[0].split("|")][2:-2] == list(ablate.ROWS)
    assert any(line.startswith("| pointing_phrases |") and " ± " in line for line in shown)
    assert any(line.startswith("| occlusion |") for line in shown)
    for seed in (0, 1):
        out = here / f"out/ablation/seed{seed}"
        done = json.loads((out / "results.json").read_text())
        assert list(done) == list(ablate.ROWS)
        ratio = done["all"]["seconds"] / done["caption"]["seconds"]
        assert done["caption, same time"]["steps"] == max(1, round(2 * ratio))
        first = {}
        for row in map(json.loads, (out / "metrics.jsonl").read_text().splitlines()):
            first.setdefault(row["run"], row["caption_itc"])
        assert len(first) == 8
        base = first.pop("base")
        assert len(set(first.values())) == 1 and base not in first.values()
        assert Image.open(out / "balance.png").size == (1500, 450)
    files = sorted((here / "out/ablation").glob("*/*"))
    written = [path.stat().st_mtime_ns for path in files]
    ablate.main(command)
    assert written == [path.stat().st_mtime_ns for path in files]
    assert shown == [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]


def test_an_ablation_that_was_stopped_goes_on(here, capsys):
    ablate.main(["--seeds", "1", *TINY])
    path = here / "out/ablation/seed0/results.json"
    done = json.loads(path.read_text())
    left = {row: done[row] for row in list(done)[:-2]}
    path.write_text(json.dumps(left))
    ablate.main(["--seeds", "1", *TINY])
    again = json.loads(path.read_text())
    assert list(again) == list(done) and again["all"] == done["all"]
    said = refused(capsys, ablate.main, "--seeds", 1, *TINY, "--lr", 0.5)
    assert "--lr 0.002" in said and "another --out" in said
    assert "--seeds" in refused(capsys, ablate.main, "--seeds", 0)


def test_divisions_by_hand(monkeypatch):
    """A map that is 1 everywhere divides as the areas do."""
    options = hist.Options(device="cpu")
    record = hist.Scenes(10, options, "divisions", True)[0]

    def flat(model, tokenizer, image, texts, cam_layer):
        return np.ones((len(texts), *image.shape[1:])), []

    monkeypatch.setattr(hist, "maps_of", flat)
    found = ablate.divisions(None, None, [record], options)
    assert len(found) == min(3, len(record["targets"]) * (len(record["targets"]) - 1) // 2)
    for division in found:
        assert division.mass == pytest.approx(division.area) and division.area >= 0.5
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
    images = torch.stack([torch.full((3, 24, 24), v, dtype=torch.uint8) for v in (30, 220)])
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
    words = caption.generate(untaught, tokenizer, images[0], 1.0).split()
    assert len(words) < hist.MAX_TOKENS and not set(tokenizer.SPECIAL) & set(words)


def test_caption_of_a_run(capsys):
    Image.fromarray(np.full((30, 40, 3), 200, np.uint8)).save("photo.png")
    hist.main([*TINY, *SMALL_BLIP, "--out", "blip"])
    capsys.readouterr()
    caption.main(["blip", "photo.png"])
    likeliest = capsys.readouterr().out
    caption.main(["blip", "photo.png"])
    assert capsys.readouterr().out == likeliest and likeliest.count("\n") == 1
    caption.main(["blip", "photo.png", "--top-p", "0.9", "--seed", "1"])
    assert capsys.readouterr().out.count("\n") == 1
    assert "no run" in refused(capsys, caption.main, "nowhere", "photo.png")
    assert "picture" in refused(capsys, caption.main, "blip", "nowhere.png")
    hist.main([*TINY, "--levels", "caption", "--out", "albef"])
    assert "--base blip" in refused(capsys, caption.main, "albef", "photo.png")


def test_choices(capsys):
    choices.main(TINY)
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split("|")[1].strip() for line in lines if line.startswith("|")]
    assert [row for row in rows if row in choices.VARIANTS] == list(choices.VARIANTS)
    assert "base: layer 0, rows of words" in rows and "v0: layer 1, rows of [CLS]" in rows


def test_over_maximum_by_hand():
    """(1, 0) and (0, 1) ask for (1, 1); the whole (2, 1) is (1, 1/2): off by 0 and 1/2."""
    part1, part2, whole = torch.tensor([[[[1.0, 0]]], [[[0, 3.0]]], [[[2.0, 1]]]])
    loss = choices.over_maximum(part1, part2, whole, torch.ones(1))
    assert loss.item() == pytest.approx(0.25)


def test_cost(capsys):
    original = hist.grad_cam, torch.Tensor.backward
    cost.main(["--batch-size", "8", "--eval-images", "8", "--device", "cpu"])
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert [row.split("|")[1].strip() for row in rows[2:]] == [
        "caption",
        "+ phrase",
        "+ subject",
        "+ composition",
    ]
    for row in rows[2:]:
        shares = [float(cell.strip(" %")) for cell in row.split("|")[-10:-1] if "%" in cell]
        assert sum(shares) == pytest.approx(100, abs=0.5)
    assert (hist.grad_cam, torch.Tensor.backward) == original
    assert "--accumulate" in refused(capsys, cost.main, "--accumulate", 2)
