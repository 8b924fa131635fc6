"""HIST in one file: train a vision-language model that can point at what a phrase names.

An educational implementation of "Barking Up The Syntactic Tree: Enhancing VLM Training with Syntactic Losses"
(arXiv 2412.08110) on a small ALBEF (arXiv 2107.07651). parse.py cuts each caption into phrases, their subjects, and
composites of two phrases; here they become losses. No boxes are used in training.

    python hist.py                                          drawn scenes: no download, no GPU
    python hist.py --data coco --root PATH_TO_COCO          COCO 2017
    python hist.py --data my.jsonl                          your own images and captions
    python hist.py --ground PICTURE "a red circle" "a blue star"

Read it from top to bottom: options, data, batches, model, Grad-CAM, losses, measures, pictures, training, main.
"""
import argparse
import copy
import hashlib
import itertools
import json
import math
import os
import random
import sys
import textwrap
import time
import urllib.request
import zipfile
from collections import Counter
from dataclasses import asdict, dataclass, field, fields
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from matplotlib.figure import Figure                     # no pyplot: it would choose a backend for whoever imports this file
from PIL import Image, ImageDraw
from timm.layers import HybridEmbed
from timm.models.vision_transformer import VisionTransformer
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2.functional import resize
from tqdm import tqdm

import parse as parser

class UserError(Exception):
    """A mistake that the person at the keyboard can mend: printed as one line, exit status 2, no traceback."""

# ---------------------------------------------------------------------------------------------------- options
LEVELS = ("caption", "phrase", "subject", "composition")

option = lambda default, text: field(default=default, metadata={"help": text})

@dataclass
class Options:
    """The command line. 0, -1 or "" stand for what suits the data: SCENES and PHOTOS below."""
    data: str = option("scenes", "scenes, coco, or a file of your own records: FILE.jsonl")
    root: str = option("data/coco", "folder of COCO's train2017/ val2017/ annotations/")
    download: bool = option(False, "fetch COCO 2017 into --root first (20 GB, resumable, checked)")
    out: str = option("", "folder for all that a run writes [out/NAME]")
    parses: str = option("", "file of parses to train on in place of the rules' (python parse.py --llm)")
    levels: str = option(",".join(LEVELS), "levels of the HIST training; 'caption' trains the baseline alone")
    base_steps: int = option(-1, "caption-only steps first, from which every training then goes on [scenes 800, else 0]")
    steps: int = option(0, "optimiser steps of each training [scenes 400, else 10 epochs]")
    batch_size: int = option(-1, "images a step [64]")
    lr: float = option(0.0, "peak learning rate [scenes 2e-3, else 3e-4]")
    composition_weight: float = option(1.0, "lambda, the weight of the composition loss")
    composition_start: float = option(0.66, "share of the steps after which composition ramps in")
    vit: str = option("", "any timm ViT, from scratch [scenes: one layer on a stem, else vit_small_patch16_224; CPU vit_tiny_…]")
    image_size: int = option(-1, "side of the square image, pixels [scenes 48, else 224; CPU 160]")
    width: int = option(-1, "width of text and fusion layers [scenes 64, else 384; CPU 192]")
    text_layers: int = option(-1, "layers of the text encoder [scenes 1, else 4; CPU 2]")
    fusion_layers: int = option(-1, "layers in which text attends to the image [scenes 2, else 4; CPU 2]")
    cam_layer: int = option(-1, "fusion layer that Grad-CAM reads, 0 the first [scenes the last, else the middle]")
    vocab_size: int = option(10_000, "words kept, most frequent first; the rest are [UNK]")
    eval_images: int = option(500, "held-out images to evaluate on; 0 all of them")
    save_every: int = option(200, "steps between checkpoints")
    workers: int = option(-1, "processes that load images [scenes 0, else one a core, 8 at most]")
    seed: int = option(0, "seed of weights, scenes, order and masks")
    device: str = option("auto", "auto, cpu, cuda or mps")
    resume: bool = option(False, "go on from the last checkpoint in --out, with its options")
    ablate: bool = option(False, "train every row of the ablation for --seeds seeds, and print its table")
    seeds: int = option(5, "seeds of --ablate, from --seed on")
    eval_only: bool = option(False, "evaluate the checkpoints in --out, no training")
    ground: list = option(None, "draw where the last trained model looks: PICTURE PHRASE [PHRASE ...]")

SCENES = dict(base_steps=800, steps=400, batch_size=64, lr=2e-3, vit="scenes", image_size=48, width=64, text_layers=1, fusion_layers=2, workers=0)
PHOTOS = dict(base_steps=0, batch_size=64, lr=3e-4, workers=min(8, os.cpu_count() or 1), **(
    dict(vit="vit_small_patch16_224", image_size=224, width=384, text_layers=4, fusion_layers=4) if torch.cuda.is_available() else
    dict(vit="vit_tiny_patch16_224", image_size=160, width=192, text_layers=2, fusion_layers=2)))      # to see it run, no more

# ------------------------------------------------------------------------------------------------ data: scenes
# Every reader makes records {"image": path or array, "captions": [str, …], "targets": [{"phrase": str,
# "boxes": [[x0, y0, x1, y1], …], "mask": optional}, …]}, and the rest of the program knows only these.
COLOURS = {"red": (220, 40, 40), "orange": (245, 140, 20), "yellow": (240, 225, 50), "green": (40, 170, 60),
           "cyan": (70, 215, 225), "blue": (40, 70, 220), "purple": (130, 50, 170), "pink": (250, 150, 200)}

def corners(n, *radii):
    """Points at equal angles around (0, 0), from the top, at these radii in turn."""
    return [(radii[i % len(radii)] * math.sin(2 * math.pi * i / n), -radii[i % len(radii)] * math.cos(2 * math.pi * i / n))
            for i in range(n)]

SHAPES = {"circle": corners(40, .46), "ring": corners(40, .46), "square": [(-.42, -.42), (.42, -.42), (.42, .42), (-.42, .42)],
          "diamond": corners(4, .48, .3), "triangle": corners(3, .5), "star": corners(10, .5, .2),
          "cross": [(x * s, y * s) for s in (1, -1) for x, y in [(-.15, -.46), (.15, -.46), (.15, -.15), (.46, -.15), (.46, .15), (.15, .15)]],
          "heart": [(.47 * math.sin(t) ** 3, (math.cos(4 * t) + 2 * math.cos(3 * t) + 5 * math.cos(2 * t) - 13 * math.cos(t)) / 34)
                    for t in np.linspace(0, 2 * math.pi, 40)]}

UNSEEN = {(c, s) for i, c in enumerate(COLOURS) for j, s in enumerate(SHAPES) if (i + 2 * j) % 5 == 0}     # a fifth: in test scenes only
COUNT = ("no", "one", "two", "three", "four")

@lru_cache(maxsize=None)
def shape_alpha(shape, size, angle):
    """How much of each pixel a shape covers, (size, size) in [0, 1], drawn by PIL at four times the size; and its box."""
    big, c, s = Image.new("L", (4 * size, 4 * size)), math.cos(math.radians(angle)), math.sin(math.radians(angle))
    ImageDraw.Draw(big).polygon([(4 * size * (0.5 + c * x - s * y), 4 * size * (0.5 + s * x + c * y)) for x, y in SHAPES[shape]], fill=255)
    if shape == "ring":
        ImageDraw.Draw(big).ellipse([1.1 * size, 1.1 * size, 2.9 * size, 2.9 * size], fill=0)
    alpha = np.asarray(big.resize((size, size), Image.Resampling.BOX), dtype=np.float32) / 255
    ys, xs = np.nonzero(alpha > 0.5)
    return alpha, (int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1)

def draw_scene(rng, side, wanted, unseen):
    """One scene: a record with an image (side, side, 3) uint8, a caption of some of its objects, and the truth about all.

    rng: random.Random. wanted: how many objects, no two of the same colour and shape, half of them distractors that share
    one of the two with the first; their diameters are 0.2 to 0.5 of the side. unseen: whether UNSEEN pairs may be drawn.
    """
    objects, masks, base = [], [], rng.uniform(190, 240)
    grain = np.frombuffer(rng.randbytes(side * side), dtype=np.uint8).reshape(side, side)
    image = np.float32([[[base + rng.uniform(-10, 10)]] for _ in "rgb"]) + grain * np.float32(rng.uniform(0.01, 0.05))
    for _ in range(200):
        if len(objects) == wanted:
            break
        colour, shape = rng.choice(list(COLOURS)), rng.choice(list(SHAPES))
        if objects and rng.random() < 0.5:
            colour, shape = (objects[0]["colour"], shape) if rng.random() < 0.5 else (colour, objects[0]["shape"])
        size = int(side * 0.2 * 2.5 ** rng.random())
        x, y = rng.randint(0, side - size), rng.randint(0, side - size)
        if (colour, shape) in UNSEEN and not unseen or any(
                (colour, shape) == (o["colour"], o["shape"]) or max(o["x"] - x - size, x - o["x"] - o["size"],
                                                                    o["y"] - y - size, y - o["y"] - o["size"]) < 1 for o in objects):
            continue                                           # not now, the same again, or no room: draw another
        alpha, (x0, y0, x1, y1) = shape_alpha(shape, size, rng.choice((-16, -8, 0, 8, 16)))
        ink = np.float32([[[value + rng.gauss(0, 12)]] for value in COLOURS[colour]])
        spot = image[:, y:y + size, x:x + size]                # (3, size, size), a view
        spot += alpha * (ink - spot)
        mask = np.zeros((side, side), dtype=bool)
        mask[y:y + size, x:x + size] = alpha > 0.5
        masks.append(mask)
        objects.append({"colour": colour, "shape": shape, "x": x, "y": y, "size": size, "box": [x + x0, y + y0, x + x1, y + y1]})
    alike = lambda o, what: sum(p[what] == o[what] for p in objects) > 1
    targets = [{"phrase": with_article(f"{o['colour']} {o['shape']}"), "boxes": [o["box"]], "mask": mask,
                "tags": [tag for tag, so in (("shared_colour", alike(o, "colour")), ("shared_shape", alike(o, "shape")),
                                             ("unseen", (o["colour"], o["shape"]) in UNSEEN)) if so]} for o, mask in zip(objects, masks)]
    caption, said = describe(rng, objects, side)
    return {"image": image.clip(0, 255).astype(np.uint8).transpose(1, 2, 0), "captions": [caption], "said": said, "targets": targets,
            "questions": ask(rng, objects)}

def with_article(noun):
    return ("an " if noun[0] in "aeiou" else "a ") + noun

def describe(rng, objects, side):
    """A true caption that names one to four of the objects, and what it says: [(phrase, subject), ...]."""
    order, alike = rng.sample(objects, len(objects)), lambda o, what: sum(p[what] == o[what] for p in objects) > 1
    names = lambda o: ("small " if o["size"] < 0.27 * side else "large " if o["size"] > 0.38 * side else "") * (rng.random() < 0.4) + f"{o['colour']} {o['shape']}"
    clause = [o for o in order[1:] or order if not alike(o, "shape") or not alike(o, "colour")][-1:] if rng.random() < 0.5 else []
    chosen = [o for o in order if o not in clause][:rng.randint(1 if clause else 2, 3)]
    if rng.random() < 0.15:
        chosen, clause = ([], clause) if clause else (chosen[:1], [])
    said = [(with_article(names(o)), o["shape"]) for o in chosen]
    phrases = [phrase for phrase, _ in said]
    if len(chosen) < 2:
        caption = rng.choice(["{}", "there is {}", "a picture of {}"]).format(*phrases) if chosen else ""
    else:
        dx, dy = (chosen[0][k] + chosen[0]["size"] / 2 - chosen[1][k] - chosen[1]["size"] / 2 for k in "xy")
        sideways = ("left of", "to the left of") if dx < 0 else ("right of", "to the right of")
        true = sideways if abs(dx) > abs(dy) else ("above", "over") if dy < 0 else ("below", "under")
        where = rng.choice(true + ("next to", "beside", "and", "with", "near"))
        caption = rng.choice(["{} {w} {}", "there is {} {w} {}", "a picture of {} {w} {}"] if len(chosen) == 2 else
                             ["{}, {} and {}", "there are {}, {} and {}", "{} {w} {} and {}", "{} {w} {}, with {}"]).format(*phrases, w=where)
    for o in clause:
        of_colour = alike(o, "shape") or not alike(o, "colour") and rng.random() < 0.5
        said += [(f"the {o['colour']} shape", "shape"), (with_article(o["shape"]), o["shape"])] if of_colour else [(f"the {o['shape']}", o["shape"])]
        caption += " and " * bool(caption) + (f"the {o['colour']} shape is {with_article(o['shape'])}" if of_colour else f"the {o['shape']} is {o['colour']}")
    if chosen and phrases[0] == caption[:len(phrases[0])] and rng.random() < 0.4:
        count = f"{COUNT[len(objects)]} shapes"
        caption, said = f"{count}: {caption}", [(count, "shapes")] + said
    return caption, said

def ask(rng, objects):
    """Questions as [(kind, cloze, choices, answer), ...]; a statement without [MASK] asks whether it is true."""
    once = lambda what: [o for o in objects if sum(p[what] == o[what] for p in objects) == 1]
    colours, shapes = list(COLOURS), list(SHAPES)
    there, o = {(p["colour"], p["shape"]) for p in objects}, rng.choice(objects)
    absent = [(c, s) for c in {p["colour"] for p in objects} for s in {p["shape"] for p in objects} if (c, s) not in there]
    absent = rng.choice(sorted(absent)) if absent and rng.random() < 0.5 else rng.choice(
        [(c, s) for c in colours for s in shapes if (c, s) not in there])
    questions = [("is_there", with_article(' '.join(pair)), ["no", "yes"], answer) for pair, answer in (
        ((o["colour"], o["shape"]), "yes"), (absent, "no"))]
    questions += [("colour", f"the {p['shape']} is [MASK]", colours, p["colour"]) for p in once("shape")[:1]]
    questions += [("shape", f"the {p['colour']} shape is a [MASK]", shapes, p["shape"]) for p in once("colour")[:1]]
    return questions + [("count", "[MASK] shapes", COUNT[2:], COUNT[len(objects)])] * (len(objects) > 1)

class Scenes:
    """n scenes, drawn on demand, each by its number, the seed and a name: no two sets share a scene.

    test: whether they have at least two objects, and UNSEEN pairs too; else the first 16,000 scenes have one object, and
    16,000 later there may be two, and so on up to four: shapes are learnt on their own, or only after many thousands.
    """
    def __init__(self, n, o, name, test):
        self.n, self.side, self.stream, self.test = n, o.image_size, f"{o.seed} {name}", test

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        rng = random.Random(f"{self.stream} {i}")
        return draw_scene(rng, self.side, rng.randint(2, 4) if self.test else rng.randint(1, min(4, 1 + i // 16000)), self.test)

# ------------------------------------------------------------------------------- data: COCO, and your own images
COCO_URL = "http://images.cocodataset.org/"
COCO_FILES = {"annotations/annotations_trainval2017.zip": "f4bbac642086de4f52a3fdda2de5fa2c",     # name: MD5
              "zips/val2017.zip": "442b8da7639aecaf257c1dceb8ba8c80", "zips/train2017.zip": "cced6f7f71b7629ddf16f17bbcfab6b2"}

def fetch(url, path, md5):
    """Download url to path by way of path.part, which a second call resumes and only the right MD5 renames."""
    part = path.with_name(path.name + ".part")
    have = part.stat().st_size if part.exists() else 0
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {}), timeout=60) as reply:
            have = have if reply.status == 206 else 0          # 206: the server goes on from there; else from the start
            with open(part, "ab" if have else "wb") as f, tqdm(total=have + int(reply.headers["Content-Length"] or 0), initial=have,
                                                               unit="B", unit_scale=True, desc=path.name) as bar:
                while block := reply.read(1 << 20):
                    f.write(block)
                    bar.update(len(block))
        if bar.n < bar.total:
            raise ConnectionError(f"the connection broke at {bar.n:,} of {bar.total:,} bytes")
    except OSError as e:
        if getattr(e, "code", 0) != 416:                       # 416: it is all here already
            raise UserError(f"{url}: {getattr(e, 'reason', e)}; what has come is kept, the same command goes on from there")
    with open(part, "rb") as f:
        if hashlib.file_digest(f, "md5").hexdigest() != md5:
            part.unlink()
            raise UserError(f"{url}: what came is corrupt (its MD5 is not {md5}) and is deleted; the same command fetches it anew")
    part.rename(path)

def download_coco(root):
    """Fetch and unpack what root lacks of COCO 2017; a folder gets its name only when it is complete."""
    root.mkdir(parents=True, exist_ok=True)
    for name, md5 in COCO_FILES.items():
        archive, folder = root / Path(name).name, "annotations" if "annotations" in name else Path(name).stem
        if (root / folder).exists():
            continue
        if archive.exists():                                   # one that somebody else brought: checked like our own
            archive.rename(archive.with_name(archive.name + ".part"))
        fetch(COCO_URL + name, archive, md5)
        with zipfile.ZipFile(archive) as z:
            z.extractall(root / "unpacking", tqdm(z.infolist(), desc=f"unpacking {archive.name}", unit="file"))
        (root / "unpacking" / folder).rename(root / folder)
        archive.unlink()

def read_coco(root, split):
    """Records of COCO 2017: "train" with captions, "val" with targets too (the instances of each category in an image)."""
    captions, instances, folder = (root / name.format(split) for name in ("annotations/captions_{}2017.json", "annotations/instances_{}2017.json", "{}2017"))
    missing = [str(p) for p in (captions, instances, folder) if not p.exists()]
    if missing:
        raise UserError(f"no COCO 2017 in {root}: there is no {', no '.join(missing)}. Point --root at the folder that holds train2017/, "
                        "val2017/ and annotations/, or add --download to fetch it (20 GB), or see https://cocodataset.org/#download")
    said, there = json.loads(captions.read_text()), set(os.listdir(folder))
    records = {image["id"]: {"image": folder / image["file_name"], "captions": [], "targets": {}}
               for image in said["images"] if image["file_name"] in there}             # a name that leads elsewhere is not in there
    for a in said["annotations"]:
        if a["image_id"] in records:
            records[a["image_id"]]["captions"].append(a["caption"].strip())
    if split == "val":
        truth = json.loads(instances.read_text())
        size = {image["id"]: (image["height"], image["width"]) for image in truth["images"]}
        names = {c["id"]: c["name"] for c in truth["categories"]}
        for a in truth["annotations"]:
            if a["image_id"] in records:
                name, (x, y, w, h) = names[a["category_id"]], a["bbox"]
                t = records[a["image_id"]]["targets"].setdefault(
                    name, {"phrase": name, "boxes": [], "mask": {"size": size[a["image_id"]], "parts": []}})
                t["boxes"].append([x, y, x + w, y + h])
                t["mask"]["parts"].append(a["segmentation"])
    records = [{**r, "targets": list(r["targets"].values())} for r in records.values() if r["captions"]]
    if not records:
        raise UserError(f"{folder} holds none of the images that {captions} names")
    if len(records) < len(said["images"]):
        print(f"{folder}: {len(said['images']) - len(records)} of {len(said['images'])} images have no file or no caption: left out", file=sys.stderr)
    return records

def decode_mask(mask):
    """A target's mask as a boolean array (height, width).

    mask: an array; or {"size": [height, width], "parts": […]}, a part being COCO's polygons [[x, y, x, y, …], …] or its
    uncompressed run lengths {"counts": [zeros, ones, zeros, …], "size": [height, width]} down the columns (crowds).
    """
    if isinstance(mask, np.ndarray):
        return mask
    drawn = Image.new("1", mask["size"][::-1])
    runs = np.zeros(mask["size"], dtype=bool)
    for part in mask["parts"]:
        if isinstance(part, dict):
            flat = np.repeat(np.arange(len(part["counts"])) % 2 == 1, part["counts"])
            runs |= flat.reshape(part["size"][::-1]).T
        else:
            for polygon in part:
                ImageDraw.Draw(drawn).polygon(polygon, fill=1)
    return np.asarray(drawn) | runs

def read_jsonl(path):
    """A person's own records, (train, held out), one a line; raises UserError with the line's number and what is wrong.

    {"image": path from this file's folder, "captions": [str, …], "targets": [{"phrase": str, "boxes": [[x0, y0, x1, y1], …],
    "mask": as decode_mask takes it}, …], "split": "train", "val" or "test"}; targets, masks and split may be left out.
    """
    listed = lambda v, good: isinstance(v, list) and v and all(map(good, v))
    text = lambda v: isinstance(v, str)
    box = lambda b: listed(b, lambda v: type(v) in (int, float)) and len(b) == 4 and b[0] < b[2] and b[1] < b[3]
    target = lambda t: (isinstance(t, dict) and text(t.get("phrase")) and t["phrase"].strip() and listed(t.get("boxes"), box) and
                        (t.get("mask") is None or isinstance(t["mask"], dict) and {"size", "parts"} <= t["mask"].keys()))
    train, held_out = [], []
    for n, line in enumerate(path.read_text(encoding="utf-8-sig", errors="replace").split("\n"), 1):
        if not line.strip():
            continue
        try:
            r = json.loads(line)
            wrong = ('a record is an object {"image": …, "captions": [ … ]}' if not isinstance(r, dict) else
                     '"image" must be the path of a picture' if not text(r.get("image")) else
                     f"{r['image']} leads out of {path.parent.resolve()}" if not (path.parent / r["image"]).resolve().is_relative_to(path.parent.resolve()) else
                     f"there is no picture {path.parent / r['image']}" if not (path.parent / r["image"]).is_file() else
                     '"captions" must be a list of at least one string' if not listed(r.get("captions"), text) else
                     '"split" must be "train", "val" or "test"' if r.get("split", "train") not in ("train", "val", "test") else
                     '"targets" must be a list of {"phrase": …, "boxes": [[x0, y0, x1, y1], …]}, x0 < x1, y0 < y1'
                     if r.get("targets") and not listed(r["targets"], target) else "")
            for t in r.get("targets") or [] if not wrong else []:
                t.get("mask") is None or decode_mask(t["mask"])
        except json.JSONDecodeError as e:
            wrong = f"not JSON: {e.msg} at column {e.colno}"
        except (TypeError, ValueError) as e:
            wrong = f"a mask must be polygons or uncompressed run lengths ({e})"
        if wrong:
            raise UserError(f"{path}, line {n}: {wrong}")
        (train if r.get("split", "train") == "train" else held_out).append(
            {**r, "targets": r.get("targets") or [], "image": path.parent / r["image"]})
    if not train:
        raise UserError(f"{path}: there is no record to train on")
    if not held_out:
        train, held_out = [r for i, r in enumerate(train) if i % 10 != 9 and len(train) > 9] or train[:-1] or train, train[9::10] or train[-1:]
        print(f'{path.name}: no line says "split": "val"; {len(held_out)} of the records are held out to evaluate on', file=sys.stderr)
    return train, held_out

def load_data(o):
    """(training records, --eval-images held-out records) of --data."""
    if o.data not in ("scenes", "coco") and not Path(o.data).is_file():
        raise UserError(f"--data {o.data}: neither scenes, coco, nor a file")
    if o.data == "coco" and o.download:
        download_coco(Path(o.root))
    train, held_out = ((Scenes(1_000_000, o, "train", False), Scenes(o.eval_images or 500, o, "held out", True)) if o.data == "scenes" else
                       [read_coco(Path(o.root), split) for split in ("train", "val")] if o.data == "coco" else read_jsonl(Path(o.data)))
    return train, [held_out[i] for i in range(min(len(held_out), o.eval_images or len(held_out)))]

# -------------------------------------------------------------------------------------------- samples and batches
PAD, CLS, MASK, UNK = range(4)
MAX_TOKENS = 64

def split_words(text):
    """The parser's own tokens, lower-cased: a phrase has the same words alone as in its caption."""
    return [text[start:end].lower() for start, end in parser.tokenize(text)]

def build_vocabulary(captions, size):
    """{word: id} of the most frequent words, after the four special tokens."""
    count = Counter(w for c in captions for w in split_words(c))
    return {w: i for i, w in enumerate(["[PAD]", "[CLS]", "[MASK]", "[UNK]"] + [w for w, _ in count.most_common(size)])}

def encode(vocabulary, text):
    """Ids of [CLS] and of the words, MAX_TOKENS at most: an empty text is [CLS] alone, an unknown word [UNK]."""
    parts = [[vocabulary.get(w, UNK) for w in split_words(part)] for part in text.split("[MASK]")]
    return ([CLS] + sum(([MASK] + part for part in parts[1:]), parts[0]))[:MAX_TOKENS]

def pad(rows, value=PAD):
    """Lists of numbers as one tensor (n, longest)."""
    longest = max(map(len, rows))
    return torch.tensor([row + [value] * (longest - len(row)) for row in rows])

def mask_words(ids, rng, words):
    """(ids with 30% of the words hidden, one at least; their labels, -100 elsewhere): 8 in 10 as [MASK], 1 as another word, as BERT does."""
    known = [i for i in range(1, len(ids)) if ids[i] != UNK]
    masked, labels = list(ids), [-100] * len(ids)
    for i in [i for i in known if rng.random() < 0.3] or known[:1] and [rng.choice(known)]:
        labels[i] = ids[i]
        masked[i] = rng.choices((MASK, ids[i], rng.randrange(UNK, words)), (8, 1, 1))[0]
    return masked, labels

@lru_cache(maxsize=1 << 16)
def phrases_of(caption):
    """[(phrase, subject), …] of a caption."""
    return [(p.text, p.subject) for p in parser.parse(caption).phrases]

def read_given(path):
    """{caption: [(phrase, subject), …]} of a file of parses; UserError where it is no such file."""
    try:
        return {caption.strip(): [(p.text, p.subject) for p in phrases] for caption, phrases in parser.read_parses(path).items()}
    except ValueError as e:
        raise UserError(str(e))

def key(text):
    """What makes two texts one: neither case nor a leading article counts ("A dog", "the dog", "dog")."""
    words = text.lower().split()
    return " ".join(words[1:] if len(words) > 1 and words[0] in ("a", "an", "the") else words)

def load_pixels(image):
    """A path or an array as an array (H, W, 3) uint8."""
    try:
        return image if isinstance(image, np.ndarray) else np.array(Image.open(image).convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as e:      # as PIL has it
        raise UserError(f"{image}: not readable as a picture ({e})")

def read_image(image, side, crop=None):
    """A path or an array as a uint8 tensor (3, side, side), squeezed to the square; crop: an rng for a random part of it."""
    image = load_pixels(image)
    pixels = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)
    if crop:
        height, width = (round(edge * crop.uniform(0.7, 1)) for edge in image.shape[:2])
        top, left = crop.randint(0, image.shape[0] - height), crop.randint(0, image.shape[1] - width)
        pixels = pixels[:, top:top + height, left:left + width]
    return pixels if pixels.shape[1:] == (side, side) else resize(pixels, [side, side], antialias=True)

@lru_cache(maxsize=2)
def epoch_order(n, seed, epoch):
    return torch.randperm(n, generator=torch.Generator().manual_seed(1000 * seed + epoch)).tolist()

class Samples(Dataset):
    """What one image gives to a step, by its position in the run: pixels, a caption, one phrase of it, that phrase's subject, and a
    composite of two of its phrases. A caption without a phrase gives the caption alone, one with a single phrase no composite."""
    def __init__(self, records, vocabulary, o):
        self.records, self.vocabulary, self.o = records, vocabulary, o
        if not isinstance(records, Scenes):                    # each caption is parsed once
            given = read_given(o.parses) if o.parses else {}
            captions = [[c.strip() for c in r["captions"]] for r in records]
            self.parses = [[given[c] if c in given else phrases_of(c) for c in row] for row in tqdm(captions, desc="parsing", unit="img")]
            if o.parses:
                known = [c in given for row in captions for c in row]
                print(f"{o.parses}: parses of {sum(known)} of {len(known)} captions; the rest by the rules")

    def __getitem__(self, position):
        epoch, i = divmod(position, len(self.records))
        rng, scenes = random.Random(f"{self.o.seed} {position}"), isinstance(self.records, Scenes)
        i = i if scenes else epoch_order(len(self.records), self.o.seed, epoch)[i]
        record = self.records[i]
        parses = [phrases_of(c) for c in record["captions"]] if scenes else self.parses[i]
        n, all_phrases = rng.randrange(len(parses)), [p for phrases in parses for p in phrases]
        text, composite = {"caption": record["captions"][n]}, ()
        if parses[n]:
            text["phrase"], text["subject"] = rng.choice(parses[n])
            others = [p for p, _ in parses[n] if key(p) != key(text["phrase"])]
            if others:
                one, two = sorted((text["phrase"], rng.choice(others)), key=text["caption"].index)
                composite = one, two, f"{one} and {two}"
        ids = {level: encode(self.vocabulary, t) for level, t in text.items()}
        return {"image": read_image(record["image"], self.o.image_size, None if scenes else rng), "text": text, "ids": ids,
                "masked": {level: mask_words(row, rng, len(self.vocabulary)) for level, row in ids.items()},
                "composite": [encode(self.vocabulary, t) for t in composite],
                "keys": {"caption": {key(c) for c in record["captions"]}, "phrase": {key(p) for p, _ in all_phrases},
                         "subject": {key(s) for _, s in all_phrases}}}

def collate(samples):
    """Samples as a batch: image (B, 3, side, side) uint8; for each level n <= B texts: ids, masked, labels (n, L), rows (n,) of their images.

    positives (B, n): whether the parse of an image has a text, be it another image's: "a dog" describes every picture of one.
    """
    batch = {"image": torch.stack([s["image"] for s in samples])}
    for level in LEVELS[:3]:
        rows = [i for i, s in enumerate(samples) if level in s["ids"]]
        if rows:
            keys = [key(samples[i]["text"][level]) for i in rows]
            masked, labels = zip(*(samples[i]["masked"][level] for i in rows))
            batch[level] = {"rows": torch.tensor(rows), "ids": pad([samples[i]["ids"][level] for i in rows]), "masked": pad(masked),
                            "labels": pad(labels, -100), "positives": torch.tensor([[k in s["keys"][level] for k in keys] for s in samples])}
    rows = [i for i, s in enumerate(samples) if s["composite"]]
    if rows:                                                   # the first parts, the second parts, the composites: (3 n, L)
        batch["composition"] = {"rows": torch.tensor(rows), "ids": pad([samples[i]["composite"][part] for part in range(3) for i in rows])}
    return batch

def to_device(batch, device):
    return {k: to_device(v, device) if isinstance(v, dict) else v.to(device, non_blocking=True) for k, v in batch.items()}

# ---------------------------------------------------------------------------------------------------------- model
class Attention(nn.Module):
    """Multi-head attention with its softmax written out: the fused kernel keeps no A to look at, and has no double backward on CPU."""
    def __init__(self, width, heads, source_width=None):
        super().__init__()
        self.heads, self.query, self.out = heads, nn.Linear(width, width), nn.Linear(width, width)
        self.key_value = nn.Linear(source_width or width, 2 * width)

    def keys_values(self, source):
        """source (B, N, source_width) -> (2, B, heads, N, d)."""
        B, N, _ = source.shape
        return self.key_value(source).view(B, N, 2, self.heads, -1).permute(2, 0, 3, 1, 4)

    def forward(self, x, keys_values, mask=None):
        """x (B, L, width) looks at (2, B, heads, N, d), where mask (B, N) is True: returns (B, L, width), A (B, heads, L, N)."""
        B, L, width = x.shape
        keys, values = keys_values
        q = self.query(x).view(B, L, self.heads, -1).transpose(1, 2)                       # (B, heads, L, d)
        scores = q @ keys.transpose(-2, -1) / math.sqrt(q.shape[-1])                       # (B, heads, L, N)
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None, None, :], torch.finfo(scores.dtype).min)
        A = scores.softmax(-1)
        return self.out((A @ values).transpose(1, 2).reshape(B, L, width)), A

class Layer(nn.Module):
    """A transformer layer, norms first; given an image width, one that also looks at the image."""
    def __init__(self, width, image_width=None):
        super().__init__()
        heads = max(4, width // 64)
        self.norm, self.attention = nn.LayerNorm(width), Attention(width, heads)
        if image_width:
            self.cross_norm, self.cross_attention = nn.LayerNorm(width), Attention(width, heads, image_width)
        self.mlp = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x, mask, image=None):
        A, normed = None, self.norm(x)
        x = x + self.attention(normed, self.attention.keys_values(normed), mask)[0]
        if image is not None:
            seen, A = self.cross_attention(self.cross_norm(x), image)
            x = x + seen
        return x + self.mlp(x), A

def scenes_vit(o):
    """Four convolutions, 6 pixels to a token, and a ViT layer on them: learns shapes where one linear patch layer learns colours only.

    The stem follows arXiv 2106.14881. Padding by (kernel - stride) / 2 centres each token on its patch: one pixel off in the
    second convolution shifts every map by two. There is no [CLS]: with one, matching reads the scene off it and the maps point nowhere.
    """
    conv = lambda i, o, kernel, stride: (nn.Conv2d(i, o, kernel, stride, (kernel - stride) // 2, bias=False), nn.BatchNorm2d(o), nn.ReLU())
    w = o.width
    stem = nn.Sequential(*conv(3, w // 2, 6, 2), *conv(w // 2, w, 5, 3), *conv(w, w, 3, 1), *conv(w, w, 3, 1))
    return VisionTransformer(img_size=o.image_size, patch_size=1, embed_layer=partial(HybridEmbed, backbone=stem), embed_dim=w, depth=1,
                             num_heads=4, num_classes=0, class_token=False, global_pool="max")

class HIST(nn.Module):
    """A small ALBEF: image tokens, text tokens, fusion layers in which text looks at the image, and heads for ITC, ITM and MLM."""
    def __init__(self, o, vocabulary):
        super().__init__()
        try:
            self.vit = scenes_vit(o) if o.vit == "scenes" else timm.create_model(o.vit, num_classes=0, img_size=o.image_size)
        except Exception as e:                                 # timm has as many exceptions as models
            raise UserError(f"--vit {o.vit} --image-size {o.image_size}: {e}")
        if not all(hasattr(self.vit, part) for part in ("patch_embed", "blocks", "num_prefix_tokens")):
            raise UserError(f"--vit {o.vit} is no ViT; timm.list_models('vit*') lists them")
        self.grid, self.prefix, D = self.vit.patch_embed.grid_size, self.vit.num_prefix_tokens, self.vit.embed_dim
        self.words = nn.Embedding(len(vocabulary), o.width)
        self.places = nn.Parameter(0.02 * torch.randn(MAX_TOKENS, o.width))
        self.text = nn.ModuleList(Layer(o.width) for _ in range(o.text_layers))
        self.fusion = nn.ModuleList(Layer(o.width, D) for _ in range(o.fusion_layers))
        self.norm = nn.LayerNorm(o.width)
        self.image_projection, self.text_projection = nn.Linear(D, 256), nn.Linear(o.width, 256)
        self.log_temperature = nn.Parameter(torch.tensor(math.log(0.07)))
        self.match_head = nn.Linear(o.width, 2)
        self.word_head = nn.Sequential(nn.Linear(o.width, o.width), nn.GELU(), nn.LayerNorm(o.width), nn.Linear(o.width, len(vocabulary)))
        nn.init.normal_(self.words.weight, std=0.02)
        self.word_head[-1].weight = self.words.weight

    def encode_image(self, images):
        """images (B, 3, side, side) uint8 -> ITC features (B, 256), and keys and values for each fusion layer [(2, B, heads, N, d), …]."""
        V = self.vit.forward_features(images.float() / 127.5 - 1)                          # (B, N, D), [CLS] first if there is one
        pooled = self.vit.forward_head(V, pre_logits=True)                                 # (B, D): [CLS], mean or max, as this ViT pools
        return F.normalize(self.image_projection(pooled), dim=-1), [f.cross_attention.keys_values(V) for f in self.fusion]

    def encode_text(self, ids):
        """ids (n, L) -> token states (n, L, width), mask (n, L), ITC features (n, 256)."""
        mask, T = ids != PAD, self.words(ids) + self.places[:ids.shape[1]]
        for layer in self.text:
            T, _ = layer(T, mask)
        return T, mask, F.normalize(self.text_projection(T[:, 0]), dim=-1)

    def fuse(self, T, mask, image, rows):
        """Texts (n, L, width) with the images of these rows (n,) -> states (n, L, width), cross-attentions [(n, heads, L, N), …]."""
        maps = []
        for layer, keys_values in zip(self.fusion, image):
            T, A = layer(T, mask, keys_values.index_select(1, rows))
            maps.append(A)
        return self.norm(T), maps

    def match(self, T, mask, image, rows):
        """Match logits (n, 2) of texts with the images of these rows, and the cross-attentions behind them."""
        states, maps = self.fuse(T, mask, image, rows)
        return self.match_head(states[:, 0]), maps

# ------------------------------------------------------------------------------------------------------- Grad-CAM
def grad_cam(attention, score, mask, grid, prefix=1, create_graph=False):
    """Where a score looks: M = mean over heads and text tokens of A * ReLU(ds/dA) (Selvaraju et al., arXiv 1610.02391; ALBEF, section 6).

    attention: cross-attention A of one fusion layer (n, heads, L, prefix + patches), part of the graph of score.
    score: s, the match logit (n,). mask: (n, L), True for tokens that are not padding. grid: (height, width) in patches.
    create_graph: True to differentiate M again, as the composition loss does. Returns M (n, height, width), >= 0.
    """
    gradient, = torch.autograd.grad(score.sum(), attention, create_graph=create_graph, retain_graph=True)
    cam = (attention * gradient.relu()).mean(1)                                            # (n, L, prefix + patches)
    cam = (cam * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    return cam[:, prefix:].reshape(-1, *grid)

def locate(model, T, mask, image, rows, layer, create_graph=False):
    """Maps (n, height, width) of texts over the images of these rows, and the probability (n,) that they match."""
    logits, attentions = model.match(T, mask, image, rows)
    maps = grad_cam(attentions[layer], logits[:, 1], mask, model.grid, model.prefix, create_graph)
    return maps, logits.detach().softmax(-1)[:, 1]

# --------------------------------------------------------------------------------------------------------- losses
def itc_loss(image_features, text_features, positives, temperature):
    """Image-text contrast with several positives: mean cross-entropy to the uniform distribution over them, both ways.

    image_features (B, d), text_features (n, d), normalised; positives (B, n), True where a text describes an image.
    An image without a positive text is a negative only. ALBEF, equation 1, with the targets of arXiv 2004.11362 (L_out).
    """
    logits = image_features @ text_features.T / temperature
    def one_way(logits, positives):
        count = positives.sum(1)
        loss = -(logits.log_softmax(1) * positives).sum(1) / count.clamp(min=1)
        return loss.sum() / (count > 0).sum().clamp(min=1)
    return (one_way(logits, positives) + one_way(logits.T, positives.T)) / 2

def draw_negatives(similarity, positives, hardness):
    """For each row one column that is no positive: uniform at hardness 0, by softmax of the similarity at 1.

    similarity, positives: (a, b). Returns columns (a,) and whether there was any to draw (a,).
    """
    free = ~positives
    hard = similarity.float().masked_fill(positives, -1e4).softmax(1)
    uniform = free / free.sum(1, keepdim=True).clamp(min=1)
    weights = ((1 - hardness) * uniform + hardness * hard) * free
    some = free.any(1)
    return torch.multinomial(weights + 1e-12 * free + (~some)[:, None], 1)[:, 0], some

def itm_loss(logits, labels, weight):
    """Image-text matching: cross-entropy of match logits (n, 2) with labels (n,), 1 for a pair that belongs together; weight (n,) 0 leaves one out."""
    return (F.cross_entropy(logits, labels, reduction="none") * weight).sum() / weight.sum().clamp(min=1)

def mlm_loss(logits, labels):
    """Masked language modelling: cross-entropy of word logits (n, L, words) where labels (n, L) are not -100; 0 where none is."""
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum") / (labels != -100).sum().clamp(min=1)

def composition_loss(part1, part2, whole, weight=None, eps=1e-12):
    """The map of "p1 and p2" should be the sum of the maps of p1 and p2: || n(M12) - n(n(M1) + n(M2)) ||_1, n(M) = M / sum M.

    part1, part2, whole: Grad-CAM maps (n, height, width) >= 0. The parts are detached: the composite learns from them, not they
    from it (else both collapse to nothing). weight (n,): how far to trust each pair. Returns their weighted mean, 0 to 2.
    """
    n = lambda M: M.flatten(1) / (M.flatten(1).sum(1, keepdim=True) + eps)
    distance = (n(whole) - n(n(part1.detach()) + n(part2.detach()))).abs().sum(1)
    return distance.mean() if weight is None else (distance * weight).sum() / weight.sum().clamp(min=eps)

def training_losses(model, batch, levels, hardness, cam_layer, teacher=None):
    """The losses of one batch, {"phrase_itc": scalar, …}, unweighted; and figures to watch, {"map_mass": scalar, …}.

    The image is encoded once, and its keys and values projected once a fusion layer: every text of every level, and every
    negative, looks at the same ones. Figures: the composites' map_mass (sum of M) and map_entropy (1: flat) show a collapse.
    """
    losses, figures = {}, {}
    image_features, image = model.encode_image(batch["image"])
    temperature = model.log_temperature.exp().clamp(0.01, 1)
    for level in [level for level in LEVELS[:3] if level in levels and level in batch]:
        text = batch[level]
        rows, positives, n = text["rows"], text["positives"], len(text["rows"])
        T, mask, text_features = model.encode_text(text["ids"])
        losses[f"{level}_itc"] = itc_loss(image_features, text_features, positives, temperature)
        with torch.no_grad():                                                # a wrong image for each text, a wrong text for its image
            similarity = image_features @ text_features.T / temperature
            wrong_image, some_image = draw_negatives(similarity.T, positives.T, hardness)
            wrong_text, some_text = draw_negatives(similarity[rows], positives[rows], hardness)
        every = torch.arange(n, device=rows.device)
        texts, images = torch.cat([every, every, wrong_text]), torch.cat([rows, wrong_image, rows])
        logits, _ = model.match(T[texts], mask[texts], image, images)
        losses[f"{level}_itm"] = itm_loss(logits, (torch.arange(3 * n, device=rows.device) < n).long(),
                                          torch.cat([torch.ones_like(every, dtype=torch.bool), some_image, some_text]))
        if level != "subject":                                               # a subject is one word: nothing would be left to guess it from
            states, _ = model.fuse(*model.encode_text(text["masked"])[:2], image, rows)
            losses[f"{level}_mlm"] = mlm_loss(model.word_head(states), text["labels"])
    if "composition" in levels and "composition" in batch:
        ids, rows = batch["composition"]["ids"], batch["composition"]["rows"]
        with torch.autocast(rows.device.type, enabled=False):                # a loss on a gradient wants all of float32
            image, n = [keys_values.float() for keys_values in image], len(rows)
            T, mask, _ = model.encode_text(ids)
            with torch.no_grad():                              # without a teacher the parts' maps flatten along with the composite's
                seen, said = (image, T) if teacher is None else (teacher.encode_image(batch["image"])[1], teacher.encode_text(ids)[0])
            parts, found = locate(teacher or model, said[:2 * n].detach(), mask[:2 * n], [kv.detach() for kv in seen], rows.repeat(2), cam_layer)
            whole, _ = locate(model, T[2 * n:], mask[2 * n:], image, rows, cam_layer, create_graph=True)
            losses["composition"] = composition_loss(parts[:n], parts[n:], whole, found[:n] * found[n:])
        share = whole.detach().flatten(1) / whole.detach().flatten(1).sum(1, keepdim=True).clamp(min=1e-12)
        figures = {"map_mass": whole.detach().flatten(1).sum(1).mean(), "pair_weight": (found[:n] * found[n:]).mean(),
                   "map_entropy": torch.special.entr(share).sum(1).mean() / math.log(share.shape[1])}
    return losses, figures

# ------------------------------------------------------------------------------------------------------- measures
def pointing_game(heat, region):
    """Whether the highest point of a map (height, width) lies in a region (height, width) of truth (Zhang et al., arXiv 1608.00507)."""
    return bool(region.flat[heat.argmax()])

def multi_object_iou(heat, union, thresholds=np.linspace(0.05, 0.95, 19)):
    """IoU of a map (height, width), cut at fractions of its maximum, with the union of the targets' masks: (thresholds,)."""
    marked = heat >= thresholds[:, None, None] * max(heat.max(), 1e-12)
    return (marked & union).sum((1, 2)) / (marked | union).sum((1, 2)).clip(1)

def balance(heat, mask1, mask2):
    """The smaller of two targets' shares of a map over the larger: 1 when both get as much, 0 when one gets nothing."""
    small, large = sorted((heat[mask1].sum(), heat[mask2].sum()))
    return small / max(large, 1e-12)

def box_mask(boxes, side):
    """Boxes [[x0, y0, x1, y1], …] filled: (side, side) bool."""
    filled = np.zeros((side, side), dtype=bool)
    for x0, y0, x1, y1 in np.clip(boxes, 0, side):
        filled[math.floor(y0):math.ceil(y1), math.floor(x0):math.ceil(x1)] = True
    return filled

def truth(record, side):
    """A record's targets on the square image that the model sees: [(phrase, boxes filled, mask or else the boxes), …]."""
    width, height = record["image"].shape[1::-1] if isinstance(record["image"], np.ndarray) else Image.open(record["image"]).size
    targets = []
    for t in record["targets"]:
        boxes = box_mask(np.array(t["boxes"]) * ([side / width, side / height] * 2), side)
        mask = t.get("mask") is not None and np.asarray(Image.fromarray(decode_mask(t["mask"])).resize((side, side)))
        targets.append((t["phrase"], boxes, mask if np.any(mask) else boxes))
    return targets

def maps_of(model, vocabulary, images, texts, rows, o):
    """Maps at pixel size (n, side, side), bicubic, of n texts over the images (B, 3, side, side) of these rows; match probabilities (n,)."""
    model.eval()
    with torch.no_grad():
        _, image = model.encode_image(images)
        T, mask, _ = model.encode_text(pad([encode(vocabulary, t) for t in texts]).to(images.device))
    maps, match = locate(model, T, mask, image, torch.tensor(rows, device=images.device), o.cam_layer)
    big = F.interpolate(maps.detach()[:, None].float(), size=images.shape[2:], mode="bicubic")[:, 0]
    return big.clamp(min=0).cpu().numpy(), match.tolist()

def answer(model, vocabulary, images, questions):
    """Answers to questions [(row, kind, cloze, choices, answer), ...] about images (B, 3, side, side): the choice that the language
    head thinks likeliest at [MASK]; without [MASK], the last choice where text and image match, else the first."""
    ids = pad([encode(vocabulary, cloze) for _, _, cloze, _, _ in questions]).to(images.device)
    with torch.no_grad():
        states, _ = model.fuse(*model.encode_text(ids)[:2], model.encode_image(images)[1], torch.tensor([q[0] for q in questions], device=images.device))
        match, words = model.match_head(states[:, 0]).argmax(-1), model.word_head(states)
    hidden = [(row == MASK).nonzero()[:1, 0] for row in ids]
    return [choices[-int(match[i])] if not len(hidden[i]) and match[i] else choices[0] if not len(hidden[i]) else
            choices[int(words[i, hidden[i][0]][[vocabulary.get(c, UNK) for c in choices]].argmax())] for i, (*_, choices, _) in enumerate(questions)]

def rerank(model, images, T, mask, similarity, k=16):
    """ITM probabilities of each image (N of them, a callable gives a slice) with its k captions that ITC likes best, and of each
    caption with its k images: two (N, texts), -inf elsewhere (ALBEF, section 5)."""
    N, M = similarity.shape
    best = [torch.zeros_like(similarity, dtype=torch.bool).scatter_(d, similarity.topk(min(k, (M, N)[1 - d]), dim=d).indices, True) for d in (1, 0)]
    score = torch.full_like(similarity, -torch.inf)
    with torch.no_grad():
        for start in range(0, N, 32):
            _, image = model.encode_image(images(start, start + 32))
            for pairs in (best[0] | best[1])[start:start + 32].nonzero().split(512):
                logits, _ = model.match(T[pairs[:, 1]], mask[pairs[:, 1]], image, pairs[:, 0])
                score[start + pairs[:, 0], pairs[:, 1]] = logits.softmax(-1)[:, 1]
    return [score.masked_fill(~chosen, -torch.inf) for chosen in best]

def occlusion_agreement(model, vocabulary, image, phrase, o):
    """Rank correlation (Spearman) of the Grad-CAM map of a phrase with the drop of its match logit when each patch is greyed; nan where one is flat."""
    (height, width), device = model.grid, next(model.parameters()).device
    pixels = read_image(image, o.image_size).to(device)
    rows, columns = (torch.arange(o.image_size, device=device) * n // o.image_size for n in (height, width))
    patch = rows[:, None] * width + columns                                                # (side, side): the patch of each pixel
    hidden = patch == torch.arange(height * width, device=device)[:, None, None]         # (patches, side, side)
    grey = pixels.flatten(1).float().mean(1).to(pixels.dtype)[:, None, None]
    images = torch.cat([pixels[None], torch.where(hidden[:, None], grey, pixels)])         # the image whole, then without each patch
    with torch.no_grad():
        _, kv = model.encode_image(images)
        T, mask, _ = model.encode_text(pad([encode(vocabulary, phrase)]).to(device))
        score = model.match(T.expand(len(images), -1, -1), mask.expand(len(images), -1), kv, torch.arange(len(images), device=device))[0][:, 1]
    heat, _ = locate(model, T, mask, [x[:, :1] for x in kv], torch.zeros(1, dtype=torch.long, device=device), o.cam_layer)
    ranks = torch.stack([heat.detach().flatten(), score[0] - score[1:]]).argsort(1).argsort(1).float()
    return float(torch.corrcoef(ranks)[0, 1])

def subjects_found(records):
    """(precision, recall, F1) of the parser's (phrase, subject) pairs against what the captions of these scenes say by construction."""
    found, said = ([Counter((i, *pair) for i, r in enumerate(records) for pair in pairs(r))
                    for pairs in (lambda r: phrases_of(r["captions"][0]), lambda r: r["said"])])
    precision, recall = ((found & said).total() / max(1, c.total()) for c in (found, said))
    return precision, recall, 2 * precision * recall / max(1e-12, precision + recall)

def evaluate(model, vocabulary, records, o):
    """Every measure on held-out records, {name: 0 to 1}: pointing, several objects, retrieval, questions; and the pairs behind two of them.

    "..._chance": what pointing at a random target of the image (R@1: a random image; questions: a random choice) would get;
    "..._chance_pixel": at any pixel (IoU: marking all of them). The threshold of the IoU is chosen on the other half of the images.
    Pairs: [(image, balance, area of the union, IoU at each threshold, areas (2,), masses (2,)), ...].
    """
    side, device, rng = o.image_size, next(model.parameters()).device, random.Random(0)
    points, pairs, right, features, captions = {}, [], {}, [], [(i, c) for i, r in enumerate(records) for c in r["captions"]]
    load = lambda start, end: torch.stack([read_image(r["image"], side) for r in records[start:end]]).to(device)
    model.eval()
    for start in tqdm(range(0, len(records), 32), desc="evaluating", unit_scale=32, unit="img", leave=False):
        batch, images = records[start:start + 32], load(start, start + 32)
        with torch.no_grad():
            features.append(model.encode_image(images)[0])
        asked = []                                             # (row, kinds, text, targets it names, chance of an object)
        for row, record in enumerate(batch):
            targets, subjects = truth(record, side), {}
            for t, tags in zip(targets, (t.get("tags", []) for t in record["targets"])):
                asked.append((row, ["phrases"] + tags, t[0], [t], 1 / len(targets)))
                subjects.setdefault((phrases_of(t[0]) or [(t[0], t[0])])[0][1], []).append(t)
            asked += [(row, ["subjects"], subject, named, len(named) / len(targets)) for subject, named in subjects.items()]
            two = list(itertools.combinations(targets, 2))
            asked += [(row, [], f"{a[0]} and {b[0]}", [a, b], 0) for a, b in rng.sample(two, min(3, len(two)))]
        maps, _ = maps_of(model, vocabulary, images, [q[2] for q in asked], [q[0] for q in asked], o) if asked else ((), ())
        for (row, kinds, _, named, chance), heat in zip(asked, maps):
            boxes, mask = (np.logical_or.reduce([t[k] for t in named]) for k in (1, 2))
            for kind in kinds:
                points.setdefault(kind, []).append((pointing_game(heat, boxes), pointing_game(heat, mask), chance, boxes.mean()))
            if not kinds:
                areas, masses = zip(*((t[2].mean(), heat[t[2]].sum() / max(heat.sum(), 1e-12)) for t in named))
                pairs.append((start + row, balance(heat, named[0][2], named[1][2]), mask.mean(), multi_object_iou(heat, mask), areas, masses))
        questions = [(row, *q) for row, r in enumerate(batch) for q in r.get("questions", [])]
        for (_, kind, _, choices, true), said in zip(questions, answer(model, vocabulary, images, questions) if questions else ()):
            right.setdefault(kind, []).append((said == true, 1 / len(choices)))
    result = {f"pointing_{kind}{name}": v for kind, rows in points.items() for name, v in zip(("", "_in_mask", "_chance", "_chance_pixel"), np.mean(rows, 0))}
    if pairs:
        image, balances, area, iou = (np.array(column) for column in zip(*(p[:4] for p in pairs)))
        best = [iou[image % 2 != half].mean(0).argmax() if (image % 2 != half).any() else 9 for half in (0, 1)]
        result.update(multi_object_iou=iou[np.arange(len(iou)), np.array(best)[image % 2]].mean(), multi_object_iou_chance_pixel=area.mean(),
                      balance=balances.mean())
    with torch.no_grad():
        T, mask, text_features = model.encode_text(pad([encode(vocabulary, c) for _, c in captions]).to(device))
    similarity, owner = torch.cat(features) @ text_features.T, torch.tensor([i for i, _ in captions], device=device)
    for name, (to_text, to_image) in (("", (similarity, similarity)), ("_itm", rerank(model, load, T, mask, similarity))):
        result[f"r1_image_to_text{name}"] = (owner[to_text.argmax(1)] == torch.arange(len(records), device=device)).float().mean()
        result[f"r1_text_to_image{name}"] = (to_image.argmax(0) == owner).float().mean()
        result[f"r1_image_to_text{name}_chance"] = result[f"r1_text_to_image{name}_chance"] = 1 / len(records)
    for kind, rows in right.items():
        result[f"vqa_{kind}"], result[f"vqa_{kind}_chance"] = np.mean(rows, 0)
    if right:
        result["vqa"], result["vqa_chance"] = (np.mean([result[f"vqa_{kind}{name}"] for kind in right]) for name in ("", "_chance"))
    agreement = [occlusion_agreement(model, vocabulary, r["image"], t["phrase"], o) for r in records[:32] for t in r["targets"][:2]]
    if agreement:
        result["occlusion"], result["occlusion_chance"] = np.nanmean(agreement), 0
    return {k: round(float(v), 5) for k, v in result.items()}, pairs

# ------------------------------------------------------------------------------------------------------- pictures
def draw_panels(rows, path, title):
    """Rows of panels (text, image (H, W, 3), map (side, side) or None, target region (side, side) or None) as a picture file."""
    figure = Figure(figsize=(2.6 * len(rows[0]), 2.75 * len(rows) + 1), layout="constrained")
    axes = figure.subplots(len(rows), len(rows[0]), squeeze=False)
    for ax, (text, image, heat, region) in zip(axes.flat, itertools.chain(*rows)):
        ax.imshow(image, extent=(0, 1, 1, 0), aspect=image.shape[0] / image.shape[1])
        if heat is not None:
            shown = ax.imshow(heat / max(heat.max(), 1e-12), extent=(0, 1, 1, 0), aspect="auto", cmap="inferno", alpha=0.7, vmin=0, vmax=1)
            ax.set_aspect(image.shape[0] / image.shape[1])
            y, x = divmod(int(heat.argmax()), heat.shape[1])
            ax.plot((x + 0.5) / heat.shape[1], (y + 0.5) / heat.shape[0], "x", color="cyan", markersize=9, markeredgewidth=2)
        if region is not None:
            ax.contour(region, [0.5], extent=(0, 1, 0, 1), colors="white", linewidths=1.5)
        ax.set_title(textwrap.fill(text, 32), fontsize=9, parse_math=False)
        ax.set_axis_off()
    figure.colorbar(shown, ax=axes, location="bottom", shrink=0.6, aspect=50, pad=0.05 / len(rows),
                    label="Grad-CAM, share of each map's maximum (cross: its highest point; white line: the target)")
    figure.suptitle(title)
    figure.savefig(path, dpi=100, bbox_inches="tight")

def panels(name, model, vocabulary, image, phrases, regions, o):
    """One row of panels: the image under a name, the map of each phrase, and the map of all of them together."""
    pixels = read_image(image, o.image_size)
    texts = phrases + [" and ".join(phrases)] * (len(phrases) > 1)
    regions = regions + [np.logical_or.reduce(regions)] if regions else [None] * len(texts)
    maps, match = maps_of(model, vocabulary, pixels[None].to(o.device), texts, [0] * len(texts), o)
    picture = load_pixels(image)
    return [(name, picture, None, None)] + [(f"{t} ({m:.2f})", picture, h, r) for t, m, h, r in zip(texts, match, maps, regions)]

def draw_grounding(models, vocabulary, records, o, path):
    """The first eight records with two things to point at (or else one), a row each: the image, and the maps of each model."""
    things = lambda r: [t["phrase"] for t in r["targets"]] or [phrase for phrase, _ in phrases_of(r["captions"][0])]
    rows = []
    for r in ([r for r in records if len(things(r)) > 1] or [r for r in records if things(r)])[:8]:
        regions = [boxes for _, boxes, _ in truth(r, o.image_size)[:2]]
        of = {name: panels(r["captions"][0], model, vocabulary, r["image"], things(r)[:2], regions, o) for name, model in models.items()}
        rows.append(next(iter(of.values()))[:1] + [(f"{name}: {text}", *rest) for name, (_, *maps) in of.items() for text, *rest in maps])
    if rows:
        draw_panels(rows, path, "Where each model looks for a phrase, and for two (in brackets: the probability that it matches)")

def draw_balance(pairs, path):
    """For each model, how the map of a pair divides: the larger object's share of both masses against its share of both areas, and the balance."""
    figure = Figure(figsize=(5 * len(pairs) + 5, 4.5), layout="constrained")
    *scatters, histogram = figure.subplots(1, len(pairs) + 1)
    for colour, (ax, (name, rows)) in enumerate(zip(scatters, pairs.items())):
        areas, masses = (np.array([p[k] for p in rows]) for k in (4, 5))
        larger = areas.argmax(1)[:, None]
        share = lambda v: np.take_along_axis(v, larger, 1)[:, 0] / np.maximum(v.sum(1), 1e-12)
        ax.scatter(share(areas), share(masses), s=6, alpha=0.4, color=f"C{colour}")
        ax.axhline(0.5, color="grey", linewidth=1)
        ax.set(title=f"{name}: mass on the larger of two objects", xlabel="its share of both areas", ylabel="its share of the map's mass on both", ylim=(0, 1))
        balances = [p[1] for p in rows]
        histogram.hist(balances, np.linspace(0, 1, 21), histtype="step", linewidth=2, color=f"C{colour}", label=f"{name}: mean {np.mean(balances):.2f}")
    histogram.set(title="balance of a pair's map (1: both get as much)", xlabel="smaller share over larger", ylabel="pairs")
    histogram.legend()
    figure.savefig(path, dpi=100)

def draw_curves(metrics, path):
    """The losses of metrics.jsonl against the step, a panel a loss, a line a training; each point the mean of a fiftieth."""
    lines = [line for line in map(json.loads, metrics.read_text().splitlines()) if "losses" in line]
    names = list(dict.fromkeys(k for line in lines for k in line["losses"]))
    figure = Figure(figsize=(12, 2.6 * math.ceil(len(names) / 3)), layout="constrained")
    axes = figure.subplots(math.ceil(len(names) / 3), 3, squeeze=False).flat
    for ax, name in itertools.zip_longest(axes, names):
        ax.set_visible(name is not None)
        for colour, run in enumerate(dict.fromkeys(line["run"] for line in lines)):
            points = np.array([(line["step"], line["losses"][name]) for line in lines if line["run"] == run and name in line["losses"]])
            if len(points):
                parts = np.array_split(points, min(50, len(points)))
                ax.plot(*np.array([part.mean(0) for part in parts]).T, color=f"C{colour}", label=run)
                ax.set(title=f"{name.replace('_', ' ')} loss", xlabel="step")
                ax.legend()
    figure.savefig(path, dpi=100)

# ------------------------------------------------------------------------------------------------------- training
def load_checkpoint(path, device="cpu"):
    try:
        saved = torch.load(path, map_location=device, weights_only=True)
        return saved if saved["model"] and saved["options"] else None
    except Exception as e:                                     # torch.load has as many exceptions as there are ways to be no checkpoint
        raise UserError(f"{path} is no checkpoint of hist.py: {repr(e).splitlines()[0][:200]}")

def restore(path, o):
    """(model, vocabulary, checkpoint) from a checkpoint file and options that fit it."""
    saved = load_checkpoint(path, o.device)
    vocabulary = {w: i for i, w in enumerate(saved["vocabulary"])}
    model = HIST(o, vocabulary).to(o.device)
    try:
        model.load_state_dict(saved["model"])
    except RuntimeError as e:
        raise UserError(f"{path} does not fit the options given: {str(e).splitlines()[1].strip()}")
    return model, vocabulary, saved

def train(name, levels, samples, o, steps, base=None):
    """Train one model with these levels, or go on from its checkpoint; returns (model, seconds of training).

    base: a checkpoint to start from, whose images are not seen again; else weights by o.seed. So all trainings from one base
    start from the same weights and see the same images and captions in the same order.
    """
    path, metrics, B, cuda = Path(o.out) / f"{name}.pt", Path(o.out) / "metrics.jsonl", o.batch_size, o.device == "cuda"
    torch.manual_seed(o.seed)
    model, start, seconds, saved = HIST(o, samples.vocabulary).to(o.device), 0, 0.0, None
    first = o.base_steps if base else 0
    if o.resume and path.exists():
        model, _, saved = restore(path, o)
        start, seconds = saved["step"], saved["seconds"]
        if saved["vocabulary"] != list(samples.vocabulary):
            raise UserError(f"{path} was trained on other captions: --resume goes on with the same --data")
    elif base:
        model, _, _ = restore(base, o)
    optimizer = torch.optim.AdamW(model.parameters(), lr=o.lr / (2 if base else 1), weight_decay=0.02, betas=(0.9, 0.98), fused=o.device != "mps")
    warmup = max(1, min(100, steps // 10))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / warmup) * max(
        0.01, (1 + math.cos(math.pi * step / max(1, steps))) / 2))
    loader = DataLoader(samples, batch_size=B, sampler=range((first + start) * B, (first + steps) * B), collate_fn=collate, num_workers=o.workers,
                        pin_memory=cuda, generator=torch.Generator())                      # its own generator: ours is the checkpoint's
    if saved:
        optimizer.load_state_dict(saved["optimizer"])
        schedule.load_state_dict(saved["schedule"])
        torch.set_rng_state(saved["random"]["cpu"].cpu())
        if cuda and saved["random"]["cuda"] is not None:
            torch.cuda.set_rng_state(saved["random"]["cuda"].cpu())
    kept = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
    metrics.write_text("".join(json.dumps(k) + "\n" for k in kept if k["run"] != name or k["step"] <= start and "losses" in k))
    model.train()
    teacher = copy.deepcopy(model).eval() if saved and saved["teacher"] else None
    teacher and teacher.load_state_dict(saved["teacher"])
    waiting, begun = [], time.time() - seconds
    with open(metrics, "a") as log, tqdm(total=steps * B, initial=start * B, unit="img", desc=name, smoothing=0.05) as bar:
        for step, batch in enumerate(loader, start):
            done = (first + step) / (o.base_steps + o.steps)               # of the whole, base and what follows
            hardness = 0.5 * min(1, max(0, (done - 0.5) / 0.3))    # hard negatives from the first step leave the match head at chance
            weight = o.composition_weight * min(1, max(0, (done - o.composition_start) / 0.1))
            now = [level for level in levels if level != "composition" or weight > 0]
            if "composition" in now and teacher is None:
                teacher = copy.deepcopy(model).eval()          # of the weights as they are when composition sets in
            with torch.autocast(o.device, torch.bfloat16, enabled=cuda):
                losses, figures = training_losses(model, to_device(batch, o.device), now, hardness, o.cam_layer, teacher)
            loss = sum((weight * v if k == "composition" else v for k, v in losses.items()), start=0 * model.log_temperature)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            waiting.append((step + 1, {k: v.detach() for k, v in losses.items()}, figures))
            bar.update(B)
            save = step + 1 == steps or (step + 1) % o.save_every == 0
            if save or len(waiting) == 10:                     # the only wait for the device, once in ten steps
                for n, losses, figures in waiting:
                    log.write(json.dumps({"run": name, "step": n, "losses": {k: round(float(v), 5) for k, v in losses.items()},
                                          **{k: float(v) for k, v in figures.items()}}) + "\n")
                bar.set_postfix_str(" ".join(f"{k} {float(v):.2f}" for k, v in losses.items()))
                waiting = []
            if save:
                log.flush()
                seconds = time.time() - begun
                torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict(),
                            "step": step + 1, "teacher": teacher and teacher.state_dict(), "seconds": seconds, "vocabulary": list(samples.vocabulary), "options": asdict(o),
                            "random": {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state() if cuda else None}}, path.with_suffix(".tmp"))
                os.replace(path.with_suffix(".tmp"), path)     # a checkpoint is whole, or it is the one before
    return model, seconds

# ----------------------------------------------------------------------------------------------------------- main
TABLE = {"pointing_phrases": "pointing, phrases", "pointing_subjects": "pointing, subjects", "pointing_shared_colour": "  colour shared",
         "pointing_shared_shape": "  shape shared", "pointing_unseen": "  pair never seen", "multi_object_iou": "multi-object IoU", "balance": "balance",
         "r1_image_to_text": "R@1, image to text", "r1_text_to_image": "R@1, text to image", "r1_image_to_text_itm": "  ITM: i. to t.",
         "r1_text_to_image_itm": "  ITM: t. to i.", "vqa": "VQA, mean", "vqa_colour": "  colour", "vqa_shape": "  shape", "vqa_is_there": "  is there",
         "vqa_count": "  count", "occlusion": "occlusion, rank r", "seconds": "seconds of training"}
ROWS = {"caption": ("caption",), "+ phrase": ("caption", "phrase"), "+ subject": ("caption", "subject"), "+ both": ("caption", "phrase", "subject"),
        "+ composition": ("caption", "composition"), "all": LEVELS, "caption, same time": ("caption",)}
T95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)                             # Student's t, two-sided, for 2 to 10 seeds

def table(results):
    """The results {training: {measure: value}} as text: a measure a line, a training a column, and what chance gives."""
    show = lambda k, v: f"{'' if v is None else round(v) if k == 'seconds' else f'{100 * v:.1f}':>15}"
    first = next(iter(results.values()))
    lines = [f"{'':20}" + "".join(f"{name:>15}" for name in (*results, "chance", "any pixel"))]
    for k, title in TABLE.items():
        if k in first:
            chance = [first.get(f"{k}_chance"), first.get(f"{k}_chance_pixel")]
            lines.append(f"{title:20}" + "".join(show(k, v) for v in [r[k] for r in results.values()] + chance))
    return "\n".join(lines)

def command_line(argv=None):
    """What was typed, {option: value}; only what was typed, since the defaults depend on the data and a checkpoint has its own."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=partial(argparse.RawDescriptionHelpFormatter, width=150, max_help_position=29))
    for f in fields(Options):
        kind = {bool: dict(action="store_true"), list: dict(nargs="+", metavar="ARG")}.get(f.type, dict(type=f.type, metavar=f.type.__name__.upper()))
        shown = f" [{f.default}]" if f.default not in (0, -1, "", None) else ""
        p.add_argument("--" + f.name.replace("_", "-"), default=argparse.SUPPRESS, help=f.metadata["help"] + shown, **kind)
    def refuse(message):
        raise UserError(f"{message}; python hist.py --help lists the options")
    p.error = refuse
    return vars(p.parse_args(argv))

def settle(given):
    """Options from what was typed, then the checkpoint that it goes on from, if any, then what suits the data."""
    o = Options(**given)
    o.out = o.out or ("out/ablation" if o.ablate else f"out/{Path(o.data).stem}")
    if o.resume or o.eval_only or o.ground:
        anywhere = o.ground and not {"out", "data"} & set(given)
        found = sorted(Path("out" if anywhere else o.out).glob("*/*.pt" if anywhere else "*.pt"), key=lambda path: path.stat().st_mtime)
        if not found:
            raise UserError(f"no checkpoint in {'out' if anywhere else o.out}: train first (python hist.py), or say --out FOLDER of a run")
        once = dict(resume=False, eval_only=False, ablate=False, ground=None, download=False, device="auto")
        o = Options(**{**load_checkpoint(found[-1])["options"], **once, **given, "out": str(found[-1].parent)})
    for name, value in (SCENES if o.data == "scenes" else PHOTOS).items():
        if getattr(o, name) == getattr(Options, name):
            setattr(o, name, value)
    for name, least in dict(batch_size=1, image_size=16, width=8, fusion_layers=1, text_layers=0, base_steps=0, steps=0, seeds=1, eval_images=0, save_every=1, workers=0,
                             lr=0, vocab_size=1).items():
        if getattr(o, name) < least:
            raise UserError(f"--{name.replace('_', '-')} {getattr(o, name)}: at least {least}, please")
    if o.width % max(4, o.width // 64):
        raise UserError(f"--width {o.width}: take a multiple of 64, so that its heads are of one size")
    o.cam_layer = (o.fusion_layers - 1 if o.data == "scenes" else (o.fusion_layers - 1) // 2) if o.cam_layer == -1 else o.cam_layer   # ALBEF: the third of six
    if not 0 <= o.cam_layer < o.fusion_layers:
        raise UserError(f"--cam-layer {o.cam_layer}: there are {o.fusion_layers} fusion layers, 0 the first")
    wrong = [level for level in o.levels.split(",") if level not in LEVELS]
    if wrong:
        raise UserError(f"--levels {o.levels}: there is no level {wrong[0]!r}; the levels are {','.join(LEVELS)}")
    if o.parses and o.data == "scenes":
        raise UserError("--parses: scenes are drawn without end and parsed as they come; say --data coco or --data FILE.jsonl")
    here = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    o.device = next(d for d in here if here[d]) if o.device == "auto" else o.device
    if not here.get(o.device):
        raise UserError(f"--device {o.device}: " + ("this machine has none that PyTorch can use" if o.device in here else "auto, cpu, cuda or mps"))
    return o

def ground(o):
    """--ground PICTURE PHRASE …: where the last trained model looks, over a person's own picture."""
    picture, *phrases = o.ground
    if not phrases or not Path(picture).is_file():
        raise UserError('--ground PICTURE "a red circle" "a blue star": ' + ("say at least one phrase" if not phrases else f"there is no picture {picture}"))
    path = Path(o.out) / ("hist.pt" if (Path(o.out) / "hist.pt").exists() else "baseline.pt")
    model, vocabulary, _ = restore(path, o)
    new = sorted({w for p in phrases for w in split_words(p)} - set(vocabulary))
    if new:
        print(f"not in the vocabulary, read as [UNK]: {', '.join(new)}", file=sys.stderr)
    draw_panels([panels(Path(picture).name, model, vocabulary, picture, phrases, [], o)], Path(o.out) / "ground.png", f"Where {path} looks")
    print(Path(o.out) / "ground.png")

def prepare(o):
    """(samples to train on, held-out records) of a run, its folder made and its options settled."""
    records, held_out = load_data(o)
    o.batch_size = min(o.batch_size, len(records))
    o.steps = o.steps or max(1, 10 * len(records) // o.batch_size)
    few = range(100_000, 102_000) if o.data == "scenes" else range(len(records))
    samples = Samples(records, build_vocabulary((c for i in few for c in records[i]["captions"]), o.vocab_size), o)
    HIST(o, samples.vocabulary)                                # options that build no model stop here, before the last run goes
    out = Path(o.out)
    out.mkdir(parents=True, exist_ok=True)
    for old in () if o.resume else (*out.glob("*.pt"), out / "metrics.jsonl"):
        old.unlink(missing_ok=True)
    (out / "options.json").write_text(json.dumps(asdict(o), indent=1))
    return samples, held_out

def train_base(samples, o):
    """The checkpoint of --base-steps of captions alone, from which every training goes on; None without them."""
    if o.base_steps:
        train("base", ("caption",), samples, o, o.base_steps)
        return Path(o.out) / "base.pt"

def run(o):
    """Train or load the models, evaluate them on the same held-out records, write the table and the pictures."""
    out, models, results, pairs = Path(o.out), {}, {}, {}
    levels = {"baseline": ("caption",), "hist": tuple(o.levels.split(","))}
    if o.eval_only:
        held_out = load_data(o)[1]
        for name in [n for n in levels if (out / f"{n}.pt").exists()]:
            models[name], vocabulary, saved = restore(out / f"{name}.pt", o)
            results[name] = {"seconds": saved["seconds"]}
    else:
        samples, held_out = prepare(o)
        vocabulary, base = samples.vocabulary, train_base(samples, o)
        for name in levels if levels["hist"] != levels["baseline"] else ["baseline"]:
            models[name], seconds = train(name, levels[name], samples, o, o.steps, base)
            results[name] = {"seconds": seconds}
    for name, model in models.items():
        measured, pairs[name] = evaluate(model, vocabulary, held_out, o)
        results[name].update(measured)
        with open(out / "metrics.jsonl", "a") as log:
            log.write(json.dumps({"run": name, "step": o.steps, "evaluation": results[name]}) + "\n")
    (out / "results.json").write_text(json.dumps(results, indent=1))
    before = f"{o.base_steps} steps with captions alone, then " if o.base_steps else ""
    print(f"\n{o.data}: {len(held_out)} held-out images, {before}{o.steps} steps of {o.batch_size}, seed {o.seed}, {o.device}; percent but for seconds\n")
    print(table(results), "\n")
    if not any(r["targets"] for r in held_out):
        print("these records have no targets: there is nothing to point at, retrieval alone is measured")
    if o.data == "scenes":
        print("subjects that the parser finds in these captions: precision {:.3f}, recall {:.3f}, F1 {:.3f}".format(*subjects_found(held_out)))
    draw_curves(out / "metrics.jsonl", out / "curves.png")
    draw_grounding(models, vocabulary, held_out, o, out / "grounding.png")
    if any(pairs.values()):
        draw_balance(pairs, out / "balance.png")
        rated = {}                                             # by the IoU of the last model, each pair at the one threshold best for all
        threshold = np.mean([p[3] for p in pairs[name]], 0).argmax()
        for p in pairs[name]:
            rated.setdefault(p[0], []).append(p[3][threshold])
        worst = sorted(rated, key=lambda i: np.mean(rated[i]))[:4]
        draw_grounding(models, vocabulary, [held_out[i] for i in worst], o, out / "worst.png")
    print(f"in {out}: {' '.join(sorted(p.name for p in out.iterdir()))}")

def ablate(o):
    """Every row of ROWS for every seed, from that seed's base, on the same images for as many steps; the last for as much time as "all".

    What is done lies in out/seedN/results.json, and the same command goes on from there. Prints the means, and below each its
    difference from the first row, paired by seed, with the 95% interval (Student's t).
    """
    top, every = Path(o.out), []
    for seed in range(o.seed, o.seed + o.seeds):
        now = Options(**{**asdict(o), "seed": seed, "out": str(top / f"seed{seed}"), "resume": (top / f"seed{seed}" / "options.json").exists()})
        path = Path(now.out) / "results.json"
        done = json.loads(path.read_text()) if path.exists() else {}
        if set(ROWS) - set(done):
            samples, held_out = prepare(now)
            base = train_base(samples, now)
            for row, levels in ROWS.items():
                if row not in done:
                    steps = round(now.steps * done["all"]["seconds"] / done["caption"]["seconds"]) if "time" in row else now.steps
                    name = row.replace("+ ", "").replace(", ", "_").replace(" ", "_")
                    model, seconds = train(name, levels, samples, now, steps, base)
                    done[row] = {**evaluate(model, samples.vocabulary, held_out, now)[0], "seconds": seconds}
                    path.write_text(json.dumps(done, indent=1))
        every.append(done)
    print(ablation_table(every))

def ablation_table(every):
    """[{row: {measure: value}} of each seed] as a Markdown table: mean ± standard deviation, then the paired difference [95% interval]."""
    n, lines = len(every), ["| | " + " | ".join(ROWS) + " | chance |", "|---" * (len(ROWS) + 2) + "|"]
    for k, title in TABLE.items():
        if k in every[0]["caption"]:
            scale, cells = 1 if k == "seconds" else 100, []
            values = {row: scale * np.array([done[row][k] for done in every]) for row in ROWS}
            for row, v in values.items():
                d = v - values["caption"]
                half = T95[n - 2] * d.std(ddof=1) / math.sqrt(n) if 1 < n < 11 else math.nan
                cells.append(f"{v.mean():.1f}" + (f" ± {v.std(ddof=1):.1f}" if n > 1 else "") +
                             (f"<br>{d.mean():+.1f} [{d.mean() - half:+.1f}, {d.mean() + half:+.1f}]" if row != "caption" and k != "seconds" else ""))
            chance = [done["caption"][f"{k}_chance"] * scale for done in every if f"{k}_chance" in done["caption"]]
            lines.append(f"| {title.strip()} | " + " | ".join(cells) + f" | {f'{np.mean(chance):.1f}' if chance else ''} |")
    return "\n".join(lines)

def main(argv=None):
    try:
        o = settle(command_line(argv))
        ground(o) if o.ground else ablate(o) if o.ablate else run(o)
    except (UserError, OSError, torch.cuda.OutOfMemoryError) as e:        # a process that loads images wraps its error in a traceback
        print("hist.py: " + " ".join(str(e).split("UserError: ")[-1].split()), file=sys.stderr)
        sys.exit(2)

if __name__ == "__main__":
    main()
