"""What the paper leaves open, measured: the full method, and with one thing changed at a time.

    OMP_NUM_THREADS=1 python -m tests.paper.choices --seed 100     no other table's scenes

All go on from one base of captions alone. The layer and the rows of A that make a map are read off
the base's and the full method's weights, without new training. hist.py's own options are understood
too; into out/choices/seed100/.
"""

import itertools
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import torch

import hist
from tests.paper import ablate

SHOWN = {  # measure: as the table calls it
    "pointing_phrases": "phrases",
    "pointing_subjects": "subjects",
    "multi_object_iou": "IoU",
    "balance": "balance",
    "r1_image_to_text": "R@1 i. to t.",
    "r1_text_to_image": "t. to i.",
    "vqa": "VQA",
    "occlusion": "occlusion",
}
ALL = ablate.ROWS["all"]


def grad_cam_of(rows, original=hist.grad_cam):
    """hist.grad_cam from the row of [CLS] alone, or from those of the words alone."""

    def grad_cam(A, score, mask, *rest):
        is_cls = torch.arange(mask.shape[1], device=mask.device) == 0
        return original(A, score, mask & (is_cls if rows == "[CLS]" else ~is_cls), *rest)

    return grad_cam


def over_maximum(part1, part2, whole, weight, eps=1e-12):
    """hist.composition_loss with maps over their maximum, not their sum; the mean over patches."""

    def normalise(M):
        return M / (M.amax((1, 2), keepdim=True) + eps)

    target = normalise(normalise(part1.detach()) + normalise(part2.detach()))
    distance = (normalise(whole) - target).abs().mean((1, 2))
    return (distance * weight).sum() / weight.sum().clamp(min=eps)


def without_teacher(model, teacher, *rest, original=hist.composition_losses):
    """hist.composition_losses with the parts' maps from the model in training, detached."""
    return original(model, model, *rest)


VARIANTS = {  # name: options changed, functions of hist.py replaced
    "as it is": ({}, {}),
    "no teacher": ({}, {"composition_losses": without_teacher}),
    "lambda 0.3": ({"composition_weight": 0.3}, {}),
    "start at 0.85": ({"composition_start": 0.85}, {}),
    "maps over their maximum": ({}, {"composition_loss": over_maximum}),
}


def show(name, model, samples, records, options):
    """Print a row of the table."""
    result = ablate.measure(model, samples, records, options)
    cells = (f"{100 * result[measure]:.1f}" if measure in result else "" for measure in SHOWN)
    print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


def read_off(name, samples, records, options):
    """Print a row for each fusion layer and rows of A, from the weights of OUT/name.pt."""
    model, _, _ = hist.read_checkpoint(Path(options.out) / f"{name}.pt", options)
    for layer, rows in itertools.product(range(options.fusion_layers), ("[CLS]", "words")):
        with patch.object(hist, "grad_cam", grad_cam_of(rows)):
            title = f"{name}: layer {layer}, rows of {rows}"
            show(title, model, samples, records, replace(options, cam_layer=layer))


def main(arguments=None):
    try:
        typed = sys.argv[1:] if arguments is None else arguments
        options = hist.parse_options(["--seed", "100", "--out", "out/choices", *typed])
        options.out = str(Path(options.out) / f"seed{options.seed}")
        samples, held_out = hist.prepare(options)
        print("| | " + " | ".join(SHOWN.values()) + " |\n" + "|---" * (len(SHOWN) + 1) + "|")
        hist.train("base", ["caption"], samples, options, options.base_steps)
        read_off("base", samples, held_out, options)
        for number, (name, (changes, functions)) in enumerate(VARIANTS.items()):
            with ExitStack() as stack:
                for replaced, by in functions.items():
                    stack.enter_context(patch.object(hist, replaced, by))
                now = replace(options, **changes)
                model, _ = hist.train(f"v{number}", ALL, samples, now, options.steps)
            show(name, model, samples, held_out, options)
            if number == 0:
                read_off("v0", samples, held_out, options)
    except (hist.UserError, OSError) as error:
        print(f"choices: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
