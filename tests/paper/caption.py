"""What a model of --base blip says of a picture, word by word.

python hist.py --base blip
python -m tests.paper.caption out/scenes-blip PICTURE                     the likeliest words
python -m tests.paper.caption out/scenes-blip PICTURE --top-p 0.9 --seed 1     drawn ones
"""

from pathlib import Path

import torch

import hist


@torch.no_grad()
def generate(model, tokenizer, image, top_p=0.0):
    """A caption of an image (3, side, side): each word is the likeliest, or drawn from the nucleus,
    the likeliest words whose probability together is top_p (arXiv 1904.09751)."""
    model.eval()
    image_kv = model.project_image(model.encode_image(image[None])[1])
    ids = torch.tensor([[tokenizer.cls_id]], device=image.device)
    while ids.shape[1] < hist.MAX_TOKENS:
        logits = model.decode(ids, image_kv)[0, -1]
        logits[[tokenizer.pad_id, tokenizer.mask_id, tokenizer.unk_id]] = -torch.inf
        probability, order = logits.softmax(-1).sort(descending=True)
        probability[1:][probability.cumsum(0)[:-1] >= top_p] = 0
        word = order[torch.multinomial(probability, 1)]
        if word == tokenizer.cls_id:  # the end
            break
        ids = torch.cat([ids, word[None]], 1)
    return tokenizer.decode(ids[0].tolist())


def main(arguments=None):
    own = hist.CommandLine("python -m tests.paper.caption", description=__doc__.split("\n")[0])
    own.add_argument("run", type=Path, help="folder of a run of --base blip")
    own.add_argument("picture")
    own.add_argument("--top-p", type=float, default=0.0, help="draw from the likeliest; 0: do not")
    own.add_argument("--seed", type=int, default=0, help="of the words drawn")
    with hist.told("caption"):
        asked = own.parse_args(arguments)
        options = hist.parse_options(["--eval-only", "--out", str(asked.run)])
        blip = options.base == "blip"
        hist.insist(blip, f"the model in {asked.run} has no decoder: train one with --base blip")
        path = asked.run / "hist.pt"
        path = path if path.exists() else asked.run / "baseline.pt"
        model, tokenizer, _ = hist.read_checkpoint(path, options)
        pixels = hist.pad_to_square(hist.load_pixels(asked.picture, upright=True))
        image = hist.read_image(pixels, options.image_size).to(options.device)
        torch.manual_seed(asked.seed)
        print(generate(model, tokenizer, image, asked.top_p))


if __name__ == "__main__":
    main()
