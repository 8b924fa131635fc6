"""python hist.py --ablate: every row of the ablation for several seeds, and its table."""
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np

import hist

ROWS = {"caption": ("caption",), "+ phrase": ("caption", "phrase"), "+ subject": ("caption", "subject"), "+ both": ("caption", "phrase", "subject"),
        "+ composition": ("caption", "composition"), "all": hist.LEVELS, "caption, same time": ("caption",)}
T95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)                             # Student's t, two-sided, for 2 to 10 seeds


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
            if now.base_steps:
                hist.train("base", ("caption",), samples, now, now.base_steps)
            for row, levels in ROWS.items():
                if row not in done:
                    steps = round(now.steps * done["all"]["seconds"] / done["caption"]["seconds"]) if "time" in row else now.steps
                    name = row.replace("+ ", "").replace(", ", "_").replace(" ", "_")
                    model, seconds = hist.train(name, levels, samples, now, steps)
                    done[row] = {**hist.evaluate(model, samples.vocabulary, held_out, now)[0], "seconds": seconds}
                    hist.write_whole(path, json.dumps(done, indent=1))
        every.append(done)
    print(table(every))


def table(every):
    """[{row: {measure: value}} of each seed] as a Markdown table: mean ± standard deviation, then the paired difference [95% interval]."""
    n, lines = len(every), ["| | " + " | ".join(ROWS) + " | chance |", "|---" * (len(ROWS) + 2) + "|"]
    for k, title in hist.TABLE.items():
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
