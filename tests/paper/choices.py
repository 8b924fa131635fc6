"""What the paper leaves open, measured: the full method, and with one thing changed at a time.

    OMP_NUM_THREADS=1 python -m tests.paper.choices --seed 300     no other table's scenes
    OMP_NUM_THREADS=1 python -m tests.paper.choices --seed 300 --world    captions alone, no HIST

--world: what the scenes are chosen by, of a base and of captions alone: where the maps of each
layer and of which rows of A point, and how many of a phrase's negatives are true. All rows go on
from one base. hist.py's own options are understood too; into out/choices/seed300/.
"""

import itertools
from contextlib import nullcontext
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
    "r1_mean": "R@1",
    "r1_mean_itm": "re-ranked",
    "vqa": "VQA",
    "occlusion": "occlusion",
    "pointing_phrases_chance": "chance",
    "error_beside": "beside",
    "error_other": "another",
}


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


def moving_teacher(model, teacher, *rest, original=hist.composition_losses):
    """hist.composition_losses with a teacher that follows the model, 2% of the way each step."""
    own = dict(model.named_parameters())
    with torch.no_grad():
        for name, weight in teacher.named_parameters():
            weight.lerp_(own[name], 0.02)
    return original(model, teacher, *rest)


def entailed(text):
    """A phrase and what it entails: "a small red cup", "a small cup", "a red cup", "a cup"."""
    article, *adjectives, noun = text.split()
    kept = itertools.product(*[(word, "") for word in adjectives])
    return [" ".join(filter(None, (article, *words, noun))) for words in kept]


def text_by_entailment(samples, level, parsed, number, parses, rng, original=hist.Samples.text):
    """hist.Samples.text, whose positives are also the images whose phrases entail the text."""
    row = original(samples, level, parsed, number, parses, rng)
    if level is hist.LEVELS["phrase"]:
        said = [text for p in parses for text in level.texts(p)]
        keys = {hist.text_key(text) for phrase in said for text in entailed(phrase)}
        known = [*row["image_keys"][:1], *sorted(keys - {row["text_keys"]})]
        row["image_keys"] = [*known, *row["image_keys"][len(known) :]][: hist.MAX_KEYS]
    return row


def alike(levels, composition):
    """hist.loss_weights with matching of captions weighed as that of phrases."""
    return {"composition": composition}


def without_teacher(model, teacher, *rest, original=hist.composition_losses):
    """hist.composition_losses with the parts' maps from the model in training, detached."""
    return original(model, model, *rest)


NONE = nullcontext()
VARIANTS = {  # name: options changed, a function of hist.py replaced
    "as it is": ({}, NONE),
    "no composition": ({"composition_weight": 0.0}, NONE),
    "parts by the model itself": ({}, patch("hist.composition_losses", without_teacher)),
    "a teacher that follows": ({}, patch("hist.composition_losses", moving_teacher)),
    "from 0.5": ({"composition_start": 0.5}, NONE),
    "from 0.85": ({"composition_start": 0.85}, NONE),
    "a third of lambda": ({"composition_weight": hist.Options.composition_weight / 3}, NONE),
    "maps over their maximum": ({}, patch("hist.composition_loss", over_maximum)),
    "levels weigh alike": ({}, patch("hist.loss_weights", alike)),
    "positives by entailment": ({}, patch("hist.Samples.text", text_by_entailment)),
}


def show(name, model, samples, records, options):
    """Print a row of the table."""
    result = ablate.measure(model, samples, records, options)
    cells = (f"{100 * result[measure]:.1f}" if measure in result else "" for measure in SHOWN)
    print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


def read_off(name, samples, records, options):
    """Print a row for each fusion layer and rows of A, from the weights of OUT/name.pt: but
    for the words' in the last layer, where [CLS] alone reaches the match head."""
    model, _, _ = hist.read_checkpoint(Path(options.out) / f"{name}.pt", options)
    pairs = itertools.product(range(options.fusion_layers), ("[CLS]", "words"))
    for layer, rows in list(pairs)[:-1]:
        with patch.object(hist, "grad_cam", grad_cam_of(rows)):
            title = f"{name}: layer {layer}, rows of {rows}"
            show(title, model, samples, records, replace(options, cam_layer=layer))


def false_negatives(records):
    """Of the scenes whose caption does not say a phrase, the share of which it is true; "small" and
    "large" are not looked at, so this counts a few too many."""
    found = []
    kinds = [[set(target["phrase"].split()[1:]) for target in r["targets"]] for r in records]
    known = [{hist.text_key(phrase) for phrase, _ in record["said"]} for record in records]
    for phrase in {phrase for record in records for phrase, _ in record["said"]}:
        words = set(phrase.split()) - {"a", "an", "the", "shape", "small", "large"}
        key = hist.text_key(phrase)
        for there, said in zip(kinds, known):
            if key not in said:
                found.append(any(words <= kind for kind in there))
    return sum(found) / len(found)


def compare(options, world):
    """Train the variants, or with `world` captions alone, and print a row of each."""
    samples, held_out = hist.prepare(options)
    print("| | " + " | ".join(SHOWN.values()) + " |\n" + "|---" * (len(SHOWN) + 1) + "|")
    hist.train("base", ["caption"], samples, options, options.base_steps)
    read_off("base", samples, held_out, options)
    variants = {"captions alone": ({"levels": "caption"}, NONE)} if world else VARIANTS
    for number, (name, (changes, replaced)) in enumerate(variants.items()):
        now = replace(options, **changes)
        with replaced:
            model, _ = hist.train(f"v{number}", now.levels.split(","), samples, now, options.steps)
        show(name, model, samples, held_out, options)
        if number == 0:
            read_off("v0", samples, held_out, options)
    if world:
        share = false_negatives([samples.records[i] for i in range(300)])
        print(f"of a phrase's negatives {100 * share:.1f}% are true")


def main(arguments=None):
    own = hist.CommandLine("choices", epilog="and hist.py's own options", allow_abbrev=False)
    own.add_argument("--world", action="store_true", help="captions alone, no HIST")
    with hist.told("choices"):
        asked, rest = own.parse_known_args(arguments)
        options = hist.parse_options(["--seed", "300", "--out", "out/choices", *rest])
        options.out = str(Path(options.out) / f"seed{options.seed}")
        with hist.only_writer(Path(options.out)):
            compare(options, asked.world)


if __name__ == "__main__":
    main()
