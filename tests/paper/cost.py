"""What a training step costs as levels are added, part by part, and how fast the loader is.

    OMP_NUM_THREADS=1 python -m tests.paper.cost --data coco --root PATH_TO_COCO --workers 0

The rows take turns, so that all meet the same machine; the first turn warms up, of the others the
median is printed [least, most]. Parts are in percent of a step with its data; "other" holds losses
and teacher; GiB is the process's peak, or the GPU's. hist.py's own options are understood too.
"""

import math
import sys
import time
from collections import Counter
from contextlib import ExitStack
from unittest.mock import patch

import numpy as np
import torch

import hist

try:
    import resource
except ImportError:  # on Windows: the column "GiB" stays without a number
    resource = None

TURNS = 6
LEVELS = [*hist.LEVELS, "composition"]
PARTS = ("data", "image", "text", "fusion", "Grad-CAM", "backward", "optimiser")
METHODS = {"encode_image": "image", "project_image": "image", "encode_text": "text"}
METHODS |= {"fuse": "fusion", "decode": "fusion"}


def now():
    """The time, when the GPU, if there is one, has done what it was told."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def peak_memory(device):
    """Bytes that this process, or its GPU, has held at most; nan where that is not known."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit if resource else math.nan


def timed(clock, part, function):
    """The function, with the seconds that it takes added to clock[part]."""

    def wrapped(*arguments, **named):
        began = now()
        result = function(*arguments, **named)
        clock[part] += now() - began
        return result

    return wrapped


def cost(options, samples):
    """[[Counter of a turn: seconds by part, "step"; "GiB"], …] for 1, 2, … levels."""
    model = hist.MODELS[options.base](options, samples.tokenizer).to(options.device)
    teacher, clock = hist.make_teacher(model), Counter()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    watched = [(hist, "grad_cam", "Grad-CAM"), (torch.Tensor, "backward", "backward")]
    watched += [(optimizer, "step", "optimiser")]
    watched += [(model, name, part) for name, part in METHODS.items() if hasattr(model, name)]
    images, rows = TURNS * len(LEVELS) * options.batch_size, [[] for _ in LEVELS]
    batches = iter(hist.loader(samples, options, 0, images))
    with ExitStack() as stack:
        for owner, name, part in watched:
            stack.enter_context(patch.object(owner, name, timed(clock, part, getattr(owner, name))))
        step = timed(clock, "step", hist.train_step)
        for number, row in TURNS * list(enumerate(rows, 1)):
            clock.clear()
            batch = timed(clock, "data", next)(batches)
            how = options, LEVELS[:number], 0.5, 1.0  # hardness, weight of composition
            step(model, teacher, iter([batch]), optimizer, *how)
            row.append(Counter(clock, GiB=peak_memory(options.device) / 2**30))
    return rows


def table(rows, batch_size):
    """cost's rows as a Markdown table."""
    titles = ["levels", "s a step", "times", "images/s", "GiB", *PARTS, "other"]
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    first = None
    for level, (warm, *turns) in zip(LEVELS, rows):
        middle = Counter()
        for part in (*PARTS, "step"):
            middle[part] = np.median([turn[part] for turn in turns])
        seconds = [turn["step"] for turn in turns]
        step, first = middle["step"], first or middle["step"]
        cells = [f"{'' if level == 'caption' else '+ '}{level}"]
        cells += [f"{step:.3f} [{min(seconds):.3f}, {max(seconds):.3f}]", f"{step / first:.2f}"]
        cells += [f"{batch_size / step:.1f}", f"{warm['GiB']:.1f}"]
        shares = [100 * middle[part] / (step + middle["data"]) for part in PARTS]
        cells += [f"{share:.1f}%" for share in (*shares, 100 - sum(shares))]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments=None):
    with hist.told("cost"):
        options = hist.parse_options(["--out", "out/cost", *(arguments or sys.argv[1:])])
        hist.insist(options.accumulate == 1, "--accumulate: a step is timed whole")
        samples, _ = hist.prepare(options)
        print(table(cost(options, samples), options.batch_size))
        began = time.perf_counter()
        images = sum(len(b["image"]) for b in hist.loader(samples, options, 0, 256))
        speed = images / (time.perf_counter() - began)
        print(f"\n{torch.get_num_threads()} threads; the loader alone: {speed:.0f} images/s")


if __name__ == "__main__":
    main()
