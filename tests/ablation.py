"""python hist.py --ablate: every row of the ablation for several seeds, and its table."""
import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

import hist

ROWS = {"caption": ("caption",), "+ phrase": ("caption", "phrase"), "+ subject": ("caption", "subject"), "+ both": ("caption", "phrase", "subject"),
        "+ composition": ("caption", "composition"), "all": hist.LEVELS, "caption, same time": ("caption",)}
T95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)                             # Student's t, two-sided, for 2 to 10 seeds


@torch.no_grad()
def occlusion_agreement(model, vocabulary, image, phrase, o):
    """Rank correlation (Spearman) of the Grad-CAM map of a phrase with the drop of its match logit when each patch is greyed; nan where one is flat."""
    (height, width), device = model.grid, next(model.parameters()).device
    pixels = hist.read_image(image, o.image_size).to(device)
    rows, columns = (torch.arange(o.image_size, device=device) * n // o.image_size for n in (height, width))
    patch = rows[:, None] * width + columns                                                # (side, side): the patch of each pixel
    hidden = patch == torch.arange(height * width, device=device)[:, None, None]         # (patches, side, side)
    grey = pixels.flatten(1).float().mean(1).to(pixels.dtype)[:, None, None]
    images = torch.cat([pixels[None], torch.where(hidden[:, None], grey, pixels)])         # the image whole, then without each patch
    kv = model.encode_image(images)[1]
    T, mask, _ = model.encode_text(hist.pad([hist.encode(vocabulary, phrase)]).to(device))
    score = model.match(T.expand(len(images), -1, -1), mask.expand(len(images), -1), kv, torch.arange(len(images), device=device))[0][:, 1]
    heat, _ = hist.locate(model, T, mask, [x[:, :1] for x in kv], torch.zeros(1, dtype=torch.long, device=device), o.cam_layer)
    ranks = torch.stack([heat.detach().flatten(), score[0] - score[1:]]).argsort(1).argsort(1).float()
    return float(torch.corrcoef(ranks)[0, 1])


def subjects_found(records):
    """(precision, recall, F1) of the parser's (phrase, subject) pairs against what the captions of these scenes say by construction."""
    found, said = ([Counter((i, *pair) for i, r in enumerate(records) for pair in pairs(r))
                    for pairs in (lambda r: hist.phrases_of(r["captions"][0]), lambda r: r["said"])])
    precision, recall = ((found & said).total() / max(1, c.total()) for c in (found, said))
    return precision, recall, 2 * precision * recall / max(1e-12, precision + recall)


def measure(model, vocabulary, records, o):
    """What hist.evaluate measures, and over two phrases of each of the first 32 scenes the mean agreement of maps with occlusion."""
    result, _ = hist.evaluate(model, vocabulary, records, o)
    agreement = [occlusion_agreement(model, vocabulary, r["image"], t["phrase"], o) for r in records[:32] for t in r["targets"][:2]]
    return result | {"occlusion": round(float(np.nanmean(agreement)), 5), "occlusion_chance": 0}


def ablation(o):
    """Every row of ROWS for every seed, from that seed's base, on the same images for as many steps; the last for as much time as "all".

    What is done lies in out/seedN/results.json, and the same command goes on from there. Prints the means, and below each its
    difference from the first row, paired by seed, with the 95% interval (Student's t).
    """
    top, every = Path(o.out), []
    for seed in range(o.seed, o.seed + o.seeds):
        now = replace(o, seed=seed, out=str(top / f"seed{seed}"), resume=(top / f"seed{seed}" / "options.json").exists())
        path = Path(now.out) / "results.json"
        done = json.loads(path.read_text()) if path.exists() else {}
        if set(ROWS) - set(done):
            samples, held_out = hist.prepare(now)
            print("subjects that the parser finds in seed {}'s captions: precision {:.3f}, recall {:.3f}, F1 {:.3f}".format(seed, *subjects_found(held_out)))
            if now.base_steps:
                hist.train("base", ("caption",), samples, now, now.base_steps)
            for row, levels in ROWS.items():
                if row not in done:
                    steps = max(1, round(now.steps * done["all"]["seconds"] / done["caption"]["seconds"])) if "time" in row else now.steps
                    name = row.replace("+ ", "").replace(", ", "_").replace(" ", "_")
                    model, seconds = hist.train(name, levels, samples, now, steps)
                    done[row] = {**measure(model, samples.vocabulary, held_out, now), "seconds": seconds}
                    hist.write_whole(path, json.dumps(done, indent=1))
        every.append(done)
    print(table(every))


def table(every):
    """[{row: {measure: value}} of each seed] as a Markdown table: mean ± standard deviation, then the paired difference [95% interval]."""
    n, lines = len(every), ["| | " + " | ".join(ROWS) + " | chance |", "|---" * (len(ROWS) + 2) + "|"]
    for k, title in (hist.TABLE | {"occlusion": "occlusion, rank r"}).items():
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
