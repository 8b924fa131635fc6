"""BLIP's wiring: contrast without the image, matching with it, and a causal decoder."""

import pytest
import torch
import torch.nn.functional as F
from common import batch_of, options

import hist


@pytest.fixture(scope="module")
def blip():
    """(options, tokenizer, batch, model, image_kv)."""
    torch.manual_seed(0)
    o = options(base="blip", text_layers=0)
    tokenizer, batch = batch_of(o)
    model = hist.BLIP(o, tokenizer).eval()
    image_kv = [kv.detach() for kv in model.project_image(model.encode_image(batch["image"])[1])]
    return o, tokenizer, batch, model, image_kv


def test_a_word_is_told_from_those_before_it_and_the_image(blip):
    _, _, batch, model, image_kv = blip
    ids, kv = batch["caption"]["ids"][:1], [kv[:, :1] for kv in image_kv]
    with torch.no_grad():
        words = model.decode(ids, kv)
        for t in range(1, ids.shape[1]):
            other = ids.clone()
            other[:, t:] = 5 + other[:, t:] % 7
            changed = model.decode(other, kv)
            torch.testing.assert_close(changed[:, :t], words[:, :t])
            assert (changed[:, t] - words[:, t]).abs().max() > 1e-4
        elsewhere = model.decode(ids, [kv[:, 1:2] for kv in image_kv])
        assert (elsewhere - words).abs().max() > 1e-5
        before = ids.clone()
        before[:, 1] = 5
        if (before != ids).any():
            changed = model.decode(before, kv)
            assert ((changed - words)[:, 1:].abs().amax(-1) > 1e-5).all()


def test_a_decoder_layer_shares_all_but_self_attention(blip):
    """With the same self-attention the last word, which sees all words either way, gets the same
    state in the first layer."""
    o, tokenizer, batch, _, image_kv = blip
    model = hist.BLIP(o, tokenizer).eval()
    one, other = model.fusion_layers[0], model.decoder_layers[0]
    ids = batch["caption"]["ids"][:1]
    ids = ids[:, ids[0] > 0]
    x, every = model.embed(ids), torch.ones(1, 1, ids.shape[1], dtype=torch.bool)
    kv = image_kv[0][:, :1]
    assert (one(x, every, kv)[0] - other(x, every, kv)[0]).abs().max() > 1e-4
    other.self_attention.load_state_dict(one.self_attention.state_dict())
    causal = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()[None]
    expected, seen = one(x, every, kv)[0], other(x, causal, kv)[0]
    torch.testing.assert_close(seen[:, -1], expected[:, -1])
    shared = {id(parameter) for parameter in model.fusion_layers.parameters()}
    for name, parameter in model.decoder_layers.named_parameters():
        assert (id(parameter) in shared) == ("self_" not in name)
    albef = hist.ALBEF(options(text_layers=0), tokenizer)
    own = {id(p) for p in model.parameters()} - {id(p) for p in model.decoder_layers.parameters()}
    assert len(own) + len(shared & {id(p) for p in model.decoder_layers.parameters()}) == len(
        list(albef.parameters())
    )


def test_contrast_sees_no_image_and_matching_does(blip):
    _, _, batch, model, image_kv = blip
    ids = batch["caption"]["ids"]
    T, mask, features = model.encode_text(ids)
    torch.testing.assert_close(T, model.embed(ids))
    states = T
    for layer in model.fusion_layers:
        states, A = layer(states, mask[:, None])
        assert A is None
    projected = model.text_projection(states[:, 0])
    torch.testing.assert_close(features, F.normalize(projected, dim=-1))
    logits, _ = model.match(T, mask, image_kv)
    elsewhere, _ = model.match(T, mask, [kv.roll(1, 1) for kv in image_kv])
    assert (logits - elsewhere).abs().max() > 1e-5


def test_lm_loss_by_hand(blip, monkeypatch):
    """ "a dog" and "cat": each word from those before it, and [CLS] for the end; a text that does
    not exist asks for nothing."""
    model = blip[3]
    ids = torch.tensor([[1, 7, 8], [1, 9, 0], [1, 0, 0]])
    logits = torch.randn(3, 3, 10)
    monkeypatch.setattr(model, "decode", lambda ids, image_kv: logits)
    p = logits.softmax(-1).log()
    expected = -(p[0, 0, 7] + p[0, 1, 8] + p[0, 2, 1] + p[1, 0, 9] + p[1, 1, 1]) / 5
    text = {"ids": ids, "exists": torch.tensor([True, True, False])}
    torch.testing.assert_close(model.language_loss(text, None), expected)
    text["exists"] = torch.zeros(3, dtype=torch.bool)
    assert model.language_loss(text, None).item() == 0


def test_an_answer_is_the_next_word(blip):
    """What the decoder says after "the circle is", as the LM loss of the next word has it."""
    _, tokenizer, batch, model, image_kv = blip
    kv = [kv[:, 2:3] for kv in image_kv]
    text = tokenizer.batch(["the circle is [MASK]"])
    place = 4
    assert text[0, place] == tokenizer.mask_id
    said = model.word_logits(text, place, kv).log_softmax(-1)

    def loss(ids):
        found = {"ids": torch.tensor([ids]), "exists": torch.tensor([True])}
        return model.language_loss(found, kv).item() * len(ids)

    red = tokenizer.ids["red"]
    shorter = text[0, :place].tolist()
    end = model.decode(torch.tensor([[*shorter, red]]), kv)[0, -1].log_softmax(-1)[1].item()
    stop = model.decode(torch.tensor([shorter]), kv)[0, -1].log_softmax(-1)[1].item()
    # the LM losses of "the circle is red" and "the circle is" differ by the word, and two ends
    expected = loss(shorter) + stop - loss([*shorter, red]) - end
    assert said[red].item() == pytest.approx(expected, abs=1e-4)


def test_losses_and_gradients_reach_every_weight(blip):
    o, tokenizer, batch, _, _ = blip
    torch.manual_seed(0)
    model = hist.BLIP(o, tokenizer)
    levels = [*hist.LEVELS, "composition"]
    losses, _ = hist.hist_losses(model, batch, levels, 0.5, 0, hist.make_teacher(model))
    expected = [
        f"{level}_{kind}" for level in ("caption", "phrase") for kind in ("itc", "itm", "lm")
    ]
    assert list(losses) == [*expected, "subject_itc", "subject_itm", "composition"]
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_a_taught_decoder_answers_what_it_was_taught():
    """Two pictures and what is said of each: after 60 steps of LM alone the cloze is filled."""
    torch.manual_seed(0)
    o = options(base="blip", text_layers=0)
    captions = ["a red circle", "a blue star"]
    tokenizer = hist.Tokenizer.build(captions, 100)
    images = torch.tensor([30, 220], dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 24, 24)
    text = {"ids": tokenizer.batch(captions), "exists": torch.tensor([True, True])}
    model = hist.BLIP(o, tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    model.vit.eval()
    for _ in range(60):
        loss = model.language_loss(text, model.project_image(model.encode_image(images)[1]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    colours = ["red", "blue"]
    for image, colour in zip(images, colours):
        assert hist.answer(model, tokenizer, image, "a [MASK]", colours) == colour
        assert hist.answer(model, tokenizer, image, "a [MASK] circle", colours) == colour
