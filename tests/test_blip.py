"""BLIP's wiring: one text stack that contrasts without the image, matches with it, and decodes; its LM loss; captions; its commands."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import hist
from test_commands import TINY, here, refused  # noqa: F401 (a fixture)
from test_hist import batch_of, options


@pytest.fixture(scope="module")
def blip():
    torch.manual_seed(0)
    o = options(base="blip", text_layers=0)
    vocabulary, batch = batch_of(o)
    return o, vocabulary, batch, hist.HIST(o, vocabulary).eval()


def decoded(model, image, ids):
    with torch.no_grad():
        return model.word_head(model.fuse(*model.encode_text(ids)[:2], image, torch.zeros_like(ids[:, 0]), causal=True)[0])


def test_a_word_is_told_from_those_before_it_and_the_image(blip):
    _, _, batch, model = blip
    ids, image = batch["caption"]["ids"][:1], [kv.detach() for kv in model.encode_image(batch["image"])[1]]
    words = decoded(model, image, ids)
    for t in range(1, ids.shape[1]):
        other = ids.clone()
        other[:, t:] = 5 + other[:, t:] % 7
        torch.testing.assert_close(decoded(model, image, other)[:, :t], words[:, :t])
        assert (decoded(model, image, other)[:, t] - words[:, t]).abs().max() > 1e-4
    assert (decoded(model, [kv.roll(1, 1) for kv in image], ids) - words).abs().max() > 1e-5


def test_decoding_shares_all_but_self_attention(blip):
    """With the same weights in both self-attentions, the last word, which sees all words either way, gets the same state in the first layer."""
    o, vocabulary, batch, _ = blip
    model = hist.HIST(o, vocabulary).eval()
    layer, ids = model.fusion[0], batch["caption"]["ids"]
    ids = ids[(ids != hist.PAD).all(1)][:1]
    T, mask, _ = model.encode_text(ids)
    image = model.encode_image(batch["image"])[1][0][:, :1]
    assert (layer(T, mask, image)[0] - layer(T, mask, image, causal=True)[0]).abs().max() > 1e-4
    layer.causal_attention.load_state_dict(layer.attention.state_dict())
    torch.testing.assert_close(layer(T, mask, image)[0][:, -1], layer(T, mask, image, causal=True)[0][:, -1])
    of_albef = {name for name, _ in hist.HIST(options(text_layers=0), vocabulary).named_parameters()}
    assert all("causal_attention" in name for name, _ in model.named_parameters() if name not in of_albef)


def test_contrast_sees_no_image_and_matching_does(blip):
    _, _, batch, model = blip
    ids, image = batch["caption"]["ids"], model.encode_image(batch["image"])[1]
    T, mask, features = model.encode_text(ids)
    states = T
    for layer in model.fusion:
        states, A = layer(states, mask)
        assert A is None
    torch.testing.assert_close(features, F.normalize(model.text_projection(states[:, 0]), dim=-1))
    rows = torch.zeros(len(ids), dtype=torch.long)
    assert (model.match(T, mask, image, rows)[0] - model.match(T, mask, image, rows + 1)[0]).abs().max() > 1e-5


def test_lm_loss_by_hand():
    """"a dog" and "cat": each word from those before it, and [CLS] for the end."""
    ids = torch.tensor([[1, 7, 8], [1, 9, 0]])
    assert hist.next_words(ids).tolist() == [[7, 8, 1], [9, 1, -100]]
    logits = torch.randn(2, 3, 10)
    p = logits.softmax(-1)
    by_hand = -(p[0, 0, 7].log() + p[0, 1, 8].log() + p[0, 2, 1].log() + p[1, 0, 9].log() + p[1, 1, 1].log()) / 5
    torch.testing.assert_close(hist.mlm_loss(logits, hist.next_words(ids)), by_hand)


def test_losses_and_gradients_reach_every_weight(blip):
    o, vocabulary, batch, _ = blip
    torch.manual_seed(0)
    model = hist.HIST(o, vocabulary)
    losses, _ = hist.training_losses(model, batch, hist.LEVELS, 0.5, o.cam_layer)
    assert list(losses) == ["caption_itc", "caption_itm", "caption_lm", "phrase_itc", "phrase_itm", "phrase_lm", "subject_itc", "subject_itm", "composition"]
    sum(losses.values()).backward()
    unused = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert not unused


@pytest.mark.parametrize("cloze", ["the circle is [MASK]", "[MASK] circle"])
def test_answers_with_what_the_decoder_finds_likeliest(blip, cloze):
    """The next word after what the question says, or where more follows the sentence that is likeliest as a whole."""
    _, vocabulary, batch, model = blip
    choices = list(hist.COLOURS)
    image = model.encode_image(batch["image"])[1]
    def likelihood(text):
        ids = torch.tensor([hist.encode(vocabulary, text)])
        p = decoded(model, [kv[:, 2:3] for kv in image], ids).log_softmax(-1)[0]
        words = ids[0, 1:].tolist()
        return float(p[len(words) - 1, words[-1]]) if cloze.endswith("[MASK]") else sum(float(p[t, word]) for t, word in enumerate([*words, hist.CLS]))
    best = max(choices, key=lambda c: likelihood(cloze.replace("[MASK]", c)))
    assert hist.answer(model, vocabulary, batch["image"], [(2, "colour", cloze, choices, "red")]) == [best]


def test_captions_what_it_was_taught():
    """Two pictures and what is said of each: after 60 steps of LM alone, greedy decoding says it; the nucleus never leaves its words."""
    torch.manual_seed(0)
    o = options(base="blip", text_layers=0, image_size=24)
    vocabulary = hist.build_vocabulary(["a red circle", "the blue star is small"], 100)
    images = torch.stack([torch.full((3, 24, 24), 30, dtype=torch.uint8), torch.full((3, 24, 24), 220, dtype=torch.uint8)])
    ids = hist.pad([hist.encode(vocabulary, c) for c in ("a red circle", "the blue star is small")])
    model = hist.HIST(o, vocabulary)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    model.vit.eval()
    for _ in range(60):
        states, _ = model.fuse(*model.encode_text(ids)[:2], model.encode_image(images)[1], torch.arange(2), causal=True)
        loss = hist.mlm_loss(model.word_head(states), hist.next_words(ids))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert [hist.generate(model, vocabulary, image) for image in images] == ["a red circle", "the blue star is small"]
    assert [hist.generate(model, vocabulary, image, 0.3) for image in images] == ["a red circle", "the blue star is small"]
    untaught = hist.HIST(o, vocabulary)
    said = hist.generate(untaught, vocabulary, images[0], 1.0).split()
    assert len(said) < hist.MAX_TOKENS and not {"[PAD]", "[MASK]", "[UNK]", "[CLS]"} & set(said)


def test_commands(here, capsys):
    hist.main([*TINY, "--base", "blip"])
    said = capsys.readouterr().out
    assert "VQA" in said and (here / "out/scenes-blip/hist.pt").exists()
    Image.fromarray(np.full((30, 40, 3), 200, np.uint8)).save("photo.png")
    hist.main(["--caption", "photo.png"])
    greedy = capsys.readouterr().out
    hist.main(["--caption", "photo.png", "--top-p", "0.9", "--seed", "1"])
    drawn = capsys.readouterr().out
    assert greedy.count("\n") == drawn.count("\n") == 1
    hist.main(["--ground", "photo.png", "a red circle"])
    assert (here / "out/scenes-blip/ground.png").exists()
    assert "no picture" in refused(capsys, "--caption", "nowhere.png") and "albef or blip" in refused(capsys, "--base", "clip")
    hist.main([*TINY, "--levels", "caption", "--steps", "1"])
    assert "--base blip" in refused(capsys, "--caption", "photo.png", "--out", "out/scenes")
