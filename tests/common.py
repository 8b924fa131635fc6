"""Small models, batches, folders of data and commands that several tests need."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import hist

ROOT = Path(__file__).resolve().parents[1]
COCO_MINI = ROOT.parent / "shared" / "coco-mini"
SMALL = "--batch-size 8 --width 32 --device cpu".split()
SCENES = [
    *SMALL,
    *"--vit-steps 2 --image-size 24 --base-steps 0 --steps 6 --eval-images 12".split(),
]
PHOTOS = [*SMALL, *"--image-size 32 --vit vit_tiny_patch16_224 --text-layers 1".split()]
PHOTOS += "--fusion-layers 2 --cam-layer 0 --workers 0 --steps 4 --eval-images 0".split()
WRITTEN = {"metrics.jsonl", "results.json", "options.json", "baseline.pt", "hist.pt"}
WRITTEN |= {"grounding.png", "worst.png", "curves.png"}


def options(**changes):
    """Options of a tiny model of the scenes, with a fusion layer before the one that is read."""
    tiny = {"device": "cpu", "width": 32, "image_size": 24, "vit_steps": 2}
    tiny |= {"text_layers": 1, "fusion_layers": 2, "cam_layer": 1}
    return hist.Options(**tiny | changes)


def record(captions, shade=0, side=24, **more):
    """A record of a grey square and what is said of it."""
    captions = [captions] if isinstance(captions, str) else captions
    image = np.full((side, side, 3), shade, dtype=np.uint8)
    return {"image": image, "captions": captions, "targets": [], "split": "train", **more}


def samples_of(options, records=None, tokenizer=None):
    """The Samples of some records, or of scenes with two to four objects."""
    if records is None:
        records = hist.Scenes(1000, options, "test", held_out=True)
    some = range(min(60, len(records)))
    captions = [caption for i in some for caption in records[i]["captions"]]
    tokenizer = tokenizer or hist.Tokenizer.build(captions, 1000)
    skipped = hist.Skipped(Path(options.out) / "skipped.jsonl", options.max_bad)
    skipped.total = len(records)
    return hist.Samples(records, tokenizer, options, skipped)


def batch_of(options, n=6, records=None):
    """(tokenizer, a batch of n images)."""
    samples = samples_of(options, records)
    return samples.tokenizer, hist.collate([samples[i] for i in range(n)])


def lines(path):
    """The objects of a JSONL file."""
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def typed(*arguments, cwd):
    """Run `python hist.py …` as its own process."""
    command = [sys.executable, ROOT / "hist.py", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)


def refused(capsys, *arguments):
    """What a command says when it is refused: one line, exit status 2, no traceback."""
    with pytest.raises(SystemExit) as stop:
        hist.main([str(argument) for argument in arguments])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and "Traceback" not in said
    last = said.strip().splitlines()[-1]
    assert last.startswith("hist.py: ")
    return last


def coco_instances(image_id):
    """Two cats, a polygon each, and a crowd of dogs as run lengths."""
    square = [[0, 0, 10, 0, 10, 10, 0, 10]]
    crowd = {"size": [48, 64], "counts": [48 + 2, 3, 48 - 3, 3, 48 * 64 - 101]}
    rows = [
        {"category_id": 1, "bbox": [0, 0, 10, 10], "segmentation": square},
        {"category_id": 1, "bbox": [20, 20, 10, 10], "segmentation": [[20, 20, 30, 20, 30, 30]]},
        {"category_id": 2, "bbox": [1, 2, 2, 3], "segmentation": crowd},
    ]
    return [{"id": 9 * image_id + n, "image_id": image_id, **row} for n, row in enumerate(rows)]


def coco_folder(root, n=6):
    """A folder in COCO's layout; the last of its images has no file."""
    (root / "annotations").mkdir(parents=True)
    for split in ("train", "val"):
        (root / f"{split}2017").mkdir()
        images, captions, instances = [], [], []
        for i in range(n):
            name = f"{i:012}.jpg"
            images.append({"id": i, "file_name": name, "width": 64, "height": 48})
            pixels = np.full((48, 64, 3), 30 * i % 256, np.uint8)
            Image.fromarray(pixels).save(root / f"{split}2017" / name)
            for caption in (f"A cat by dog {i}.", "Two dogs "):
                captions.append({"id": len(captions), "image_id": i, "caption": caption})
            instances += coco_instances(i)
        images.append({"id": 99, "file_name": "missing.jpg", "width": 64, "height": 48})
        said = {"images": images, "annotations": captions}
        names = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
        truth = {"images": images, "annotations": instances, "categories": names}
        for kind, data in (("captions", said), ("instances", truth)):
            path = root / f"annotations/{kind}_{split}2017.json"
            path.write_text(json.dumps(data))


def own_folder(root, n=12):
    """my.jsonl: pictures of the user's, with captions, some with targets, three of "val"."""
    rows = []
    for i in range(n):
        Image.fromarray(np.full((40 + i, 60, 3), 20 * i, np.uint8)).save(root / f"{i}.png")
        row = {"image": f"{i}.png", "captions": [f"a cat and dog number {i}", "😀", ""]}
        row["split"] = "val" if i > 8 else "train"
        if i != 10:
            mask = {"size": [40 + i, 60], "parts": [[[30, 5, 50, 5, 50, 30]]]}
            cat = {"phrase": "a cat", "boxes": [[0, 0, 20, 20]]}
            dog = {"phrase": "a dog", "boxes": [[30, 5, 50.5, 30]], "mask": mask}
            row["targets"] = [cat, dog]
        rows.append(json.dumps(row) + "\n\n")
    (root / "my.jsonl").write_text("".join(rows), encoding="utf-8")


def contents(folder):
    """{name: bytes} of a folder's files."""
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}
