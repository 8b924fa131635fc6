"""The model against PyTorch's own layers, and Grad-CAM against finite differences."""

import math

import numpy as np
import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from common import batch_of, options

import hist

WIDTH = 32


@pytest.fixture(scope="module")
def double():
    """A small model in float64, a batch, and the keys and values of its images."""
    torch.manual_seed(0)
    tokenizer, batch = batch_of(options())
    model = hist.ALBEF(options(), tokenizer).double().eval()
    image_kv = model.project_image(model.encode_image(batch["image"].double())[1])
    return model, batch, [kv.detach() for kv in image_kv]


# ------------------------------------------------------------------------- layers, against torch's
def carry_attention(theirs, ours):
    """Our attention's weights, into nn.MultiheadAttention's names."""
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([ours.query.weight, ours.key_value.weight]))
        theirs.in_proj_bias.copy_(torch.cat([ours.query.bias, ours.key_value.bias]))
    theirs.out_proj.load_state_dict(ours.out.state_dict())


def carry_layer(theirs, ours):
    """A Layer's weights, into those of a TransformerEncoderLayer or -DecoderLayer."""
    for norm in (ours.self_norm, ours.mlp_norm):
        nn.init.normal_(norm.weight, 1, 0.1)
        nn.init.normal_(norm.bias, 0, 0.1)
    carry_attention(theirs.self_attn, ours.self_attention)
    theirs.linear1.load_state_dict(ours.mlp[0].state_dict())
    theirs.linear2.load_state_dict(ours.mlp[2].state_dict())
    norms = [ours.self_norm, ours.mlp_norm]
    if hasattr(theirs, "multihead_attn"):
        carry_attention(theirs.multihead_attn, ours.cross_attention)
        norms.insert(1, ours.cross_norm)
    for number, norm in enumerate(norms, 1):
        getattr(theirs, f"norm{number}").load_state_dict(norm.state_dict())


def torch_layer(kind):
    how = dict(dropout=0, activation="gelu", layer_norm_eps=1e-12, batch_first=True)
    return kind(WIDTH, 4, 4 * WIDTH, norm_first=False, **how)


def test_attention_is_torch_s_own():
    torch.manual_seed(0)
    ours, theirs = hist.Attention(WIDTH, 4), nn.MultiheadAttention(WIDTH, 4, batch_first=True)
    carry_attention(theirs, ours)
    x, source = torch.randn(3, 5, WIDTH), torch.randn(3, 7, WIDTH)
    mask = torch.rand(3, 7) > 0.3
    mask[:, 0] = True
    seen, A = ours(x, ours.keys_values(source), mask[:, None])
    how = dict(key_padding_mask=~mask, average_attn_weights=False)
    expected, weights = theirs(x, source, source, **how)
    torch.testing.assert_close(seen, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(A, weights, rtol=0, atol=1e-6)


def test_a_text_layer_is_torch_s_encoder_layer():
    torch.manual_seed(0)
    ours, theirs = hist.Layer(WIDTH), torch_layer(nn.TransformerEncoderLayer)
    carry_layer(theirs, ours)
    x, mask = torch.randn(3, 6, WIDTH), torch.ones(3, 6, dtype=torch.bool)
    mask[1, 4:] = mask[2, 2:] = False
    seen, A = ours(x, mask[:, None])
    assert A is None
    expected = theirs(x, src_key_padding_mask=~mask)
    torch.testing.assert_close(seen[mask], expected[mask], rtol=0, atol=1e-6)


def test_a_fusion_layer_is_torch_s_decoder_layer():
    torch.manual_seed(0)
    ours, theirs = hist.Layer(WIDTH, WIDTH), torch_layer(nn.TransformerDecoderLayer)
    carry_layer(theirs, ours)
    x, mask, V = torch.randn(3, 6, WIDTH), torch.rand(3, 6) > 0.3, torch.randn(3, 9, WIDTH)
    mask[:, 0] = True
    seen, A = ours(x, mask[:, None], ours.cross_attention.keys_values(V))
    assert A.shape == (3, 4, 6, 9)
    torch.testing.assert_close(A.sum(-1), torch.ones(3, 4, 6))
    expected = theirs(x, V, tgt_key_padding_mask=~mask)
    torch.testing.assert_close(seen[mask], expected[mask], rtol=0, atol=1e-6)


def test_a_text_is_words_and_their_places_normalised_then_encoded(double):
    model, batch, _ = double
    ids = batch["caption"]["ids"]
    T, mask, features = model.encode_text(ids)
    words = model.word_embedding.weight[ids] + model.position_embedding.weight[: ids.shape[1]]
    x = (words - words.mean(-1, keepdim=True)) / words.std(-1, correction=0, keepdim=True)
    for layer in model.text_layers:
        theirs = torch_layer(nn.TransformerEncoderLayer).double()
        carry_layer(theirs, layer)
        x = theirs(x, src_key_padding_mask=ids == 0)
    T, mask, features = model.encode_text(ids)  # the norms have other weights by now
    assert (mask == (ids > 0)).all()
    torch.testing.assert_close(T[mask], x[mask], rtol=0, atol=1e-6)
    projected = x[:, 0] @ model.text_projection.weight.T + model.text_projection.bias
    expected = projected / projected.norm(dim=1, keepdim=True)
    torch.testing.assert_close(features.double(), expected, rtol=0, atol=1e-6)


def test_words_in_another_order_are_another_text(double):
    model, _, image_kv = double
    ids = torch.tensor([[1, 5, 6, 7], [1, 7, 6, 5]])
    features = model.encode_text(ids)[2]
    assert (features[0] - features[1]).abs().max() > 1e-4


def test_matching_is_torch_s_decoder_on_the_image(double):
    model, batch, _ = double
    V = model.encode_image(batch["image"].double())[1]
    T, mask, _ = model.encode_text(batch["caption"]["ids"])
    logits, attentions = model.match(T, mask, model.project_image(V))
    assert len(attentions) == 2
    x = T
    for layer in model.fusion_layers:
        theirs = torch_layer(nn.TransformerDecoderLayer).double()
        carry_layer(theirs, layer)
        x = theirs(x, V, tgt_key_padding_mask=~mask)
    logits, _ = model.match(T, mask, model.project_image(V))
    expected = x[:, 0] @ model.match_head.weight.T + model.match_head.bias
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-6)


def test_the_word_head_is_tied_to_the_words_and_stays_so():
    tokenizer, batch = batch_of(options())
    model = hist.ALBEF(options(), tokenizer)
    again = hist.ALBEF(options(), tokenizer)
    again.load_state_dict(model.state_dict())
    for one in (model, again, hist.make_teacher(model)):
        assert one.word_head[-1].weight is one.word_embedding.weight
        assert one.word_head[-1].bias.shape == (len(tokenizer.words),)
    T, mask, _ = model.encode_text(batch["caption"]["ids"])
    states = model.word_head[:-1](T)
    expected = states @ model.word_embedding.weight.T + model.word_head[-1].bias
    torch.testing.assert_close(model.word_head(T), expected)


def test_what_training_asks_for_at_a_place_is_what_an_answer_reads_there(double):
    """language_loss with one label is minus its log-probability in word_logits at that place."""
    model, batch, image_kv = double
    ids = batch["caption"]["ids"][2:3]
    kv = [keys_values[:, 2:3] for keys_values in image_kv]
    for place in (1, 3):
        masked, labels = ids.clone(), torch.full_like(ids, -100)
        masked[0, place], labels[0, place] = hist.Tokenizer.mask_id, ids[0, place]
        said = model.word_logits(masked, place, kv).log_softmax(-1)[ids[0, place]]
        loss = model.language_loss({"masked": masked, "labels": labels}, kv)
        torch.testing.assert_close(loss, -said)
        other = [keys_values[:, 3:4] for keys_values in image_kv]
        assert abs(model.language_loss({"masked": masked, "labels": labels}, other) - loss) > 1e-6


# ------------------------------------------------------------------------------------- the image
CLIP = timm.data.OPENAI_CLIP_MEAN, timm.data.OPENAI_CLIP_STD


@pytest.mark.parametrize(
    "name, mean, std",
    [
        ("vit_tiny_patch16_224", [0.5] * 3, [0.5] * 3),
        ("vit_medium_patch32_clip_224", *CLIP),
    ],
)
def test_images_are_normalised_as_the_vit_was_trained(monkeypatch, name, mean, std):
    model, seen = hist.ALBEF(options(vit=name, image_size=32), hist.Tokenizer("abcd")), []
    forward = model.vit.forward_features

    def watched(images):
        seen.append(images)
        return forward(images)

    monkeypatch.setattr(model.vit, "forward_features", watched)
    model.encode_image(torch.full((1, 3, 32, 32), 255, dtype=torch.uint8))
    expected = [(1 - m) / s for m, s in zip(mean, std)]
    assert seen[0][0, :, 0, 0].tolist() == pytest.approx(expected, rel=1e-5)


def test_a_vit_with_a_cls_token_has_its_patches_in_the_map_and_no_more():
    tokenizer, batch = batch_of(options())
    o = options(vit="vit_tiny_patch16_224", image_size=48, text_layers=0, fusion_layers=1)
    model = hist.ALBEF(o, tokenizer).eval()
    assert (model.prefix, model.grid) == (1, (3, 3))
    features, V = model.encode_image(torch.randint(255, (2, 3, 48, 48), dtype=torch.uint8))
    assert V.shape == (2, 10, 192)
    torch.testing.assert_close(features.norm(dim=1), torch.ones(2))
    expected = F.normalize(model.image_projection(V[:, 0]), dim=1)
    torch.testing.assert_close(features, expected)
    maps, _ = hist.locate(model, batch["phrase"]["ids"][:2], model.project_image(V), 0)
    assert maps.shape == (2, 3, 3)


def test_a_token_of_the_scenes_stem_is_centred_on_its_patch():
    """With all weights alike a token's gradient is its receptive field, whose middle must be the
    middle of the patch."""
    stem = hist.scenes_vit(options(image_size=48)).patch_embed.backbone.eval()
    for parameter in stem.parameters():
        nn.init.constant_(parameter, 0.01)
    image = torch.ones(1, 3, 96, 96, requires_grad=True)  # tokens far from an edge
    at = torch.arange(96.0)
    for row, column in ((7, 7), (8, 6)):
        (field,) = torch.autograd.grad(stem(image)[0, :, row, column].sum(), image)
        field = field[0].sum(0)
        middle = [(field.sum(dim) @ at / field.sum()).item() for dim in (1, 0)]
        assert middle == pytest.approx([6 * row + 2.5, 6 * column + 2.5], abs=0.01)


# -------------------------------------------------------------------------------------- Grad-CAM
@pytest.mark.parametrize("layer", [0, 1])
def test_grad_cam_is_attention_times_the_finite_difference_of_the_score(double, layer, monkeypatch):
    """Every entry of one text's A, nudged one after the other, in the layer that was asked for."""
    model, batch, image_kv = double
    ids = batch["phrase"]["ids"][1:2]
    ids = ids[:, ids[0] > 0]
    ids = torch.cat([ids, torch.zeros_like(ids[:, :1])], 1)  # one place of padding
    image_kv = [kv[:, 1:2] for kv in image_kv]
    attention, nudge = model.fusion_layers[layer].cross_attention, {}

    def forward(x, keys_values, mask=None):  # the same attention, whose A can be nudged
        query = attention.query(x).unflatten(-1, (attention.heads, -1)).transpose(1, 2)
        scores = query @ keys_values[0].transpose(-2, -1) / math.sqrt(query.shape[-1])
        A = scores.softmax(-1) + nudge.get("A", 0)
        return attention.out((A @ keys_values[1]).transpose(1, 2).flatten(2)), A

    maps, match = hist.locate(model, ids, image_kv, layer)
    monkeypatch.setattr(attention, "forward", forward)
    T, mask, _ = model.encode_text(ids)
    logits, attentions = model.match(T, mask, image_kv)
    A = attentions[layer].detach()[0]
    assert match.item() == pytest.approx(logits.softmax(-1)[0, 1].item())
    gradient, eps = torch.zeros_like(A), 1e-6
    for index in np.ndindex(A.shape):
        for sign in (1, -1):
            nudge["A"] = torch.zeros_like(A[None])
            nudge["A"][(0, *index)] = sign * eps
            gradient[index] += sign * model.match(T, mask, image_kv)[0][0, 1].detach() / (2 * eps)
    heads, n = len(A), int(mask.sum())
    expected = (A * gradient.clamp(min=0))[:, :n].sum((0, 1)).view(model.grid) / (heads * n)
    assert expected.max() > 0
    torch.testing.assert_close(maps[0], expected, rtol=1e-4, atol=1e-10)


def test_gradient_of_composition_through_grad_cam_against_finite_differences(double):
    model, batch, image_kv = double
    pair, weight = batch["pair"], torch.ones(6, dtype=torch.float64)
    parts = [hist.locate(model, pair[part], image_kv, 0)[0] for part in ("part1", "part2")]

    def loss(create_graph):
        whole, _ = hist.locate(model, pair["whole"], image_kv, 0, create_graph)
        return hist.composition_loss(*parts, whole, weight)

    behind = ("fusion_layers", "text_layers", "match_head", "word_embedding")
    parameters = [p for name, p in model.named_parameters() if name.startswith(behind)]
    torch.manual_seed(1)
    value = loss(True)
    gradients = torch.autograd.grad(value, parameters, allow_unused=True)
    direction = [torch.randn_like(p) for p in parameters]
    slope = sum((g * d).sum() for g, d in zip(gradients, direction) if g is not None)
    ends, eps = [], 1e-7
    for sign in (1, -2, 1):  # there, back past the start, and home
        with torch.no_grad():
            for p, d in zip(parameters, direction):
                p += sign * eps * d
        ends.append(loss(False).item())
    assert value.item() > 0.001 and abs(slope) > 1e-3
    assert slope.item() == pytest.approx((ends[0] - ends[1]) / (2 * eps), rel=1e-3)


@pytest.mark.parametrize("layer", [0, 1])
def test_maps_are_not_zero_and_a_wrong_phrase_gets_another_map(double, layer):
    model, batch, image_kv = double
    ids = batch["caption"]["ids"]
    right, _ = hist.locate(model, ids, image_kv, layer)
    wrong, _ = hist.locate(model, ids.roll(1, 0), image_kv, layer)
    assert right.shape == (6, *model.grid) and (right >= 0).all()
    assert (right.flatten(1).sum(1) > 0).all()
    one, other = (M / M.sum((1, 2), keepdim=True) for M in (right, wrong))
    assert ((one - other).abs().sum((1, 2)) > 1e-4).all()


def test_in_the_last_layer_only_the_cls_row_counts(double):
    """The match head sees [CLS] alone: word rows of the last A have no gradient; the first's do."""
    model, batch, image_kv = double
    T, mask, _ = model.encode_text(batch["caption"]["ids"])
    logits, attentions = model.match(T, mask, image_kv)
    first, last = torch.autograd.grad(logits[:, 1].sum(), attentions)
    assert last[:, :, 0].abs().max() > 0 and last[:, :, 1:].abs().max() == 0
    assert first[:, :, 1:].abs().max() > 0


def test_padding_changes_nothing(double):
    model, batch, image_kv = double
    short = batch["phrase"]["ids"]
    long = F.pad(short, (0, 5), value=hist.Tokenizer.pad_id)
    torch.testing.assert_close(model.encode_text(short)[2], model.encode_text(long)[2])
    for layer in (0, 1):
        one, match = hist.locate(model, short, image_kv, layer)
        other, same = hist.locate(model, long, image_kv, layer)
        torch.testing.assert_close(one, other)
        torch.testing.assert_close(match, same)


def test_keys_and_values_projected_once_give_the_logits_of_each_pair_alone(double):
    model, batch, image_kv = double
    T, mask, _ = model.encode_text(batch["caption"]["ids"])
    texts, images = torch.tensor([0, 1, 2, 0, 5, 5]), torch.tensor([0, 1, 2, 4, 4, 1])
    kv = [keys_values[:, images] for keys_values in image_kv]
    together, _ = model.match(T[texts], mask[texts], kv)
    for k, (t, i) in enumerate(zip(texts, images)):
        alone = model.project_image(model.encode_image(batch["image"][i : i + 1].double())[1])
        logits, _ = model.match(T[t : t + 1], mask[t : t + 1], alone)
        torch.testing.assert_close(together[k : k + 1], logits, rtol=1e-5, atol=1e-6)


def test_a_map_is_a_gradient_even_where_none_is_kept(double):
    model, batch, image_kv = double
    with torch.no_grad():
        maps, _ = hist.locate(model, batch["phrase"]["ids"], image_kv, 0)
    again, _ = hist.locate(model, batch["phrase"]["ids"], image_kv, 0)
    torch.testing.assert_close(maps, again)
