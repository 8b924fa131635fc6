"""What each level of HIST adds: every row of the ablation for several seeds, as a table.

    OMP_NUM_THREADS=1 python -m tests.paper.ablate --seeds 5     out/ablation/seed0/, seed1/, …

For each seed a base is trained with captions alone; every row goes on from it, over the same images
and captions in the same order, for as many steps; the last row for as much time as "all". Below a
mean is its difference from the first row, paired by seed, and the 95% interval (Student's t). What
is done is kept: the same command goes on. --brief: the rows "caption" and "all" alone.
hist.py's own options are understood too.
"""

import json
import math
import re
from collections import Counter, namedtuple
from pathlib import Path
from random import Random

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure

import hist
import parse
from hist import insist

ROWS = {  # row: its levels
    "caption": ["caption"],
    "+ phrase": ["caption", "phrase"],
    "+ subject": ["caption", "subject"],
    "+ both": ["caption", "phrase", "subject"],
    "+ composition": ["caption", "composition"],
    "all": ["caption", "phrase", "subject", "composition"],
    "caption, same time": ["caption"],
}
FIRST, LAST = "caption", "caption, same time"
LEFT_OUT = "chance|in_mask|r5_|r10_|^(images|phrases|pairs|steps)$"  # by the table
T95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)  # Student's t, for 2 to 10 seeds
OCCLUDED = 32  # scenes, two phrases of each
BESIDE = 1 / 12  # of the side of an image: how far from its box a point still is beside an object
# Of a pair: the larger object's share of both areas, and of the map on both; the map's balance.
Division = namedtuple("Division", "area mass balance")


def ranks(values):
    """The rank of each of the values (n,); equal ones share theirs."""
    return (values[:, None] > values).sum(1) + (values[:, None] == values).sum(1) / 2


@torch.no_grad()
def occlusion_agreement(model, tokenizer, picture, phrase, options):
    """Rank correlation (Spearman) of a phrase's map with the drop of its match logit when each
    patch of the picture is greyed; nan where one of them is flat."""
    image = hist.read_image(picture, options.image_size).to(options.device)
    patches = torch.eye(math.prod(model.grid), device=options.device)
    patches = patches.unflatten(1, (1, *model.grid))
    hidden = F.interpolate(patches, options.image_size) > 0  # (patches, 1, side, side)
    grey = image.flatten(1).float().mean(1).to(image.dtype)[:, None, None]
    images = torch.cat([image[None], torch.where(hidden, grey, image)])
    image_kv = model.project_image(model.encode_image(images)[1])
    ids = tokenizer.batch([phrase]).to(options.device)
    T, mask, _ = model.encode_text(ids.expand(len(images), -1))
    score = model.match(T, mask, image_kv)[0][:, 1]
    whole = [keys_values[:, :1] for keys_values in image_kv]
    heat, _ = hist.locate(model, ids, whole, options.cam_layer)
    both = torch.stack([ranks(heat.detach().flatten()), ranks(score[0] - score[1:])])
    return float(torch.corrcoef(both)[0, 1])


def subjects_found(records):
    """(precision, recall) of the parser's subjects against what these scenes' captions say."""
    found, said = Counter(), Counter()
    for number, record in enumerate(records):
        phrases = parse.parse(record["captions"][0]).phrases
        found.update((number, phrase.text, phrase.subject) for phrase in phrases)
        said.update((number, phrase, phrase.split()[-1]) for phrase, _ in record["said"])
    right = (found & said).total()
    return right / max(1, found.total()), right / max(1, said.total())


def where(x, y, target, others, side):
    """Where a point lies: in the "own" box of a target, in an "other" target's, "beside" its own,
    or "elsewhere". Boxes [x0, y0, x1, y1] in an image of this side."""

    def within(target, margin):
        boxes = np.array(target["boxes"]) + np.array([-1, -1, 1, 1]) * margin
        return any(x0 <= x < x1 and y0 <= y < y1 for x0, y0, x1, y1 in boxes)

    if within(target, 0):
        return "own"
    if any(within(other, 0) for other in others):
        return "other"
    return "beside" if within(target, BESIDE * side) else "elsewhere"


def point_at(model, tokenizer, records, options):
    """Of scenes: where the maps of all objects' names point, as shares "error_own", "error_other",
    …; and "pointing_said", for the phrases that the captions themselves say of them."""
    found, hits, chances, side = Counter(), [], [], options.image_size
    for record in records:
        targets, said = record["targets"], record["said"]
        texts = [target["phrase"] for target in targets] + [phrase for phrase, _ in said]
        meant = targets + [targets[number] for _, number in said]
        image = hist.read_image(record["image"], side).to(options.device)
        maps, _ = hist.maps_of(model, tokenizer, image, texts, options.cam_layer)
        places = []
        for target, heat in zip(meant, maps):
            y, x = np.unravel_index(heat.argmax(), heat.shape)
            places.append(where(x, y, target, targets, side))
        found.update(places[: len(targets)])
        hits += [place == "own" for place in places[len(targets) :]]
        chances += [1 / len(targets)] * len(said)
    shares = {f"error_{place}": count / found.total() for place, count in sorted(found.items())}
    return shares | {"pointing_said": np.mean(hits), "pointing_said_chance": np.mean(chances)}


def measure(model, samples, records, options):
    """hist.evaluate's measures, all splits in one, R@1 as the mean of both ways, what `point_at`
    finds, and the agreement of maps with occlusion."""
    tokenizer, agreement = samples.tokenizer, []
    together = [record | {"split": "held out"} for record in records]
    answers = hist.common_answers(samples.records, tokenizer)
    result = hist.evaluate(model, tokenizer, together, options, answers)[0]["held out"]
    for kind in ("", "_itm"):
        ways = [result[f"r1_{way}{kind}"] for way in ("image_to_text", "text_to_image")]
        result[f"r1_mean{kind}"] = float(np.mean(ways))
    if options.data == "scenes":
        result |= point_at(model, tokenizer, records, options)
    for record in records[:OCCLUDED]:
        for target in record["targets"][:2]:
            asked = record["image"], target["phrase"], options
            agreement.append(occlusion_agreement(model, tokenizer, *asked))
    if np.isfinite(agreement).any():
        result |= {"occlusion": float(np.nanmean(agreement)), "occlusion_chance": 0}
    return {name: round(value, 5) for name, value in result.items()}


def divisions(model, tokenizer, records, options):
    """A Division for each pair of objects that hist.evaluate looks at."""
    found, rng = [], Random(0)
    for record in records:
        pixels = hist.load_pixels(record["image"])
        image = hist.read_image(pixels, options.image_size).to(options.device)
        targets = hist.targets_of(record, pixels.shape, options.image_size)
        pairs = [(text, two) for kinds, text, two in hist.texts_to_find(targets, rng) if not kinds]
        texts = [text for text, _ in pairs]
        maps = hist.maps_of(model, tokenizer, image, texts, options.cam_layer)[0] if texts else []
        for (_, two), heat in zip(pairs, maps):
            small, large = sorted((target.mask for target in two), key=np.sum)
            area = large.sum() / (small.sum() + large.sum())
            mass = heat[large].sum() / max(heat[small].sum() + heat[large].sum(), 1e-12)
            found.append(Division(area, mass, hist.balance(heat, small, large)))
    return found


def draw_balance(records, options):
    """balance.png: how the maps of pairs divide between two objects, before and after HIST."""
    out = Path(options.out)
    figure = Figure(figsize=(15, 4.5), layout="constrained")
    *scatters, histogram = figure.subplots(1, 3)
    for ax, row, colour in zip(scatters, ("caption", "all"), ("C0", "C1")):
        model, tokenizer, _ = hist.read_checkpoint(out / f"{row}.pt", options)
        found = divisions(model, tokenizer, records, options)
        area, mass, balance = np.array(found).reshape(-1, 3).T
        ax.scatter(area, mass, s=6, alpha=0.4, color=colour)
        ax.axhline(0.5, color="grey", linewidth=1)
        ax.set(title=f"{row}: the larger of two objects", ylim=(0, 1))
        ax.set(xlabel="its share of both areas", ylabel="its share of the map's mass")
        mean = balance.sum() / max(1, len(balance))
        steps = {"bins": np.linspace(0, 1, 21), "histtype": "step", "linewidth": 2}
        histogram.hist(balance, color=colour, label=f"{row}, mean {mean:.2f}", **steps)
    histogram.set(title="balance of a pair's map (1: both get as much)", ylabel="pairs")
    histogram.set(xlabel="smaller share over larger")
    histogram.legend()
    figure.savefig(out / "balance.png", dpi=100)


def seed_options(arguments, out, seed):
    """The Options of a seed: those that it has begun with, if it has."""
    arguments = [*arguments, "--out", str(out), "--seed", str(seed)]
    begun = hist.saved_options(out) or {}
    arguments += ["--resume"] if begun else []
    options = hist.parse_options(arguments)
    for name, value in begun.items():
        same = name == "out" or getattr(options, name) == value
        insist(same, f"{out} has begun with --{name} {value}: say another --out")
    return options


def run_seed(options, rows):
    """{row: {measure: value}} of a seed; out/results.json keeps the rows that are done."""
    path = Path(options.out) / "results.json"
    done = json.loads(path.read_text()) if path.exists() else {}
    if set(rows) <= set(done) and path.with_name("balance.png").exists():
        return done
    samples, held_out = hist.prepare(options)
    if options.data == "scenes":
        precision, recall = subjects_found(held_out)
        print(f"seed {options.seed}, subjects: precision {precision:.3f}, recall {recall:.3f}")
    if options.base_steps:
        hist.train("base", ["caption"], samples, options, options.base_steps)
    for row in rows:
        if row not in done:
            steps, name = options.steps, "_".join(re.findall("[a-z]+", row))
            if row == LAST:
                ratio = done["all"]["seconds"] / done["caption"]["seconds"]
                steps = max(1, round(steps * ratio))
            model, seconds = hist.train(name, ROWS[row], samples, options, steps)
            result = measure(model, samples, held_out, options)
            done[row] = result | {"seconds": round(seconds, 2), "steps": steps}
            hist.write_whole(path, json.dumps(done, indent=1))
    draw_balance(held_out, options)
    return done


def difference(values, first):
    """The mean of values - first, paired by seed, and its 95% interval."""
    n, mean = len(values), (values - first).mean()
    if n == 1:
        return f"{mean:+.1f}"
    half = T95[n - 2] * (values - first).std(ddof=1) / math.sqrt(n)
    return f"{mean:+.1f} [{mean - half:+.1f}, {mean + half:+.1f}]"


def table(seeds):
    """[{row: {measure: value}} of each seed] as Markdown, in percent: mean ± standard deviation,
    and below the difference from the first row; then what "all" gains in equal steps, and time."""
    rows = [row for row in ROWS if row in seeds[0]]
    lines = ["| | " + " | ".join(rows) + " | chance |", "|---" * (len(rows) + 2) + "|"]
    gains = ["", "| all against captions | in as many steps | in as much time |", "|---|---|---|"]
    names = [name for name in seeds[0][FIRST] if not re.search(LEFT_OUT, name)]
    for name in names:
        scale, cells, values = 1 if name == "seconds" else 100, [name], {}
        for row in rows:
            values[row] = scale * np.array([seed[row].get(name, math.nan) for seed in seeds])
            spread = f" ± {values[row].std(ddof=1):.1f}" if len(seeds) > 1 else ""
            cells.append(f"{values[row].mean():.1f}{spread}")
            if row != FIRST:
                cells[-1] += f"<br>{difference(values[row], values[FIRST])}"
        chance = [seed[FIRST].get(f"{name}_chance") for seed in seeds]
        cells.append("" if None in chance else f"{100 * np.mean(chance):.1f}")
        lines.append("| " + " | ".join(cells) + " |")
        if LAST in rows:
            steps, time = (difference(values["all"], values[row]) for row in (FIRST, LAST))
            gains.append(f"| {name} | {steps} | {time} |")
    return "\n".join(lines + gains if LAST in rows else lines)


def main(arguments=None):
    own = hist.CommandLine("ablate", epilog="and hist.py's own options", allow_abbrev=False)
    own.add_argument("--seeds", type=int, default=5, help="how many, 1 to 10 [5]")
    own.add_argument("--seed", type=int, default=0, help="the first of them [0]")
    own.add_argument("--out", type=Path, default=Path("out/ablation"), help="[out/ablation]")
    own.add_argument("--brief", action="store_true", help="the rows caption and all alone")
    with hist.told("ablate"):
        asked, rest = own.parse_known_args(arguments)
        insist(0 < asked.seeds < 11, f"--seeds {asked.seeds}: 1 to 10, please")
        done, rows = [], [FIRST, "all"] if asked.brief else list(ROWS)
        for seed in range(asked.seed, asked.seed + asked.seeds):
            out = asked.out / f"seed{seed}"
            with hist.only_writer(out):
                done.append(run_seed(seed_options(rest, out, seed), rows))
        print(table(done))


if __name__ == "__main__":
    main()
