"""python hist.py --bench: what a training step costs, part by part, and how fast the loader is.

Another program's step can be timed beside ours: bench(o, {"name": step}), where step(batch) does all from collate's batch to new weights.
"""
import copy
import itertools
import time
from collections import Counter
from functools import partial

import numpy as np
import torch

import hist


def bench(o, peers={}):
    """Print the cost of a whole training step, and the share of its parts, as levels are added; in turns, so that all meet the same machine."""
    samples, _ = hist.prepare(o)
    model, clock, cuda = hist.HIST(o, samples.vocabulary).to(o.device), Counter(), o.device == "cuda"
    teacher = copy.deepcopy(model).eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=o.device != "mps")
    def timed(part, f):
        def g(*arguments, **named):
            torch.cuda.synchronize() if cuda else None
            begun = time.perf_counter()
            result = f(*arguments, **named)
            torch.cuda.synchronize() if cuda else None
            clock[part] += time.perf_counter() - begun
            return result
        return g
    for part, owner, f in (("image", model, "encode_image"), ("text", model, "encode_text"), ("fusion", model, "fuse"), ("Grad-CAM", hist, "grad_cam")):
        setattr(owner, f, timed(part, getattr(owner, f)))
    def ours(levels, batch):
        with torch.autocast(o.device, torch.bfloat16, enabled=cuda):
            losses = hist.training_losses(model, hist.to_device(batch, o.device), levels, 0.5, o.cam_layer, teacher)[0]
        optimizer.zero_grad()
        timed("backward", sum(losses.values()).backward)()
        timed("optimiser", optimizer.step)()
    steps, turns = {"caption": hist.LEVELS[:1], "+ phrase": hist.LEVELS[:2], "+ subject": hist.LEVELS[:3], "+ composition": hist.LEVELS}, 6
    steps = {name: (partial(ours, levels), levels) for name, levels in steps.items()} | {name: (step, hist.LEVELS) for name, step in peers.items()}
    batches, rows = hist.loader(samples, o, 0, turns * len(steps) * o.batch_size), {name: [] for name in steps}
    for turn, (name, (step, levels)) in itertools.product(range(turns), steps.items()):
        clock.clear()
        batch = timed("data", partial(next, batches))()
        batch.pop("bad", None)
        tokens = sum(int((batch[level]["ids"] != hist.PAD).sum()) for level in levels if level in batch)
        torch.cuda.reset_peak_memory_stats() if cuda else None
        timed("step", partial(step, batch))()
        rows[name].append({**clock, "tokens": tokens, "memory": hist.peak_memory(o)})
    parts, first = ("data", "image", "text", "fusion", "Grad-CAM", "backward", "optimiser"), None
    print(f"\n{o.vit}, {o.image_size} px, width {o.width}, batch {o.batch_size}, {o.device}, {torch.get_num_threads()} threads; "
          f"median of {turns - 1} turns [least, most]; parts in % of the step with its data")
    print(f"{'levels':15}{'s a step':>22}{'times':>7}{'images/s':>10}{'tokens/s':>10}{'GiB':>6}  " +
          "".join(f"{part:>10}" for part in (*parts, "other")))
    for name, (warm, *measured) in rows.items():               # the first turn warms up
        step, data, tokens, *parts_of = (np.median([m.get(part, 0) for m in measured]) for part in ("step", "data", "tokens", *parts))
        times, first, shares = [m["step"] for m in measured], first or step, [100 * v / (step + data) for v in parts_of]
        print(f"{name:15}{step:8.3f} [{min(times):.3f}, {max(times):.3f}]{step / first:7.2f}{o.batch_size / step:10.1f}{tokens / step:10.0f}"
              f"{warm['memory']:6.1f}  " + "".join(f"{v:10.1f}" for v in (*shares, 100 - sum(shares))))
    begun, n = time.perf_counter(), sum(1 for _ in hist.loader(samples, o, 0, turns * o.batch_size))
    print(f"loader alone, {o.workers} processes: {n * o.batch_size / (time.perf_counter() - begun):.0f} images/s")
