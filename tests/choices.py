"""What the paper leaves open, measured: python tests/choices.py [SEED ...]; by default seeds 100 and 101, whose scenes no table of the README uses.

From one base of captions alone, the full method goes on as hist.py has it and with one thing changed at a time. The maps' layer
and rows are read off the baseline's and the full method's weights, with no new training.
"""
import itertools
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import hist
import ablation

SHOWN = ("pointing_phrases", "pointing_subjects", "multi_object_iou", "balance", "r1_image_to_text", "r1_text_to_image", "vqa", "occlusion")


def rows_of(which, original=hist.grad_cam):
    """grad_cam from the rows of [CLS] alone, or of the words alone."""
    def grad_cam(attention, score, mask, *rest):
        is_cls = torch.arange(mask.shape[1], device=mask.device) == 0
        return original(attention, score, mask & (is_cls if which == "[CLS]" else ~is_cls), *rest)
    return grad_cam


def over_maximum(part1, part2, whole, weight, eps=1e-12):
    """hist.composition_loss with maps over their maximum in place of their sum, and the mean over patches."""
    n = lambda M: M.flatten(1) / (M.flatten(1).amax(1, keepdim=True) + eps)
    distance = (n(whole) - n(n(part1.detach()) + n(part2.detach()))).abs().mean(1)
    return (distance * weight).sum() / weight.sum().clamp(min=eps)


def without_teacher(model, batch, levels, hardness, cam_layer, teacher, original=hist.training_losses):
    """training_losses with the parts' maps from the model that is trained, detached."""
    return original(model, batch, levels, hardness, cam_layer)


VARIANTS = {"as it is": ({}, {}), "no teacher": ({}, {"training_losses": without_teacher}), "lambda 0.3": ({"composition_weight": 0.3}, {}),
            "start at 0.85": ({"composition_start": 0.85}, {}), "maps over their maximum": ({}, {"composition_loss": over_maximum})}


def main(seeds):
    print(f"{'seed':5}{'':34}" + "".join(f"{name.replace('pointing_', '').replace('multi_object_', ''):>18}" for name in SHOWN))
    for seed in seeds:
        o = hist.settle({"seed": seed, "out": f"out/choices/seed{seed}"})
        samples, held_out = hist.prepare(o)
        hist.train("base", hist.LEVELS[:1], samples, o, o.base_steps)

        def measure(name, model, o):
            result = ablation.measure(model, samples.vocabulary, held_out, o)
            print(f"{seed:<5}{name:34}" + "".join(f"{100 * result[k]:18.1f}" for k in SHOWN), flush=True)

        def read_off(name):
            model, _, _ = hist.restore(Path(o.out) / f"{name}.pt", o)
            for layer, which in itertools.product(range(o.fusion_layers), ("[CLS]", "words")):
                with patch.object(hist, "grad_cam", rows_of(which)):
                    measure(f"{name}: layer {layer}, rows of {which}", model, replace(o, cam_layer=layer))

        read_off("base")
        for number, (name, (changes, patches)) in enumerate(VARIANTS.items()):
            now = replace(o, **changes)
            with ExitStack() as stack:
                for what, by in patches.items():
                    stack.enter_context(patch.object(hist, what, by))
                model, _ = hist.train(f"v{number}", hist.LEVELS, samples, now, o.steps)
            measure(name, model, now)
            if number == 0:
                read_off("v0")


if __name__ == "__main__":
    main([int(seed) for seed in sys.argv[1:]] or [100, 101])
