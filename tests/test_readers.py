"""The other data sets: each written here in its published layout, small and with the odd cases of the real files; readers, benchmarks, commands."""
import json
import pickle
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import benchmarks
import hist
import readers
from test_commands import ROOT, SMALL_VIT, here, lines, refused, typed  # noqa: F401

QUICK = [*SMALL_VIT, *"--steps 2 --batch-size 4 --eval-images 0 --save-every 2 --device cpu".split()]


def picture(path, value=90, size=(64, 48)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(value).integers(0, 255, (*size[::-1], 3)).astype(np.uint8)).save(path)


def taken(read, root, splits):
    """(records, what was left out) of a reader."""
    bad = {}
    return list(read(root, splits, bad)), bad


@pytest.fixture
def peaks(monkeypatch):
    """Maps whose highest point is where the test says: {text: (x, y)} on the square of 32 pixels; flat elsewhere."""
    at = {}

    def maps_of(model, vocabulary, images, texts, rows, o):
        maps = np.zeros((len(texts), 32, 32))
        for heat, text in zip(maps, texts):
            for x, y in at.get(text, [(0, 0)]):
                heat[y, x] = 1
        return maps, [1.0] * len(texts)
    monkeypatch.setattr(hist, "maps_of", maps_of)
    return at


SQUARE = hist.Options(image_size=32, device="cpu", eval_images=0)


# -------------------------------------------------------------------------------------------------- Visual Genome
def vg_folder(root):
    """Ten images to train on (one in VG_100K_2), one without a file, one without a good region; image 49 is held out; 7 has COCO's id 391895."""
    region = lambda i, k, phrase: {"region_id": 100 * i + k, "image_id": i, "x": 8 * k, "y": 4, "width": 8, "height": 12, "phrase": phrase}
    said = ["a red bus", "Two dogs  near a tree", "the sky is blue", "a red bus"]
    entries = [{"id": i, "regions": [region(i, k, c) for k, c in enumerate(said)]} for i in [*range(1, 11), 12, 49]]
    entries[0]["regions"] += [region(1, 5, ""), region(1, 6, None), {"region_id": 7}, "no region"]
    entries[-1]["regions"] += [{**region(49, 4, "no box"), "width": 0}, *(region(49, k, f"dog number {k}") for k in range(5, 20))]
    entries[3:3] = [{"id": 11, "regions": []}, {"regions": []}, {"id": "../12", "regions": []}, "no entry"]
    for i in [*range(1, 12), 49]:
        picture(root / ("VG_100K_2" if i == 3 else "VG_100K") / f"{i}.jpg", i)
    (root / "region_descriptions.json").write_text(json.dumps(entries))
    (root / "image_data.json").write_text(json.dumps([{"image_id": i, "coco_id": 391895 if i == 7 else None} for i in range(1, 12)]))


def test_visual_genome(tmp_path):
    vg_folder(tmp_path)
    records, bad = taken(readers.read_vg, tmp_path, ("train", "val"))
    assert [int(r["image"].stem) for r in records] == [*range(1, 11), 49] and [r["split"] for r in records] == ["train"] * 10 + ["val"]
    assert records[2]["image"] == tmp_path / "VG_100K_2/3.jpg"
    assert records[0]["captions"] == ["a red bus", "Two dogs near a tree", "the sky is blue", "a red bus"] and records[0]["targets"] == []
    held_out = records[-1]["targets"]
    assert len(held_out) == readers.TOLD and held_out[1] == {"phrase": "Two dogs near a tree", "boxes": [[8, 4, 16, 16]], "object": 1}
    assert [t["phrase"] for t in held_out[4:6]] == ["dog number 5", "dog number 6"]                # the one with no box is left out
    assert bad["region", "image 1"] == "4 of 8 have no description, or no box"
    assert bad["region", "image 49"] == "1 of 20 have no description, or no box"
    assert sorted(why for (kind, _), why in bad.items() if kind == "image") == [
        "'id' is missing", "invalid literal for int() with base 10: '../12'", "no region of it can be used", "string indices must be integers, not 'str'",
        f"there is no file 12.jpg in {tmp_path}/VG_100K or VG_100K_2"]


@pytest.mark.parametrize("text", ["2\n391895\n", "[2, 391895]", '["2", "391895"]'])
def test_images_are_excluded_by_either_id(tmp_path, text):
    vg_folder(tmp_path)
    (tmp_path / "leave.txt").write_text(text)
    records, _ = taken(lambda *a: readers.read_vg(*a, exclude=tmp_path / "leave.txt"), tmp_path, ("train",))
    assert [int(r["image"].stem) for r in records] == [1, 3, 4, 5, 6, 8, 9, 10]


def test_a_composite_of_visual_genome_has_phrases_of_two_regions(tmp_path):
    vg_folder(tmp_path)
    o = hist.settle(hist.command_line(["--data", "vg", "--root", str(tmp_path), "--out", str(tmp_path), "--max-bad", "0.5", *QUICK]))
    records, _ = hist.load_data(o)
    vocabulary = hist.build_vocabulary([c for r in records for c in r["captions"]], 100)
    samples, word = hist.Samples(records, vocabulary, o), {i: w for w, i in vocabulary.items()}
    whole, pairs = lambda ids: " ".join(word[i] for i in ids[1:]), set()
    for position in range(200):
        sample = samples[position]
        pairs |= {tuple(map(whole, sample["composite"][:2]))}
    assert pairs == {(a, b) for a in ("a red bus", "two dogs", "a tree", "the sky") for b in ("a red bus", "two dogs", "a tree", "the sky") if a != b} - {
        ("two dogs", "a tree"), ("a tree", "two dogs")}          # of one region


def test_a_list_is_read_in_parts(tmp_path):
    path, elements = tmp_path / "list.json", [{"a": "ü]}, {", "b": [1.5, None]}, [], "x", {"c": {}}]
    for text in (json.dumps(elements), json.dumps(elements, ensure_ascii=False, indent=1), "\n[ ] ", "[]"):
        path.write_text(text)
        for size in (2, 3, 7, 1 << 20):
            if len(text) > 16 * size:
                continue                                        # an element may be 16 times as long as a part
            assert list(readers.stream(path, size)) == (elements if "a" in text else [])
    for text, what in (('{"a": 1}', "not a JSON list"), ('[{"a": 1}, {"b": }]', "after 1 elements"), ('[{"a": 1}', "after 1 elements"), ("", "not a JSON list")):
        path.write_text(text)
        with pytest.raises(hist.UserError, match=f"list.json: .*{what}"):
            list(readers.stream(path))


def test_a_hundred_thousand_images_open_in_at_most_4_GiB(tmp_path):
    """Ten regions an image, as the published file has them, and image files that are names only."""
    (tmp_path / "VG_100K").mkdir()
    names = random.Random(0).sample(range(10 ** 6), 1000)
    with open(tmp_path / "region_descriptions.json", "w") as f:
        regions = lambda i: [{"region_id": 10 * i + k, "width": 82, "height": 139, "image_id": i, "phrase": f"a clock number {names[i * k % 1000]} on the wall",
                              "y": 57, "x": 421} for k in range(10)]
        f.write("[" + ", ".join(json.dumps({"regions": regions(i), "id": i}) for i in range(100_000)) + "]")
    program = """if True:
        import os, resource, sys, time
        sys.path[:0] = sys.argv[1:3]
        import hist, readers
        from pathlib import Path
        listed, readers.os.listdir = os.listdir, lambda folder: [f"{i}.jpg" for i in range(100_000)] if "VG_100K" in str(folder) else listed(folder)
        begun = time.time()
        train, held_out = readers.load(hist.settle({"data": "vg", "root": sys.argv[3], "out": sys.argv[3], "device": "cpu"}))
        print(len(train), len(held_out), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20, time.time() - begun)"""
    done = subprocess.run([sys.executable, "-c", program, ROOT, ROOT / "tests", tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    train, held_out, gigabytes, seconds = map(float, done.stdout.split())
    print(f"{gigabytes:.2f} GiB, {seconds:.1f} s")
    assert (train, held_out) == (98_000, 2_000) and gigabytes < (4 if sys.platform != "darwin" else 4096)


# ------------------------------------------------------------------------------------------------------ Flickr30k
XML = """<annotation><filename>{name}.jpg</filename><size><width>64</width><height>48</height><depth>3</depth></size>
<object><name>1</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>17</xmax><ymax>25</ymax></bndbox></object>
<object><name>1</name><name>4</name><bndbox><xmin>33</xmin><ymin>25</ymin><xmax>49</xmax><ymax>37</ymax></bndbox></object>
<object><name>2</name><bndbox><xmin>41</xmin><ymin>1</ymin><xmax>65</xmax><ymax>13</ymax></bndbox></object>
<object><name>3</name><scene>1</scene><nobndbox>1</nobndbox></object>
</annotation>"""
SAID = ["[/EN#1/people Two men] with [/EN#2/clothing/other red hats] stand in [/EN#3/scene the street] .", "[/EN#1/people They] have [/EN#0/notvisual fun] .",
        "[/EN#9/animals A dog] without an annotation .", "No phrase here .", "[/EN#4/vehicles/people A rider] passes ."]


def flickr_folder(root, images="flickr30k-images"):
    for folder in ("Sentences", "Annotations"):
        (root / folder).mkdir(parents=True)
    for split, names in {"train": range(1000, 1006), "val": range(2000, 2003), "test": range(3000, 3003)}.items():
        (root / f"{split}.txt").write_text("".join(f"{n}\n" for n in [*names, f"missing_{split}"]))
        for n in names:
            picture(root / images / f"{n}.jpg", n)
            (root / f"Sentences/{n}.txt").write_text("\n".join([SAID[0].replace("street", f"street number {n % 10}"), *SAID[1:]]) + "\n")
            (root / f"Annotations/{n}.xml").write_text(XML.format(name=n))


def test_flickr30k(tmp_path):
    flickr_folder(tmp_path)
    (tmp_path / "Annotations/3001.xml").write_text('<!DOCTYPE a [<!ENTITY b "b">]><annotation/>')
    (tmp_path / "Annotations/3002.xml").write_text("<annotation><object>")
    (tmp_path / "test.txt").write_text((tmp_path / "test.txt").read_text() + "../train/1000\n")
    records, bad = taken(readers.read_flickr30k, tmp_path, ("test", "train"))
    assert [(r["image"].stem, r["split"]) for r in records] == [*((str(n), "test") for n in range(3000, 3003)), *((str(n), "train") for n in range(1000, 1006))]
    assert records[0]["captions"] == ["Two men with red hats stand in the street number 0 .", "They have fun .", "A dog without an annotation .",
                                      "No phrase here .", "A rider passes ."]
    two, hats = [[0, 0, 16, 24], [32, 24, 48, 36]], [[40, 0, 64, 12]]
    assert [(t["phrase"], t["boxes"], t["tags"], t["object"]) for t in records[0]["targets"]] == [
        ("Two men", two, ["people"], "1"), ("red hats", hats, ["clothing", "other"], "2"), ("They", two, ["people"], "1"),
        ("A rider", two[1:], ["vehicles", "people"], "4")]
    assert [r["targets"] for r in records[1:]] == [[]] * 8       # two files that cannot be read; nothing is pointed at in training
    why = {which: why for (kind, which), why in bad.items()}
    assert "expand without end" in why[f"{tmp_path}/Annotations/3001.xml"] and "no element found" in why[f"{tmp_path}/Annotations/3002.xml"]
    assert "leads out" in why["../train/1000"] and "no file missing_test.jpg" in why["missing_test"] and "missing_train" in why and len(bad) == 5


def test_flickr30k_pointing_by_category(tmp_path, peaks):
    flickr_folder(tmp_path, "flickr30k_images")
    records, _ = taken(readers.read_flickr30k, tmp_path, ("test",))
    peaks.update({"Two men": [(20, 20)], "red hats": [(0, 0)], "They": [(31, 0)], "A rider": [(17, 17)]})     # 64 x 48 pixels are 32 x 32 here
    result = benchmarks.pointing(None, None, {"test": records}, SQUARE)
    assert result == {"pointing, test": 0.5, "phrases, test": 12, "pointing, test, clothing": 0.0, "phrases, test, clothing": 3, "pointing, test, other": 0.0,
                      "phrases, test, other": 3, "pointing, test, people": pytest.approx(2 / 3), "phrases, test, people": 9,
                      "pointing, test, vehicles": 1.0, "phrases, test, vehicles": 3}


def test_flickr30k_as_typed(here, capsys):
    flickr_folder(here / "data/flickr30k")
    hist.main(["--data", "flickr30k", *QUICK, "--max-bad", "0.4"])
    assert "R@1" in capsys.readouterr().out and "no file missing_val.jpg" in Path("out/flickr30k/skipped.jsonl").read_text()
    done = typed("--eval", "flickr30k", cwd=here)                # the last training, its options, the default root
    assert done.returncode == 0, done.stderr
    result = json.loads(Path("out/flickr30k/eval-flickr30k.json").read_text())
    assert list(result) == ["baseline", "hist"] and {"pointing, val", "pointing, test, people", "multi-object IoU, test", "R@10, text to image, ITM"} <= set(result["hist"])
    assert result["hist"]["images"] == 3 and result["hist"]["captions"] == 15 and "pairs, val" in result["hist"] and "multi-object IoU, val" not in result["hist"]
    row = next(line for line in done.stdout.splitlines() if line.startswith("pointing, test, people "))
    assert row.split()[-2:] == [f"{100 * result[name]['pointing, test, people']:.1f}" for name in result]
    hist.main(["--eval", "flickr30k", "--eval-images", "1", "--device", "cpu"])
    assert json.loads(Path("out/flickr30k/eval-flickr30k.json").read_text())["hist"]["images"] == 1


# ------------------------------------------------------------------------------------------ referring expressions
def compressed(counts):
    """COCO's compressed run lengths, written from their description: the inverse of run_lengths."""
    text = ""
    for i, count in enumerate(counts):
        x, more = count - (counts[i - 2] if i > 2 else 0), True
        while more:
            digit, x = x & 31, x >> 5
            more = x != (-1 if digit & 16 else 0)
            text += chr(digit + 32 * more + 48)
    return text


def refer_folder(root, name="refcoco+", by="unc", protocol=2, tests=("testA", "testB"), images="train2014"):
    """Three images of val, two of each test split; two objects each (polygons, a crowd's run lengths), the first with two sentences."""
    pictures, annotations, refs = [], [], []
    for i, split in enumerate(["train", "val", "val", "val"] + [t for t in tests for _ in (0, 1)]):
        pictures.append({"id": 500 + i, "file_name": f"COCO_train2014_{500 + i:012}.jpg", "width": 64, "height": 48})
        picture(root / images / pictures[-1]["file_name"], i)
        annotations += [{"id": 10 * i, "image_id": 500 + i, "category_id": 1, "iscrowd": 0, "bbox": [0, 0, 16, 24], "segmentation": [[0, 0, 16, 0, 0, 24]]},
                        {"id": 10 * i + 1, "image_id": 500 + i, "category_id": 1, "iscrowd": 1, "bbox": [32, 0, 32, 48],
                         "segmentation": {"size": [48, 64], "counts": [48 * 32, 48 * 32]}}]
        for k, sentences in enumerate([["left bus", "red one on the left"], ["sky"]]):
            refs.append({"ref_id": 100 * i + k, "ann_id": 10 * i + k, "image_id": 500 + i, "category_id": 1, "split": split, "sent_ids": [9],
                         "file_name": f"COCO_train2014_{500 + i:012}_{10 * i + k}.jpg",
                         "sentences": [{"sent_id": 9, "sent": s, "raw": s.upper(), "tokens": s.split()} for s in sentences]})
    (root / name).mkdir()
    (root / name / f"refs({by}).p").write_bytes(pickle.dumps(refs, protocol))
    (root / name / "instances.json").write_text(json.dumps({"images": pictures, "annotations": annotations, "categories": []}))
    return refs, pictures, annotations


@pytest.mark.parametrize("name, by, protocol", [("refcoco", "unc", 0), ("refcoco+", "google", 2), ("refcocog", "umd", 4)])
def test_refcoco(tmp_path, name, by, protocol):
    refer_folder(tmp_path, name, by, protocol)
    records, bad = taken(readers.READERS[name], tmp_path, None)
    assert not bad and [(r["split"], r["image"].name[-6:-4]) for r in records] == [
        ("val", "01"), ("val", "02"), ("val", "03"), ("testA", "04"), ("testA", "05"), ("testB", "06"), ("testB", "07")]
    targets = records[0]["targets"]
    assert [(t["phrase"], t["boxes"], t["object"]) for t in targets] == [
        ("left bus", [[0, 0, 16, 24]], 10), ("red one on the left", [[0, 0, 16, 24]], 10), ("sky", [[32, 0, 64, 48]], 11)]
    bus, sky = hist.decode_mask(targets[0]["mask"]), hist.decode_mask(targets[2]["mask"])
    assert bus[2, 2] and not bus[20, 14] and sky[:, 32:].all() and not sky[:, :32].any()


def test_a_pickle_of_python_2(tmp_path):
    refs, *_ = refer_folder(tmp_path, protocol=0)
    text = (b"(lp0\n(dp1\nS'ref_id'\np2\nI0\nsS'ann_id'\np3\nL10L\nsS'image_id'\np4\nI501\nsS'split'\np5\nS'testA'\np6\nsS'sentences'\np7\n(lp8\n(dp9\n"
            b"S'sent'\np10\nS'caf\\xe9'\np11\nsasa.")              # str as bytes, long with its L: what Python 2 writes
    (tmp_path / "refcoco+/refs(unc).p").write_bytes(text)
    records, bad = taken(readers.READERS["refcoco+"], tmp_path, None)
    assert not bad and [t["phrase"] for t in records[0]["targets"]] == ["café"] and records[0]["split"] == "testA"


class Call:
    def __reduce__(self):
        return exec, ("open('touched', 'w')",)


@pytest.mark.parametrize("data, name", [(pickle.dumps([Call()], 0), "exec"), (pickle.dumps([Call()], 4), "builtins.exec"), (b"cos\nsystem\n(S'touch touched'\ntR.", "os.system"),
                                        (b"(S'touch touched'\nios\nsystem\n.", "os.system"), (b"Pposix.system\n.", "posix.system"), (b"garbage", "refs(unc).p"),
                                        (pickle.dumps({"a": 1}), "no list of referring expressions")])
def test_a_pickle_that_wants_more_than_plain_data_is_refused_by_name(here, capsys, data, name):
    refer_folder(here)
    (here / "refcoco+/refs(unc).p").write_bytes(data)
    with pytest.raises(hist.UserError) as error:
        taken(readers.READERS["refcoco+"], here, None)
    assert name in str(error.value) and "refs(unc).p" in str(error.value) and not Path("touched").exists()


def test_bad_expressions_are_left_out_and_listed(tmp_path):
    refs, pictures, annotations = refer_folder(tmp_path)
    pictures[1]["file_name"] = "../../secret.jpg"
    pictures[2]["file_name"] = "missing.jpg"
    annotations[9]["bbox"] = [70, 0, 5, 5]
    del annotations[12]
    pictures += [{"file_name": "of no id"}, "x"]
    (tmp_path / "refcoco+/instances.json").write_text(json.dumps({"images": pictures, "annotations": annotations}))
    (tmp_path / "refcoco+/refs(unc).p").write_bytes(pickle.dumps([*refs, {"ref_id": 1}, "x", {**refs[-1], "image_id": 9}]))
    records, bad = taken(readers.READERS["refcoco+"], tmp_path, ("val", "testA", "testB"))
    why = {f"{kind} {which}": why for (kind, which), why in bad.items()}
    assert "leads out" in why["image 501 of refs(unc).p"] and "no file missing.jpg" in why["image 502 of refs(unc).p"]
    assert len(records) == 5 and len(why) == 7 and why["image 9 of refs(unc).p"] == "9 is missing"
    assert "no pixel" in why["expression ref_id 401 of refs(unc).p"] and why["expression ref_id 600 of refs(unc).p"] == "60 is missing"


def test_refclef_has_compressed_run_lengths(tmp_path):
    for counts in ([0, 48 * 64], [100, 30, 18, 30, 18, 2000, 876], [5, 40, 1000, 3, 2024], [48 * 64]):
        assert readers.run_lengths(compressed(counts)) == counts
    assert readers.run_lengths("01861KJ") == [0, 1, 8, 7, 9, 2, 3] and readers.run_lengths("7330;") == [7, 3, 3, 3, 14]       # pycocotools wrote these
    refs, pictures, annotations = refer_folder(tmp_path, "refclef", "berkeley", tests=("test",), images="saiapr_tc-12")
    for a in annotations:
        a["segmentation"] = [{"size": [48, 64], "counts": compressed([48 * 10, 96, 48 * 20, 48 * 32])}, {"size": [48, 64], "counts": compressed([0, 1, 48 * 64 - 1])}]
    (tmp_path / "refclef/instances.json").write_text(json.dumps({"images": pictures, "annotations": annotations}))
    records, bad = taken(readers.READERS["refclef"], tmp_path, None)
    mask = hist.decode_mask(records[0]["targets"][0]["mask"])
    assert not bad and mask[:, 10:12].all() and mask[:, 32:].all() and mask[0, 0] and mask.sum() == 48 * 34 + 1


def test_refcoco_pointing_and_multi_object_iou(tmp_path, peaks):
    refer_folder(tmp_path)
    records, _ = taken(readers.READERS["refcoco+"], tmp_path, None)
    splits = {split: [r for r in records if r["split"] == split] for split in ("testA", "val")}
    peaks.update({"left bus": [(7, 15)], "sky": [(20, 3)], "red one on the left": [(1, 1)]})     # in the box but not in its triangle; in both; in both
    result = benchmarks.pointing(None, None, splits, SQUARE)
    assert result == {"pointing, testA": 1.0, "pointing in mask, testA": pytest.approx(2 / 3), "phrases, testA": 6,
                      "pointing, val": 1.0, "pointing in mask, val": pytest.approx(2 / 3), "phrases, val": 9}
    half = [(x, y) for x in range(16, 32) for y in range(32)]    # all of the sky, nothing of the bus
    peaks.update({f"{a} and sky": half for a in ("left bus", "red one on the left")})
    area = 32 * 16 + hist.truth(records[0], 32)[0][2].sum()
    assert benchmarks.referring(None, None, splits, SQUARE) == {
        "multi-object IoU, testA": pytest.approx(32 * 16 / area), "pairs, testA": 2, "pairs, val": 3}


def test_the_threshold_of_the_iou_is_chosen_on_val(tmp_path, monkeypatch):
    refer_folder(tmp_path)
    records, _ = taken(readers.READERS["refcoco+"], tmp_path, None)
    best = {"val": 3, "testA": 7}                                # of each split the threshold at which IoU is 1; 0.2 elsewhere
    shown = [split for split in best for r in records if r["split"] == split]
    monkeypatch.setattr(hist, "maps_of", lambda model, vocabulary, images, texts, rows, o: (np.zeros((len(texts), 32, 32)), [1.0]))
    monkeypatch.setattr(hist, "multi_object_iou", lambda heat, union: np.where(np.arange(19) == best[shown.pop(0)], 1.0, 0.2))
    splits = {split: [r for r in records if r["split"] == split] for split in best}
    assert benchmarks.referring(None, None, splits, SQUARE)["multi-object IoU, testA"] == pytest.approx(0.2)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run on six pictures of a person's own, that the benchmarks can be run on."""
    folder = tmp_path_factory.mktemp("own")
    for i in range(6):
        picture(folder / f"{i}.png", i)
    (folder / "my.jsonl").write_text("\n".join(json.dumps({"image": f"{i}.png", "captions": [f"a red bus and two dogs number {i} yes"]}) for i in range(6)))
    hist.main(["--data", str(folder / "my.jsonl"), "--out", str(folder / "run"), *QUICK])
    return folder / "run"


def test_refcoco_as_typed(here, trained, capsys):
    refer_folder(here / "refer")
    hist.main(["--eval", "refcoco+", "--root", "refer", "--out", str(trained), "--device", "cpu"])
    result, shown = json.loads((trained / "eval-refcoco+.json").read_text()), capsys.readouterr().out
    assert list(result) == ["baseline", "hist"] and list(result["hist"]) == [
        "pointing, val", "pointing in mask, val", "phrases, val", "pointing, testA", "pointing in mask, testA", "phrases, testA", "pointing, testB",
        "pointing in mask, testB", "phrases, testB", "multi-object IoU, testA", "multi-object IoU, testB", "pairs, val", "pairs, testA", "pairs, testB"]
    assert all(name in shown for name in result["hist"]) and result["hist"]["phrases, val"] == 9
    (here / "refer/refcoco+/refs(unc).p").write_bytes(b"cos\nsystem\n(S'touch touched'\ntR.")
    said = refused(capsys, "--eval", "refcoco+", "--root", "refer", "--out", trained)
    assert "os.system" in said and "refs(unc).p" in said and not Path("touched").exists()


# ------------------------------------------------------------------------------------------------ retrieval and VQA
def karpathy_folder(root, n=12):
    images = [{"filepath": "val2014" if i % 2 else "train2014", "filename": f"COCO_{i:012}.jpg", "split": "test", "cocoid": i,
               "sentences": [{"raw": f"A bus number {i} and {k} dogs. "} for k in range(5)] + [{"raw": "a sixth caption"}] * (i == 0)} for i in range(n)]
    for i, image in enumerate(images):
        picture(root / image["filepath"] / image["filename"], i)
    images[3:3] = [{**images[0], "split": split} for split in ("train", "restval", "val")] + [{**images[0], "filename": "../val2014/COCO_000000000001.jpg"}, {"split": "test"}]
    (root / "dataset_coco.json").write_text(json.dumps({"images": images, "dataset": "coco"}))


def test_karpathy_split(tmp_path):
    karpathy_folder(tmp_path)
    records, bad = taken(readers.read_karpathy, tmp_path, ("test",))
    assert len(records) == 12 and len(records[0]["captions"]) == 6 and records[1]["image"] == tmp_path / "val2014/COCO_000000000001.jpg"
    assert [("leads out" in why, "is missing" in why) for why in bad.values()] == [(True, False), (False, True)]


def test_any_of_five_captions_counts_as_right(tmp_path, monkeypatch):
    """Three images, of 1, 2 and 6 captions (the sixth does not count), with similarities given: recalls worked out by hand."""
    similarity = torch.tensor([[.1, .9, .8, .7, .6, .5, .4, .3],                # the best of image 0 is caption 1, of image 1; its own is the last of 8
                               [.9, .5, .1, .8, .7, .6, .2, .3],                # its own (1, 2) are 5th and last
                               [.0, .1, .2, .3, .4, .9, .5, .6]])               # its own (3 to 7) are the first
    records = [{"image": np.zeros((32, 32, 3), np.uint8), "captions": [f"w{i}"] * n} for i, n in enumerate((1, 2, 6))]

    class Model:
        encode_image = lambda self, images: (torch.eye(3), None, None)
        encode_text = lambda self, ids: (None, None, similarity.T)
    monkeypatch.setattr(hist, "rerank", lambda *a, **k: (similarity[:, [0, 1, 2, 3, 4, 5, 6, 7]], 1 - similarity))
    result = benchmarks.retrieval(Model(), {}, {"test": records}, SQUARE)
    assert (result["images"], result["captions"]) == (3, 8)
    for name in ("", ", ITM"):
        assert [result[f"R@{k}, image to text{name}"] for k in (1, 5, 10)] == [pytest.approx(1 / 3), pytest.approx(2 / 3), 1]
    # captions' best images: 1 0 0 1 1 2 2 2, their own 0 1 1 2 2 2 2 2; by 1 - similarity: 2 2 1 2 2 0 1 0
    assert result["R@1, text to image"] == pytest.approx(3 / 8) and result["R@1, text to image, ITM"] == pytest.approx(3 / 8)
    assert result["R@5, text to image"] == 1


def test_reranking_of_texts_encoded_one_by_one_is_that_of_all_at_once(tmp_path):
    torch.manual_seed(0)
    karpathy_folder(tmp_path)
    records, _ = taken(readers.read_karpathy, tmp_path, ("test",))
    o = hist.settle(hist.command_line(["--data", "x.jsonl", *QUICK]))
    vocabulary = hist.build_vocabulary([c for r in records for c in r["captions"]], 100)
    model = hist.HIST(o, vocabulary).eval()
    captions = [(i, c) for i, r in enumerate(records) for c in r["captions"][:5]]
    with torch.no_grad():
        load = lambda start, end: torch.stack([hist.read_image(r["image"], o.image_size) for r in records[start:end]])
        T, mask, texts = model.encode_text(hist.pad([hist.encode(vocabulary, c) for _, c in captions]))
        similarity, owner = model.encode_image(load(0, 12))[0] @ texts.T, torch.tensor([i for i, _ in captions])
        to_text, to_image = hist.rerank(model, load, T, mask, similarity)
    result = benchmarks.retrieval(model, vocabulary, {"test": records}, o)
    assert result["R@1, image to text, ITM"] == pytest.approx(float((owner[to_text.argmax(1)] == torch.arange(12)).float().mean()))
    assert result["R@1, text to image, ITM"] == pytest.approx(float((to_image.argmax(0) == owner).float().mean()))
    assert result["R@1, image to text"] == pytest.approx(float((owner[similarity.argmax(1)] == torch.arange(12)).float().mean()))
    assert (result["images"], result["captions"]) == (12, 60)


def test_karpathy_as_typed(here, trained, capsys):
    karpathy_folder(here / "data/karpathy")
    hist.main(["--eval", "karpathy", "--out", str(trained), "--device", "cpu", "--eval-images", "5"])
    result = json.loads((trained / "eval-karpathy.json").read_text())["hist"]
    assert result["images"] == 5 and result["captions"] == 25 and "R@5, image to text, ITM" in capsys.readouterr().out


def vqa_folder(root):
    for split, n in (("train", 6), ("val", 4)):
        questions, annotations = [], []
        for i in range(n):
            picture(root / f"{split}2014/COCO_{split}2014_{i:012}.jpg", i)
            for k, (question, answer, kind) in enumerate([("Is there a bus?", "yes", "yes/no"), ("How many dogs are there?", "2", "number"), ("Where is it?", "on table", "other")]):
                questions.append({"question_id": 10 * i + k, "image_id": i, "question": question})
                annotations.append({"question_id": 10 * i + k, "image_id": i, "question_type": "x", "answer_type": kind, "multiple_choice_answer": answer,
                                    "answers": [{"answer_id": j, "answer": answer if j <= 8 else "maybe", "answer_confidence": "yes"} for j in range(1, 11)]})
        annotations += [{**annotations[0], "image_id": 99}, {**annotations[0], "question_id": 777}, {"question_id": 0}]
        (root / f"v2_OpenEnded_mscoco_{split}2014_questions.json").write_text(json.dumps({"questions": questions, "data_type": "mscoco"}))
        (root / f"v2_mscoco_{split}2014_annotations.json").write_text(json.dumps({"annotations": annotations}))


def test_vqa(tmp_path):
    vqa_folder(tmp_path)
    records, bad = taken(readers.read_vqa, tmp_path, ("train", "val"))
    assert [r["split"] for r in records] == ["train"] * 6 + ["val"] * 4 and records[7]["image"] == tmp_path / "val2014/COCO_val2014_000000000001.jpg"
    assert records[0]["captions"] == ["Is there a bus? yes", "How many dogs are there? 2", "Where is it? on table"] and records[0]["asked"] == []
    assert records[6]["asked"][1] == ("number", "How many dogs are there?", ["2"] * 8 + ["maybe"] * 2)
    assert sorted(kind for kind, _ in bad) == ["image"] * 2 + ["question"] * 4


@pytest.mark.parametrize("answer, normal", [
    ("A dog.", "dog"), ("The  Dogs", "dogs"), ("two", "2"), ("none", "0"), ("Ten", "10"), ("eleven", "eleven"), ("3.5", "3.5"), ("U.S.", "us"), ("1,000", "1000"),
    ("black-white", "black white"), ("black - white", "black white"), ("black, white", "black white"), ("yes!", "yes"), ("dont know", "don't know"), ("isnt", "isn't"),
    ("couldnt've", "couldn't've"), ("wed", "wed"), ("its", "its"), ("12:30", "12:30"), ("what?no", "what no"), ("$1,000-2,000", "$10002000"), ("an\napple\t", "apple")])
def test_answers_are_normalised_as_by_the_official_evaluation(answer, normal):
    assert " ".join(benchmarks.normalise(answer).split()) == normal


@pytest.mark.parametrize("said, answers, accuracy", [
    ("yes", ["yes"] * 10, 1), ("no", ["yes"] * 10, 0), ("yes", ["yes"] * 4 + ["no"] * 6, 1), ("yes", ["yes"] * 3 + ["no"] * 7, (3 * 2 / 3 + 7) / 10),
    ("yes", ["yes"] * 2 + ["no"] * 8, 0.6), ("yes", ["yes"] + ["no"] * 9, 0.3), ("2", ["two", "Two.", "2", "2"] + ["3"] * 6, 1), ("two", ["2"] * 10, 0)])
def test_vqa_accuracy(said, answers, accuracy):
    assert benchmarks.vqa_accuracy(said, answers) == pytest.approx(accuracy)
    leave_one_out = [min(sum(a == said for k, a in enumerate(answers) if k != j) / 3, 1) for j in range(10)]      # the definition
    if not {"two", "Two."} & {said, *answers}:
        assert sum(leave_one_out) / 10 == pytest.approx(accuracy)


def test_vqa_answers_are_scored_by_kind(tmp_path, monkeypatch):
    vqa_folder(tmp_path)
    records, _ = taken(readers.read_vqa, tmp_path, ("val",))
    asked = []
    monkeypatch.setattr(hist, "answer", lambda model, vocabulary, images, questions: asked.extend(questions) or ["yes", "maybe", "on"])
    o = hist.Options(image_size=32, device="cpu", root=str(tmp_path))
    result = benchmarks.vqa(None, {"yes": 4, "2": 5, "on": 6}, {"val": records}, o)
    assert asked[0] == (0, "yes/no", "Is there a bus? [MASK]", ["yes", "2"], None)
    assert result == {"VQA, overall": pytest.approx(1.6 / 3), "VQA, yes/no": 1.0, "VQA, number": pytest.approx(0.6), "VQA, other": 0.0, "questions": 12,
                      "answers to choose from": 2}


def test_vqa_as_typed(here, capsys):
    vqa_folder(here / "data/vqa")
    done = typed("--data", "vqa", *QUICK, cwd=here)
    assert done.returncode == 0, done.stderr
    result = json.loads(Path("out/vqa/eval-vqa.json").read_text())
    assert "VQA, overall" in done.stdout and list(result) == ["baseline", "hist"] and result["hist"]["questions"] == 12
    hist.main(["--eval", "vqa", "--device", "cpu"])
    assert json.loads(Path("out/vqa/eval-vqa.json").read_text()) == result


def test_visual_genome_as_typed(here, capsys):
    vg_folder(here / "data/vg")
    Path("leave.txt").write_text("2\n391895\n")
    hist.main(["--data", "vg", "--exclude", "leave.txt", *QUICK, "--max-bad", "0.5", "--composition-start", "0"])
    assert "pointing, phrases" in capsys.readouterr().out and {e["kind"] for e in lines("out/vg/skipped.jsonl")} == {"image", "region"}
    assert '"composition"' in Path("out/vg/metrics.jsonl").read_text()


# ------------------------------------------------------------------------------------------------------------- errors
@pytest.mark.parametrize("name, missing", [
    ("flickr30k", "val.txt, no test.txt"), ("refcoco", "refcoco/refs(unc).p or refcoco/refs(google).p, no refcoco/instances.json"), ("karpathy", "dataset_coco.json"),
    ("refclef", "refclef/refs(berkeley).p"), ("vqa", "v2_OpenEnded_mscoco_val2014_questions.json, no v2_mscoco_val2014_annotations.json, no val2014")])
def test_a_missing_file_is_named_with_its_folder(here, trained, capsys, name, missing):
    said = refused(capsys, "--eval", name, "--out", trained)
    assert missing in said and f"--root data/{name}" in said


def test_first_mistakes_with_other_data(here, trained, capsys):
    assert "region_descriptions.json, no VG_100K or VG_100K_2 in --root data/vg" in refused(capsys, "--data", "vg")
    assert "the benchmarks are" in refused(capsys, "--eval", "coco", "--out", trained)
    assert "no checkpoint" in refused(capsys, "--eval", "flickr30k")
    assert "--exclude" in refused(capsys, "--exclude", "x.txt")
    vg_folder(here / "data/vg")
    assert "nothing.txt" in refused(capsys, "--data", "vg", "--exclude", "nothing.txt")
    (here / "data/vg/region_descriptions.json").write_text('[{"id": 1, "regions": [}]')
    assert "region_descriptions.json: not JSON after 0 elements" in refused(capsys, "--data", "vg")
    flickr_folder(here / "data/flickr30k", "pictures")
    assert "no flickr30k-images or flickr30k_images in --root" in refused(capsys, "--data", "flickr30k")
    karpathy_folder(here / "data/karpathy")
    (here / "data/karpathy/dataset_coco.json").write_text('{"images": [1,]}')
    assert "dataset_coco.json, line 1: not JSON" in refused(capsys, "--eval", "karpathy", "--out", trained)
