"""ALBEF's published checkpoint (github.com/salesforce/ALBEF) as one of hist.py, to be fine-tuned.

    python -m tests.paper.albef ALBEF.pth vocab.txt out/albef/base.pt
    python hist.py --data coco --root PATH_TO_COCO --init out/albef/base.pt --lr 1e-5

Or refcoco.pth, or a retrieval checkpoint; vocab.txt is bert-base-uncased's. baseline.pt beside it
is the same, for --ground and --eval-only before HIST.
"""

import json
import math
import re
import sys
from dataclasses import asdict
from pathlib import Path

import timm.data
import torch

import hist
from hist import insist

VITS = {192: "tiny", 384: "small", 768: "base", 1024: "large"}  # timm's, by their width
HEADS = ("word_head", "image_projection", "text_projection", "log_temperature")  # may be missing
RENAMES = (  # their names to ours, one after the other
    (r"^visual_encoder\.", "vit."),
    (r"^vision_proj\.", "image_projection."),
    (r"^text_proj\.", "text_projection."),
    (r"^itm_head\.", "match_head."),
    (r"^text_encoder\.(bert\.)?", "text_encoder."),  # fine-tuned ones have no "bert."
    (r"^text_encoder\.embeddings\.(token_)?(word|position|type)_embeddings", r"\2_embedding"),
    (r"^text_encoder\.embeddings\.LayerNorm", "embedding_norm"),
    (r"^text_encoder\.cls\.predictions\.(decoder\.)?", "word_head.3."),  # its bias is there twice
    (r"^word_head\.3\.transform\.dense", "word_head.0"),
    (r"^word_head\.3\.transform\.LayerNorm", "word_head.2"),
    (r"^text_encoder\.encoder\.layer\.", "layers."),
    (r"\.crossattention\.", ".cross_attention."),
    (r"\.attention\.", ".self_attention."),
    (r"_attention\.output\.LayerNorm", "_norm"),
    (r"_attention\.output\.dense", "_attention.out"),
    (r"_attention\.self\.", "_attention."),
    (r"\.intermediate\.dense", ".mlp.0"),
    (r"\.output\.dense", ".mlp.2"),
    (r"\.output\.LayerNorm", ".mlp_norm"),
)


def translate(published):
    """({our name: weight}, text layers, fusion layers); what has no place is named anyhow."""
    fusing = re.findall(r"text_encoder\S*\.layer\.(\d+)\.crossattention", " ".join(published))
    insist(fusing, "it has no text_encoder with crossattention")
    first, depth = min(map(int, fusing)), 1 + max(map(int, fusing))
    layers = [f"text_layers.{n}." for n in range(first)]
    layers += [f"fusion_layers.{n}." for n in range(depth - first)]
    weights, of_layers = {}, [(rf"^layers\.{n}\.", ours) for n, ours in enumerate(layers)]
    for name in sorted(published):
        ours = name
        for pattern, new in (*RENAMES, *of_layers):
            ours = re.sub(pattern, new, ours)
        weights[ours] = published[name].float()
    for name in [name for name in weights if "_layers." in name and ".key." in name]:
        key, value = weights.pop(name), weights.pop(name.replace(".key.", ".value."))
        weights[name.replace(".key.", ".key_value.")] = torch.cat([key, value])
    # Every token is of type 0: our positions include it. We keep the temperature's logarithm.
    positions, types = (weights.pop(f"{kind}_embedding.weight") for kind in ("position", "type"))
    weights["position_embedding.weight"] = positions[: hist.MAX_TOKENS] + types[0]
    if "temp" in weights:
        weights["log_temperature"] = weights.pop("temp").log()
    pixels = {"mean": timm.data.OPENAI_CLIP_MEAN, "std": timm.data.OPENAI_CLIP_STD}
    weights |= {name: torch.tensor(value).view(3, 1, 1) for name, value in pixels.items()}
    return weights, first, depth - first


def build(published, words, folder):
    """A checkpoint of hist.py; prints what it leaves out, and what is missing."""
    weights, text_layers, fusion_layers = translate(published)
    rows, width = weights["word_embedding.weight"].shape
    places, image_width = weights["vit.pos_embed"].shape[1:]
    insist(rows == len(words), f"it has {rows} words, and the vocabulary {len(words)}")
    insist(text_layers, "all of its layers look at the image, as BLIP's do")
    shape = {"vit": f"vit_{VITS[image_width]}_patch16_224", "width": width, "data": "coco"}
    shape |= {"text_layers": text_layers, "fusion_layers": fusion_layers, "lr": 1e-5}
    shape |= {"image_size": 16 * math.isqrt(places - 1), "out": str(folder)}
    options = hist.Options(**hist.presets(shape))
    torch.manual_seed(0)
    model = hist.ALBEF(options, hist.Tokenizer(words))
    ours = model.state_dict().keys()
    missing, left = sorted(ours - weights.keys()), sorted(weights.keys() - ours)
    strange = [n for n in missing if not n.startswith(HEADS)] + [n for n in left if n[:4] == "vit."]
    insist(not strange, f"it has another image encoder or other layers: {' '.join(strange[:3])}")
    model.load_state_dict({name: weights[name] for name in ours & weights.keys()}, strict=False)
    print("left out:", *sorted({re.sub(r"_m\..*", "_m", name) for name in left}))
    print("missing, to be learnt:", *missing)
    state = {"step": 0, "seconds": 0.0, "options": asdict(options), "words": words}
    return state | {"model": model.state_dict()}


def main(argv):
    hist.use_any_console()
    with hist.told("albef"), hist.blaming(" ".join(argv)):
        insist(len(argv) == 3, "python -m tests.paper.albef ALBEF.pth vocab.txt out/albef/base.pt")
        source, vocabulary, target = map(Path, argv)
        words = vocabulary.read_text(encoding="utf-8").rstrip("\n").split("\n")
        published = torch.load(source, map_location="cpu", weights_only=True)
        insist(isinstance(published, dict), "it is no dictionary of weights")
        state = build(published.get("model", published), words, target.parent)
        target.parent.mkdir(parents=True, exist_ok=True)
        for path in {target, target.with_name("baseline.pt")}:
            hist.write_whole(path, state)
        kept = {name: v for name, v in state["options"].items() if name not in hist.ONCE}
        hist.write_whole(target.with_name("options.json"), json.dumps(kept, indent=1))
        print(f"python hist.py --data DATA --init {target} --lr 1e-5")


if __name__ == "__main__":
    main(sys.argv[1:])
