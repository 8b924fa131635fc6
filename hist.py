"""HIST in one file: train a vision-language model that can point at what a phrase names.

An educational implementation of "Barking Up The Syntactic Tree: Enhancing VLM Training with Syntactic Losses"
(arXiv 2412.08110) on a small ALBEF (arXiv 2107.07651) or BLIP. parse.py cuts each caption into phrases, their subjects, and
composites of two phrases; here they become losses. No boxes are used in training.

    python hist.py                                          drawn scenes: no download, no GPU
    python hist.py --data coco --root PATH_TO_COCO          COCO 2017
    python hist.py --data my.jsonl                          your own images and captions
    torchrun --nproc_per_node=4 hist.py --data coco …       four GPUs
    python hist.py --ground PICTURE "a red circle" "a blue star"

Read it from top to bottom: options, data, batches, model, Grad-CAM, losses, measures, pictures, training, main.
"""
import argparse, collections, copy, hashlib, importlib, itertools, json, math, os, random, resource, shlex, signal, sys, textwrap, time
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from functools import lru_cache, partial
from pathlib import Path

import numpy as np, timm, timm.data, torch, torch.distributed, torch.nn as nn, torch.nn.functional as F, torchvision.transforms.v2.functional
from matplotlib.figure import Figure                     # no pyplot: it would choose a backend for whoever imports this file
from PIL import Image, ImageDraw, ImageOps
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import parse as parser

RANK, RANKS = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))         # this process, and of how many: torchrun sets them

class UserError(Exception):
    """A mistake that the person at the keyboard can mend: printed as one line, exit status 2, no traceback."""

def insist(good, why):
    """UserError with the reason where something is not good."""
    if not good: raise UserError(why)

# ---------------------------------------------------------------------------------------------------- options
LEVELS = ("caption", "phrase", "subject", "composition")

def option(default, text, least=None):
    return field(default=default, metadata={"help": text, "least": least})

@dataclass
class Options:
    """The command line. 0, -1 or "" stand for what suits the data: SCENES and PHOTOS below."""
    data: str = option("scenes", "scenes, coco, vg, flickr30k, vqa, or a file of your own records: FILE.jsonl")
    root: str = option("", "folder of the data set, laid out as it is published [data/NAME]")
    exclude: str = option("", "--data vg: file of image ids, Visual Genome's or COCO's, to leave out")
    download: bool = option(False, "fetch COCO 2017 into --root first (20 GB, checked)")
    out: str = option("", "folder for all that a run writes [out/NAME]")
    parses: str = option("", "file of parses to train on in place of the rules' (python parse.py --llm)")
    base: str = option("albef", "what is trained: albef, or blip (one text stack, causal LM in place of MLM)")
    levels: str = option(",".join(LEVELS), "levels of the HIST training; 'caption' trains the baseline alone")
    base_steps: int = option(-1, "caption-only steps first, from which every training then goes on [scenes 800, else 0]", 0)
    steps: int = option(0, "optimiser steps of each training [scenes 400, else 10 epochs]", 0)
    batch_size: int = option(-1, "images a step, over all GPUs [64]", 1)
    accumulate: int = option(1, "parts in which a step's batch is computed, one after the other: less memory", 1)
    lr: float = option(0.0, "peak learning rate [scenes 2e-3, else 3e-4]", 0)
    composition_weight: float = option(1.0, "lambda, the weight of the composition loss")
    composition_start: float = option(0.66, "share of the steps after which composition ramps in")
    vit: str = option("", "any timm ViT [scenes: one layer on a stem, else vit_small_patch16_224; CPU vit_tiny_…]")
    pretrained: bool = option(False, "start --vit from timm's pretrained weights")
    image_size: int = option(-1, "side of the square image, pixels [scenes 48, else 224; CPU 160]", 16)
    width: int = option(-1, "width of text and fusion layers [scenes 64, else 384; CPU 192]", 8)
    text_layers: int = option(-1, "layers of the text encoder [scenes 1, else 4; CPU 2]", 0)
    fusion_layers: int = option(-1, "layers in which text attends to the image [scenes 2, else 4; CPU 2]", 1)
    cam_layer: int = option(-1, "fusion layer that Grad-CAM reads, 0 the first [ALBEF on scenes the last, else the middle]")
    vocab_size: int = option(10_000, "words kept, most frequent first; the rest are [UNK]", 1)
    eval_images: int = option(500, "held-out images to evaluate on; 0 all of them", 0)
    save_every: int = option(200, "steps between checkpoints", 1)
    workers: int = option(-1, "processes that load images [scenes 0, else one a core, 8 at most]", 0)
    max_bad: float = option(0.2, "share of the images that may be unusable; above it the run stops", 0)
    compile: bool = option(False, "torch.compile the ViT's layers")
    seed: int = option(0, "seed of weights, scenes, order and masks")
    device: str = option("auto", "auto, cpu, cuda or mps")
    resume: bool = option(False, "go on from the last checkpoint in --out, with its options")
    ablate: bool = option(False, "train every row of the ablation for --seeds seeds, and print its table")
    seeds: int = option(5, "seeds of --ablate, from --seed on", 1)
    eval_only: bool = option(False, "evaluate the checkpoints in --out, no training")
    eval: str = option("", "a benchmark for the last checkpoints: flickr30k, refcoco, refcoco+, refcocog, refclef, karpathy, vqa")
    bench: bool = option(False, "time a step, part by part, as levels are added; and the loader alone")
    caption: str = option("", "say what the last model trained with --base blip sees in this picture")
    top_p: float = option(0.0, "draw the words of --caption from the likeliest of this probability together (nucleus) [0: the likeliest]", 0)
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
    if shape == "ring": ImageDraw.Draw(big).ellipse([1.1 * size, 1.1 * size, 2.9 * size, 2.9 * size], fill=0)
    alpha = np.asarray(big.resize((size, size), Image.Resampling.BOX), dtype=np.float32) / 255
    ys, xs = np.nonzero(alpha > 0.5)
    return alpha, (int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1)

def draw_scene(rng, side, wanted, unseen):
    """One scene: a record with an image (side, side, 3) uint8, a caption of some of its objects, and the truth about all. wanted: how many,
    no two of the same colour and shape, half of them distractors that share one of the two with the first; their diameters are 0.2 to 0.5
    of the side. unseen: whether UNSEEN pairs may be drawn. rng: random.Random."""
    objects, masks, base = [], [], rng.uniform(190, 240)
    grain = np.frombuffer(rng.randbytes(side * side), dtype=np.uint8).reshape(side, side)
    image = np.float32([[[base + rng.uniform(-10, 10)]] for _ in "rgb"]) + grain * np.float32(rng.uniform(0.01, 0.05))
    for _ in range(200):
        if len(objects) == wanted: break
        colour, shape = rng.choice(list(COLOURS)), rng.choice(list(SHAPES))
        if objects and rng.random() < 0.5: colour, shape = (objects[0]["colour"], shape) if rng.random() < 0.5 else (colour, objects[0]["shape"])
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
        masks.append(np.zeros((side, side), dtype=bool))
        masks[-1][y:y + size, x:x + size] = alpha > 0.5
        objects.append({"colour": colour, "shape": shape, "x": x, "y": y, "size": size, "box": [x + x0, y + y0, x + x1, y + y1]})
    targets = [{"phrase": with_article(f"{o['colour']} {o['shape']}"), "boxes": [o["box"]], "mask": mask,
                "tags": [tag for tag, so in (("shared_colour", shared(objects, o, "colour")), ("shared_shape", shared(objects, o, "shape")),
                                             ("unseen", (o["colour"], o["shape"]) in UNSEEN)) if so]} for o, mask in zip(objects, masks)]
    caption, said = describe(rng, objects, side)
    return {"image": image.clip(0, 255).astype(np.uint8).transpose(1, 2, 0), "captions": [caption], "said": said, "targets": targets,
            "questions": ask(rng, objects)}

with_article = lambda noun: ("an " if noun[0] in "aeiou" else "a ") + noun
shared = lambda objects, o, what: sum(p[what] == o[what] for p in objects) > 1      # whether another object has its colour, or its shape

def describe(rng, objects, side):
    """A true caption that names one to four of the objects, and what it says: [(phrase, subject), ...]."""
    order, alike = rng.sample(objects, len(objects)), partial(shared, objects)
    names = lambda o: ("small " if o["size"] < 0.27 * side else "large " if o["size"] > 0.38 * side else "") * (rng.random() < 0.4) + f"{o['colour']} {o['shape']}"
    clause = [o for o in order[1:] or order if not alike(o, "shape") or not alike(o, "colour")][-1:] if rng.random() < 0.5 else []
    chosen = [o for o in order if o not in clause][:rng.randint(1 if clause else 2, 3)]
    if rng.random() < 0.15: chosen, clause = ([], clause) if clause else (chosen[:1], [])
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
    once, colours, shapes = lambda what: [o for o in objects if not shared(objects, o, what)], list(COLOURS), list(SHAPES)
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
    """n scenes, drawn on demand, each by its number, the seed and a name: no two sets share a scene. test: whether they have two objects at least,
    and UNSEEN pairs too; else the first 16,000 have one object, 16,000 later there may be two, and so on to four: shapes are learnt one by one."""
    def __init__(self, n, o, name, test):
        self.n, self.side, self.stream, self.test = n, o.image_size, f"{o.seed} {name}", test

    def __len__(self): return self.n
    def __getitem__(self, i):
        rng = random.Random(f"{self.stream} {i}")
        return draw_scene(rng, self.side, rng.randint(2, 4) if self.test else rng.randint(1, min(4, 1 + i // 16000)), self.test)

# ------------------------------------------------------------------------------- data: COCO, and your own images
@contextmanager
def blaming(what, bad=None, line=0):
    """An error inside becomes a sentence about what: a UserError, or given bad an entry of it, {what: why}. line: the line of a JSON file."""
    try:
        yield
    except Exception as e:                                     # PIL, timm and torch.load have as many exceptions as ways to fail
        why = f"not JSON: {e.msg} at column {e.colno}" if isinstance(e, json.JSONDecodeError) else f"{e}" + " is missing" * isinstance(e, KeyError)
        insist(bad is not None, f"{what}" + f", line {line - 1 + (getattr(e, 'lineno', 0) or 1)}" * (line > 0) + f": {' '.join(why.split())[:300]}")
        bad[what] = why

def leave_out(bad, o, total):
    """List what cannot be used, {(kind, which): why}, in OUT/skipped.jsonl; UserError where of a total of images it is more than --max-bad."""
    path, images = Path(o.out) / "skipped.jsonl", [f"{which}: {why}" for (kind, which), why in bad.items() if kind == "image"]
    known = path.read_text().splitlines() if path.exists() else ()
    new = {json.dumps({"kind": kind, "which": which, "why": why}) for (kind, which), why in bad.items()} - set(known)
    if new:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a") as f: f.writelines(line + "\n" for line in sorted(new))
    insist(len(images) <= o.max_bad * total,
           f"{len(images)} of {total} images cannot be used, more than --max-bad {o.max_bad}: {''.join(images[-1:])}; {path} lists them")

def read_json(path, *names):
    """The lists of these names in a JSON file."""
    with blaming(path, line=1):
        read = json.loads(path.read_bytes())
        insist(isinstance(read, dict) and all(isinstance(read.get(name), list) for name in names), f"there is no object with lists {names}")
        return [read[name] for name in names]

def read_coco(root, split, o=None):
    """Records of COCO 2017: "train" with captions, "val" with targets too (the instances of each category in an image). Boxes, masks and
    images are in the pixels as stored, not as an EXIF tag would turn them. With o, what cannot be used goes to leave_out."""
    folder, (captions, instances) = root / f"{split}2017", (root / f"annotations/{name}_{split}2017.json" for name in ("captions", "instances"))
    missing = [str(p) for p in (captions, instances, folder) if not p.exists()]
    insist(not missing, f"--root {root}: there is no {', no '.join(missing)}; --download fetches all (20 GB), or see https://cocodataset.org")
    images, said = read_json(captions, "images", "annotations")
    truth, categories = read_json(instances, "annotations", "categories") if split == "val" else ((), ())
    names, there, seen, bad, records = {c["id"]: c["name"] for c in categories}, set(os.listdir(folder)), set(), {}, {}
    kinds = (("image", images), ("caption", said), ("annotation", truth))
    for kind, n, e in [(kind, n, e) for kind, entries in kinds for n, e in enumerate(entries)]:
        with blaming((kind, f"{split}, entry {n}"), bad):
            i, name = str(e["id"] if kind == "image" else e["image_id"]), e.get("file_name")
            insist((kind, str(e["id"])) not in seen, "its id is there twice")
            seen.add((kind, str(e["id"])))
            if kind == "image":
                records[i] = {"captions": [], "targets": {}, "size": (e.get("height"), e.get("width"))}
                insist(name in there, f"{name} leads out of the folder" if Path(name).name != name else f"there is no file {name}")
                records[i]["image"] = folder / name
            insist(i in records, f"there is no image {i}")
            if kind == "caption":
                insist(isinstance(e["caption"], str) and e["caption"].strip(), f"a caption must be text, not {e['caption']!r}")
                records[i]["captions"].append(e["caption"].strip())
            elif kind == "annotation":
                name, (x, y, w, h), part, (height, width) = names[e["category_id"]], e["bbox"], e["segmentation"], records[i]["size"]
                box = [max(x, 0), max(y, 0), min(x + w, width), min(y + h, height)]
                insist(box[0] < box[2] and box[1] < box[3], f"its box {e['bbox']} has no pixel in the image of {width} x {height}")
                t = records[i]["targets"].setdefault(name, {"phrase": name, "boxes": [], "mask": {"size": (height, width), "parts": []}})
                t["boxes"].append(box)
                t["mask"]["parts"].append(part)
    bad.update({("image", str(r["image"])): "no caption of it can be used" for r in records.values() if "image" in r and not r["captions"]})
    records = [{**r, "targets": list(r["targets"].values())} for r in records.values() if "image" in r and r["captions"]]
    if bad:
        print(f"{folder}: {len(images) - len(records)} of {len(images)} images have no file or no caption; bad entries: {len(bad)}", file=sys.stderr)
    if o: leave_out(bad, o, len(images))
    return records

def decode_mask(mask):
    """A target's mask as a boolean array (height, width). mask: an array; or {"size": [height, width], "parts": […]}, a part being COCO's
    polygons [[x, y, x, y, …], …] or its uncompressed run lengths {"counts": [zeros, ones, zeros, …]} down the columns (crowds)."""
    if isinstance(mask, np.ndarray): return mask
    drawn, runs = Image.new("1", mask["size"][::-1]), np.zeros(mask["size"], dtype=bool)
    for part in mask["parts"]:
        if isinstance(part, dict):
            insist(isinstance(part["counts"], list) and sum(part["counts"]) == runs.size, f"run lengths are compressed, or not of {runs.size} pixels")
            runs |= np.repeat(np.arange(len(part["counts"])) % 2 == 1, part["counts"]).reshape(runs.shape[::-1]).T
        for polygon in part if isinstance(part, list) else (): ImageDraw.Draw(drawn).polygon(polygon, fill=1)
    return np.asarray(drawn) | runs

def read_jsonl(path):
    """A person's own records, (train, held out), one a line: {"image": path from this file's folder, "captions": [str, …], "targets":
    [{"phrase": str, "boxes": [[x0, y0, x1, y1], …], "mask": as decode_mask takes it}, …], "split": "train", "val" or "test"}; targets, masks
    and split may be left out. UserError gives the line's number and what is wrong."""
    text, listed = lambda v: isinstance(v, str), lambda v, good: isinstance(v, list) and v and all(map(good, v))
    box = lambda b: listed(b, lambda v: type(v) in (int, float)) and len(b) == 4 and b[0] < b[2] and b[1] < b[3]
    target = lambda t: isinstance(t, dict) and text(t.get("phrase")) and t["phrase"].strip() and listed(t.get("boxes"), box)
    train, held_out, here = [], [], path.parent
    lines = enumerate(path.read_text(encoding="utf-8-sig", errors="replace").split("\n"), 1)
    for n, line in [(n, line) for n, line in lines if line.strip()]:
        with blaming(path, line=n):
            r = json.loads(line)
            insist(isinstance(r, dict), 'a record is an object {"image": …, "captions": [ … ]}')
            image, split = here / str(r.get("image")), r.get("split", "train")
            insist(image.resolve().is_relative_to(here.resolve()), f"{image} leads out of {here.resolve()}")
            insist(image.is_file(), f'"image": there is no picture {image}')
            insist(listed(r.get("captions"), text), '"captions" must be a list of at least one string')
            insist(not r.get("targets") or listed(r["targets"], target),
                   '"targets" must be a list of {"phrase": …, "boxes": [[x0, y0, x1, y1], …]}, x0 < x1, y0 < y1')
            insist(split in ("train", "val", "test"), '"split" must be "train", "val" or "test"')
            (train if split == "train" else held_out).append({**r, "targets": r.get("targets") or [], "image": image})
    if not held_out:
        train, held_out = [r for i, r in enumerate(train) if i % 10 != 9 and len(train) > 9] or train[:-1] or train, train[9::10] or train[-1:]
        print(f'{path.name}: no line says "split": "val"; {len(held_out)} of the records are held out to evaluate on', file=sys.stderr)
    return train, held_out

def load_data(o):
    """(training records, held-out records) of --data."""
    if o.data == "scenes": return Scenes(1_000_000, o, "train", False), Scenes(o.eval_images or 500, o, "held out", True)
    if o.data in ("vg", "flickr30k", "vqa"): return beside("readers", o, "load")
    if o.data != "coco": return read_jsonl(Path(o.data))
    if o.download: beside("readers", Path(o.root), "download_coco")
    return [read_coco(Path(o.root), split, o) for split in ("train", "val")]

def readable(records, o):
    """The held-out records to evaluate on: of the first --eval-images those whose picture can be read, with the targets whose masks can."""
    kept, bad, n = [], {}, min(len(records), o.eval_images or len(records))
    for r in (records[i] for i in range(n)):
        with blaming(("image", str(r["image"])), bad):
            size, targets = load_pixels(r["image"]).shape[:2], []
            for t in r["targets"]:
                with blaming(("mask", f"{t['phrase']} in {r['image']}"), bad):
                    mask = t.get("mask")
                    insist(mask is None or isinstance(mask, np.ndarray) or tuple(mask["size"]) == size, f"the image has {size} pixels, its mask not")
                    targets.append(t if mask is None or decode_mask(mask) is not None else None)
            kept.append({**r, "targets": targets})
    leave_out(bad, o, n)
    return kept

# -------------------------------------------------------------------------------------------- samples and batches
PAD, CLS, MASK, UNK = range(4)
MAX_TOKENS = 64

def split_words(text):
    """The parser's own tokens, lower-cased: a phrase has the same words alone as in its caption."""
    return [text[start:end].lower() for start, end in parser.tokenize(text)]

def build_vocabulary(captions, size):
    """{word: id} of the most frequent words, after the four special tokens."""
    count = collections.Counter(w for c in captions for w in split_words(c))
    return {w: i for i, w in enumerate(["[PAD]", "[CLS]", "[MASK]", "[UNK]"] + [w for w, _ in count.most_common(size)])}

def encode(vocabulary, text):
    """Ids of [CLS] and of the words, MAX_TOKENS at most: an empty text is [CLS] alone, an unknown word [UNK]."""
    parts = [[vocabulary.get(w, UNK) for w in split_words(part)] for part in text.split("[MASK]")]
    return ([CLS] + sum(([MASK] + part for part in parts[1:]), parts[0]))[:MAX_TOKENS]

def pad(rows, value=PAD):
    """Lists of numbers as one tensor (n, longest)."""
    return nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value)

def mask_words(ids, rng, words):
    """(ids with 30% of the words hidden, one at least; their labels, -100 elsewhere): 8 in 10 as [MASK], 1 as another word, as BERT does."""
    known = [i for i in range(1, len(ids)) if ids[i] != UNK]
    masked, labels = list(ids), [-100] * len(ids)
    for i in [i for i in known if rng.random() < 0.3] or known[:1] and [rng.choice(known)]:
        labels[i], masked[i] = ids[i], rng.choices((MASK, ids[i], rng.randrange(UNK, words)), (8, 1, 1))[0]
    return masked, labels

@lru_cache(maxsize=1 << 16)
def phrases_of(caption):
    """[(phrase, subject), …] of a caption."""
    return [(p.text, p.subject) for p in parser.parse(caption).phrases]

def cached(what, captions, make, o):
    """make(), or what it returned for the same captions and the same parse.py before: JSON beside the run's folder, for other runs too."""
    key = hashlib.sha256(json.dumps([what, captions]).encode() + Path(parser.__file__).read_bytes()).hexdigest()[:16]
    path = Path(o.out).parent / f"captions-{key}.json"
    with suppress(OSError, ValueError): return json.loads(path.read_text())
    made = make()
    if o.out and o.data != "scenes" and not RANK: write_whole(path, json.dumps(made))   # scenes are drawn without end
    return made

def key(text):
    """What makes two texts one: neither case nor a leading article counts ("A dog", "the dog", "dog")."""
    words = text.lower().split()
    return " ".join(words[1:] if len(words) > 1 and words[0] in ("a", "an", "the") else words)

def load_pixels(image, upright=False):
    """A path or an array as an array (H, W, 3) uint8; as it is stored, or upright as its EXIF tag says. UserError where it is no picture."""
    if isinstance(image, np.ndarray): return image
    with blaming(f"{image}: not readable as a picture"), Image.open(image) as picture:
        picture = ImageOps.exif_transpose(picture) if upright else picture
        if picture.mode.startswith("I"):                       # 16 bits: convert() cuts at 255, and all is white
            picture = Image.fromarray((np.asarray(picture).clip(0, 65535) // 257).astype(np.uint8))
        return np.array(picture.convert("RGB"))

def read_image(image, side, crop=None):
    """A path or an array as a uint8 tensor (3, side, side), squeezed to the square; crop: an rng for a random part of it."""
    image = load_pixels(image)
    pixels = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)
    if crop:
        height, width = (round(edge * crop.uniform(0.7, 1)) for edge in image.shape[:2])
        top, left = crop.randint(0, image.shape[0] - height), crop.randint(0, image.shape[1] - width)
        pixels = pixels[:, top:top + height, left:left + width]
    return pixels if pixels.shape[1:] == (side, side) else torchvision.transforms.v2.functional.resize(pixels, [side, side], antialias=True)

epoch_order = lru_cache(maxsize=2)(lambda n, seed, epoch: torch.randperm(n, generator=torch.Generator().manual_seed(1000 * seed + epoch)).tolist())

class Samples(Dataset):
    """What one image gives to a step, by its position in the run: pixels, a caption, one phrase of it, that phrase's subject, and a
    composite of two of its phrases. A caption without a phrase gives the caption alone, one with a single phrase no composite.
    Of each batch a rank reads its own run of images, and the texts of all: every rank draws the same negatives from them."""
    def __init__(self, records, vocabulary, o):
        self.records, self.vocabulary, self.o, self.scenes = records, vocabulary, o, isinstance(records, Scenes)
        if not self.scenes:                                    # each caption is parsed once
            with blaming("--parses"):
                given = {c.strip(): [(p.text, p.subject) for p in ps] for c, ps in (parser.read_parses(o.parses) if o.parses else {}).items()}
            rows = [[c.strip() for c in r["captions"]] for r in records]
            parsed = cached("parses", rows, lambda: [[phrases_of(c) for c in row] for row in tqdm(rows, desc="parsing", unit="img")], o)
            self.parses = [[given.get(c, phrases) for c, phrases in zip(*both)] for both in zip(rows, parsed)]
            if o.parses:
                print(f"{o.parses}: parses of {sum(c in given for row in rows for c in row)} of {sum(map(len, rows))} captions; others by the rules")

    def __getitem__(self, position):
        (epoch, i), rng, side = divmod(position, len(self.records)), random.Random(f"{self.o.seed} {position}"), self.o.image_size
        i = i if self.scenes else epoch_order(len(self.records), self.o.seed, epoch)[i]
        record, image, bad, composite = self.records[i], None, "", ()
        parses = [phrases_of(c) for c in record["captions"]] if self.scenes else self.parses[i]
        n = rng.randrange(len(parses))
        text = {"caption": record["captions"][n]}
        if parses[n]:
            text["phrase"], text["subject"] = rng.choice(parses[n])
            regions = [p for m, row in enumerate(parses) if m != n for p in row] if self.o.data == "vg" else parses[n]      # a caption is a region
            others = [p for p, _ in regions if key(p) != key(text["phrase"])]
            if others:
                one, two = sorted((text["phrase"], rng.choice(others)), key=text["caption"].find)
                composite = one, two, f"{one} and {two}"
        texts = {level: (ids := encode(self.vocabulary, t), *mask_words(ids, rng, len(self.vocabulary)), key(t)) for level, t in text.items()}
        if position * RANKS // (self.o.batch_size // self.o.accumulate) % RANKS == RANK:
            try:
                image = read_image(record["image"], side, None if self.scenes else rng)
            except UserError as e:                             # grey, and marked: nothing is learnt from it
                image, bad = torch.full((3, side, side), 127, dtype=torch.uint8), str(e)
        every = {"caption": record["captions"], "phrase": [p for row in parses for p, _ in row], "subject": [s for row in parses for _, s in row]}
        return {"image": image, "bad": bad, "name": f"scene {i}" if self.scenes else str(record["image"]), "texts": texts,
                "composite": [encode(self.vocabulary, t) for t in composite], "keys": {level: set(map(key, said)) for level, said in every.items()}}

def collate(samples):
    """Samples as a batch: image (this rank's, 3, side, side) uint8; each level n <= B texts: ids, masked, labels (n, L), rows (n,) of their images.
    positives (B, n): whether the parse of an image has a text, be it another image's: "a dog" describes every picture of one.
    own: the slice of the texts of this rank's images. Where images are not readable also good (this rank's,), and bad {("image", name): why}."""
    mine = [i for i, s in enumerate(samples) if s["image"] is not None]
    batch, bad = {"image": torch.stack([samples[i]["image"] for i in mine])}, {("image", s["name"]): s["bad"] for s in samples if s["bad"]}
    if bad: batch.update(bad=bad, good=torch.tensor([not samples[i]["bad"] for i in mine]))
    own = lambda rows: slice(sum(i < mine[0] for i in rows), sum(i <= mine[-1] for i in rows))
    for level in LEVELS[:3]:
        rows = [i for i, s in enumerate(samples) if level in s["texts"]]
        if rows:
            ids, masked, labels, keys = zip(*(samples[i]["texts"][level] for i in rows))
            batch[level] = {"rows": torch.tensor(rows), "own": own(rows), "ids": pad(ids), "masked": pad(masked), "labels": pad(labels, -100),
                            "positives": torch.tensor([[k in s["keys"][level] for k in keys] for s in samples])}
    rows = [i for i, s in enumerate(samples) if s["composite"]]
    if rows:                                                   # the first parts, the second parts, the composites: (3 n, L)
        ids = pad([samples[i]["composite"][part] for part in range(3) for i in rows])
        batch["composition"] = {"rows": torch.tensor(rows), "ids": ids, "own": own(rows)}
    return batch

def to_device(batch, device):
    """A batch with its tensors on the device; the copies from pinned memory are not waited for."""
    move = lambda v: to_device(v, device) if isinstance(v, dict) else v.to(device, non_blocking=True) if torch.is_tensor(v) else v
    return {k: move(v) for k, v in batch.items()}

# ---------------------------------------------------------------------------------------------------------- model
class Attention(nn.Module):
    """Multi-head attention with its softmax written out: the fused kernel keeps no A to look at, and has no double backward on CPU."""
    def __init__(self, width, heads, source_width=None):
        super().__init__()
        self.heads, self.query, self.out = heads, nn.Linear(width, width), nn.Linear(width, width)
        self.key_value = nn.Linear(source_width or width, 2 * width)
    def keys_values(self, source):
        """source (B, N, source_width) -> (2, B, heads, N, d)."""
        return self.key_value(source).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
    def forward(self, x, keys_values, mask=None):
        """x (B, L, width) looks at (2, B, heads, N, d), where mask (B, 1 or L, N) is True: returns (B, L, width), A (B, heads, L, N)."""
        q, (keys, values) = self.query(x).unflatten(-1, (self.heads, -1)).transpose(1, 2), keys_values     # (B, heads, L, d)
        scores = q @ keys.transpose(-2, -1) / math.sqrt(q.shape[-1])                       # (B, heads, L, N)
        if mask is not None: scores = scores.masked_fill(~mask[:, None], torch.finfo(scores.dtype).min)
        A = scores.softmax(-1)
        return self.out((A @ values).transpose(1, 2).flatten(2)), A

class Layer(nn.Module):
    """A transformer layer, norms first; given an image width, one that also looks at the image; causal, one that can also decode (BLIP):
    then a word sees those before it only, by a self-attention of its own, and all else is shared."""
    def __init__(self, width, image_width=None, causal=False):
        super().__init__()
        heads = max(4, width // 64)
        self.norm, self.attention = nn.LayerNorm(width), Attention(width, heads)
        if image_width: self.cross_norm, self.cross_attention = nn.LayerNorm(width), Attention(width, heads, image_width)
        self.mlp = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        if causal: self.causal_attention = Attention(width, heads)
    def forward(self, x, mask, image=None, causal=False):
        A, normed, mask, attention = None, self.norm(x), mask[:, None], self.causal_attention if causal else self.attention
        x = x + attention(normed, attention.keys_values(normed), mask.expand(-1, x.shape[1], -1).tril() if causal else mask)[0]
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
    embed = partial(timm.layers.HybridEmbed, backbone=stem)
    return timm.models.VisionTransformer(img_size=o.image_size, patch_size=1, embed_layer=embed, embed_dim=w, depth=1, num_heads=4, num_classes=0,
                                         class_token=False, global_pool="max")

class HIST(nn.Module):
    """A small ALBEF: image tokens, text tokens, fusion layers in which text looks at the image, and heads for ITC, ITM and MLM. Or a small
    BLIP (arXiv 2201.12086): its text layers are the fusion layers, without their cross-attention for ITC, with it for ITM, and with causal
    self-attention for LM. Simplified: one [CLS] begins the text of all three, and ends a caption."""
    def __init__(self, o, vocabulary):
        super().__init__()
        self.blip = o.base == "blip"
        with blaming(f"--vit {o.vit} --image-size {o.image_size}{' --pretrained (fetched once, by way of the network)' * o.pretrained}"):
            self.vit = scenes_vit(o) if o.vit == "scenes" else timm.create_model(o.vit, pretrained=o.pretrained, num_classes=0, img_size=o.image_size)
            insist(all(hasattr(self.vit, part) for part in ("patch_embed", "blocks", "num_prefix_tokens")), "no ViT; see timm.list_models('vit*')")
            patch = self.vit.patch_embed.patch_size[0]
            insist(o.image_size % patch == 0, f"the size must be a multiple of its patch, {patch}")
        like = timm.data.resolve_model_data_config(self.vit) if o.vit != "scenes" else {"mean": (0.5,) * 3, "std": (0.5,) * 3}
        self.register_buffer("scale", 255 * torch.tensor(like["std"]).view(3, 1, 1), persistent=False)
        self.register_buffer("shift", torch.tensor(like["mean"]).view(3, 1, 1) / torch.tensor(like["std"]).view(3, 1, 1), persistent=False)
        self.grid, self.prefix, D = self.vit.patch_embed.grid_size, self.vit.num_prefix_tokens, self.vit.embed_dim
        self.words = nn.Embedding(len(vocabulary), o.width)
        self.places = nn.Parameter(0.02 * torch.randn(MAX_TOKENS, o.width))
        self.text = nn.ModuleList(Layer(o.width) for _ in range(o.text_layers))
        self.fusion = nn.ModuleList(Layer(o.width, D, self.blip) for _ in range(o.fusion_layers))
        self.norm = nn.LayerNorm(o.width)
        self.image_projection, self.text_projection = nn.Linear(D, 256), nn.Linear(o.width, 256)
        self.log_temperature = nn.Parameter(torch.tensor(math.log(0.07)))
        self.match_head = nn.Linear(o.width, 2)
        self.word_head = nn.Sequential(nn.Linear(o.width, o.width), nn.GELU(), nn.LayerNorm(o.width), nn.Linear(o.width, len(vocabulary)))
        nn.init.normal_(self.words.weight, std=0.02)
        self.word_head[-1].weight = self.words.weight

    def encode_image(self, images):
        """images (B, 3, side, side) uint8 -> ITC features (B, 256), keys and values for each fusion layer, image tokens V (B, N, D)."""
        V = self.vit.forward_features((images / self.scale - self.shift).float())          # (B, N, D), [CLS] first if there is one
        pooled = self.vit.forward_head(V, pre_logits=True)                                 # (B, D): [CLS], mean or max, as this ViT pools
        return F.normalize(self.image_projection(pooled).float(), dim=-1), self.keys_values(V), V

    def keys_values(self, V):
        """Image tokens V (B, N, D) -> keys and values for each fusion layer [(2, B, heads, N, d), …]."""
        return [f.cross_attention.keys_values(V) for f in self.fusion]

    def encode_text(self, ids):
        """ids (n, L) -> token states to fuse (n, L, width), BLIP's before any layer; mask (n, L); ITC features (n, 256)."""
        mask, T = ids != PAD, (words := self.words(ids) + self.places[:ids.shape[1]])
        for layer in self.fusion if self.blip else self.text: T, _ = layer(T, mask)
        return words if self.blip else T, mask, F.normalize(self.text_projection(T[:, 0]).float(), dim=-1)

    def fuse(self, T, mask, image, rows, causal=False):
        """Texts (n, L, width) with the images of these rows (n,) -> states (n, L, width), cross-attentions [(n, heads, L, N), …]."""
        maps = []
        for layer, keys_values in zip(self.fusion, image):
            T, A = layer(T, mask, keys_values.index_select(1, rows), causal)
            maps.append(A)
        return self.norm(T), maps

    def match(self, T, mask, image, rows):
        """Match logits (n, 2) of texts with the images of these rows, and the cross-attentions behind them."""
        states, maps = self.fuse(T, mask, image, rows)
        return self.match_head(states[:, 0]), maps

    def forward(self, *batch_and_settings):
        """training_losses: what DistributedDataParallel calls."""
        return training_losses(self, *batch_and_settings)

def gather(x, dim=0):
    """x of every rank, one after the other along dim; the gradient of x is the sum of what all ranks send back for it."""
    if RANKS == 1: return x
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(RANKS)]
    torch.distributed.all_gather(parts, x.detach().contiguous())
    whole = torch.cat([*parts[:RANK], x, *parts[RANK + 1:]], dim)
    def summed(gradient):
        total = gradient.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(total)
        return total
    if whole.requires_grad: whole.register_hook(summed)
    return whole

def share(loss, weight, total):
    """A mean over a rank's own texts, weighing weight of total: the mean over ranks of what this returns is the mean over all texts."""
    return loss if RANKS == 1 else loss * RANKS * weight / total.clamp(min=1e-12)

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

@torch.enable_grad()                                           # a map is a gradient, whoever asks for it
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
    weights = ((1 - hardness) * (free / free.sum(1, keepdim=True).clamp(min=1)) + hardness * hard) * free
    some = free.any(1)
    weights = weights + 1e-12 * free + (~some)[:, None]
    return (weights / torch.empty_like(weights).exponential_()).argmax(1), some            # torch.multinomial waits for the device

def itm_loss(logits, labels, weight):
    """Image-text matching: cross-entropy of match logits (n, 2) with labels (n,), 1 for a pair that belongs together; weight (n,)."""
    return (F.cross_entropy(logits, labels, reduction="none") * weight).sum() / weight.sum().clamp(min=1)

def mlm_loss(logits, labels):
    """Language modelling: cross-entropy of word logits (n, L, words) with labels (n, L), the masked words or the next; -100 leaves one out."""
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum") / (labels != -100).sum().clamp(min=1)

def next_words(ids):
    """Labels of causal LM for texts (n, L): at each place the next word; at the last the end, [CLS] again (id 1); at padding (id 0) -100."""
    following = F.pad(ids[:, 1:], (0, 1))
    return following.masked_fill(following == 0, 1).masked_fill(ids == 0, -100)

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
    Each rank encodes its own images, and gathers those of all; fuses its own images' texts, and their negatives from anywhere.
    """
    losses, figures = {}, {}
    own_features, own_image, V = model.encode_image(batch["image"])
    image_features, image = gather(own_features), [gather(keys_values, 1) for keys_values in own_image]
    good = gather(batch.get("good", torch.ones_like(own_features[:, 0], dtype=torch.bool)))
    temperature, device = model.log_temperature.exp().clamp(0.01, 1), good.device
    for level in [level for level in LEVELS[:3] if level in levels and level in batch]:
        text, own = batch[level], batch[level]["own"]
        rows, n = text["rows"], len(text["rows"])
        positives, never = text["positives"] & good[:, None] & good[rows], text["positives"] | ~good[:, None]
        T, mask, text_features = model.encode_text(text["ids"])
        with torch.autocast(device.type, enabled=False):                     # bfloat16 is too coarse for a similarity over 0.07
            losses[f"{level}_itc"] = itc_loss(image_features, text_features, positives, temperature)
            with torch.no_grad():                                            # a wrong image for each text, a wrong text for its image
                similarity = image_features @ text_features.T / temperature
                wrong_image, some_image = draw_negatives(similarity.T, never.T, hardness)
                wrong_text, some_text = draw_negatives(similarity[rows], never[rows], hardness)
        every = torch.arange(n, device=device)
        texts, images = torch.stack([every, every, wrong_text])[:, own].flatten(), torch.stack([rows, wrong_image, rows])[:, own].flatten()
        weight = torch.stack([good[rows], some_image & good[rows], some_text])
        logits, _ = model.match(T[texts], mask[texts], image, images)
        labels = (torch.arange(len(texts), device=device) < len(texts) // 3).long()
        losses[f"{level}_itm"] = share(itm_loss(logits, labels, weight[:, own].flatten()), weight[:, own].sum(), weight.sum())
        if level != "subject":                                               # a subject is one word: nothing would be left to guess it from
            name, read, labels = (("lm", (T[own], mask[own]), next_words(text["ids"])) if model.blip else
                                  ("mlm", model.encode_text(text["masked"][own])[:2], text["labels"]))
            states, _ = model.fuse(*read, image, rows[own], causal=model.blip)
            labels = labels.masked_fill(~good[rows, None], -100)
            losses[f"{level}_{name}"] = share(mlm_loss(model.word_head(states), labels[own]), (labels[own] != -100).sum(), (labels != -100).sum())
    if "composition" in levels and "composition" in batch:
        own, ids = batch["composition"]["own"], batch["composition"]["ids"]
        rows, ids = batch["composition"]["rows"][own], ids.view(3, -1, ids.shape[1])[:, own].flatten(0, 1)
        with torch.autocast(device.type, enabled=False):                     # a loss on a gradient wants all of float32
            image, n = [keys_values.float() for keys_values in image], len(rows)
            T, mask, _ = model.encode_text(ids)
            teacher = teacher or model                         # with no other the parts' maps flatten along with the composite's
            with torch.no_grad():
                seen, said = [gather(kv, 1) for kv in teacher.keys_values(V.float())], teacher.encode_text(ids)[0]
            parts, found = locate(teacher, said[:2 * n], mask[:2 * n], seen, rows.repeat(2), cam_layer)
            whole, _ = locate(model, T[2 * n:], mask[2 * n:], image, rows, cam_layer, create_graph=True)
            weight = found[:n] * found[n:] * good[rows]
            losses["composition"] = share(composition_loss(parts[:n], parts[n:], whole, weight), weight.sum(), gather(weight.sum()[None]).sum())
        maps = whole.detach().flatten(1)
        entropy = torch.special.entr(maps / maps.sum(1, keepdim=True).clamp(min=1e-12)).sum(1) / math.log(maps.shape[1])
        figures = {"map_mass": maps.sum(1).mean(), "pair_weight": weight.mean(), "map_entropy": entropy.mean()}
    return losses, figures

# ------------------------------------------------------------------------------------------------------- measures
def pointing_game(heat, region):
    """Whether the highest point of a map (height, width) lies in a region (height, width) of truth (Zhang et al., arXiv 1608.00507)."""
    return bool(region.reshape(-1)[heat.argmax()])

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
    for x0, y0, x1, y1 in np.clip(boxes, 0, side): filled[math.floor(y0):math.ceil(y1), math.floor(x0):math.ceil(x1)] = True
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

@torch.no_grad()
def maps_of(model, vocabulary, images, texts, rows, o):
    """Maps at pixel size (n, side, side), bicubic, of n texts over the images (B, 3, side, side) of these rows; match probabilities (n,)."""
    model.eval()
    image = model.encode_image(images)[1]
    T, mask, _ = model.encode_text(pad([encode(vocabulary, t) for t in texts]).to(images.device))
    maps, match = locate(model, T, mask, image, torch.tensor(rows, device=images.device), o.cam_layer)
    big = F.interpolate(maps.detach()[:, None].float(), size=images.shape[2:], mode="bicubic")[:, 0]
    return big.clamp(min=0).cpu().numpy(), match.tolist()

def answer(model, vocabulary, images, questions):
    """Answers to questions [(row, kind, cloze, choices, answer), ...] about images (B, 3, side, side): the choice that the language head, or
    BLIP's decoder, thinks likeliest at [MASK]; without [MASK], of two choices the second where text and image match."""
    image, answers = model.encode_image(images)[1], []
    for row, _, cloze, choices, _ in questions:
        lm = model.blip and "[MASK]" in cloze                  # the next word, where [MASK] is last; else each sentence as a whole
        texts = [cloze.replace("[MASK]", c) for c in choices] if lm and not cloze.endswith("[MASK]") else [cloze]
        ids = pad([encode(vocabulary, text) for text in texts]).to(images.device)
        states, _ = model.fuse(*model.encode_text(ids)[:2], image, torch.full_like(ids[:, 0], row), causal=lm)
        if MASK in ids: score = model.word_head(states[0, ids[0].tolist().index(MASK) - lm])[[vocabulary.get(c, UNK) for c in choices]]
        elif lm: score = -F.cross_entropy(model.word_head(states).transpose(1, 2), next_words(ids), reduction="none").sum(1)
        else: score = model.match_head(states[0, 0])
        answers.append(choices[int(score.argmax())])
    return answers

@torch.no_grad()
def generate(model, vocabulary, image, top_p=0):
    """A caption of an image (3, side, side), word by word: the likeliest, or one drawn from the likeliest whose probability is top_p together."""
    ids, words = torch.tensor([[CLS]], device=image.device), list(vocabulary)
    model.eval()
    keys_values = model.encode_image(image[None])[1]
    while ids.shape[1] < MAX_TOKENS and (ids.shape[1] == 1 or ids[0, -1] != CLS):
        states, _ = model.fuse(*model.encode_text(ids)[:2], keys_values, torch.zeros_like(ids[:, 0]), causal=True)
        logits = model.word_head(states[0, -1]).index_fill(0, torch.tensor([PAD, MASK, UNK], device=image.device), -torch.inf)
        probability, order = logits.softmax(-1).sort(descending=True)
        probability[1:][probability.cumsum(0)[:-1] >= top_p] = 0           # nucleus sampling (arXiv 1904.09751)
        ids = torch.cat([ids, order[torch.multinomial(probability, 1)][None]], 1)
    return " ".join(words[i] for i in ids[0].tolist() if i != CLS)

def rerank(model, images, T, mask, similarity, k=16):
    """ITM probabilities of each image (N of them, a callable gives a slice) with its k captions that ITC likes best, and of each
    caption with its k images: two (N, texts), -inf elsewhere (ALBEF, section 5)."""
    N, M = similarity.shape
    best = [torch.zeros_like(similarity, dtype=torch.bool).scatter_(d, similarity.topk(min(k, (M, N)[1 - d]), dim=d).indices, True) for d in (1, 0)]
    score = torch.full_like(similarity, -torch.inf)
    for start in range(0, N, 32):
        image = model.encode_image(images(start, start + 32))[1]
        for pairs in (best[0] | best[1])[start:start + 32].nonzero().split(512):
            logits, _ = model.match(T[pairs[:, 1]], mask[pairs[:, 1]], image, pairs[:, 0])
            score[start + pairs[:, 0], pairs[:, 1]] = logits.softmax(-1)[:, 1]
    return [score.masked_fill(~chosen, -torch.inf) for chosen in best]

@torch.no_grad()
def evaluate(model, vocabulary, records, o):
    """Every measure on held-out records, {name: 0 to 1}; and the pairs of targets behind two of them, [(image, balance, area of the union,
    IoU at each threshold, areas (2,), masses (2,)), ...]. "..._chance": what pointing at a random target of the image (R@1: a random image;
    questions: a random choice) would get; "..._chance_pixel": at any pixel (IoU: marking all). The IoU's threshold suits the other half of them."""
    side, device, rng = o.image_size, next(model.parameters()).device, random.Random(0)
    counts, pairs, features, captions = {}, [], [], [(i, c) for i, r in enumerate(records) for c in r["captions"]]
    load = lambda start, end: torch.stack([read_image(r["image"], side) for r in records[start:end]]).to(device)
    model.eval()
    for start in tqdm(range(0, len(records), 32), desc="evaluating", unit_scale=32, unit="img", leave=False):
        batch, images = records[start:start + 32], load(start, start + 32)
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
            hit = pointing_game(heat, boxes), chance, pointing_game(heat, mask), boxes.mean()
            for kind in kinds: counts.setdefault(f"pointing_{kind}", []).append(hit)
            if not kinds:
                areas, masses = zip(*((t[2].mean(), heat[t[2]].sum() / max(heat.sum(), 1e-12)) for t in named))
                pairs.append((start + row, balance(heat, named[0][2], named[1][2]), mask.mean(), multi_object_iou(heat, mask), areas, masses))
        questions = [(row, *q) for row, r in enumerate(batch) for q in r.get("questions", [])]
        for (_, kind, _, choices, true), said in zip(questions, answer(model, vocabulary, images, questions) if questions else ()):
            counts.setdefault(f"vqa_{kind}", []).append((said == true, 1 / len(choices)))
    result = {f"{k}{name}": v for k, rows in counts.items() for name, v in zip(("", "_chance", "_in_mask", "_chance_pixel"), np.mean(rows, 0))}
    if pairs:
        image, balances, area, iou = (np.array(column) for column in zip(*(p[:4] for p in pairs)))
        best = [iou[image % 2 != half].mean(0).argmax() if (image % 2 != half).any() else 9 for half in (0, 1)]
        result.update(multi_object_iou=iou[np.arange(len(iou)), np.array(best)[image % 2]].mean(), multi_object_iou_chance_pixel=area.mean(),
                      balance=balances.mean())
    T, mask, text_features = model.encode_text(pad([encode(vocabulary, c) for _, c in captions]).to(device))
    similarity, owner = torch.cat(features) @ text_features.T, torch.tensor([i for i, _ in captions], device=device)
    for name, (to_text, to_image) in (("", (similarity, similarity)), ("_itm", rerank(model, load, T, mask, similarity))):
        result[f"r1_image_to_text{name}"] = (owner[to_text.argmax(1)] == torch.arange(len(records), device=device)).float().mean()
        result[f"r1_text_to_image{name}"] = (to_image.argmax(0) == owner).float().mean()
        result[f"r1_image_to_text{name}_chance"] = result[f"r1_text_to_image{name}_chance"] = 1 / len(records)
    kinds = [k for k in counts if k.startswith("vqa_")]
    result |= {f"vqa{name}": np.mean([result[f"{kind}{name}"] for kind in kinds]) for name in ("", "_chance") if kinds}
    return {k: round(float(v), 5) for k, v in result.items()}, pairs

# ------------------------------------------------------------------------------------------------------- pictures
def draw_grounding(models, vocabulary, records, o, path):
    """Where each model looks in the first eight records with two things to name (or else one): a row a record of the image, then for each model
    the map of each phrase and of all together, in brackets the probability that they match, and the target as a white line."""
    things = lambda r: r.get("phrases") or ([t["phrase"] for t in r["targets"]] or [phrase for phrase, _ in phrases_of(r["captions"][0])])[:2]
    chosen, rows = ([r for r in records if len(things(r)) > 1] or [r for r in records if things(r)])[:8], []
    for r in chosen:
        picture, phrases = load_pixels(r["image"]), things(r)
        texts, regions = phrases + [" and ".join(phrases)] * (len(phrases) > 1), [boxes for _, boxes, _ in truth(r, o.image_size)[:2]]
        regions = regions + [np.logical_or.reduce(regions)] if regions else [None] * len(texts)
        rows.append([(picture, (r["captions"][0], None, None))])
        for name, model in models.items():
            maps, match = maps_of(model, vocabulary, read_image(picture, o.image_size)[None].to(o.device), texts, [0] * len(texts), o)
            rows[-1] += [(picture, (f"{name}: {text} ({m:.2f})", heat, region)) for text, m, heat, region in zip(texts, match, maps, regions)]
    if not rows: return
    figure = Figure(figsize=(2.6 * len(rows[0]), 2.75 * len(rows) + 1), layout="constrained")
    axes = figure.subplots(len(rows), len(rows[0]), squeeze=False)
    for ax, (picture, (text, heat, region)) in zip(axes.flat, itertools.chain(*rows)):
        shown = partial(ax.imshow, extent=(0, 1, 1, 0), aspect=picture.shape[0] / picture.shape[1])
        shown(picture)
        if heat is not None:
            colours = shown(heat / max(heat.max(), 1e-12), cmap="inferno", alpha=0.7, vmin=0, vmax=1)
            y, x = divmod(int(heat.argmax()), heat.shape[1])
            ax.plot((x + 0.5) / heat.shape[1], (y + 0.5) / heat.shape[0], "x", color="cyan", markersize=9, markeredgewidth=2)
        if region is not None: ax.contour(region, [0.5], extent=(0, 1, 0, 1), colors="white", linewidths=1.5)
        ax.set_title(textwrap.fill(text, 32), fontsize=9, parse_math=False)
        ax.set_axis_off()
    figure.colorbar(colours, ax=axes, location="bottom", shrink=0.6, aspect=50, pad=0.05 / len(rows),
                    label="Grad-CAM, share of each map's maximum (cross: its highest point; white line: the target)")
    figure.suptitle("Where each model looks for a phrase, and for several (in brackets: the probability that it matches)")
    figure.savefig(path, dpi=100, bbox_inches="tight")

def draw_balance(pairs, path):
    """For each model, how the map of a pair divides: the larger object's share of both masses against its share of both areas, and the balance."""
    figure = Figure(figsize=(5 * len(pairs) + 5, 4.5), layout="constrained")
    *scatters, histogram = figure.subplots(1, len(pairs) + 1)
    for colour, (ax, (name, rows)) in enumerate(zip(scatters, pairs.items())):
        balances, areas, masses = (np.array([p[k] for p in rows]) for k in (1, 4, 5))
        larger = areas.argmax(1)[:, None]
        share = lambda v: np.take_along_axis(v, larger, 1)[:, 0] / np.maximum(v.sum(1), 1e-12)
        ax.scatter(share(areas), share(masses), s=6, alpha=0.4, color=f"C{colour}")
        ax.axhline(0.5, color="grey", linewidth=1)
        ax.set(title=f"{name}: the larger of two objects", xlabel="its share of both areas", ylabel="its share of the map's mass", ylim=(0, 1))
        histogram.hist(balances, np.linspace(0, 1, 21), histtype="step", linewidth=2, color=f"C{colour}", label=f"{name}: {np.mean(balances):.2f}")
    histogram.set(title="balance of a pair's map (1: both get as much)", xlabel="smaller share over larger", ylabel="pairs")
    histogram.legend(title="mean")
    figure.savefig(path, dpi=100)

def draw_curves(metrics, path):
    """The losses of metrics.jsonl against the step, a panel a loss, a line a training; each point the mean of a fiftieth."""
    points, runs = {}, []                                      # {loss: {training: [(step, value), …]}}
    for line in [line for line in read_metrics(metrics) if "losses" in line]:
        runs += [line["run"]] * (line["run"] not in runs)
        for name, value in line["losses"].items(): points.setdefault(name, {}).setdefault(line["run"], []).append((line["step"], value))
    figure = Figure(figsize=(12, 2.6 * math.ceil(len(points) / 3)), layout="constrained")
    for n, (name, lines) in enumerate(points.items(), 1):
        ax = figure.add_subplot(math.ceil(len(points) / 3), 3, n, title=f"{name.replace('_', ' ')} loss", xlabel="step")
        for run, values in lines.items():
            parts = np.array_split(np.array(values), min(50, len(values)))
            ax.plot(*np.array([part.mean(0) for part in parts]).T, color=f"C{runs.index(run)}", label=run)
        ax.legend()
    figure.savefig(path, dpi=100)

# ------------------------------------------------------------------------------------------------------- training
def write_whole(path, data):
    """Write text, or an object as torch.save does, to a temporary file that then becomes path: what path names is whole, or as it was before."""
    part = path.with_name(path.name + ".tmp")
    part.parent.mkdir(parents=True, exist_ok=True)
    try:
        with blaming(f"{path} could not be written; the one before is {'kept' if path.exists() else 'not there'}"), open(part, "wb") as f:
            f.write(data.encode()) if isinstance(data, str) else torch.save(data, f)
            f.flush()
            os.fsync(f.fileno())
            os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)

def read_metrics(path):
    """The objects of metrics.jsonl; a last line cut short, by a kill or a full disk, is left out."""
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")] if path.exists() else []

def peak_memory(o):
    """The most memory, in GiB, that this process has held: the GPU's, or else the machine's."""
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return (torch.cuda.max_memory_allocated() if o.device == "cuda" else own) / 2 ** 30

def restore(path, o):
    """(model, vocabulary, checkpoint) from what torch.save wrote, no code run, and options that fit it."""
    with blaming(f"{path} is no checkpoint of hist.py, or does not fit the options given"):
        saved = torch.load(path, map_location=o.device, weights_only=True)
        vocabulary = {w: i for i, w in enumerate(saved["vocabulary"])}
        model = HIST(replace(o, pretrained=False), vocabulary).to(o.device)
        model.load_state_dict(saved["model"])
    return model, vocabulary, saved

def ignore_interrupt(worker):
    """Ctrl-C is the main process's to answer: a process that loads images goes on with the step, and ends when it is told to."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

@contextmanager
def interrupts():
    """A list in which Ctrl-C, or SIGTERM, leaves a mark, so that neither cuts a step in two; on one process a second Ctrl-C is not waited for."""
    stop, mark = [], lambda *_: stop.append(RANKS > 1 or signal.signal(signal.SIGINT, signal.default_int_handler))
    with ExitStack() as after:
        for s in (signal.SIGINT, signal.SIGTERM): after.callback(signal.signal, s, signal.signal(s, mark))
        yield stop

def loader(samples, o, start, end):
    """The batches, or the --accumulate parts of them, of positions start to end of the run; one iterator keeps its processes to the end."""
    return iter(DataLoader(samples, batch_size=o.batch_size // o.accumulate, sampler=range(start, end), collate_fn=collate, num_workers=o.workers,
                           pin_memory=o.device == "cuda", prefetch_factor=4 if o.workers else None, worker_init_fn=ignore_interrupt,
                           generator=torch.Generator()))       # its own generator: ours is the checkpoint's

def train(name, levels, samples, o, steps):
    """Train one model with these levels, or go on from its checkpoint; returns (model, seconds of training). All but "base" go on from base.pt, with
    images after its own, or with no --base-steps from weights by o.seed: they start alike, and see the same images and captions in the same order."""
    out, B, cuda = Path(o.out), o.batch_size, o.device == "cuda"
    path, metrics, base = out / f"{name}.pt", out / "metrics.jsonl", o.base_steps and name != "base"
    first, start, seconds, again = o.base_steps if base else 0, 0, 0.0, o.resume and path.exists()
    torch.manual_seed(o.seed)
    if again or base:
        model, vocabulary, saved = restore(path if again else out / "base.pt", o)
        insist(vocabulary == samples.vocabulary, f"{path} was trained on other captions: --resume goes on with the same --data")
    else: model = HIST(o, samples.vocabulary).to(o.device)
    if RANKS > 1 and cuda: model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    if o.compile: model.vit.blocks.compile()                   # in place: a copy has its own; the rest has new lengths, and second derivatives
    optimizer = torch.optim.AdamW(model.parameters(), lr=o.lr / (2 if base else 1), weight_decay=0.02, betas=(0.9, 0.98), fused=o.device != "mps")
    warmup, cosine = max(1, min(100, steps // 10)), lambda step: max(0.01, (1 + math.cos(math.pi * step / max(1, steps))) / 2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / warmup) * cosine(step))
    if again:
        start, seconds = saved["step"], saved["seconds"]
        optimizer.load_state_dict(saved["optimizer"])
        schedule.load_state_dict(saved["schedule"])
        torch.set_rng_state(saved["random"]["cpu"].cpu())
        if cuda and saved["random"]["cuda"] is not None: torch.cuda.set_rng_state(saved["random"]["cuda"].cpu())
    if not RANK:
        kept = [k for k in read_metrics(metrics) if k["run"] != name or k["step"] <= start and "losses" in k]
        write_whole(metrics, "".join(json.dumps(k) + "\n" for k in kept))
    batches = loader(samples, o, (first + start) * B, (first + steps) * B)
    whole = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True) if RANKS > 1 else model
    model.train()
    teacher = copy.deepcopy(model).eval() if again and saved["teacher"] else None
    if teacher: teacher.load_state_dict(saved["teacher"])
    waiting, begun, unread, kept = [], time.time() - seconds, {}, start
    bar = tqdm(total=steps * B, initial=start * B, unit="img", desc=name, smoothing=0.05, disable=RANK > 0)
    with open(os.devnull if RANK else metrics, "a") as log, bar, interrupts() as stop:
        for step in range(start, steps):
            done = (first + step) / (o.base_steps + o.steps)               # of the whole, base and what follows
            hardness = 0.5 * min(1, max(0, (done - 0.5) / 0.3))    # hard negatives from the first step leave the match head at chance
            weight = o.composition_weight * min(1, max(0, (done - o.composition_start) / 0.1))
            now, shown = [level for level in levels if level != "composition" or weight > 0], {}
            if "composition" in now and teacher is None: teacher = copy.deepcopy(model).eval()      # of the weights as composition sets in
            optimizer.zero_grad()
            for part in range(o.accumulate):
                batch = next(batches)
                unread.update(batch.pop("bad", {}))
                whole.require_backward_grad_sync = part == o.accumulate - 1       # ranks average their gradients once a step
                with torch.autocast(o.device, torch.bfloat16, enabled=cuda):
                    losses, figures = whole(to_device(batch, o.device), now, hardness, o.cam_layer, teacher)
                loss = sum((weight * v if k == "composition" else v for k, v in losses.items()), start=0 * model.log_temperature)
                (loss / o.accumulate).backward()
                for k, v in (losses | figures).items(): shown[k] = shown.get(k, 0) + v.detach() / o.accumulate
            shown["gradient"] = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            waiting.append((step + 1, shown))
            bar.update(B)
            save = step + 1 == steps or (step + 1) % o.save_every == 0
            if save or len(waiting) == 10 or stop and RANKS == 1:          # the only wait for the device, once in ten steps
                values = torch.stack([v.float() for _, row in waiting for v in row.values()] + [torch.tensor(float(len(stop)), device=o.device)])
                if RANKS > 1: torch.distributed.all_reduce(values)   # all log the mean, and stop at one step
                values = iter((values / RANKS).tolist())
                for n, shown in waiting:
                    shown = {k: next(values) for k in shown}
                    losses = {k: round(v, 5) for k, v in shown.items() if k.split("_")[0] in LEVELS}
                    wrong = [k for k, v in shown.items() if not math.isfinite(v) and (k in losses or k == "gradient")]
                    if wrong:
                        names = ", ".join(samples[p]["name"] for p in range((first + n - 1) * B, (first + n) * B))
                        raise UserError(f"step {n} of {name}: {', '.join(wrong)} not finite; the checkpoint {path} is of step {kept or 'none'}; "
                                        f"a lower --lr may help, or a look at that step's images: {names}")
                    log.write(json.dumps({"run": name, "step": n, "losses": losses, **{k: v for k, v in shown.items() if k not in losses}}) + "\n")
                bar.set_postfix_str(" ".join(f"{k} {v:.2f}" for k, v in losses.items()))
                leave_out(unread, o, len(samples.records))
                waiting, halt = [], next(values) > 0
                if save or halt:
                    seconds, kept = time.time() - begun, step + 1
                    log.flush()
                    if not RANK:
                        write_whole(path, {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict(),
                                           "teacher": teacher and teacher.state_dict(), "step": kept, "seconds": seconds, "options": asdict(o),
                                           "random": {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state() if cuda else None},
                                           "vocabulary": list(samples.vocabulary)})
                if halt: raise KeyboardInterrupt
    if RANKS > 1: torch.distributed.barrier()                  # the checkpoint is there before anyone goes on from it
    return model, seconds

# ----------------------------------------------------------------------------------------------------------- main
TABLE = {"pointing_phrases": "pointing, phrases", "pointing_subjects": "pointing, subjects", "pointing_shared_colour": "  colour shared",
         "pointing_shared_shape": "  shape shared", "pointing_unseen": "  pair never seen", "multi_object_iou": "multi-object IoU",
         "balance": "balance", "r1_image_to_text": "R@1, image to text", "r1_text_to_image": "R@1, text to image",
         "r1_image_to_text_itm": "  ITM: i. to t.", "r1_text_to_image_itm": "  ITM: t. to i.", "vqa": "VQA, mean", "vqa_colour": "  colour",
         "vqa_shape": "  shape", "vqa_is_there": "  is there", "vqa_count": "  count", "seconds": "seconds of training"}

def table(results):
    """The results {training: {measure: value}} as text: a measure a line, a training a column, and what chance gives."""
    first = next(iter(results.values()))
    columns = {**results, "chance": {k: first.get(f"{k}_chance") for k in first}, "any pixel": {k: first.get(f"{k}_chance_pixel") for k in first}}
    show = lambda k, v: f"{'' if v is None else round(v) if k == 'seconds' else f'{100 * v:.1f}':>15}"
    rows = [f"{title:20}" + "".join(show(k, column[k]) for column in columns.values()) for k, title in TABLE.items() if k in first]
    return "\n".join([f"{'':20}" + "".join(f"{name:>15}" for name in columns), *rows])

def command_line(argv=None):
    """What was typed, {option: value}; only what was typed, since the defaults depend on the data and a checkpoint has its own."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=partial(argparse.RawDescriptionHelpFormatter, width=150, max_help_position=29))
    for f in fields(Options):
        kind = {bool: dict(action="store_true"), list: dict(nargs="+", metavar="ARG")}.get(f.type, dict(type=f.type, metavar=f.type.__name__.upper()))
        shown = f" [{f.default}]" if f.default not in (0, -1, "", None) else ""
        p.add_argument("--" + f.name.replace("_", "-"), default=argparse.SUPPRESS, help=f.metadata["help"] + shown, **kind)
    p.error = lambda message: insist(False, f"{message}; python hist.py --help lists the options")
    return vars(p.parse_args(argv))

def settle(given):
    """Options from what was typed, then of the run that it goes on from, if any, then what suits the data."""
    o = Options(**given)
    o.out = o.out or ("out/ablation" if o.ablate else f"out/{Path(o.data).stem}") + "-blip" * (o.base == "blip")
    look_at = o.ground or o.caption or o.eval
    if o.resume or o.eval_only or look_at:
        anywhere = "*-blip/*.pt" if o.caption else "*/*.pt"
        where, pattern = ("out", anywhere) if look_at and not {"out", "data", "base"} & set(given) else (o.out, "*.pt")
        found = sorted(Path(where).glob(pattern), key=lambda path: path.stat().st_mtime)
        folder = found[-1].parent if found else Path(o.out)    # killed before its first checkpoint, a run begins again
        insist((folder / "options.json").exists() and (found or o.resume),
               f"no checkpoint of hist.py in {where}: train first{' with --base blip' * bool(o.caption)}, or say --out FOLDER")
        once = dict(resume=False, eval_only=False, ablate=False, bench=False, ground=None, caption="", eval="", download=False, device="auto")
        o = Options(**{**json.loads((folder / "options.json").read_text()), **once, **({"root": ""} if o.eval else {}), **given, "out": str(folder)})
    for name, value in (SCENES if o.data == "scenes" else PHOTOS).items():
        if getattr(o, name) == getattr(Options, name): setattr(o, name, value)
    o.root = o.root or f"data/{o.eval or o.data}"
    if o.base == "blip": o.text_layers, o.fusion_layers = 0, o.text_layers + o.fusion_layers       # its text layers are all fusion layers
    if o.cam_layer == -1: o.cam_layer = (o.fusion_layers - 1) // (1 if o.data == "scenes" and o.base == "albef" else 2)     # ALBEF: the third of six
    here = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    o.device = next(d for d in here if here[d]) if o.device == "auto" else o.device
    for f in fields(o):
        least, value = f.metadata["least"], getattr(o, f.name)
        insist(least is None or value >= least, f"--{f.name.replace('_', '-')} {value}: at least {least}, please")
    insist(o.width % max(4, o.width // 64) == 0, f"--width {o.width}: take a multiple of 64, so that its heads are of one size")
    insist(0 <= o.cam_layer < o.fusion_layers, f"--cam-layer {o.cam_layer}: there are {o.fusion_layers} fusion layers, 0 the first")
    insist(o.base in ("albef", "blip"), f"--base {o.base}: albef or blip")
    insist(set(o.levels.split(",")) <= set(LEVELS), f"--levels {o.levels}: the levels are {','.join(LEVELS)}")
    insist(not o.parses or o.data != "scenes", "--parses: scenes are drawn without end and parsed as they come; say --data coco or --data FILE.jsonl")
    insist(not o.pretrained or o.vit != "scenes", "--pretrained: the model of the scenes has no pretrained weights; say --vit NAME")
    insist(o.batch_size % (o.accumulate * RANKS) == 0, f"--batch-size {o.batch_size}: take a multiple of --accumulate {o.accumulate} x {RANKS} GPUs")
    insist(RANKS == 1 or not (o.ablate or o.bench or o.eval), "--ablate, --bench and --eval run on one GPU: start them without torchrun")
    insist(not o.exclude or o.data == "vg", "--exclude goes with --data vg")
    insist(here.get(o.device), f"--device {o.device}: auto, or what this machine has: {', '.join(d for d in here if here[d])}")
    return o

def look(o):
    """--ground PICTURE PHRASE … and --caption PICTURE: where the last trained model looks in a person's own picture, or what it says of it."""
    picture, *phrases = o.ground or [o.caption]
    insist(phrases or o.caption, '--ground PICTURE "a red circle" "a blue star": say at least one phrase')
    insist(Path(picture).is_file(), f"there is no picture {picture}")
    path, pixels = Path(o.out) / ("hist.pt" if (Path(o.out) / "hist.pt").exists() else "baseline.pt"), load_pixels(picture, upright=True)
    model, vocabulary, _ = restore(path, o)
    if o.caption:
        insist(model.blip, f"--caption: the model in {o.out} has no decoder; train one with --base blip")
        torch.manual_seed(o.seed)
        return print(generate(model, vocabulary, read_image(pixels, o.image_size).to(o.device), o.top_p))
    new = sorted({w for p in phrases for w in split_words(p)} - set(vocabulary))
    if new: print(f"not in the vocabulary, read as [UNK]: {', '.join(new)}", file=sys.stderr)
    record = {"image": pixels, "captions": [Path(picture).name], "targets": [], "phrases": phrases}
    draw_grounding({path.stem: model}, vocabulary, [record], o, path.with_name("ground.png"))
    print(path.with_name("ground.png"))

def prepare(o):
    """(samples to train on, held-out records) of a run, its folder made and its options settled."""
    if RANK: torch.distributed.barrier()                       # rank 0 is first: it clears the folder and fills the caches
    out, fresh = Path(o.out), not (o.resume or o.bench or RANK)
    if fresh: (out / "skipped.jsonl").unlink(missing_ok=True)
    records, held_out = load_data(o)
    held_out = readable(held_out, o)
    o.batch_size = min(o.batch_size, len(records) // (RANKS * o.accumulate) * RANKS * o.accumulate)
    insist(o.batch_size, f"{o.data}: {len(records)} images to train on are too few for {RANKS} GPUs and --accumulate {o.accumulate}")
    o.steps = o.steps or max(1, 10 * len(records) // o.batch_size)
    captions = [c for i in (range(100_000, 102_000) if o.data == "scenes" else range(len(records))) for c in records[i]["captions"]]
    samples = Samples(records, cached(f"{o.vocab_size} words", captions, lambda: build_vocabulary(captions, o.vocab_size), o), o)
    HIST(o, samples.vocabulary)                                # options that build no model stop here, before the last run goes
    for old in (out / "options.json", *out.glob("*.pt"), out / "metrics.jsonl") if fresh else (): old.unlink(missing_ok=True)
    if not RANK and not o.bench: write_whole(out / "options.json", json.dumps(asdict(o), indent=1))
    if RANKS > 1 and not RANK: torch.distributed.barrier()
    return samples, held_out

def run(o):
    """Train the models, or none with --eval-only, evaluate them on the same held-out records, write the table and the pictures."""
    out, models, results, pairs = Path(o.out), {}, {}, {}
    levels = {"baseline": ("caption",), "hist": tuple(o.levels.split(","))}
    if o.eval_only: held_out = readable(load_data(o)[1], o)
    else:
        samples, held_out = prepare(o)
        if o.base_steps: train("base", ("caption",), samples, o, o.base_steps)
        for name in levels if levels["hist"] != levels["baseline"] else ["baseline"]: train(name, levels[name], samples, o, o.steps)
    for name in [name for name in levels if (out / f"{name}.pt").exists() and not RANK]:
        models[name], vocabulary, saved = restore(out / f"{name}.pt", o)
        measured, pairs[name] = evaluate(models[name], vocabulary, held_out, o)
        results[name] = {"seconds": saved["seconds"], **measured}
        with open(out / "metrics.jsonl", "a") as log: log.write(json.dumps({"run": name, "step": o.steps, "evaluation": results[name]}) + "\n")
    if RANK: return
    write_whole(out / "results.json", json.dumps(results, indent=1))
    print(f"\n{o.data}: {len(held_out)} held-out images, {o.base_steps} steps with captions alone, then {o.steps}, of {o.batch_size} images, "
          f"seed {o.seed}, {o.device}, at most {peak_memory(o):.1f} GiB of memory; percent but for seconds\n\n{table(results)}\n")
    if not any(r["targets"] for r in held_out): print("these records have no targets: there is nothing to point at, retrieval alone is measured")
    draw_curves(out / "metrics.jsonl", out / "curves.png")
    draw_grounding(models, vocabulary, held_out, o, out / "grounding.png")
    if any(pairs.values()):
        draw_balance(pairs, out / "balance.png")
        image, iou = (np.array([p[k] for p in pairs[name]]) for k in (0, 3))
        iou = iou[:, iou.mean(0).argmax()]                     # of each pair of the last model, at the one threshold best for all
        worst = sorted(np.unique(image), key=lambda i: iou[image == i].mean())[:4]
        draw_grounding(models, vocabulary, [held_out[i] for i in worst], o, out / "worst.png")
    if o.data == "vqa": beside("benchmarks", replace(o, eval="vqa"))
    print(f"in {out}: {' '.join(sorted(p.name for p in out.iterdir()))}")

def beside(name, o, what=None):
    """--bench, --ablate, --eval and the other data sets stand with the tests, as tests/bench.py and so on, and work on this very module."""
    sys.modules["hist"] = sys.modules[__name__]
    sys.path.insert(0, str(Path(__file__).with_name("tests")))
    return getattr(importlib.import_module(name), what or name)(o)

def main(argv=None):
    """Do what was typed; a mistake, a full disk or too little memory ends it with one line and status 2, Ctrl-C with the command that resumes."""
    o = None
    try:
        o = settle(command_line(argv))
        if o.device == "cuda": torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        if RANKS > 1: torch.distributed.init_process_group("nccl" if o.device == "cuda" else "gloo")
        task = o.bench and "bench" or o.ablate and "ablation" or o.eval and "benchmarks"
        look(o) if o.ground or o.caption else beside(task, o) if task else run(o)
        if RANKS > 1: torch.distributed.destroy_process_group()        # or a thread of it may outlive the interpreter, and abort
    except KeyboardInterrupt:
        begun = o and (Path(o.out) / "options.json").exists()
        again = sys.argv[1:] if o and o.ablate else ["--resume", "--out", o.out, "--device", o.device] if begun else []
        print("hist.py: stopped" + f"; python hist.py {shlex.join(again)} goes on" * bool(again), file=sys.stderr)
        sys.exit(130)
    except (UserError, OSError, MemoryError, RuntimeError) as e:
        said = str(e).split("UserError: ")[-1]                 # a process that loads images wraps its error in a traceback
        if isinstance(e, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in said:
            said = f"out of memory: lower --batch-size {o.batch_size} or --image-size {o.image_size}, or raise --accumulate ({said[:99]})"
        elif isinstance(e, RuntimeError) and said == str(e):
            raise                                              # no mistake of the person's: the traceback is wanted
        print("hist.py: " + " ".join(said.split()), file=sys.stderr)
        sys.exit(2)

if __name__ == "__main__": main()
