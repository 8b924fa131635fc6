"""tests/paper/convert.py: each data set in its published layout, written here, small and with the
odd cases of the real files; converted, read back; then hist.evaluate on what was written."""

import hashlib
import http.server
import json
import os
import pickle
import random
import subprocess
import sys
import threading
import time
import zipfile
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import hist
from tests.paper import convert

ROOT = Path(__file__).resolve().parents[1]
EVERYTHING = 0.99  # --max-bad of a folder that is mostly odd cases
needs_pycocotools = pytest.mark.skipif(
    find_spec("pycocotools") is None, reason="needs pycocotools, no requirement of hist.py"
)


def picture(path, seed=90, size=(64, 48)):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (*size[::-1], 3))
    Image.fromarray(pixels.astype(np.uint8)).save(path)


def lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def converted(name, root, *arguments, max_bad=EVERYTHING):
    """(records, {which: why} of what was left out, {kind: how many}) of main, as it was typed."""
    convert.main([name, str(root), "--max-bad", str(max_bad), *map(str, arguments)])
    listed = root / f"{name}.skipped.jsonl"
    skipped = lines(listed) if listed.exists() else []
    kinds = {}
    for entry in skipped:
        kinds[entry["kind"]] = kinds.get(entry["kind"], 0) + 1
    why = {entry["which"]: entry["why"] for entry in skipped}
    assert not list(root.glob("*.tmp"))
    return lines(root / f"{name}.jsonl"), why, kinds


def refused(capsys, *arguments):
    """What main says when it refuses: a line at the end, and exit status 2."""
    with pytest.raises(SystemExit) as stop:
        convert.main([str(argument) for argument in arguments])
    said = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and said[-1].startswith("convert: ")
    return said[-1]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


# ----------------------------------------------------------------------------------- Visual Genome
PHRASES = ["a red bus", "Two dogs  near a tree", "the sky is blue", "a red bus"]


def vg_region(image_id, k, phrase):
    place = {"x": 8 * k, "y": 4, "width": 8, "height": 12}
    return {"region_id": 100 * image_id + k, "image_id": image_id, "phrase": phrase, **place}


def vg_entry(image_id, phrases=PHRASES):
    regions = [vg_region(image_id, k, phrase) for k, phrase in enumerate(phrases)]
    return {"id": image_id, "regions": regions}


def vg_folder(root):
    """Ten images to train on (3 in VG_100K_2), 12 without a file, 11 without a good region; image
    49 is held out; 7 has COCO's id 391895."""
    entries = [vg_entry(image_id) for image_id in [*range(1, 11), 12, 49]]
    odd = [vg_region(1, 5, ""), vg_region(1, 6, None), {"region_id": 7}, "no region"]
    entries[0]["regions"] += odd
    no_box = [{**vg_region(49, 4, "no box"), "width": 0}, {**vg_region(49, 4, "a"), "x": "8"}]
    entries[-1]["regions"] += no_box
    entries[-1]["regions"] += [vg_region(49, k, f"dog number {k}") for k in range(5, 20)]
    bad = [{"id": 11, "regions": []}, {"regions": []}, {"id": "../12", "regions": []}, "no entry"]
    entries[3:3] = [*bad, vg_entry(2)]
    for image_id in [*range(1, 12), 49]:
        folder = "VG_100K_2" if image_id == 3 else "VG_100K"
        picture(root / folder / f"{image_id}.jpg", image_id)
    (root / "region_descriptions.json").write_text(json.dumps(entries))
    told = [{"image_id": i, "coco_id": 391895 if i == 7 else None} for i in range(1, 12)]
    (root / "image_data.json").write_text(json.dumps(told))


def vg_ids(records):
    return [int(Path(record["image"]).stem) for record in records]


def test_visual_genome(tmp_path):
    vg_folder(tmp_path)
    records, why, kinds = converted("vg", tmp_path)
    assert vg_ids(records) == [*range(1, 11), 49]
    assert [record["split"] for record in records] == ["train"] * 10 + ["val"]
    assert records[2]["image"] == "VG_100K_2/3.jpg"
    said = ["a red bus", "Two dogs near a tree", "the sky is blue", "a red bus"]
    assert records[0]["captions"] == said and records[0]["targets"] == []
    targets = records[-1]["targets"]
    assert len(targets) == 10 and records[-1]["captions"] == [t["phrase"] for t in targets]
    two_dogs = {"phrase": "Two dogs near a tree", "boxes": [[8, 4, 16, 16]], "object": 1}
    assert targets[1] == two_dogs
    numbered = ["dog number 5", "dog number 6"]
    assert [target["phrase"] for target in targets[4:6]] == numbered  # those of no box are left out
    assert kinds == {"image": 6, "region": 6}
    assert why["4 of image 1"] == "'' is no text" and why["6 of image 1"] == "'phrase' is missing"
    assert "has no pixel" in why["4 of image 49"] and "5 of image 49" in why
    assert why["entry 3 of region_descriptions.json"] == "no region of it can be used"
    assert why["entry 4 of region_descriptions.json"] == "'id' is missing"
    assert "invalid literal for int()" in why["entry 5 of region_descriptions.json"]
    assert "indices must be" in why["entry 6 of region_descriptions.json"]
    assert why["VG_100K/2.jpg, train"] == "it is there twice"
    assert why["entry 15 of region_descriptions.json"] == "'12.jpg' is missing"


def test_regions_outside_their_picture_are_left_out_and_listed(tmp_path):
    """Above and left of it by the converter, which opens no picture; the others by hist.py."""
    vg_folder(tmp_path)
    path = tmp_path / "region_descriptions.json"
    entries = json.loads(path.read_text())
    places = {
        "above": (8, -904),
        "left": (-8, 4),
        "below": (8, 48),
        "right": (64, 4),
        "in": (60, 44),
    }
    regions = [vg_region(49, k, phrase) for k, phrase in enumerate(places)]
    for region, (x, y) in zip(regions, places.values()):
        region |= {"x": x, "y": y}
    entries[-1]["regions"] = regions
    path.write_text(json.dumps(entries))
    records, why, _ = converted("vg", tmp_path)
    assert [target["phrase"] for target in records[-1]["targets"]] == ["below", "right", "in"]
    assert "no pixel" in why["0 of image 49"] and "no pixel" in why["1 of image 49"]
    options = hist.Options(data=str(tmp_path / "vg.jsonl"))
    _, (record,) = hist.load_data(options, hist.Skipped(tmp_path / "skipped.jsonl", 0.2))
    assert [target["boxes"] for target in record["targets"]] == [[[60, 44, 64, 48]]]
    assert [row["kind"] for row in lines(tmp_path / "skipped.jsonl")] == ["box", "box"]


@pytest.mark.parametrize("text", ["2\n391895\n", "[2, 391895]", '["2", "391895"]'])
@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_images_are_excluded_by_either_id(tmp_path, text, encoding):
    vg_folder(tmp_path)
    (tmp_path / "leave.txt").write_text(text, encoding=encoding)
    records, why, _ = converted("vg", tmp_path, "--exclude", tmp_path / "leave.txt")
    assert vg_ids(records) == [1, 3, 4, 5, 6, 8, 9, 10, 49]
    assert "VG_100K/2.jpg, train" not in why  # what is excluded is no fault


STREAMED = [{"a": "ü]}, {", "b": [1.5, None]}, [], "x", {"c": {}}]
LISTS = [json.dumps(STREAMED), json.dumps(STREAMED, ensure_ascii=False, indent=1), "\n[ ] ", "[]"]


@pytest.mark.parametrize("text", LISTS)
@pytest.mark.parametrize("size", [2, 3, 7, 1 << 20])
def test_a_list_is_read_in_parts(tmp_path, text, size):
    path = tmp_path / "list.json"
    path.write_text(text)
    if len(text) <= 16 * size:  # an element may be 16 times as long as a part
        assert list(convert.stream(path, size)) == (STREAMED if "a" in text else [])


@pytest.mark.parametrize(
    "text, what",
    [
        ('{"a": 1}', "not a JSON list"),
        ('[{"a": 1}, {"b": }]', "after 1 elements"),
        ('[{"a": 1}', "after 1 elements"),
        ('[{"a": 1}] more', "after 1 elements"),
        ("", "not a JSON list"),
    ],
)
def test_a_list_that_is_none_is_refused(tmp_path, text, what):
    path = tmp_path / "list.json"
    path.write_text(text)
    with pytest.raises(hist.UserError, match=f"list.json: .*{what}"):
        list(convert.stream(path))


WEIGHED = """if True:
    import resource, sys
    from pathlib import Path
    from tests.paper import convert
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(dict(convert.convert(convert.read_vg, "vg", Path(sys.argv[1]), 0.2)))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"""


def test_a_hundred_thousand_images_are_never_whole_in_memory(tmp_path):
    """Ten regions an image, as the published file has them (of ten times as many regions in all),
    and image files that are names only. Whole, they are 1 GiB of Python objects."""
    images = 100_000
    (tmp_path / "VG_100K").mkdir()
    for image_id in range(images):
        (tmp_path / f"VG_100K/{image_id}.jpg").touch()
    names = random.Random(0).sample(range(10**6), 1000)
    with open(tmp_path / "region_descriptions.json", "w") as file:
        for image_id in range(images):
            said = [f"a clock number {names[image_id * k % 1000]} on the wall" for k in range(10)]
            file.write(("," if image_id else "[") + json.dumps(vg_entry(image_id, said)))
        file.write("]")
    begun = time.time()
    command = [sys.executable, "-c", WEIGHED, tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    splits, grown = done.stdout.splitlines()
    mebibytes = int(grown) / (2**20 if sys.platform == "darwin" else 2**10)
    print(f"{mebibytes:.0f} MiB more, {time.time() - begun:.1f} s")
    assert splits == "{'train': 98000, 'val': 2000}" and mebibytes < 300


# ------------------------------------------------------------------------------ Flickr30k Entities
XML = """<annotation><filename>{name}.jpg</filename>
<size><width>64</width><height>48</height><depth>3</depth></size>
<object><name>1</name>
<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>17</xmax><ymax>25</ymax></bndbox></object>
<object><name>1</name><name>4</name>
<bndbox><xmin>33</xmin><ymin>25</ymin><xmax>49</xmax><ymax>37</ymax></bndbox></object>
<object><name>2</name>
<bndbox><xmin>41</xmin><ymin>1</ymin><xmax>65</xmax><ymax>13</ymax></bndbox></object>
<object><name>3</name><scene>1</scene><nobndbox>1</nobndbox></object>
</annotation>"""
SAID = [
    "[/EN#1/people Two men] with [/EN#2/clothing/other red hats] stand in [/EN#3/scene a street] .",
    "[/EN#1/people They] have [/EN#0/notvisual fun] .",
    "[/EN#9/animals A dog] without an annotation .",
    "No phrase here .",
    "[/EN#4/vehicles/people A rider] passes .",
]
FLICKR = {"train": range(1000, 1006), "val": range(2000, 2003), "test": range(3000, 3003)}


def flickr_folder(root, images="flickr30k-images"):
    for folder in ("Sentences", "Annotations"):
        (root / folder).mkdir(parents=True)
    for split, names in FLICKR.items():
        listed = [*map(str, names), f"missing_{split}"]
        (root / f"{split}.txt").write_text("\n".join(listed) + "\n")
        for name in names:
            picture(root / images / f"{name}.jpg", name)
            (root / f"Sentences/{name}.txt").write_text("\n".join(SAID) + "\n")
            (root / f"Annotations/{name}.xml").write_text(XML.format(name=name))


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "latin-1"])
def test_sentences_of_every_encoding(tmp_path, encoding):
    flickr_folder(tmp_path)
    said = tmp_path / "Sentences/1000.txt"
    said.write_text("A café .\r\nA dog .\r\n", encoding=encoding)
    records, _, _ = converted("flickr30k", tmp_path)
    assert records[0]["captions"] == ["A café .", "A dog ."]


def test_flickr30k(tmp_path):
    flickr_folder(tmp_path)
    annotations = tmp_path / "Annotations"
    declared = '<!DOCTYPE a [<!ENTITY b "b">]><annotation/>'
    (annotations / "3001.xml").write_text(declared)
    (annotations / "3002.xml").write_text("<annotation><object>")
    (annotations / "2001.xml").write_text(XML.replace("<xmax>65", "<xmax>41"))
    with open(tmp_path / "test.txt", "a") as file:
        file.write("../train/1000\n3000\n")
    records, why, kinds = converted("flickr30k", tmp_path)
    told = [(record["image"], record["split"]) for record in records]
    names = [(f"flickr30k-images/{n}.jpg", split) for split, ns in FLICKR.items() for n in ns]
    assert told == names
    first = records[9]  # 3000
    assert first["captions"] == [
        "Two men with red hats stand in a street .",
        "They have fun .",
        "A dog without an annotation .",
        "No phrase here .",
        "A rider passes .",
    ]
    two, hats = [[0, 0, 16, 24], [32, 24, 48, 36]], [[40, 0, 64, 12]]
    assert first["targets"] == [
        {"phrase": "Two men", "boxes": two, "tags": ["people"], "object": "1"},
        {"phrase": "red hats", "boxes": hats, "tags": ["clothing", "other"], "object": "2"},
        {"phrase": "They", "boxes": two, "tags": ["people"], "object": "1"},
        {"phrase": "A rider", "boxes": two[1:], "tags": ["vehicles", "people"], "object": "4"},
    ]
    nothing = [*records[:6], *records[10:]]  # to train on; two files that cannot be read
    assert all(record["targets"] == [] for record in nothing)
    assert [target["object"] for target in records[7]["targets"]] == ["1", "1", "4"]
    assert "has no pixel" in why[f"{annotations}/2001.xml, object 2"]
    assert "expand without end" in why[f"{annotations}/3001.xml"]
    assert "no element found" in why[f"{annotations}/3002.xml"]
    assert "leads out" in why["../train/1000"] and "missing_train" in why
    assert "no file missing_test.jpg" in why["missing_test"]
    assert why["flickr30k-images/3000.jpg, test"] == "it is there twice"
    assert kinds == {"image": 5, "annotation": 3}


# --------------------------------------------------------------------------- referring expressions
def compressed(counts):
    """COCO's compressed run lengths, written from their description: numbers in base 32, least
    digit first, bit 32 says that another follows; from the fourth on, differences to the one two
    before."""
    text = ""
    for i, count in enumerate(counts):
        rest, more = count - (counts[i - 2] if i > 2 else 0), True
        while more:
            digit, rest = rest & 31, rest >> 5
            more = rest != (-1 if digit & 16 else 0)
            text += chr(digit + 32 * more + 48)
    return text


def ref(name, i, k, split, sentences):
    said = [{"sent_id": 9, "sent": s, "raw": s.upper(), "tokens": s.split()} for s in sentences]
    ids = {"ref_id": 100 * i + k, "ann_id": 10 * i + k, "image_id": 500 + i, "category_id": 1}
    file_name = f"COCO_train2014_{500 + i:012}_{10 * i + k}.jpg"
    return {**ids, "split": split, "sent_ids": [9], "file_name": file_name, "sentences": said}


def refer_folder(root, name="refcoco+", by="unc", tests=("testA", "testB"), images="train2014"):
    """Three images of val, two of each test split; two objects each (polygons, a crowd's run
    lengths), the first with two sentences. Returns (refs, images, annotations), which
    refer_write writes again when a test has changed them."""
    pictures, annotations, refs = [], [], []
    splits = ["train", "val", "val", "val", *(split for split in tests for _ in range(2))]
    for i, split in enumerate(splits):
        file_name = f"COCO_train2014_{500 + i:012}.jpg"
        pictures.append({"id": 500 + i, "file_name": file_name, "width": 64, "height": 48})
        picture(root / images / file_name, i)
        triangle = {"iscrowd": 0, "segmentation": [[0, 0, 16, 0, 0, 24]], "bbox": [0, 0, 16, 24]}
        half = {"size": [48, 64], "counts": [48 * 32, 48 * 32]}
        crowd = {"iscrowd": 1, "segmentation": half, "bbox": [32, 0, 32, 48]}
        for k, truth in enumerate((triangle, crowd)):
            ids = {"id": 10 * i + k, "image_id": 500 + i, "category_id": 1}
            annotations.append({**ids, **truth})
        for k, sentences in enumerate([["left bus", "red one on the left"], ["sky"]]):
            refs.append(ref(name, i, k, split, sentences))
    (root / name).mkdir()
    refer_write(root, refs, pictures, annotations, f"{name}/refs({by}).p")
    return refs, pictures, annotations


def refer_write(root, refs, pictures, annotations, path="refcoco+/refs(unc).p", protocol=2):
    (root / path).write_bytes(pickle.dumps(refs, protocol))
    instances = {"images": pictures, "annotations": annotations, "categories": []}
    (root / path).with_name("instances.json").write_text(json.dumps(instances))


@pytest.mark.parametrize(
    "name, by, protocol", [("refcoco", "unc", 0), ("refcoco+", "google", 2), ("refcocog", "umd", 4)]
)
def test_refcoco(tmp_path, name, by, protocol):
    made = refer_folder(tmp_path, name, by)
    refer_write(tmp_path, *made, f"{name}/refs({by}).p", protocol)
    records, why, _ = converted(name, tmp_path)
    splits = ["val"] * 3 + ["testA"] * 2 + ["testB"] * 2
    assert not why and [record["split"] for record in records] == splits
    images = [f"train2014/COCO_train2014_{500 + i:012}.jpg" for i in range(1, 8)]
    assert [record["image"] for record in records] == images
    said, targets = records[0]["captions"], records[0]["targets"]
    assert said == ["left bus", "red one on the left", "sky"]
    assert [target["phrase"] for target in targets] == said
    assert [target["object"] for target in targets] == [10, 10, 11]
    bus_box, sky_box = [[0, 0, 16, 24]], [[32, 0, 64, 48]]
    assert [target["boxes"] for target in targets] == [bus_box, bus_box, sky_box]
    bus, sky = hist.decode_mask(targets[0]["mask"]), hist.decode_mask(targets[2]["mask"])
    assert bus[2, 2] and not bus[20, 14] and sky[:, 32:].all() and not sky[:, :32].any()


def test_a_box_is_cut_at_the_edge_of_the_image(tmp_path):
    refs, pictures, annotations = refer_folder(tmp_path)
    annotations[2]["bbox"] = [-4, 10.5, 100, 100]
    refer_write(tmp_path, refs, pictures, annotations)
    records, *_ = converted("refcoco+", tmp_path)
    assert records[0]["targets"][0]["boxes"] == [[0, 10.5, 64, 48]]


@pytest.mark.parametrize("folder", ["images/train2014", "images/mscoco/images/train2014"])
def test_images_of_the_toolkit_lie_in_one_of_three_places(tmp_path, folder):
    refer_folder(tmp_path, images=folder)
    records, *_ = converted("refcoco+", tmp_path)
    assert records[0]["image"] == f"{folder}/COCO_train2014_000000000501.jpg"


# str as bytes, long with its L: what Python 2 writes
PYTHON_2 = (
    b"(lp0\n(dp1\nS'ref_id'\np2\nI0\nsS'ann_id'\np3\nL10L\nsS'image_id'\np4\nI501\nsS'split'\np5\n"
    b"S'val'\np6\nsS'sentences'\np7\n(lp8\n(dp9\nS'sent'\np10\nS'caf\\xe9'\np11\nsasa."
)


def test_a_pickle_of_python_2(tmp_path):
    refer_folder(tmp_path)
    (tmp_path / "refcoco+/refs(unc).p").write_bytes(PYTHON_2)
    (record,), why, _ = converted("refcoco+", tmp_path)
    assert not why and record["captions"] == ["café"] and record["split"] == "val"


class Call:
    def __reduce__(self):
        return exec, ("open('touched', 'w')",)


@pytest.mark.parametrize(
    "data, name",
    [
        (pickle.dumps([Call()], 0), "exec"),
        (pickle.dumps([Call()], 4), "builtins.exec"),
        (b"cos\nsystem\n(S'touch touched'\ntR.", "os.system"),
        (b"(S'touch touched'\nios\nsystem\n.", "os.system"),
        (b"Pposix.system\n.", "persistent"),
        (b"garbage", "refs(unc).p"),
        (b"", "refs(unc).p"),
        (pickle.dumps({"a": 1}), "no list of referring expressions"),
    ],
)
def test_a_pickle_that_wants_more_than_plain_data_is_refused_by_name(here, capsys, data, name):
    refer_folder(here)
    (here / "refcoco+/refs(unc).p").write_bytes(data)
    said = refused(capsys, "refcoco+", here)
    assert name in said and "refs(unc).p" in said and not Path("touched").exists()


def test_bad_expressions_are_left_out_and_listed(tmp_path):
    refs, pictures, annotations = refer_folder(tmp_path)
    pictures[1]["file_name"] = "../../secret.jpg"
    pictures[2]["file_name"] = "missing.jpg"
    annotations[9]["bbox"] = [70, 0, 5, 5]
    annotations[11]["segmentation"]["counts"] = [48 * 32]
    annotations[13]["segmentation"] = []
    del annotations[12]
    pictures += [{"file_name": "of no id"}, {"id": []}, "x"]
    odd = [{"ref_id": 1}, "x", {**refs[-1], "image_id": 9}, {**refs[-1], "split": ["val"]}]
    refer_write(tmp_path, [*refs, *odd], pictures, annotations)
    records, why, kinds = converted("refcoco+", tmp_path)
    assert "leads out" in why["501 of refs(unc).p"]
    assert "no file missing.jpg" in why["502 of refs(unc).p"]
    assert why["9 of refs(unc).p"] == "9 is missing"
    assert "no pixel" in why["ref_id 401 of refs(unc).p"]
    assert "ref_id 501 of refs(unc).p" in why  # run lengths of half of its pixels
    assert why["ref_id 600 of refs(unc).p"] == "60 is missing"
    assert why["506 of refs(unc).p"] == "no expression of it can be used"
    assert why["entry 16 of refs(unc).p"] == "'split' is missing"
    assert len(records) == 4 and kinds == {"image": 4, "expression": 7}


def run_lengths(text, pixels):
    """Compressed run lengths of pixels in one column, as plain_part gives them."""
    return convert.plain_part({"counts": text}, [pixels, 1])["counts"]


@needs_pycocotools
def test_run_lengths_are_uncompressed():
    for counts in ([0, 3072], [100, 30, 18, 30, 18, 2000, 876], [5, 40, 1000, 3, 2024], [3072]):
        assert run_lengths(compressed(counts), 3072) == counts
    assert run_lengths("01861KJ", 30) == [0, 1, 8, 7, 9, 2, 3]  # pycocotools wrote these
    assert run_lengths("7330;", 30) == [7, 3, 3, 3, 14]


def refclef_folder(root, part):
    made = refer_folder(root, "refclef", "berkeley", tests=("test",), images="saiapr_tc-12")
    for annotation in made[2]:
        annotation["segmentation"] = part
    refer_write(root, *made, "refclef/refs(berkeley).p")


@needs_pycocotools
def test_refclef_has_compressed_run_lengths(tmp_path):
    columns = compressed([48 * 10, 96, 48 * 20, 48 * 32])
    corner = compressed([0, 1, 48 * 64 - 1])
    refclef_folder(tmp_path, [{"size": [48, 64], "counts": c} for c in (columns, corner)])
    records, why, _ = converted("refclef", tmp_path)
    mask = hist.decode_mask(records[0]["targets"][0]["mask"])
    assert not why and mask[:, 10:12].all() and mask[:, 32:].all() and mask[0, 0]
    assert mask.sum() == 48 * 34 + 1


@needs_pycocotools
def test_run_lengths_of_too_few_pixels_are_left_out(tmp_path, capsys):
    refclef_folder(tmp_path, [{"size": [48, 64], "counts": compressed([10, 20])}])
    said = refused(capsys, "refclef", tmp_path)
    assert "5 of 5 images" in said and not (tmp_path / "refclef.jsonl").exists()
    listed = lines(tmp_path / "refclef.skipped.jsonl")
    assert len(listed) == 15 and listed[0]["kind"] == "expression"


def test_compressed_masks_without_pycocotools_say_what_to_install(tmp_path, capsys, monkeypatch):
    refclef_folder(tmp_path, [{"size": [48, 64], "counts": compressed([10, 3062])}])
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    assert "pip install pycocotools" in refused(capsys, "refclef", tmp_path)


# --------------------------------------------------------------------------------------- retrieval
def karpathy_image(i, split="test"):
    sentences = [{"raw": f"A bus number {i} and {k} dogs. "} for k in range(5)]
    if i == 0:
        sentences.append({"raw": "a sixth caption"})
    folder, filename = "val2014" if i % 2 else "train2014", f"COCO_{i:012}.jpg"
    image = {"filepath": folder, "filename": filename, "split": split, "cocoid": i}
    return {**image, "sentences": sentences}


def karpathy_folder(root, n=12):
    images = [karpathy_image(i) for i in range(n)]
    for i, image in enumerate(images):
        picture(root / image["filepath"] / image["filename"], i)
    others = [karpathy_image(0, split) for split in ("train", "restval", "val")]
    leads_out = {**images[0], "filename": "../val2014/COCO_000000000001.jpg"}
    images[3:3] = [*others, leads_out, {"split": "test"}]
    whole = {"images": images, "dataset": "coco"}
    (root / "dataset_coco.json").write_text(json.dumps(whole))


def test_karpathy_split(tmp_path):
    karpathy_folder(tmp_path)
    records, why, _ = converted("karpathy", tmp_path)
    first = {"image": "train2014/COCO_000000000000.jpg", "split": "test", "targets": []}
    five = [f"A bus number 0 and {k} dogs." for k in range(5)]
    assert len(records) == 12 and records[0] == {**first, "captions": five}
    assert records[1]["image"] == "val2014/COCO_000000000001.jpg"
    assert "leads out" in why["entry 6 of dataset_coco.json"] and len(why) == 2
    assert why["entry 7 of dataset_coco.json"] == "'sentences' is missing"


# --------------------------------------------------------------------------------------------- VQA
ASKED = [
    ("Is there a bus?", "yes", "yes/no"),
    ("How many dogs are there?", "two", "number"),
    ("Where  is it?", "on the table", "other"),
]


def vqa_annotation(i, k, common, kind, answers=None):
    answers = answers or [common] * 8 + ["maybe"] * 2
    given = [
        {"answer_id": j, "answer": answer, "answer_confidence": "yes"}
        for j, answer in enumerate(answers, 1)
    ]
    ids = {"question_id": 10 * i + k, "image_id": i, "question_type": "x", "answer_type": kind}
    return {**ids, "multiple_choice_answer": common, "answers": given}


def vqa_folder(root, answers=None):
    """Six images to train on, four of val, three questions each; answers: val's of all of them."""
    for split, n in (("train", 6), ("val", 4)):
        questions, annotations = [], []
        for i in range(n):
            picture(root / f"{split}2014/COCO_{split}2014_{i:012}.jpg", i)
            for k, (question, common, kind) in enumerate(ASKED):
                asked = {"question_id": 10 * i + k, "image_id": i, "question": question}
                questions.append(asked)
                annotations.append(vqa_annotation(i, k, common, kind, answers))
        questions += [{**questions[0], "question_id": 500}, {"question_id": 501}]
        annotations += [
            {**annotations[0], "question_id": 500, "image_id": 99},
            {**annotations[0], "question_id": 777},
            {"question_id": 0},
            annotations[1],
        ]
        whole = json.dumps({"questions": questions, "data_type": "mscoco"})
        (root / f"v2_OpenEnded_mscoco_{split}2014_questions.json").write_text(whole)
        truth = json.dumps({"annotations": annotations})
        (root / f"v2_mscoco_{split}2014_annotations.json").write_text(truth)


def test_vqa(tmp_path):
    vqa_folder(tmp_path)
    records, why, kinds = converted("vqa", tmp_path)
    assert [record["split"] for record in records] == ["train"] * 6 + ["val"] * 4
    assert records[7]["image"] == "val2014/COCO_val2014_000000000001.jpg"
    said = ["Is there a bus? yes", "How many dogs are there? two", "Where is it? on the table"]
    assert records[0]["captions"] == records[6]["captions"] == said
    dogs = {"text": "How many dogs are there? [MASK]", "kind": "number"}
    assert records[0]["questions"][1] == {**dogs, "answers": ["2"]}
    assert records[6]["questions"][1] == {**dogs, "answers": ["2"] * 8 + ["maybe"] * 2}
    assert records[0]["questions"][2]["answers"] == ["on table"]
    assert all(len(record["questions"]) == 3 for record in records)
    assert kinds == {"image": 2, "question": 8}
    assert why["entry 19 of v2_mscoco_train2014_annotations.json"] == "777 is missing"
    assert why["entry 21 of v2_mscoco_train2014_annotations.json"] == "1 is missing"  # once more
    assert "no file COCO_val2014_000000000099.jpg" in why["COCO_val2014_000000000099.jpg"]


@pytest.mark.parametrize(
    "answers, compared",
    [
        (["two "] * 10, ["two"] * 10),  # all the same: as they are, but for space around them
        (["two ", "two"] * 5, ["two"] * 10),
        (["Two."] * 9 + ["2"], ["2"] * 10),
        (["a dog", "The dogs"] * 5, ["dog", "dogs"] * 5),
    ],
)
def test_answers_are_normalised_where_they_are_not_all_the_same(tmp_path, answers, compared):
    vqa_folder(tmp_path, answers)
    records, *_ = converted("vqa", tmp_path)
    assert records[-1]["questions"][0]["answers"] == compared


@pytest.mark.parametrize(
    "answer, normal",
    [
        ("A dog.", "dog"),
        ("The  Dogs", "dogs"),
        ("two", "2"),
        (" two ", "2"),
        ("none", "0"),
        ("Ten", "10"),
        ("eleven", "eleven"),
        ("3.5", "3.5"),
        ("U.S.", "us"),
        ("1,000", "1000"),
        ("black-white", "black white"),
        ("black - white", "black white"),
        ("black, white", "black white"),
        ("yes!", "yes"),
        ("dont know", "don't know"),
        ("isnt", "isn't"),
        ("couldnt've", "couldn't've"),
        ("wed", "wed"),
        ("its", "its"),
        ("12:30", "12:30"),
        ("what?no", "what no"),
        ("$1,000-2,000", "$10002000"),
        ("an\napple\t", "apple"),
        ("a", ""),
    ],
)
def test_answers_are_normalised_as_by_the_official_evaluation(answer, normal):
    assert convert.normalise(answer) == normal


# ---------------------------------------------------------------------------------- COCO's download
@pytest.fixture
def server(here, monkeypatch):
    """COCO's archives in small, on a local server that can break off (after `breaks` bytes) or send
    what is wrong."""
    archives, sums = {}, {}
    for name in convert.COCO_FILES:
        folder = "annotations" if "annotations" in name else Path(name).stem
        with zipfile.ZipFile("made.zip", "w") as archive:
            archive.writestr(f"{folder}/a.txt", os.urandom(50_000))
        archives["/" + name] = Path("made.zip").read_bytes()
        sums[name] = hashlib.md5(archives["/" + name]).hexdigest()

    class Handler(http.server.BaseHTTPRequestHandler):
        breaks, wrong, asked = None, False, []

        def do_GET(self):
            Handler.asked.append(self.path)
            data = archives[self.path]
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            body = bytes(len(data)) if Handler.wrong else data
            self.wfile.write(body[: Handler.breaks])

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{listening.server_port}/"
        monkeypatch.setattr(convert, "COCO_URL", url)
        monkeypatch.setattr(convert, "COCO_FILES", sums)
        Handler.archives = archives
        yield Handler
        listening.shutdown()


def test_a_download_that_breaks_off_is_no_data_and_the_same_command_ends_it(server, capsys):
    server.breaks = 20_000
    said = refused(capsys, "coco", "coco")
    assert "annotations_trainval2017.zip" in said and "wget -c" in said
    assert not Path("coco/annotations").exists()
    server.breaks = None
    convert.main(["coco", "coco"])
    assert "python hist.py --data coco --root coco" in capsys.readouterr().out
    folders = ["annotations", "train2017", "unpacking", "val2017"]
    assert sorted(path.name for path in Path("coco").iterdir()) == folders
    asked = len(server.asked)
    convert.main(["coco", "coco"])  # all is there: nothing is asked for
    assert len(server.asked) == asked


def test_an_archive_that_somebody_else_brought_is_taken_if_it_is_whole(server):
    Path("coco").mkdir()
    name = next(iter(convert.COCO_FILES))
    Path("coco", Path(name).name).write_bytes(server.archives["/" + name])
    convert.main(["coco", "coco"])
    assert "/" + name not in server.asked and Path("coco/annotations").is_dir()


def test_a_corrupt_download_is_no_data(server, capsys):
    server.wrong = True
    assert "corrupt" in refused(capsys, "coco", "coco")
    assert not Path("coco/annotations").exists()


def test_download_offline_says_so(here, monkeypatch, capsys):
    monkeypatch.setattr(convert, "COCO_URL", "http://127.0.0.1:9/")
    assert "refused" in refused(capsys, "coco", "coco").lower()


# ----------------------------------------------------------------------------------------- command
def typed(*arguments):
    """Run `python -m tests.paper.convert …` as its own process, from the project's folder."""
    command = [sys.executable, "-m", "tests.paper.convert", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_as_typed(tmp_path):
    vg_folder(tmp_path)
    done = typed("vg", tmp_path, "--max-bad", "0.5")
    assert done.returncode == 0, done.stderr
    assert f"python hist.py --data {tmp_path}/vg.jsonl" in done.stdout
    assert "'train': 10, 'val': 1" in done.stdout
    assert f"12 entries left out, 6 of them images: {tmp_path}/vg.skipped.jsonl" in done.stderr
    again = (tmp_path / "vg.jsonl").read_text(), (tmp_path / "vg.skipped.jsonl").read_text()
    typed("vg", tmp_path, "--max-bad", "0.5")  # the list is of this command, not of all before it
    assert again[0] == (tmp_path / "vg.jsonl").read_text()
    assert again[1] == (tmp_path / "vg.skipped.jsonl").read_text()


def test_a_refusal_as_typed_is_one_line(tmp_path):
    vg_folder(tmp_path)
    (tmp_path / "vg.jsonl").write_text("of an earlier command\n")
    for arguments, what in [
        (["vg", tmp_path], "--max-bad"),  # 6 of 17 images
        (["vg", tmp_path / "nowhere"], "there is no folder"),
        (["coco2", tmp_path], "invalid choice: 'coco2'"),
        (["vg"], "root"),
        (["vg", tmp_path, "--max-bad", "some"], "invalid float value: 'some'"),
        (["vqa", tmp_path, "--exclude", "x.txt"], "--exclude is for vg"),
        (["vqa", tmp_path], "no v2_mscoco_train2014_annotations.json, no train2014 in"),
    ]:
        done = typed(*arguments)
        said = done.stderr.splitlines()
        assert done.returncode == 2 and said[-1].startswith("convert: ") and what in said[-1]
        assert len(said) == 1 or "left out" in said[0] and len(said) == 2
    assert (tmp_path / "vg.jsonl").read_text() == "of an earlier command\n"
    assert not list(tmp_path.glob("*.tmp"))


def test_help_says_where_the_data_are(capsys):
    with pytest.raises(SystemExit) as stop:
        convert.main(["--help"])
    assert stop.value.code == 0 and "github.com/lichengunc/refer" in capsys.readouterr().out


@pytest.mark.parametrize(
    "name, missing",
    [
        ("vg", "region_descriptions.json, no VG_100K or VG_100K_2"),
        ("flickr30k", "train.txt, no val.txt, no test.txt"),
        ("refcoco", "refcoco/refs(unc).p or refcoco/refs(google).p, no refcoco/instances.json"),
        ("refclef", "refclef/refs(berkeley).p"),
        ("karpathy", "dataset_coco.json"),
    ],
)
def test_a_missing_file_is_named_with_its_folder(tmp_path, capsys, name, missing):
    said = refused(capsys, name, tmp_path)
    assert f"{missing} in {tmp_path}" in said or name == "refclef" and missing in said
    assert "--help" in said


def test_first_mistakes(tmp_path, capsys):
    vg_folder(tmp_path)
    assert "nothing.txt" in refused(capsys, "vg", tmp_path, "--exclude", "nothing.txt")
    (tmp_path / "words.txt").write_text("all of them")
    assert "words.txt" in refused(capsys, "vg", tmp_path, "--exclude", tmp_path / "words.txt")
    (tmp_path / "region_descriptions.json").write_text('[{"id": 1, "regions": [}]')
    said = refused(capsys, "vg", tmp_path)
    assert "region_descriptions.json: not JSON after 0 elements" in said
    flickr_folder(tmp_path, "pictures")
    said = refused(capsys, "flickr30k", tmp_path)
    assert "no flickr30k-images or flickr30k_images in" in said
    karpathy_folder(tmp_path)
    (tmp_path / "dataset_coco.json").write_text('{"images": [1,]}')
    assert "dataset_coco.json: no JSON object with " in refused(capsys, "karpathy", tmp_path)
    (tmp_path / "dataset_coco.json").write_text('{"images": []}')
    assert "no image of test can be used" in refused(capsys, "karpathy", tmp_path)


def test_a_file_is_there_when_it_is_whole(tmp_path, monkeypatch):
    """Whatever ends the command, what is there of NAME.jsonl is the one before, or none."""
    vg_folder(tmp_path)

    def broken(root, skipped):
        yield {"image": root / "a.jpg", "captions": ["a"], "split": "train", "targets": []}
        (part,) = root.glob("vg.jsonl*")
        assert part.name != "vg.jsonl"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert.convert(broken, "vg", tmp_path, 0.2)
    assert not list(tmp_path.glob("vg.jsonl*"))


# -------------------------------------------------- hist.evaluate on these folders, figures by hand
SIDE = 32  # of the square that the model sees; the pictures' 64 x 48 pixels are scaled to it
QUICK = {"vit": "vit_tiny_patch16_224", "image_size": SIDE, "width": 64, "text_layers": 1}
QUICK |= {"fusion_layers": 2, "device": "cpu"}


def evaluated(records, answers=()):
    """hist.evaluate of a model with random weights: {split: {measure: number}}."""
    torch.manual_seed(0)
    options = hist.Options(**QUICK)
    captions = [caption for record in records for caption in record["captions"]]
    tokenizer = hist.Tokenizer.build(captions, 1000)
    model = hist.ALBEF(options, tokenizer)
    return hist.evaluate(model, tokenizer, records, options, answers)[0]


@pytest.fixture
def peaks(monkeypatch):
    """Maps whose highest points are where the test says, {text: [(x, y), …]} on the square; others
    have theirs at (0, 0)."""
    at = {}

    def maps_of(model, tokenizer, image, texts, *others):
        maps = np.zeros((len(texts), SIDE, SIDE))
        for heat, text in zip(maps, texts):
            for x, y in at.get(text, [(0, 0)]):
                heat[y, x] = 1
        return maps, [1.0] * len(texts)

    monkeypatch.setattr(hist, "maps_of", maps_of)
    return at


def loaded(name, root):
    convert.main([name, str(root), "--max-bad", str(EVERYTHING)])
    train, held_out = hist.read_jsonl(root / f"{name}.jsonl")
    return train + held_out


def those(records, *splits):
    return [record for record in records if record["split"] in splits]


def test_flickr30k_pointing_by_category(tmp_path, peaks):
    flickr_folder(tmp_path, "flickr30k_images")
    records = those(loaded("flickr30k", tmp_path), "test")
    peaks.update({"Two men": [(20, 20)], "red hats": [(0, 0)], "They": [(31, 0)]})
    peaks["A rider"] = [(17, 17)]
    result = evaluated(records)["test"]
    assert result["pointing_phrases"] == pytest.approx(0.5, abs=1e-4) and result["phrases"] == 12
    shares = {"clothing": 0, "other": 0, "people": 2 / 3, "vehicles": 1}
    for tag, share in shares.items():
        assert result[f"pointing_{tag}"] == pytest.approx(share, abs=1e-4)


def test_refcoco_pointing_in_box_and_mask(tmp_path, peaks):
    refer_folder(tmp_path)
    records = those(loaded("refcoco+", tmp_path), "testA", "val")
    peaks["left bus"] = [(7, 15)]  # in the box but not in its triangle
    peaks.update({"sky": [(20, 3)], "red one on the left": [(1, 1)]})  # in both
    results = evaluated(records)
    for split, phrases in (("testA", 6), ("val", 9)):
        assert results[split]["pointing_phrases"] == pytest.approx(1)
        in_mask = results[split]["pointing_phrases_in_mask"]
        assert in_mask == pytest.approx(2 / 3, abs=1e-4) and results[split]["phrases"] == phrases


def test_refcoco_multi_object_iou(tmp_path, peaks):
    refer_folder(tmp_path)
    records = those(loaded("refcoco+", tmp_path), "testA", "val")
    half = [(x, y) for x in range(16, SIDE) for y in range(SIDE)]  # all of the sky, no bus
    peaks.update({f"{bus} and sky": half for bus in ("left bus", "red one on the left")})
    results = evaluated(records)
    iou = results["testA"]["multi_object_iou"]
    assert iou == pytest.approx(512 / (512 + 72), abs=1e-4)  # of 72 pixels is the bus's triangle
    assert (results["testA"]["pairs"], results["val"]["pairs"]) == (2, 3)


def test_the_threshold_of_the_iou_is_chosen_on_val(tmp_path, monkeypatch, peaks):
    """Each split has a threshold at which its IoU is 1, and 0.2 at the others."""
    refer_folder(tmp_path)
    records = those(loaded("refcoco+", tmp_path), "testA", "val")
    best = {"val": 3, "testA": 7}
    shown = [record["split"] for record in records]  # a pair each, in this order

    def iou_of(heat, union):
        return np.where(np.arange(19) == best[shown.pop(0)], 1.0, 0.2)

    monkeypatch.setattr(hist, "multi_object_iou", iou_of)
    assert evaluated(records)["testA"]["multi_object_iou"] == pytest.approx(0.2)


def test_any_of_five_captions_counts_as_right(monkeypatch):
    """Three images, of 1, 2 and 5 captions, with similarities given: recalls worked out by hand."""
    similarity = torch.tensor(
        [
            [0.1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3],  # caption 1, of image 1; its own is last
            [0.9, 0.5, 0.1, 0.8, 0.7, 0.6, 0.2, 0.3],  # its own (1, 2) are 5th and last
            [0.0, 0.1, 0.2, 0.3, 0.4, 0.9, 0.5, 0.6],  # its own (3 to 7) are the first
        ]
    )
    records = []
    for i, captions in enumerate((1, 2, 5)):
        pixels = np.full((SIDE, SIDE, 3), i, np.uint8)
        record = {"image": pixels, "captions": [f"w{i}"] * captions}
        records.append({**record, "split": "test", "targets": []})

    class Model(torch.nn.Module):
        def encode_image(self, images):
            return torch.eye(3)[images[:, 0, 0, 0].long()], None

        def encode_text(self, ids):
            return None, None, similarity.T

    def rerank(*given):
        return similarity, 1 - similarity

    monkeypatch.setattr(hist, "rerank", rerank)
    tokenizer = hist.Tokenizer.build(["w0 w1 w2"], 100)
    options = hist.Options(**QUICK)
    result = hist.evaluate(Model(), tokenizer, records, options)[0]["test"]
    for itm in ("", "_itm"):
        recalls = [result[f"r{k}_image_to_text{itm}"] for k in (1, 5, 10)]
        assert recalls == pytest.approx([1 / 3, 2 / 3, 1], abs=1e-4)
        # captions' best images: 1 0 0 1 1 2 2 2, by 1 - similarity 2 2 1 2 2 0 1 0; their own
        # are 0 1 1 2 2 2 2 2
        assert result[f"r1_text_to_image{itm}"] == pytest.approx(3 / 8, abs=1e-4)
    assert result["r5_text_to_image"] == 1


def vqa_record(questions):
    pixels = np.zeros((SIDE, SIDE, 3), np.uint8)
    record = {"image": pixels, "captions": ["is it yes"], "split": "val", "targets": []}
    return {**record, "questions": questions}


@pytest.mark.parametrize(
    "said, answers, accuracy",
    [
        ("yes", ["yes"] * 10, 1),
        ("no", ["yes"] * 10, 0),
        ("yes", ["yes"] * 4 + ["no"] * 6, 1),
        ("yes", ["yes"] * 3 + ["no"] * 7, (3 * 2 / 3 + 7) / 10),
        ("yes", ["yes"] * 2 + ["no"] * 8, 0.6),
        ("yes", ["yes"] + ["no"] * 9, 0.3),
        ("2", ["two", "Two.", "2", "2"] + ["3"] * 6, 1),
        ("two", ["two "] * 10, 1),
        ("two", ["2"] * 10, 0),
    ],
)
def test_vqa_accuracy_is_the_official_one(monkeypatch, said, answers, accuracy):
    monkeypatch.setattr(hist, "answer", lambda *given: said)
    compared = convert.compared(answers)
    asked = {"text": "is it [MASK]", "kind": "other", "answers": compared}
    result = evaluated([vqa_record([asked])], [said])["val"]
    assert result["vqa"] == result["vqa_other"] == pytest.approx(accuracy, abs=1e-4)
    others = [compared[:j] + compared[j + 1 :] for j in range(10)]  # the definition
    defined = [min(other.count(said) / 3, 1) for other in others]
    assert sum(defined) / 10 == pytest.approx(accuracy)


def test_vqa_answers_are_scored_by_kind(tmp_path, monkeypatch):
    vqa_folder(tmp_path)
    records = those(loaded("vqa", tmp_path), "val")
    says = {"Is there": "yes", "How many": "maybe", "Where is": "on"}

    def answer(model, tokenizer, image, text, choices):
        assert choices == ["yes", "2"] and text.endswith(" [MASK]")
        return says[text[:8]]

    monkeypatch.setattr(hist, "answer", answer)
    result = evaluated(records, ["yes", "2"])["val"]
    kinds = {"vqa": 1.6 / 3, "vqa_yes/no": 1, "vqa_number": 0.6, "vqa_other": 0}
    for name, share in kinds.items():
        assert result[name] == pytest.approx(share, abs=1e-4)
