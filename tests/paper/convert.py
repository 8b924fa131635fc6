"""Published data sets as hist.py's records: ROOT/NAME.jsonl, of the files as unpacked in ROOT.

    python -m tests.paper.convert vg data/vg --exclude ids.txt
    python hist.py --data data/vg/vg.jsonl                             trains, and evaluates
    python hist.py --eval-only --data data/vg/vg.jsonl --out out/vg    the benchmark alone

No image is opened. What cannot be used is listed in ROOT/NAME.skipped.jsonl. ROOT holds, for NAME
    vg: region_descriptions.json, VG_100K/, VG_100K_2/; image_data.json to --exclude by COCO's ids
        homes.cs.washington.edu/~ranjay/visualgenome/api.html
    flickr30k: train.txt, val.txt, test.txt, Sentences/, Annotations/, flickr30k-images/
        github.com/BryanPlummer/flickr30k_entities; images: shannon.cs.illinois.edu/DenotationGraph
    refcoco, refcoco+, refcocog, refclef (ReferIt): NAME/instances.json; NAME/refs(unc).p (umd for
        refcocog, berkeley for refclef); train2014/, for refclef saiapr_tc-12/, perhaps in images/
        github.com/lichengunc/refer
    karpathy: dataset_coco.json, train2014/, val2014/; its test images are written
        cs.stanford.edu/people/karpathy/deepimagesent
    vqa: v2_OpenEnded_mscoco_{train,val}2014_questions.json, train2014/, val2014/,
        v2_mscoco_{train,val}2014_annotations.json; visualqa.org/download.html
    coco: nothing; COCO 2017, which hist.py reads itself, is fetched (20 GB; cocodataset.org)
"""

import argparse
import json
import math
import os
import pickle
import re
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
from torchvision.datasets.utils import download_and_extract_archive

import hist
import parse
from hist import UserError, blaming, insist

# ------------------------------------------------------------------------------------------ checks
ENDLESS = (math.inf, math.inf)  # height and width of a picture that nobody has opened


def clean(text):
    """A text with single spaces; UserError where there is none."""
    insist(isinstance(text, str) and text.strip(), f"{text!r} is no text")
    return " ".join(text.split())


def make_box(corner_and_size, size=ENDLESS):
    """[x, y, width, height] as [x0, y0, x1, y1], cut at the edges of a picture (height, width)."""
    x, y, width, height = corner_and_size
    box = hist.cut_box([x, y, x + width, y + height], size)
    insist(max(box) < math.inf, f"its box {corner_and_size} has no end")
    return box


def need(root, *names):
    """Paths of these in root, of "ONE or ANOTHER" the first there; UserError names the missing."""
    found, missing = [], []
    for name in names:
        there = [root / choice for choice in name.split(" or ") if (root / choice).exists()]
        found += there[:1]
        missing += [] if there else [name]
    insist(not missing, f"there is no {', no '.join(missing)} in {root}: --help says where it is")
    return found


def inside(folder, name):
    """The file name in folder or below; UserError where it is not there, or name leads out."""
    path = Path(name)
    insist(not path.is_absolute() and ".." not in path.parts, f"{name} leads out of {folder}")
    insist((folder / path).is_file(), f"there is no file {name} in {folder}")
    return folder / path


def stream(path, size=1 << 22):
    """The objects of a JSON list, each as it is read: all of Visual Genome's would take 5 GB.
    An object has at most 16 * size characters; UserError where the file is malformed, or cut."""
    decode, gap = json.JSONDecoder().raw_decode, re.compile(r"[\s,]*")
    number, at = 0, 1
    with blaming(path), open(path, encoding="utf-8-sig") as file:
        text = more = file.read(size).lstrip()
        insist(text.startswith("["), "not a JSON list")
        while more:
            at = gap.match(text, at).end()
            try:
                element, at = decode(text, at)
                number += 1
                yield element
            except json.JSONDecodeError:  # malformed, or only cut where the part that is read ends
                more = file.read(size) if len(text) - at < 16 * size else ""
                text, at = text[at:] + more, 0
        insist(text.strip() == "]", f"not JSON after {number} elements: {text[:40]!r}")


class PlainUnpickler(pickle.Unpickler):
    """A pickle may name any function to be called. Here it is refused: plain data are built."""

    def find_class(self, module, name):
        raise UserError(f"it asks for {module}.{name}; only plain data are read")


# ----------------------------------------------------------------------------------- Visual Genome
EVERY = 50  # images 49, 99, … are held out: there is no official split for region descriptions
REGIONS = 10  # of a held-out image that are evaluated on


def read_vg(root, skipped, exclude=""):
    """Visual Genome: a region's description is a caption, and in a held-out image a target."""
    path, _ = need(root, "region_descriptions.json", "VG_100K or VG_100K_2")
    pictures = {picture.name: picture for picture in root.glob("VG_100K*/*.jpg")}
    excluded = excluded_images(root, exclude) if exclude else ()
    for number, entry in enumerate(stream(path)):
        with blaming(("image", f"entry {number} of {path.name}"), skipped):
            image_id = int(entry["id"])
            if image_id in excluded:
                continue
            picture, targets = pictures[f"{image_id}.jpg"], []
            split = "val" if image_id % EVERY == EVERY - 1 else "train"
            for index, region in enumerate(entry["regions"]):
                with blaming(("region", f"{index} of image {image_id}"), skipped):
                    target = {"phrase": clean(region["phrase"]), "object": index}
                    if split == "val":
                        keys = "x", "y", "width", "height"
                        target["boxes"] = [make_box([region[key] for key in keys])]
                    targets.append(target)
            insist(targets, "no region of it can be used")
            shown = targets[:REGIONS] if split == "val" else []
            captions = [target["phrase"] for target in shown or targets]
            yield {"image": picture, "captions": captions, "split": split, "targets": shown}


def excluded_images(root, exclude):
    """Ids of images listed, one a line or as JSON, by this id or COCO's (from image_data.json)."""
    with blaming(f"--exclude {exclude}"):
        listed = set(map(int, re.findall(r'[^\s\[\]",]+', parse.read_text(exclude))))
    with blaming(root / "image_data.json"):
        told = [image for path in root.glob("image_data.json") for image in stream(path)]
        return listed | {image["image_id"] for image in told if image.get("coco_id") in listed}


# ------------------------------------------------------------------------------ Flickr30k Entities
MENTION = re.compile(r"\[/EN#(\d+)/(\S+) ([^\]]*)\]")  # [/EN#12/people/other two men]
NOT_VISIBLE = "0"  # the entity of what no box can show


def read_flickr30k(root, skipped):
    """Flickr30k Entities: in val and test a mention with a box is a target, tagged by category."""
    lists = need(root, "train.txt", "val.txt", "test.txt")
    (images,) = need(root, "flickr30k-images or flickr30k_images")
    sentences, annotations = need(root, "Sentences", "Annotations")
    listed = [(path.stem, name) for path in lists for name in parse.read_text(path).split()]
    for split, name in listed:
        with blaming(("image", name), skipped):
            image = inside(images, f"{name}.jpg")
            text = parse.read_text(inside(sentences, f"{name}.txt"))
            captions = [clean(MENTION.sub(r"\3", row)) for row in text.splitlines() if row.strip()]
            insist(captions, f"{name}.txt in {sentences} has no caption")
            boxes = {}
            if split != "train":
                with blaming(("annotation", f"{annotations / name}.xml"), skipped):
                    boxes = read_boxes(inside(annotations, f"{name}.xml"), skipped)
            targets = []
            for entity, tags, phrase in MENTION.findall(text):
                if entity != NOT_VISIBLE and entity in boxes and phrase.strip():
                    target = {"phrase": clean(phrase), "boxes": boxes[entity], "object": entity}
                    targets.append({**target, "tags": tags.split("/")})
            yield {"image": image, "captions": captions, "split": split, "targets": targets}


def read_boxes(path, skipped):
    """{entity: its boxes} of an XML file of Flickr30k Entities; scenes and the unseen have none.
    It counts pixels from 1: as in its own flickr30k_entities_utils.py, 1 is taken off each."""
    text, boxes = path.read_text(encoding="utf-8"), {}
    edges = "xmin", "ymin", "xmax", "ymax"
    declares = "<!DOCTYPE" in text or "<!ENTITY" in text
    insist(not declares, "it declares entities, which may expand without end")
    for number, thing in enumerate(ElementTree.fromstring(text).iter("object")):
        for box in thing.iter("bndbox"):
            with blaming(("annotation", f"{path}, object {number}"), skipped):
                corners = hist.cut_box([int(box.findtext(edge)) - 1 for edge in edges], ENDLESS)
                for name in thing.iter("name"):
                    boxes.setdefault(name.text, []).append(corners)
    return boxes


# --------------------------------------------------------------------------- referring expressions
SPLIT_BY = {"refcoco": ("unc", "google"), "refcoco+": ("unc", "google")}
SPLIT_BY |= {"refcocog": ("umd", "google"), "refclef": ("berkeley", "unc")}


def read_refs(name, root, skipped):
    """RefCOCO, RefCOCO+, RefCOCOg and ReferIt (refclef) as the REFER toolkit lays them out: of each
    image and split but "train" a record, in which each sentence of each object is a target."""
    pickles = " or ".join(f"{name}/refs({who}).p" for who in SPLIT_BY[name])
    path, instances = need(root, pickles, f"{name}/instances.json")
    folder = "saiapr_tc-12" if name == "refclef" else "train2014"
    (folder,) = need(root, f"{folder} or images/{folder} or images/mscoco/images/{folder}")
    images, annotations = map(by_id, hist.read_json(instances, "images", "annotations"))
    with blaming(path), open(path, "rb") as file:
        refs = PlainUnpickler(file, encoding="latin1").load()
        insist(isinstance(refs, list), "there is no list of referring expressions")
    groups = {}
    for number, ref in enumerate(refs):
        with blaming(("expression", f"entry {number} of {path.name}"), skipped):
            if ref["split"] != "train":
                groups.setdefault((clean(ref["split"]), ref["image_id"]), []).append(ref)
    for (split, image_id), group in groups.items():
        with blaming(("image", f"{image_id} of {path.name}"), skipped):
            image, targets = images[image_id], []
            picture = inside(folder, image["file_name"])
            for ref in group:
                with blaming(("expression", f"ref_id {ref.get('ref_id')} of {path.name}"), skipped):
                    targets += expression_targets(ref, annotations[ref["ann_id"]], image)
            insist(targets, "no expression of it can be used")
            captions = [target["phrase"] for target in targets]
            yield {"image": picture, "captions": captions, "split": split, "targets": targets}


def by_id(entries):
    """{id: entry} of the entries that have an id."""
    good = [entry for entry in entries if isinstance(entry, dict)]
    return {entry["id"]: entry for entry in good if isinstance(entry.get("id"), int)}


def expression_targets(ref, annotation, image):
    """A target for each sentence of an expression, with its object's box and mask."""
    size = [image["height"], image["width"]]
    box = make_box(annotation["bbox"], size)
    parts = annotation["segmentation"]  # run lengths, polygons, or refclef's list of run lengths
    if isinstance(parts, dict) or isinstance(parts[0], list):
        parts = [parts]
    mask = {"size": size, "parts": [plain_part(part, size) for part in parts]}
    hist.decode_mask(mask)  # what it would raise later, it raises here, where it is left out
    target = {"boxes": [box], "mask": mask, "object": annotation["id"]}
    phrases = [sentence["sent"] for sentence in ref["sentences"]]
    return [{"phrase": clean(phrase), **target} for phrase in phrases if phrase.strip()]


def plain_part(part, size):
    """A part of a mask of size [height, width], with its run lengths, if any, uncompressed."""
    if isinstance(part, list) or isinstance(part["counts"], list):
        return part
    from pycocotools import mask  # no requirement of hist.py

    pixels = mask.decode({"size": size, "counts": part["counts"]})
    whole = mask.encode(pixels)["counts"].decode() == part["counts"]  # decode fills up with noise
    insist(whole, f"its run lengths are not of {size[0]} x {size[1]} pixels")
    changes = np.flatnonzero(np.diff(pixels.flatten(order="F"), prepend=0))
    return {"counts": np.diff(changes, prepend=0, append=pixels.size).tolist()}


# ----------------------------------------------------------------------------------- retrieval, VQA
CAPTIONS = 5  # of an image that the protocol counts


def read_karpathy(root, skipped):
    """The test images of COCO by Karpathy's split, each with its first five captions."""
    (path,) = need(root, "dataset_coco.json")
    for number, image in enumerate(hist.read_json(path, "images")[0]):
        with blaming(("image", f"entry {number} of {path.name}"), skipped):
            if image["split"] == "test":
                said = [sentence["raw"] for sentence in image["sentences"]]
                captions = [clean(caption) for caption in said if caption.strip()][:CAPTIONS]
                insist(captions, "there is no caption")
                picture = inside(root, f"{image['filepath']}/{image['filename']}")
                yield {"image": picture, "captions": captions, "split": "test", "targets": []}


def read_vqa(root, skipped):
    """VQA v2: a caption is a question and its answer, a question is "QUESTION [MASK]"; its answers
    are the most common one on "train", the annotators' ten on "val"."""
    for split in ("train", "val"):
        names = f"v2_OpenEnded_mscoco_{split}2014_questions", f"v2_mscoco_{split}2014_annotations"
        path, truth, folder = need(root, *(f"{name}.json" for name in names), f"{split}2014")
        questions, records = {}, {}
        for number, entry in enumerate(hist.read_json(path, "questions")[0]):
            with blaming(("question", f"entry {number} of {path.name}"), skipped):
                questions[entry["question_id"]] = clean(entry["question"])
        for number, entry in enumerate(hist.read_json(truth, "annotations")[0]):
            with blaming(("question", f"entry {number} of {truth.name}"), skipped):
                question = questions.pop(entry["question_id"])  # answered twice, it is missing
                answer = clean(entry["multiple_choice_answer"])
                answers = [normalise(answer) or answer]
                if split == "val":
                    answers = compared([given["answer"] for given in entry["answers"]])
                asked = {"text": f"{question} [MASK]", "kind": str(entry["answer_type"])}
                name = f"COCO_{split}2014_{int(entry['image_id']):012}.jpg"
                empty = {"captions": [], "split": split, "targets": [], "questions": []}
                record = records.setdefault(name, empty)
                record["captions"].append(f"{question} {answer}")
                record["questions"].append({**asked, "answers": answers})
        for name, record in records.items():
            with blaming(("image", name), skipped):
                yield {"image": inside(folder, name), **record}


def compared(answers):
    """Annotators' answers as the official evaluation compares: normalised where they differ."""
    answers = [clean(answer) for answer in answers]
    return answers if len(set(answers)) == 1 else [normalise(answer) for answer in answers]


CONTRACTED = """ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't
    hadn't've hasn't haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am
    mightn't mightn't've might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't
    she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
    someone'd've someone'll someone's something'd something'd've something'll that's there'd
    there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've
    weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll
    who's who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've
    you'd you'd've you'll you're you've"""
NUMBERS = "zero one two three four five six seven eight nine ten"
REPAIRED = {"none": "0"} | {word: str(n) for n, word in enumerate(NUMBERS.split())}
for word in CONTRACTED.split():  # with any one apostrophe forgotten
    marks = [at for at, letter in enumerate(word) if letter == "'"]
    REPAIRED |= {word[:at] + word[at + 1 :]: word for at in marks}


def normalise(answer):
    """An answer as VQA's official vqaEval.py compares it: punctuation is dropped beside a space, or
    anywhere if a comma parts two digits, and else becomes a space; a full stop goes where no digit
    follows; then lower case, number words as digits, no articles, apostrophes."""
    answer = result = " ".join(answer.split())
    for mark in ';/[]"{}()=+\\_-><@`,?!':
        beside_space = mark + " " in answer or " " + mark in answer
        dropped = beside_space or re.search(r"\d,\d", answer)
        result = result.replace(mark, "" if dropped else " ")
    words = re.sub(r"\.(?!\d)", "", result).lower().split()
    return " ".join(REPAIRED.get(word, word) for word in words if word not in ("a", "an", "the"))


COCO_URL = "http://images.cocodataset.org/"
COCO_FILES = {  # {name: MD5}
    "annotations/annotations_trainval2017.zip": "f4bbac642086de4f52a3fdda2de5fa2c",
    "zips/val2017.zip": "442b8da7639aecaf257c1dceb8ba8c80",
    "zips/train2017.zip": "cced6f7f71b7629ddf16f17bbcfab6b2",
}


def download_coco(root):
    """Fetch, check and unpack what root lacks; a folder gets its name when it is complete."""
    for name, md5 in COCO_FILES.items():
        url, unpacking = COCO_URL + name, root / "unpacking"
        folder = "annotations" if "annotations" in name else Path(name).stem
        if not (root / folder).exists():
            with blaming(f"{url} (wget -c {url} in {root} goes on where it breaks)"):
                download_and_extract_archive(url, root, unpacking, md5=md5, remove_finished=True)
                (unpacking / folder).rename(root / folder)


# ----------------------------------------------------------------------------------------- command
READERS = {"vg": read_vg, "flickr30k": read_flickr30k, "karpathy": read_karpathy, "vqa": read_vqa}
READERS |= {name: partial(read_refs, name) for name in SPLIT_BY}
NEEDED = {"vg": ["train"], "flickr30k": ["train", "val", "test"], "karpathy": ["test"]}


def convert(read, name, root, max_bad):
    """Write ROOT/NAME.jsonl of what read(root, skipped) yields; {split: images written}. UserError
    where more than max_bad of the images, or all of a split, cannot be used."""
    part, listed = root / f"{name}.jsonl.{os.getpid()}.part", root / f"{name}.skipped.jsonl"
    insist(root.is_dir(), f"there is no folder {root}")
    listed.unlink(missing_ok=True)
    skipped, splits, seen = hist.Skipped(listed, max_bad), Counter(), set()
    try:
        with open(part, "w", encoding="utf-8") as file:
            for record in read(root, skipped):
                image, split = record["image"].relative_to(root).as_posix(), record["split"]
                if (image, split) in seen:
                    skipped.add("image", f"{image}, {split}", "it is there twice")
                    continue
                seen.add((image, split))
                splits[split] += 1
                file.write(json.dumps({**record, "image": image}) + "\n")
        images = skipped.count("image")
        if listed.exists():
            entries = len(listed.read_text().splitlines())
            told = f"{entries} entries left out, {images} of them images: {listed} says why"
            print(told, file=sys.stderr)
        skipped.total = splits.total() + images
        skipped.check()
        for split in NEEDED.get(name, ["val"]):
            insist(splits[split], f"{root}: no image of {split} can be used")
        part.replace(root / f"{name}.jsonl")
    except ImportError as error:
        raise UserError(f"to read compressed masks, pip install pycocotools: {error}") from error
    finally:
        part.unlink(missing_ok=True)
    return splits


def main(argv=None):
    hist.use_any_console()
    look = {"usage": argparse.SUPPRESS, "formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = argparse.ArgumentParser("convert", description=__doc__, **look)
    parser.add_argument("name", choices=[*READERS, "coco"])
    parser.add_argument("root", type=Path)
    parser.add_argument("--exclude", help="vg: a file of image ids, which are left out")
    parser.add_argument("--max-bad", type=float, default=0.2, help="share of images, 0 to 1")
    options = parser.parse_args(argv)
    name, root = options.name, options.root
    with hist.told("convert"):
        insist(not options.exclude or name == "vg", "--exclude is for vg")
        if name == "coco":
            download_coco(root)
            return print(f"python hist.py --data coco --root {root}")
        read = partial(read_vg, exclude=options.exclude) if options.exclude else READERS[name]
        splits = convert(read, name, root, options.max_bad)
        print(f"python hist.py --data {root / name}.jsonl  # images: {dict(splits)}")


if __name__ == "__main__":
    main()
