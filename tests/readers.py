"""python hist.py --data vg | flickr30k | vqa: the other data sets, as they are published; tests/benchmarks.py evaluates on them.

A reader gives hist.py's records one by one: read(root, splits, bad) those of the splits, one image each. It opens no image, and
enters what it leaves out in bad, {(kind, which): why}. UserError names a file that is missing, and the folder it should be in.
A target here has an "object" too: mentions of one object share it. Boxes and masks are in pixels, boxes [x0, y0, x1, y1].
"""
import json
import os
import pickle
import re
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

from torchvision.datasets.utils import download_and_extract_archive

import hist
from hist import UserError, blaming, insist


# ---------------------------------------------------------------------------------------------------------- files
def need(root, *names):
    """The paths of these files or folders in root; of several given as a tuple, the first that is there."""
    found = [next((root / n for n in ([name] if isinstance(name, str) else name) if (root / n).exists()), None) for name in names]
    missing = [name if isinstance(name, str) else " or ".join(name) for name, path in zip(names, found) if not path]
    insist(not missing, f"there is no {', no '.join(missing)} in --root {root}; README.md, Other data sets, says where to get them")
    return found


def inside(folder, name):
    """The file that data call name, in folder or below; UserError where it is not there, or the name leads out."""
    path = Path(name)
    insist(not path.is_absolute() and ".." not in path.parts, f"{name} leads out of {folder}")
    insist((folder / path).is_file(), f"there is no file {name} in {folder}")
    return folder / path


def stream(path, size=1 << 22):
    """The elements of a JSON file that is one list, each as it is read: all of Visual Genome's at once would be 5 GB of Python objects."""
    decode, gap, at, n = json.JSONDecoder().raw_decode, re.compile(r"[\s,]*"), 1, 0
    with open(path, encoding="utf-8-sig", errors="replace") as f:
        text = f.read(size).lstrip()
        insist(text.startswith("["), f"{path}: not a JSON list")
        while True:
            at = gap.match(text, at).end()
            try:
                element, at = decode(text, at)
            except json.JSONDecodeError as e:                  # cut where the part that is read ends, or malformed
                insist(len(text) - at < 16 * size, f"{path}: not JSON after {n} elements: {e.msg}")
                more = f.read(size)
                if not more: break
                text, at = text[at:] + more, 0
            else:
                n += 1
                yield element
    insist(text[at:].strip() == "]", f"{path}: not JSON after {n} elements: {text[at:at + 40]!r}")


def each(entries, make, bad):
    """The records that make(entry) returns for entries [(name, entry), …]; where it fails, the image of that name is left out."""
    for name, entry in entries:
        record = None
        with blaming(("image", name), bad): record = make(entry)
        if record: yield record


class PlainUnpickler(pickle.Unpickler):
    """Builds lists, dictionaries, strings and numbers. A pickle may name any function to be called: this one calls none."""
    def find_class(self, module, name):
        raise UserError(f"it asks for {module}.{name}; lists, dictionaries, strings and numbers are read, nothing else")

    def persistent_load(self, what):
        raise UserError(f"it asks for the persistent object {what!r}; lists, dictionaries, strings and numbers are read, nothing else")


# -------------------------------------------------------------------------------------------------- Visual Genome
TOLD = 10                                                      # regions of a held-out image that are evaluated on


def read_vg(root, splits, bad, exclude=""):
    """Visual Genome: region_descriptions.json, VG_100K/, VG_100K_2/. A region's description is a caption. There is no official split for this:
    every fiftieth image id (49, 99, …) is "val", with the boxes of its first ten regions. exclude: a file of image ids, one a line or a JSON
    list, of Visual Genome, or of COCO where image_data.json tells them; an image with either is left out."""
    described, *folders = need(root, "region_descriptions.json", ("VG_100K", "VG_100K_2"))
    there = {name: folder / name for folder in (root / "VG_100K", root / "VG_100K_2") if folder.exists() for name in os.listdir(folder)}
    with blaming(f"--exclude {exclude}"):
        text = Path(exclude).read_text() if exclude else ""
        left = {str(int(i)) for i in (json.loads(text) if text.lstrip().startswith("[") else text.split())}
    told = root / "image_data.json"
    with blaming(told): left |= {str(i["image_id"]) for i in (stream(told) if left and told.exists() else ()) if str(i.get("coco_id")) in left}
    said = {}                                                  # many regions have the same description: one string for all

    def record(entry):
        number, regions = int(entry["id"]), entry["regions"]
        split = "val" if number % 50 == 49 else "train"
        if split not in splits or str(number) in left: return None
        insist(f"{number}.jpg" in there, f"there is no file {number}.jpg in {root / 'VG_100K'} or VG_100K_2")
        good = [r for r in regions if isinstance(r, dict) and isinstance(r.get("phrase"), str) and r["phrase"].strip()]
        if split == "val": good = [r for r in good if all(type(r.get(k)) in (int, float) for k in ("x", "y", "width", "height")) and min(r["width"], r["height"]) > 0]
        if len(good) < len(regions): bad["region", f"image {number}"] = f"{len(regions) - len(good)} of {len(regions)} have no description, or no box"
        insist(good, "no region of it can be used")
        if split == "val": good = good[:TOLD]
        captions = [said.setdefault(c, c) for c in (" ".join(r["phrase"].split()) for r in good)]
        boxes = [[r["x"], r["y"], r["x"] + r["width"], r["y"] + r["height"]] for r in good] if split == "val" else ()
        return {"image": there[f"{number}.jpg"], "captions": captions, "split": split,
                "targets": [{"phrase": c, "boxes": [box], "object": k} for k, (c, box) in enumerate(zip(captions, boxes))]}
    return each(((f"entry {n} of {described.name}", entry) for n, entry in enumerate(stream(described))), record, bad)


# ----------------------------------------------------------------------------------------------------- Flickr30k
MENTION = re.compile(r"\[/EN#(\d+)/(\S+) ([^\]]*)\]")         # [/EN#12/people/other two men]: entity, its categories, phrase


def read_boxes(path):
    """{entity: its boxes} of an XML file of Flickr30k Entities; entities that are scenes, or not to be seen, have none. The file counts
    pixels from 1; as in the data set's own flickr30k_entities_utils.py, 1 is taken off all four numbers."""
    text, boxes = path.read_text(encoding="utf-8"), {}
    insist("<!DOCTYPE" not in text and "<!ENTITY" not in text, "it declares entities, which may expand without end")
    for thing in ElementTree.fromstring(text).iter("object"):
        for box in thing.iter("bndbox"):
            corners = [int(box.findtext(k)) - 1 for k in ("xmin", "ymin", "xmax", "ymax")]
            for name in thing.iter("name"): boxes.setdefault(name.text, []).append(corners)
    return boxes


def read_flickr30k(root, splits, bad):
    """Flickr30k with its Entities: {train,val,test}.txt list the images, Sentences/ID.txt has five captions with the phrases marked,
    Annotations/ID.xml the boxes. A mention with a box is a target, with its categories as tags; one of no visible thing (EN#0) is none."""
    lists = need(root, *(f"{split}.txt" for split in splits))
    sentences, annotations, images = need(root, "Sentences", "Annotations", ("flickr30k-images", "flickr30k_images"))

    def record(entry):
        (split, name), boxes = entry, {}
        image, told = inside(images, f"{name}.jpg"), inside(sentences, f"{name}.txt")
        rows = [line.strip() for line in told.read_text(encoding="utf-8").splitlines() if line.strip()]
        insist(rows, f"{told} has no caption")
        with blaming(("annotation", f"{annotations / name}.xml"), bad):
            if split != "train": boxes = read_boxes(inside(annotations, f"{name}.xml"))
        mentions = [m for row in rows for m in MENTION.findall(row) if m[0] != "0" and m[0] in boxes and m[2].strip()]
        return {"image": image, "captions": [MENTION.sub(r"\3", row) for row in rows], "split": split, "targets": [
            {"phrase": phrase, "boxes": boxes[entity], "tags": kinds.split("/"), "object": entity} for entity, kinds, phrase in mentions]}
    return each(((name, (split, name)) for split, path in zip(splits, lists) for name in path.read_text(errors="replace").split()), record, bad)


# ------------------------------------------------------------------------------------------ referring expressions
SPLIT_BY = {"refcoco": ("unc", "google"), "refcoco+": ("unc", "google"), "refcocog": ("umd", "google"), "refclef": ("berkeley", "unc")}


def run_lengths(text):
    """COCO's compressed run lengths as a list: numbers in base 32, least digit first, bit 32 says that another digit follows; digits are
    characters from "0" on; the last digit's 16 is the sign; from the fourth on each number is its difference to the one two before."""
    counts, value, shift = [], 0, 0
    for c in text.encode():
        digit = c - 48
        value |= (digit & 31) << shift
        shift += 5
        if not digit & 32:
            value -= (1 << shift) * bool(digit & 16)
            counts.append(value + (counts[-2] if len(counts) > 2 else 0))
            value = shift = 0
    return counts


def read_refs(name, root, splits, bad):
    """RefCOCO, RefCOCO+, RefCOCOg and ReferIt (refclef) as the REFER toolkit lays them out: NAME/refs(BY).p, NAME/instances.json, and COCO's
    train2014/, for refclef saiapr_tc-12/. Of each image and split a record: each sentence of each object is a target. splits: None for
    all but train. Only PlainUnpickler opens the pickle."""
    path, instances = need(root, tuple(f"{name}/refs({by}).p" for by in SPLIT_BY[name]), f"{name}/instances.json")
    folder = "saiapr_tc-12" if name == "refclef" else "train2014"
    folder, = need(root, (folder, f"images/{folder}", f"images/mscoco/images/{folder}"))
    images, annotations = hist.read_json(instances, "images", "annotations")
    with blaming(path), open(path, "rb") as f:
        refs = PlainUnpickler(f, encoding="latin1").load()
        insist(isinstance(refs, list), "there is no list of referring expressions")
    images, annotations = ({e["id"]: e for e in entries if isinstance(e, dict) and isinstance(e.get("id"), int)} for entries in (images, annotations))
    groups = {}
    for n, ref in enumerate(refs):
        with blaming(("expression", f"entry {n} of {path.name}"), bad):
            if ref["split"] in splits if splits else ref["split"] != "train": groups.setdefault((ref["split"], ref["image_id"]), []).append(ref)

    def record(entry):
        (split, number), group = entry
        image, targets = images[number], []
        picture, width, height = inside(folder, image["file_name"]), image["width"], image["height"]
        for ref in group:
            with blaming(("expression", f"ref_id {ref.get('ref_id')} of {path.name}"), bad):
                truth = annotations[ref["ann_id"]]
                (x, y, w, h), parts = truth["bbox"], truth["segmentation"]
                box = [max(x, 0), max(y, 0), min(x + w, width), min(y + h, height)]
                insist(box[0] < box[2] and box[1] < box[3], f"its box {truth['bbox']} has no pixel in the image of {width} x {height}")
                parts = [parts] if isinstance(parts, dict) or isinstance(parts[0], list) else parts             # a mask, polygons, or masks
                parts = [{**p, "counts": run_lengths(p["counts"])} if isinstance(p, dict) and isinstance(p["counts"], str) else p for p in parts]
                mask = {"size": (height, width), "parts": parts}
                targets += [{"phrase": s["sent"], "boxes": [box], "mask": mask, "object": ref["ann_id"]} for s in ref["sentences"] if s["sent"].strip()]
        insist(targets, "no expression of it can be used")
        return {"image": picture, "captions": [t["phrase"] for t in targets], "targets": targets, "split": split}
    return each(((f"{number} of {path.name}", ((split, number), group)) for (split, number), group in groups.items()), record, bad)


# --------------------------------------------------------------------------------------------------- retrieval, VQA
def read_karpathy(root, splits, bad):
    """COCO by Karpathy's split: dataset_coco.json, and COCO's train2014/ and val2014/."""
    path, = need(root, "dataset_coco.json")

    def record(image):
        if image["split"] not in splits: return None
        captions = [s["raw"].strip() for s in image["sentences"] if s["raw"].strip()]
        insist(captions, "there is no caption")
        return {"image": inside(root, f"{image['filepath']}/{image['filename']}"), "captions": captions, "targets": [], "split": image["split"]}
    return each(((f"entry {n} of {path.name}", image) for n, image in enumerate(hist.read_json(path, "images")[0])), record, bad)


def vqa_files(root, split):
    """Questions, annotations and images of a split."""
    return need(root, f"v2_OpenEnded_mscoco_{split}2014_questions.json", f"v2_mscoco_{split}2014_annotations.json", f"{split}2014")


def read_vqa(root, splits, bad):
    """VQA v2: v2_OpenEnded_mscoco_*2014_questions.json, v2_mscoco_*2014_annotations.json, train2014/, val2014/. A caption is a question and
    its answer in one; "asked" has of each question [(kind, question, the annotators' answers)]."""
    for split in splits:
        path, truth, folder = vqa_files(root, split)
        questions, records, there = {}, {}, set(os.listdir(folder))
        for n, q in enumerate(hist.read_json(path, "questions")[0]):
            with blaming(("question", f"entry {n} of {path.name}"), bad): questions[q["question_id"]] = " ".join(q["question"].split())
        for n, a in enumerate(hist.read_json(truth, "annotations")[0]):
            with blaming(("question", f"entry {n} of {truth.name}"), bad):
                question, answers, name = questions[a["question_id"]], [x["answer"] for x in a["answers"]], f"COCO_{split}2014_{int(a['image_id']):012}.jpg"
                insist(question and answers and all(isinstance(x, str) for x in [question, *answers]), "no question, or no answers")
                r = records.setdefault(name, {"image": folder / name, "captions": [], "targets": [], "asked": [], "split": split})
                r["captions"].append(f"{question} {a['multiple_choice_answer']}")
                if split == "val": r["asked"].append((str(a["answer_type"]), question, answers))
        bad.update({("image", name): f"there is no file {name} in {folder}" for name in records if name not in there})
        yield from (r for name, r in records.items() if name in there)


# ----------------------------------------------------------------------------------------------- COCO's download
COCO_URL = "http://images.cocodataset.org/"
COCO_FILES = {"annotations/annotations_trainval2017.zip": "f4bbac642086de4f52a3fdda2de5fa2c",     # name: MD5
              "zips/val2017.zip": "442b8da7639aecaf257c1dceb8ba8c80", "zips/train2017.zip": "cced6f7f71b7629ddf16f17bbcfab6b2"}


def download_coco(root):
    """Fetch, check and unpack what root lacks of COCO 2017; an archive that lies there already is used. A folder gets its name when it is complete."""
    for name, md5 in COCO_FILES.items():
        folder = "annotations" if "annotations" in name else Path(name).stem
        if not (root / folder).exists():
            with blaming(f"{COCO_URL}{name} (wget -c {COCO_URL}{name} in {root} goes on where it breaks)"):
                download_and_extract_archive(COCO_URL + name, root, root / "unpacking", md5=md5, remove_finished=True)
            (root / "unpacking" / folder).rename(root / folder)


# ------------------------------------------------------------------------------------------------------------ commands
READERS = {"vg": read_vg, "flickr30k": read_flickr30k, "karpathy": read_karpathy, "vqa": read_vqa, **{name: partial(read_refs, name) for name in SPLIT_BY}}


def take(read, splits, o):
    """All records of a reader; what it left out is counted, and listed as hist.leave_out does."""
    bad = {}
    records = list(read(Path(o.root), splits, bad))
    if bad: print(f"{o.root}: {len(bad)} entries cannot be used: {dict(Counter(kind for kind, _ in bad))}", file=sys.stderr)
    hist.leave_out(bad, o, len(records) + sum(kind == "image" for kind, _ in bad))
    insist(records, f"--root {o.root}: there are no images of {', '.join(splits or ('val', 'test'))}")
    return records


def load(o):
    """(training records, held-out records) of --data vg, flickr30k or vqa; of the mentions of one object a held-out record keeps the first."""
    read = partial(read_vg, exclude=o.exclude) if o.data == "vg" else READERS[o.data]
    records = take(read, ("train", "val", "test") if o.data == "flickr30k" else ("train", "val"), o)
    once = lambda targets: list({t["object"]: t for t in reversed(targets)}.values())[::-1]
    return [r for r in records if r["split"] == "train"], [{**r, "targets": once(r["targets"])} for r in records if r["split"] != "train"]
