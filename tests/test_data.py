"""COCO and JSONL as they are read, and pictures in every state a disk may hold them in."""

import json
import os
import zlib
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from common import PHOTOS, coco_folder, lines, options, own_folder, record, refused
from PIL import Image

import hist


def skipped(max_bad=0.3):
    return hist.Skipped("run/skipped.jsonl", max_bad)


# ------------------------------------------------------------------------------------------- COCO
def test_coco_layout(here):
    coco_folder(here / "coco")
    records = hist.read_coco(here / "coco", "val", skipped())
    assert len(records) == 6
    (row,) = lines("run/skipped.jsonl")
    assert row["kind"] == "image" and "missing.jpg" in row["why"]
    cat, dog = records[0]["targets"]
    assert cat["phrase"] == "cat" and cat["boxes"] == [[0, 0, 10, 10], [20, 20, 30, 30]]
    mask = hist.decode_mask(cat["mask"])
    assert mask.shape == (48, 64) and mask[5, 5] and mask[21, 28]
    assert not mask[29, 21] and not mask[15, 15]
    expected = np.zeros((48, 64), bool)
    expected[2:5, 1:3] = True
    assert (hist.decode_mask(dog["mask"]) == expected).all()
    assert records[0]["captions"] == ["A cat by dog 0.", "Two dogs"]
    assert records[0]["split"] == "val" and records[0]["image"] == here / "coco/val2017" / (
        "0" * 12 + ".jpg"
    )
    train = hist.read_coco(here / "coco", "train", skipped())
    assert train[0]["targets"] == [] and train[0]["split"] == "train"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # pycocotools' own
def test_masks_are_pycocotools_own():
    mask = pytest.importorskip("pycocotools.mask")
    rng = np.random.default_rng(0)
    for _ in range(20):
        truth = np.asfortranarray(rng.random((23, 17)) < 0.4)
        runs, last, counts = truth.flatten(order="F"), False, [0]
        for value in runs:
            if value == last:
                counts[-1] += 1
            else:
                counts.append(1)
                last = value
        theirs = mask.decode(mask.frPyObjects({"size": [23, 17], "counts": counts}, 23, 17))
        ours = hist.decode_mask({"size": [23, 17], "parts": [{"counts": counts}]})
        assert (ours == theirs.astype(bool)).all() and (ours == truth).all()
        polygon = rng.uniform(0, 17, 8).round().tolist()
        ours = hist.decode_mask({"size": [23, 17], "parts": [[polygon]]})
        theirs = mask.decode(mask.frPyObjects([polygon], 23, 17))[..., 0].astype(bool)
        assert (ours ^ theirs).sum() <= 4 + 8 * 17 // 3  # an edge, no more


def test_no_coco_says_what_was_looked_for_and_how_to_get_it(here, capsys):
    said = refused(capsys, "--data", "coco", "--root", "nowhere")
    assert "nowhere/annotations/captions_train2017.json" in said
    assert "tests.paper.convert coco nowhere" in said and "cocodataset.org" in said


def edit(path, change):
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def bad_captions(data):
    for caption in ("", "  ", None, 7, ["a cat"]):
        data["annotations"].append({"image_id": 1, "caption": caption})
    data["annotations"] += [{"image_id": 777, "caption": "of no image"}, {"image_id": 1}]
    named = [{"id": i, "height": 9, "width": 9} for i in (50, 51)]
    named[0]["file_name"], named[1]["file_name"] = "../../etc/passwd", "/etc/passwd"
    data["images"] += named


def bad_instances(data):
    square = [[0, 0, 9, 0, 9, 9]]
    whole = {"image_id": 1, "category_id": 1, "bbox": [0, 0, 9, 9], "segmentation": square}
    nan = [float("nan"), 0, 3, 3]
    for change in (
        {"bbox": [70, 0, 9, 9]},
        {"bbox": [5, 5, 0, 3]},
        {"bbox": None},
        {"bbox": nan},
        {"category_id": 5},
        {"image_id": 777},
    ):
        data["annotations"].append(whole | change)
    runs = {"size": [48, 64]}
    data["annotations"] += [
        whole | {"image_id": 2, "bbox": [50, 40, 99, 99]},
        whole | {"image_id": 3, "segmentation": [[1, "x"]]},
        whole | {"image_id": 4, "segmentation": runs | {"counts": "compressed"}},
        whole | {"image_id": 5, "segmentation": runs | {"counts": [1, 2]}},
    ]


def test_bad_captions_and_annotations_are_left_out_and_listed(here):
    coco_folder(here / "coco", 12)
    edit(here / "coco/annotations/captions_val2017.json", bad_captions)
    edit(here / "coco/annotations/instances_val2017.json", bad_instances)
    o, listed = options(data="coco", eval_images=0), skipped()
    records = hist.read_coco(Path("coco"), "val", listed)
    assert len(records) == 12 and records[1]["captions"] == ["A cat by dog 1.", "Two dogs"]
    why = [(row["kind"], row["why"]) for row in lines("run/skipped.jsonl")]
    for kind, text, times in (
        ("caption", "it is empty", 2),
        ("caption", "no attribute 'strip'", 3),
        ("caption", "777 is missing", 1),
        ("annotation", "777 is missing", 1),
        ("caption", "'caption' is missing", 1),
        ("annotation", "5 is missing", 1),
        ("image", "no file ../../etc/passwd", 1),
        ("image", "no file /etc/passwd", 1),
        ("image", "no file missing.jpg", 1),
        ("annotation", "has no pixel", 3),
    ):
        found = [text in line for one, line in why if one == kind]
        assert sum(found) == times, (text, why)
    cat = next(t for t in records[2]["targets"] if t["phrase"] == "cat")
    assert cat["boxes"][-1] == [50, 40, 64, 48]  # a box is cut at the edge of the image
    good = hist.usable(records, o, listed)
    assert [len(r["targets"]) for r in good[1:7]] == [2] * 6  # a bad polygon costs a mask alone
    before = lines("run/skipped.jsonl")
    assert sum("run lengths are compressed" in row["why"] for row in before) == 1
    hist.usable(hist.read_coco(Path("coco"), "val", listed), o, listed)
    assert lines("run/skipped.jsonl") == before  # the same again is not listed twice
    for row in before:  # what it is of can be found
        assert row["which"].startswith(("captions_val2017.json", "instances_val2017.json", "coco"))
    assert (listed.count(), listed.total) == (3, 2 * 15)


@pytest.mark.parametrize(
    "text, what",
    [
        ('{"images": [\n{"id": 1,}]}', "line 2"),
        ("", "line 1"),
        ('{"images": []}', "annotations"),
        ("[1]", "no JSON object"),
        ('{"images": 3, "annotations": []}', "images"),
    ],
)
def test_malformed_json_gets_its_file_line_and_fault(here, capsys, text, what):
    coco_folder(here / "coco")
    path = here / "coco/annotations/captions_train2017.json"
    path.write_bytes(text.encode("latin1"))
    said = refused(capsys, "--data", "coco", "--root", "coco", *PHOTOS)
    assert "captions_train2017.json: no JSON object with" in said and what in said


@pytest.mark.parametrize(
    "bad", ["none", None, [], [[1, "x"]], {"counts": [1, 2]}, {"counts": "packed"}]
)
def test_an_instance_without_a_good_mask_keeps_its_box_and_the_others_their_masks(here, bad):
    """COCO's first two cats: a square at (0, 0), a triangle at (20, 20) whose mask is spoilt."""
    coco_folder(here / "coco")
    path, listed = here / "coco/annotations/instances_val2017.json", skipped()
    edit(path, lambda data: data["annotations"][1].update(segmentation=bad))
    if bad == "none":
        edit(path, lambda data: data["annotations"][1].pop("segmentation"))
    records = hist.usable(hist.read_coco(Path("coco"), "val", listed), options(), listed)
    cat, _ = records[0]["targets"]
    assert cat["boxes"] == [[0, 0, 10, 10], [20, 20, 30, 30]]
    mask = hist.decode_mask(cat["mask"])
    assert mask[:10, :10].all() and mask[20:30, 20:30].all() and not mask[12:18].any()
    why = [(row["kind"], row["which"]) for row in lines("run/skipped.jsonl")]
    assert ("mask", "instances_val2017.json, entry 1") in why


def test_too_many_bad_images_of_both_splits_stop_a_run(here):
    """One of 7 in each split has no file: 2 of 14; and two pictures of val cannot be read."""
    coco_folder(here / "coco")
    for name in ("0" * 12, "0" * 11 + "1"):
        (here / f"coco/val2017/{name}.jpg").write_text("no picture")
    o = options(data="coco", root="coco", eval_images=0)
    train, held_out = hist.load_data(o, skipped(0.29))
    assert (len(train), len(held_out)) == (6, 4)
    with pytest.raises(hist.UserError, match="4 of 14 images cannot be used, more than --max-bad"):
        hist.load_data(o, skipped(0.28))


# ------------------------------------------------------------------------------------------ JSONL
def test_own_records(here):
    own_folder(here)
    train, held_out = hist.read_jsonl("my.jsonl")
    assert len(train) == 9 and [r["split"] for r in held_out] == ["val"] * 3
    assert train[3]["image"] == Path("3.png") and train[3]["captions"][1] == "😀"
    assert [len(r["targets"]) for r in held_out] == [2, 0, 2]
    first = hist.targets_of(train[0], (40, 60, 3), 24)
    assert first[1].mask.sum() < first[1].boxes.sum()  # a triangle in its box


@pytest.mark.parametrize("n, train, held_out", [(25, 23, 2), (10, 9, 1), (5, 4, 1)])
def test_every_tenth_is_held_out_where_no_line_says_so(here, capsys, n, train, held_out):
    Image.new("RGB", (8, 8)).save("0.png")
    rows = [json.dumps({"image": "0.png", "captions": [str(i)]}) for i in range(n)]
    Path("plain.jsonl").write_text("\ufeff" + "\n".join(rows), encoding="utf-8")
    one, other = hist.read_jsonl("plain.jsonl")
    assert (len(one), len(other)) == (train, held_out)
    assert {r["split"] for r in one} == {"train"} and {r["split"] for r in other} == {"val"}
    said = [r["captions"][0] for r in one + other]
    assert sorted(said, key=int) == [str(i) for i in range(n)]
    assert "held out" in capsys.readouterr().out


@pytest.mark.parametrize(
    "line, what",
    [
        ('{"image": "0.png", "captions": ["a"]', "delimiter"),
        ("[1]", "list"),
        ('{"captions": ["a"]}', "'image' is missing"),
        ('{"image": "no.png", "captions": ["a"]}', "no picture"),
        ('{"image": "../0.png", "captions": ["a"]}', "leads out"),
        ('{"image": "/etc/passwd", "captions": ["a"]}', "leads out"),
        ('{"image": "0.png", "captions": "a"}', '"captions"'),
        ('{"image": "0.png", "captions": []}', '"captions"'),
        ('{"image": "0.png", "captions": [null]}', '"captions"'),
        ('{"image": "0.png", "captions": ["a"], "targets": [{"phrase": "a"}]}', "boxes"),
        ('{"image": "0.png", "captions": ["a"], "questions": [{"text": "a"}]}', "kind"),
        (
            '{"image": "0.png", "captions": ["a"], "questions": [{"text": "a dog", "kind": "is",'
            ' "answers": ["yes"], "choices": ["no"]}]}',
            "[MASK]",
        ),
        (
            '{"image": "0.png", "captions": ["a"], "targets": [{"phrase": " ",'
            ' "boxes": [[0, 0, 2, 2]]}]}',
            '"targets"',
        ),
    ],
)
def test_a_wrong_line_is_reported_with_its_number(here, capsys, line, what):
    own_folder(here)
    text = Path("my.jsonl").read_text().splitlines()
    Path("my.jsonl").write_text("\n".join(text[:4] + [line] + text[4:]))
    said = refused(capsys, "--data", "my.jsonl", *PHOTOS)
    assert "my.jsonl, line 5:" in said and what in said


def test_what_is_null_is_as_what_is_not_there(here):
    own_folder(here)
    plain = {"image": "0.png", "captions": ["a dog"]}
    empty = plain | {"targets": None, "questions": None}
    expected = hist.read_record(json.dumps(plain), here)
    assert hist.read_record(json.dumps(empty), here) == expected
    record = empty | {"targets": [{"phrase": "a dog", "boxes": [[0, 0, 2, 2]], "tags": None}]}
    (target,) = hist.targets_of(hist.read_record(json.dumps(record), here), (4, 4), 4)
    assert list(target.tags) == [] and target.boxes.sum() == 4


def test_too_little_memory_is_no_fault_of_a_picture(here, monkeypatch):
    own_folder(here)
    monkeypatch.setattr(hist.Image, "open", Mock(side_effect=MemoryError))
    with pytest.raises(MemoryError):
        hist.load_pixels("0.png")


ENCODINGS = ("utf-8", "utf-8-sig", "utf-16")  # PowerShell's > writes UTF-16


@pytest.mark.parametrize("ends", ["\n", "\r\n", "\r\n\r\n \r\n"])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_file_is_read_in_the_encoding_that_its_first_bytes_tell(here, encoding, ends):
    own_folder(here)
    expected, text = hist.read_jsonl("my.jsonl"), Path("my.jsonl").read_text()
    text = text.replace(r"\ud83d\ude00", "😀").replace("\n\n", ends)
    Path("my.jsonl").write_bytes(text.encode(encoding))
    assert hist.read_jsonl("my.jsonl") == expected and "😀" in text
    Path("all.json").write_bytes(json.dumps({"images": ["é"]}).encode(encoding))
    assert hist.read_json("all.json", "images") == [["é"]]


def test_what_is_no_utf_8_is_read_as_latin_1_and_its_file_and_line_are_said(here, capsys):
    own_folder(here)
    Path("my.jsonl").write_bytes('\n{"image": "0.png", "captions": ["café"]}'.encode("latin-1"))
    assert hist.read_jsonl("my.jsonl")[1][0]["captions"] == ["café"]
    assert "my.jsonl:2: this is no UTF-8; read as Latin-1" in capsys.readouterr().err


def test_utf_16_that_is_cut_short_is_read_as_far_as_it_goes(here):
    own_folder(here)
    row = '{"image": "0.png", "captions": ["café"]}\n'
    Path("my.jsonl").write_bytes((row + row).encode("utf-16")[:-1])
    with pytest.raises(hist.UserError, match="my.jsonl, line 2"):
        hist.read_jsonl("my.jsonl")


def test_the_vocabulary_has_words_as_the_parser_reads_them():
    """An accent, two ways to write it; an entity; a curly apostrophe; a zero-width space."""
    one, other = "a cat's café by a fireman", "a cat&#39;s cafe\u0301 by a fire\u200bman"
    tokenizer = hist.Tokenizer.build([one], 99)
    assert tokenizer.encode(other) == tokenizer.encode(one)
    assert tokenizer.unk_id not in tokenizer.encode("a cat’s CAFÉ")
    assert hist.text_key(other) == hist.text_key(one) == hist.text_key(one.replace("'", "’"))


def test_where_a_link_leads_is_its_owner_s_business(here):
    """A picture, and a folder of pictures, that lie outside the data's folder."""
    for folder in ("elsewhere", "data"):
        (here / folder).mkdir()
    Image.new("RGB", (9, 9)).save("elsewhere/0.png")
    os.symlink(here / "elsewhere", "data/photos")
    os.symlink(here / "elsewhere/0.png", "data/1.png")
    names = ["photos/0.png", "1.png"]
    rows = [json.dumps({"image": name, "captions": ["a"]}) for name in names]
    Path("data/my.jsonl").write_text("\n".join(rows))
    train, held_out = hist.read_jsonl("data/my.jsonl")
    assert [record["image"] for record in train + held_out] == [Path("data", n) for n in names]
    coco_folder(here / "coco")
    os.rename("coco/val2017", "elsewhere/val2017")
    os.symlink(here / "elsewhere/val2017", "coco/val2017")
    assert len(hist.read_coco(Path("coco"), "val", skipped())) == 6


# ------------------------------------------------------------------------------------------ boxes
def boxed(*boxes, split="val"):
    """my.jsonl of a picture of 100 x 80 pixels, and one to train on; targets of these boxes."""
    Image.new("RGB", (100, 80)).save("0.png")
    targets = [{"phrase": "a cat", "boxes": some} for some in boxes]
    row = {"image": "0.png", "captions": ["a cat"], "split": split, "targets": targets}
    rows = [row, {"image": "0.png", "captions": ["a cat"]}]
    Path("my.jsonl").write_text("\n".join(map(json.dumps, rows)))


@pytest.mark.parametrize(
    "box",
    [
        [500, 500, 600, 600],
        [-9, 0, 0, 9],
        [0, -904, 9, -900],
        [-5, -904, 1, -900],
        [100, 0, 109, 9],
        [30, 9, 20, 40],
        [20, 20, 0, 0],
    ],
)
def test_a_box_outside_its_picture_is_left_out_and_listed(here, box):
    boxed([[10, 10, 20, 20], box], [box], [[90, 70, 120, 90]])
    o = options(data="my.jsonl", eval_images=0)
    _, (record,) = hist.load_data(o, skipped())
    assert [t["boxes"] for t in record["targets"]] == [[[10, 10, 20, 20]], [[90, 70, 100, 80]]]
    (row,) = lines("run/skipped.jsonl")
    assert row["kind"] == "box" and row["which"] == "0.png" and str(box) in row["why"]


@pytest.mark.parametrize("box", [[0.2, 0.2, 0.7, 0.7], [0, 0, 1, 1], [0.1, 0, 0.5, 1.0]])
def test_boxes_given_as_shares_get_a_sentence_of_their_own(here, capsys, box):
    boxed([box])
    said = refused(capsys, "--data", "my.jsonl", *PHOTOS)
    assert "my.jsonl, line 1:" in said and "shares of the picture" in said and "pixels" in said


# --------------------------------------------------------------------------------------- pictures
def bomb(path):
    """A PNG of 50,000 x 50,000 pixels in a few bytes."""
    size = (50_000).to_bytes(4, "big")
    text = b"\x89PNG\r\n\x1a\n"
    header = size + size + bytes([8, 0, 0, 0, 0])
    for kind, data in ((b"IHDR", header), (b"IDAT", zlib.compress(bytes(99))), (b"IEND", b"")):
        checksum = zlib.crc32(kind + data).to_bytes(4, "big")
        text += len(data).to_bytes(4, "big") + kind + data + checksum
    path.write_bytes(text)


UNREADABLE = ("truncated", "zero-byte", "missing", "bomb", "text")
READABLE = ("greyscale", "CMYK", "16-bit", "palette", "rotated", "opaque")
GREY = np.linspace(0, 255, 64 * 48).reshape(48, 64).astype(np.uint8)


def damage(path, how):
    """Make a picture unreadable, or GREY in another format; all are still called .jpg."""
    if how in READABLE:
        exif, picture = Image.Exif(), Image.fromarray(GREY)
        exif[0x0112] = 6 if how == "rotated" else 1
        changes = {
            "CMYK": picture.convert("CMYK"),
            "16-bit": Image.fromarray(GREY.astype(np.uint16) * 257),
            "palette": picture.quantize(256),
            "opaque": picture.convert("LA"),
        }
        changes.get(how, picture).save(path, "TIFF" if how == "CMYK" else "PNG", exif=exif)
    elif how == "bomb":
        bomb(path)
    elif how == "missing":
        path.unlink()
    else:
        whole = path.read_bytes()
        path.write_bytes({"truncated": whole[:400], "text": b"<html>"}.get(how, b""))


@pytest.mark.parametrize("how", UNREADABLE + READABLE)
def test_a_picture_is_read_or_refused(tmp_path, how):
    path = tmp_path / "one.jpg"
    noise = np.random.default_rng(0).integers(0, 255, (48, 64, 3)).astype(np.uint8)
    Image.fromarray(noise).save(path)
    damage(path, how)
    if how in UNREADABLE:
        with pytest.raises(hist.UserError, match="one.jpg: not readable as a picture"):
            hist.load_pixels(path)
        return
    pixels = hist.load_pixels(path)
    assert pixels.dtype == np.uint8 and pixels.shape == (48, 64, 3)
    # 16 bits are scaled, not cut off at white; boxes are of the stored pixels
    assert np.abs(pixels.astype(int) - GREY[..., None]).max() <= 2
    if how == "rotated":  # a person's own photograph is turned
        assert hist.load_pixels(path, upright=True).shape == (64, 48, 3)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_is_white(here, mode):
    """A black square on transparent black, and under it hidden red; half of it half transparent."""
    logo = Image.new("RGBA", (40, 40), (0, 0, 0, 0) if mode == "P" else (255, 0, 0, 0))
    logo.paste((0, 0, 0, 255), (10, 10, 30, 30))
    logo.convert(mode).save("logo.png")
    pixels = hist.load_pixels("logo.png").astype(int)
    assert (pixels[10:30, 10:30] == 0).all()
    assert (pixels[:10] == 255).all() and (pixels[:, 30:] == 255).all()
    Image.new("RGBA", (4, 4), (0, 0, 0, 128)).save("half.png")
    assert np.abs(hist.load_pixels("half.png").astype(int) - 127).max() <= 1


@pytest.mark.parametrize(
    "dtype, white",
    [("uint16", 65_535), ("uint16", 4095), ("uint16", 255), ("int32", 255), ("int32", 65_535)],
)
@pytest.mark.parametrize("upright", [False, True])
def test_integers_are_scaled_and_not_cut(here, dtype, white, upright):
    Image.fromarray((GREY * (white / 255)).round().astype(dtype)).save("grey.tif")
    pixels = hist.load_pixels("grey.tif", upright)
    assert np.abs(pixels - GREY[..., None].astype(int)).max() <= 1


@pytest.mark.parametrize("white", [1, 1.03, 255, 300, 65_535, 1e6])
def test_floats_are_scaled_and_not_cut(here, white):
    values = GREY * np.float32(white / 255)
    values[0, :3] = np.nan, -np.inf, -1  # black, as nothing else can be said of them
    Image.fromarray(values).save("grey.tif")
    error = 8 if white == 1.03 else 1  # what is a little more than white is white
    assert np.abs(hist.load_pixels("grey.tif") - GREY[..., None].astype(int)).max() <= error
    Image.fromarray(np.zeros((4, 4), np.float32)).save("black.tif")
    assert (hist.load_pixels("black.tif") == 0).all()


@pytest.mark.parametrize("exif", [b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", b"nothing"])
@pytest.mark.parametrize("upright", [False, True])
@pytest.mark.parametrize("kind", ["PNG", "WEBP", "JPEG"])
def test_a_malformed_exif_block_says_nothing_about_the_pixels(here, kind, upright, exif):
    Image.new("RGB", (8, 6), (10, 200, 30)).save("one.img", kind, exif=exif)
    pixels = hist.load_pixels("one.img", upright)
    assert pixels.shape == (6, 8, 3) and np.abs(pixels.astype(int) - (10, 200, 30)).max() < 9


@pytest.mark.parametrize(
    "kind, mode",
    [("TIFF", "RGB"), ("TIFF", "L"), ("TIFF", "I;16"), ("PNG", "RGB"), ("JPEG", "RGB")]
    + [("PNG", "I;16"), ("JPEG", "L"), ("WEBP", "RGB")],
)
def test_a_picture_is_turned_for_a_person_and_not_for_its_boxes(here, kind, mode):
    """The left half is black as stored; orientation 6 puts the left edge on top."""
    pixels, exif = np.full((48, 64), 255, np.uint8), Image.Exif()
    pixels[:, :32] = 0
    exif[0x0112] = 6
    picture = Image.fromarray(pixels).convert("L" if mode == "L" else "RGB")
    if mode == "I;16":
        picture = Image.fromarray(pixels * np.uint16(257))
    picture.save("one.img", kind, exif=exif)
    stored, upright = hist.load_pixels("one.img"), hist.load_pixels("one.img", upright=True)
    assert stored.shape == (48, 64, 3) and stored[:, 4:28].max() < 30 and stored[:, 36:].min() > 220
    assert upright.shape == (64, 48, 3) and upright[4:28].max() < 30 and upright[36:].min() > 220


@pytest.mark.parametrize("how", UNREADABLE)
def test_a_person_s_own_picture_that_cannot_be_read_is_refused_too(here, how):
    path = here / "one.jpg"
    Image.fromarray(GREY).save(path)
    damage(path, how)
    with pytest.raises(hist.UserError, match="one.jpg: not readable as a picture"):
        hist.load_pixels(path, upright=True)


@pytest.mark.parametrize("size", [(40, 30), (64, 36), (30, 41), (8, 8), (5, 1)])
def test_a_wide_picture_keeps_its_shape_on_a_square_of_its_border_s_colour(size):
    pixels = np.full((*size[::-1], 3), (250, 240, 20), np.uint8)
    pixels[size[1] // 3 : size[1] // 2, size[0] // 3 : size[0] // 2] = (10, 20, 200)
    square = hist.pad_to_square(pixels)
    side, (height, width) = max(size), pixels.shape[:2]
    assert square.shape == (side, side, 3) and square.dtype == np.uint8
    top, left = round((side - height) / 2), round((side - width) / 2)
    assert (square[top : top + height, left : left + width] == pixels).all()
    square[top : top + height, left : left + width] = (250, 240, 20)
    assert (square == (250, 240, 20)).all()


def test_an_image_is_squeezed_to_a_square():
    half = np.zeros((40, 80, 3), np.uint8)
    half[:, 40:] = 200
    pixels = hist.read_image(half, 20)
    assert pixels.shape == (3, 20, 20) and pixels.dtype == torch.uint8
    assert (pixels[:, :, :9] == 0).all() and (pixels[:, :, 11:] == 200).all()


def test_of_each_split_the_first_images_are_evaluated(here):
    records = [record("x", split="val" if i % 2 else "test") for i in range(10)]
    records[1]["image"] = "nowhere.png"
    listed = skipped()
    kept = hist.usable(records, options(eval_images=3), listed)
    assert [r["split"] for r in kept] == ["test", "test", "val", "test", "val"]
    assert listed.count() == 1 and len(hist.usable(records, options(eval_images=0), listed)) == 9


def test_a_mask_of_another_size_than_its_picture_is_no_target(here):
    target = {"phrase": "a cat", "boxes": [[0, 0, 9, 9]], "mask": np.ones((9, 9), bool)}
    records = [record("x", targets=[target, target | {"mask": None}])]
    (kept,) = hist.usable(records, options(), skipped())
    assert len(kept["targets"]) == 1 and lines("run/skipped.jsonl")[0]["kind"] == "mask"
