"""python hist.py --eval NAME: the benchmarks of the data sets that tests/readers.py reads, for the last checkpoints.

A benchmark is a function (model, vocabulary, {split: records}, o) -> {line of the table: a share, 0 to 1, or a count}.
"""
import itertools
import json
import random
import re
from collections import Counter
from pathlib import Path

import numpy as np
import torch

import hist
from hist import insist
from readers import READERS, SPLIT_BY, take, vqa_files


def look(model, vocabulary, record, texts, o):
    """Maps (side, side) of texts over a record's image, one after the other."""
    image = hist.read_image(record["image"], o.image_size)[None].to(o.device)
    for start in range(0, len(texts), 64):
        some = texts[start:start + 64]
        yield from hist.maps_of(model, vocabulary, image, some, [0] * len(some), o)[0]


def pointing(model, vocabulary, splits, o):
    """Pointing game for every target of each split: a hit in any of its boxes, and in its mask where there is one; by tag and in all."""
    result = {}
    for split, records in splits.items():
        hits, masked = {}, any(t.get("mask") for r in records for t in r["targets"])
        for r in records:
            truth = hist.truth(r, o.image_size)
            for t, (_, boxes, mask), heat in zip(r["targets"], truth, look(model, vocabulary, r, [t["phrase"] for t in r["targets"]], o)):
                for tag in ("", *t.get("tags", ())): hits.setdefault(tag, []).append([hist.pointing_game(heat, m) for m in (boxes, mask)])
        for tag, rows in sorted(hits.items()):
            named = f"{split}, {tag}" if tag else split
            result[f"pointing, {named}"] = float(np.mean(rows, 0)[0])
            if masked: result[f"pointing in mask, {named}"] = float(np.mean(rows, 0)[1])
            result[f"phrases, {named}"] = len(rows)
    return result


def referring(model, vocabulary, splits, o):
    """Multi-object referring segmentation: IoU of the map of "e1 and e2" with the union of both objects' masks (boxes where there are none),
    for up to three pairs of objects an image. The map is cut at the fraction of its maximum that is best on val; the other splits report."""
    iou = {}
    for split, records in splits.items():
        rng = random.Random(0)
        for r in records:
            objects = {}
            for t, (_, _, region) in zip(r["targets"], hist.truth(r, o.image_size)): objects.setdefault(t["object"], []).append((t["phrase"], region))
            pairs = list(itertools.combinations([rng.choice(named) for named in objects.values()], 2))
            pairs = rng.sample(pairs, min(3, len(pairs)))
            maps = look(model, vocabulary, r, [f"{a} and {b}" for (a, _), (b, _) in pairs], o)
            iou.setdefault(split, []).extend(hist.multi_object_iou(heat, a | b) for heat, ((_, a), (_, b)) in zip(maps, pairs))
    if not iou.get("val"): return {}
    best = int(np.mean(iou["val"], 0).argmax())
    result = {f"multi-object IoU, {split}": float(np.mean(rows, 0)[best]) for split, rows in iou.items() if rows and split != "val"}
    return {**result, **{f"pairs, {split}": len(rows) for split, rows in iou.items()}}


class Encoded:
    """Texts (n, L) of ids that are encoded when hist.rerank looks at them: part 0 their states, part 1 their mask."""
    def __init__(self, model, ids, part):
        self.model, self.ids, self.part = model, ids, part

    def __getitem__(self, rows):
        ids = self.ids[rows]
        return self.model.encode_text(ids[:, :int((ids != hist.PAD).sum(1).max())])[self.part]


@torch.no_grad()
def retrieval(model, vocabulary, splits, o):
    """R@1, 5 and 10 on test, by ITC alone and with ITM re-ranking its nearest: of an image any of its five captions, of a caption its image."""
    records, ks, result = splits["test"], (1, 5, 10), {}
    captions = [(i, c) for i, r in enumerate(records) for c in r["captions"][:5]]
    load = lambda start, end: torch.stack([hist.read_image(r["image"], o.image_size) for r in records[start:end]]).to(o.device)
    images = torch.cat([model.encode_image(load(i, i + 32))[0] for i in range(0, len(records), 32)])
    ids = hist.pad([hist.encode(vocabulary, c) for _, c in captions]).to(o.device)
    texts = torch.cat([model.encode_text(part)[2] for part in ids.split(512)])
    similarity, owner, own = images @ texts.T, torch.tensor([i for i, _ in captions]).to(o.device), torch.arange(len(records)).to(o.device)
    reranked = hist.rerank(model, load, Encoded(model, ids, 0), Encoded(model, ids, 1), similarity)
    for name, (to_text, to_image) in {"": (similarity, similarity), ", ITM": reranked}.items():
        found = owner[to_text.topk(min(10, len(captions)), 1).indices] == own[:, None]                         # (images, 10)
        right = to_image.topk(min(10, len(records)), 0).indices == owner                                       # (10, captions)
        result |= {f"R@{k}, image to text{name}": float(found[:, :k].any(1).float().mean()) for k in ks}
        result |= {f"R@{k}, text to image{name}": float(right[:k].any(0).float().mean()) for k in ks}
    return {**result, "images": len(records), "captions": len(captions)}


WHOLE = """ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's how'd how'll how's
    isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've
    shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll
    that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll
    y'all'd've you'd you'd've you'll you're you've""".split()
CONTRACTIONS = {w[:i] + w[i + 1:]: w for w in WHOLE for i, c in enumerate(w) if c == "'"}        # one apostrophe forgotten
NUMBERS = {w: str(i) for i, w in enumerate("zero one two three four five six seven eight nine ten".split())} | {"none": "0"}


def normalise(answer):
    """An answer as VQA's official evaluation compares it (vqaEval.py): punctuation is dropped beside a space, or anywhere if a comma parts two
    digits, and else becomes a space; a full stop goes where no digit follows; lower case, number words as digits, no articles, apostrophes."""
    answer = result = answer.replace("\n", " ").replace("\t", " ").strip()
    for p in ";/[]\"{}()=+\\_-><@`,?!":
        result = result.replace(p, "" if p + " " in answer or " " + p in answer or re.search(r"\d,\d", answer) else " ")
    words = [NUMBERS.get(w, w) for w in re.sub(r"\.(?!\d)", "", result).lower().split()]
    return " ".join(CONTRACTIONS.get(w, w) for w in words if w not in ("a", "an", "the"))


def vqa_accuracy(said, answers):
    """The official accuracy: min(n / 3, 1), n of the other annotators having said it, averaged over leaving out each of the (ten) annotators.
    As there, answers are normalised only where they are not all the same."""
    if len(set(answers)) > 1: said, answers = normalise(said), [normalise(a) for a in answers]
    n = sum(a == said for a in answers)
    return (n * min((n - 1) / 3, 1) + (len(answers) - n) * min(n / 3, 1)) / len(answers)


ANSWERS = 1000


@torch.no_grad()
def vqa(model, vocabulary, splits, o):
    """VQA v2 as a cloze: "QUESTION [MASK]", filled with one of the ANSWERS most frequent answers to train's questions that are one known word."""
    given = Counter(a.get("multiple_choice_answer") for a in hist.read_json(vqa_files(Path(o.root), "train")[1], "annotations")[0] if isinstance(a, dict))
    choices = [a for a, _ in given.most_common() if isinstance(a, str) and hist.split_words(a) == [a] and a in vocabulary][:ANSWERS]
    insist(choices, "no answer to the questions of train is a word that this model knows: train it with --data vqa")
    scores = {}
    for r in splits["val"]:
        image = hist.read_image(r["image"], o.image_size)[None].to(o.device)
        said = hist.answer(model, vocabulary, image, [(0, kind, f"{question} [MASK]", choices, None) for kind, question, _ in r["asked"]])
        for word, (kind, _, answers) in zip(said, r["asked"]):
            for name in ("overall", kind): scores.setdefault(name, []).append(vqa_accuracy(word, answers))
    shares = {f"VQA, {name}": float(np.mean(rows)) for name, rows in scores.items()}
    return {**shares, "questions": len(scores["overall"]), "answers to choose from": len(choices)}


BENCHMARKS = {"flickr30k": (("val", "test"), (pointing, referring, retrieval)), "karpathy": (("test",), (retrieval,)), "vqa": (("val",), (vqa,)),
              **{name: (None, (pointing, referring)) for name in SPLIT_BY}}


def benchmarks(o):
    """--eval NAME: the benchmark's table, a column for each of baseline.pt and hist.pt in --out, and OUT/eval-NAME.json. --eval-images a split."""
    insist(o.eval in BENCHMARKS, f"--eval {o.eval}: the benchmarks are {', '.join(BENCHMARKS)}")
    paths = [path for path in (Path(o.out) / f"{name}.pt" for name in ("baseline", "hist")) if path.exists()]
    insist(paths, f"there is no baseline.pt and no hist.pt in {o.out}: train first")
    wanted, measures = BENCHMARKS[o.eval]
    records, results = take(READERS[o.eval], wanted, o), {}
    splits = {split: hist.readable([r for r in records if r["split"] == split], o) for split in dict.fromkeys(r["split"] for r in records)}
    for split in wanted or ("val",): insist(splits.get(split), f"--root {o.root}: no image of {split} can be used")
    for path in paths:
        model, vocabulary, _ = hist.restore(path, o)
        model.eval()
        results[path.stem] = {name: v for measure in measures for name, v in measure(model, vocabulary, splits, o).items()}
    hist.write_whole(Path(o.out) / f"eval-{o.eval}.json", json.dumps(results, indent=1))
    show = lambda v: f"{v if isinstance(v, int) else f'{100 * v:.1f}':>15}"
    print(f"\n{o.eval}: percent, but for counts\n\n{'':36}" + "".join(f"{name:>15}" for name in results))
    for name in next(iter(results.values())): print(f"{name:36}" + "".join(show(column[name]) for column in results.values()))
