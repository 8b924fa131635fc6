"""The model, Grad-CAM, the losses and the measures, against finite differences, hand-computed cases and properties."""
import functools
import math
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import ablation
import hist


def options(**changes):
    return hist.Options(**{**hist.SCENES, "width": 32, "fusion_layers": 2, **changes})


def batch_of(o, n=6, records=None):
    records = records or hist.Scenes(1000, o, "test", True)
    vocabulary = hist.build_vocabulary((records[i]["captions"][0] for i in range(min(50, len(records)))), 1000)
    samples = hist.Samples(records, vocabulary, o)
    return vocabulary, hist.collate([samples[i] for i in range(n)])


@pytest.fixture(scope="module")
def double():
    """A small model in float64, a batch, and what match needs of it."""
    torch.manual_seed(0)
    vocabulary, batch = batch_of(options())
    model = hist.HIST(options(), vocabulary).double().eval()
    model.vit.float()                                           # images are cast to float32: everything behind them is float64
    forward = model.vit.forward_features
    model.vit.forward_features = lambda x: forward(x).double()
    model.vit.forward_head = lambda V, pre_logits: V.amax(1)
    image = model.encode_image(batch["image"])[1]
    return model, batch, [kv.detach() for kv in image]


# ------------------------------------------------------------------------------------------------------- Grad-CAM
@pytest.mark.parametrize("layer", [0, 1])
def test_grad_cam_is_attention_times_the_finite_difference_of_the_score(double, layer, monkeypatch):
    model, batch, image = double
    text = batch["caption"]
    T, mask, _ = model.encode_text(text["ids"])
    T, attention, nudge = T.detach(), model.fusion[layer].cross_attention, {}

    def forward(x, keys_values, mask=None):                     # the same attention, whose A can be nudged
        B, L, width = x.shape
        q = attention.query(x).view(B, L, attention.heads, -1).transpose(1, 2)
        A = (q @ keys_values[0].transpose(-2, -1) / math.sqrt(q.shape[-1])).softmax(-1) + nudge.get("A", 0)
        return attention.out((A @ keys_values[1]).transpose(1, 2).reshape(B, L, width)), A
    monkeypatch.setattr(attention, "forward", forward)
    logits, maps = model.match(T, mask, image, text["rows"])
    cam = hist.grad_cam(maps[layer], logits[:, 1], mask, model.grid, model.prefix)
    A, eps, expected = maps[layer].detach(), 1e-6, []
    b = 1                                                       # every entry of one sample's A, one after the other
    _, H, L, N = A.shape
    gradient = torch.zeros(H, L, N, dtype=torch.float64)
    for index in np.ndindex(H, L, N):
        s = []
        for sign in (1, -1):
            nudge["A"] = torch.zeros_like(A[b:b + 1])
            nudge["A"][(0, *index)] = sign * eps
            s.append(model.match(T[b:b + 1], mask[b:b + 1], image, text["rows"][b:b + 1])[0][0, 1].item())
        gradient[index] = (s[0] - s[1]) / (2 * eps)
    n = int(mask[b].sum())
    expected = (A[b] * gradient.clamp(min=0))[:, :n].sum((0, 1)).view(model.grid) / (H * n)
    assert expected.max() > 0
    torch.testing.assert_close(cam[b], expected, rtol=1e-4, atol=1e-10)


def test_gradient_of_composition_through_grad_cam_against_finite_differences(double):
    model, batch, image = double
    rows, ids = batch["composition"]["rows"], batch["composition"]["ids"]
    n = len(rows)
    parts, _ = hist.locate(model, *model.encode_text(ids[:2 * n])[:2], image, rows.repeat(2), -1)

    def loss(create_graph):
        whole, _ = hist.locate(model, *model.encode_text(ids[2 * n:])[:2], image, rows, -1, create_graph)
        return hist.composition_loss(parts[:n], parts[n:], whole)
    parameters = [p for name, p in model.named_parameters() if name.startswith(("fusion", "text.", "match", "words"))]
    value = loss(True)
    gradients = torch.autograd.grad(value, parameters, allow_unused=True)
    direction = [torch.randn_like(p) for p in parameters]
    slope = sum((g * d).sum() for g, d in zip(gradients, direction) if g is not None)
    ends, eps = [], 1e-7
    for sign in (1, -2, 1):                                     # there, back past the start, and home
        with torch.no_grad():
            for p, d in zip(parameters, direction):
                p += sign * eps * d
        ends.append(loss(False).item())
    assert value.item() > 0.01 and abs(slope) > 1e-3
    assert slope.item() == pytest.approx((ends[0] - ends[1]) / (2 * eps), rel=1e-3)


@pytest.mark.parametrize("layer", [0, 1])
def test_maps_are_not_zero_and_a_wrong_phrase_gets_another_map(double, layer):
    model, batch, image = double
    text = batch["caption"]
    T, mask, _ = model.encode_text(text["ids"])
    right, _ = hist.locate(model, T, mask, image, text["rows"], layer)
    wrong, _ = hist.locate(model, T.roll(1, 0), mask.roll(1, 0), image, text["rows"], layer)
    assert right.shape == (6, *model.grid) and (right >= 0).all() and (right.flatten(1).sum(1) > 0).all()
    share = lambda M: M / M.sum((1, 2), keepdim=True)
    assert ((share(right) - share(wrong)).abs().sum((1, 2)) > 1e-4).all()


def test_in_the_last_layer_only_the_cls_row_counts(double):
    """The match head sees [CLS] alone: word rows of the last A have no gradient; those of the first layer have."""
    model, batch, image = double
    T, mask, _ = model.encode_text(batch["caption"]["ids"])
    logits, maps = model.match(T, mask, image, batch["caption"]["rows"])
    first, last = torch.autograd.grad(logits[:, 1].sum(), maps)
    assert last[:, :, 0].abs().max() > 0 and last[:, :, 1:].abs().max() == 0 and first[:, :, 1:].abs().max() > 0


def test_padding_changes_neither_map_nor_logits(double):
    model, batch, image = double
    ids, rows = batch["phrase"]["ids"], batch["phrase"]["rows"]
    longer = F.pad(ids, (0, 5), value=hist.PAD)
    for layer in (0, 1):
        short, long = (hist.locate(model, *model.encode_text(x)[:2], image, rows, layer)[0] for x in (ids, longer))
        torch.testing.assert_close(short, long)


def test_keys_and_values_projected_once_give_the_logits_of_each_pair_alone(double):
    model, batch, image = double
    T, mask, _ = model.encode_text(batch["caption"]["ids"])
    texts, images = torch.tensor([0, 1, 2, 0, 5, 5]), torch.tensor([0, 1, 2, 4, 4, 1])
    together, _ = model.match(T[texts], mask[texts], image, images)
    for k, (t, i) in enumerate(zip(texts, images)):
        alone = model.encode_image(batch["image"][i:i + 1])[1]
        logits, _ = model.match(T[t:t + 1], mask[t:t + 1], alone, torch.tensor([0]))
        torch.testing.assert_close(together[k:k + 1], logits, rtol=1e-5, atol=1e-6)


def test_attention_is_torch_s_own():
    torch.manual_seed(0)
    ours = hist.Attention(32, 4)
    torch_s = torch.nn.MultiheadAttention(32, 4, batch_first=True)
    with torch.no_grad():
        torch_s.in_proj_weight.copy_(torch.cat([ours.query.weight, ours.key_value.weight]))
        torch_s.in_proj_bias.copy_(torch.cat([ours.query.bias, ours.key_value.bias]))
        torch_s.out_proj.load_state_dict(ours.out.state_dict())
    x, source, mask = torch.randn(3, 5, 32), torch.randn(3, 7, 32), torch.rand(3, 7) > 0.3
    mask[:, 0] = True
    seen, A = ours(x, ours.keys_values(source), mask[:, None])
    expected, weights = torch_s(x, source, source, key_padding_mask=~mask, average_attn_weights=False)
    torch.testing.assert_close(seen, expected)
    torch.testing.assert_close(A, weights)


# --------------------------------------------------------------------------------------------------------- losses
def test_itc_loss_by_hand():
    image, text = torch.tensor([[1., 0], [0, 1]]), torch.tensor([[1., 0], [0, 1], [1, 0]])
    positives = torch.tensor([[True, False, True], [False, True, False]])      # the first and third text are one string
    # logits/t with t = 1: rows (1,0,1) and (0,1,0); to the images: columns (1,0), (0,1), (1,0)
    e = math.e
    to_text = (-math.log(e / (2 * e + 1)) - math.log(e / (e + 2))) / 2
    to_image = -math.log(e / (e + 1))
    assert hist.itc_loss(image, text, positives, 1.0).item() == pytest.approx((to_text + to_image) / 2)


def test_itc_with_one_positive_each_is_cross_entropy_both_ways():
    torch.manual_seed(0)
    image, text = F.normalize(torch.randn(5, 8), dim=1), F.normalize(torch.randn(5, 8), dim=1)
    logits, diagonal = image @ text.T / 0.1, torch.arange(5)
    expected = (F.cross_entropy(logits, diagonal) + F.cross_entropy(logits.T, diagonal)) / 2
    torch.testing.assert_close(hist.itc_loss(image, text, torch.eye(5, dtype=torch.bool), 0.1), expected)


def test_itc_does_not_push_a_repeated_phrase_away_from_its_other_image():
    """Two images of "a dog" and one text each: at equal features there is no gradient left between them."""
    records = [{"image": np.full((48, 48, 3), 50 * i, np.uint8), "captions": [c], "targets": []}
               for i, c in enumerate(["a dog on a bed", "the dog by a door", "a cat"])]
    _, batch = batch_of(options(data="x"), 3, records)
    phrase = {hist.key(records[i]["captions"][0].split(" on ")[0].split(" by ")[0]) for i in range(3)}
    assert phrase == {"dog", "cat"}
    rows, positives = batch["subject"]["rows"], batch["subject"]["positives"]
    dogs = [k for k, r in enumerate(rows.tolist()) if batch["subject"]["positives"][:, k].sum() == 2]
    for k in dogs:                                              # whatever text of a dog was drawn, both dogs' images have it
        assert positives[:, k].nonzero()[:, 0].tolist() != [rows[k].item()]
    features = F.normalize(torch.tensor([[1., 0.2], [1, 0.2], [0, 1]]), dim=1).requires_grad_()
    both = torch.tensor([[True, True, False], [True, True, False], [False, False, True]])
    gradient, = torch.autograd.grad(hist.itc_loss(features, features.detach(), both, 0.01), features)
    assert gradient[:2].abs().max() < 1e-6                      # with the dogs as each other's negatives it is not
    gradient, = torch.autograd.grad(hist.itc_loss(features, features.detach(), torch.eye(3, dtype=torch.bool), 0.01), features)
    assert hist.itc_loss(features, features.detach(), torch.eye(3, dtype=torch.bool), 0.01) > hist.itc_loss(features, features.detach(), both, 0.01) - 1e-6


@pytest.mark.parametrize("hardness", [0.0, 0.5, 1.0])
def test_a_positive_is_never_drawn_as_a_negative(hardness):
    torch.manual_seed(0)
    similarity, positives = 50 * torch.randn(20, 30), torch.rand(20, 30) < 0.7
    positives[3], positives[4], positives[4, 7] = True, True, False            # nothing to draw; one thing to draw
    similarity[positives] = 100                                 # the most tempting ones are the positives
    for _ in range(200):
        column, some = hist.draw_negatives(similarity, positives, hardness)
        assert some.tolist() == [i != 3 for i in range(20)] and column[4] == 7
        assert not positives[torch.arange(20), column][some].any()


def test_negatives_go_from_uniform_to_hard():
    torch.manual_seed(0)
    similarity = torch.tensor([[0., 0, 3, 0]]).repeat(4000, 1)
    positives = torch.tensor([[True, False, False, False]]).repeat(4000, 1)
    share = lambda hardness: (hist.draw_negatives(similarity, positives, hardness)[0] == 2).float().mean().item()
    hard = math.exp(3) / (math.exp(3) + 2)
    assert share(0.0) == pytest.approx(1 / 3, abs=0.03)
    assert share(0.5) == pytest.approx((1 / 3 + hard) / 2, abs=0.03)
    assert share(1.0) == pytest.approx(hard, abs=0.03)


def test_itm_loss_by_hand():
    logits, labels = torch.tensor([[0., 0], [0, 2], [5, 0]]), torch.tensor([1, 1, 0])
    expected = (math.log(2) + math.log(1 + math.exp(-2))) / 2
    assert hist.itm_loss(logits, labels, torch.tensor([True, True, False])).item() == pytest.approx(expected)
    assert hist.itm_loss(logits, labels, torch.zeros(3)).item() == 0


def test_mlm_loss_by_hand():
    logits, labels = torch.zeros(2, 2, 4), torch.tensor([[-100, 3], [-100, -100]])
    logits[0, 1, 3] = 1
    assert hist.mlm_loss(logits, labels).item() == pytest.approx(-math.log(math.e / (math.e + 3)))
    assert hist.mlm_loss(logits, torch.full((2, 2), -100)).item() == 0          # nothing asked: no NaN


def test_composition_loss_by_hand():
    a, b = torch.tensor([[[4., 0], [0, 0]]]), torch.tensor([[[0., 1], [0, 0]]])
    whole = torch.tensor([[[3., 0], [0, 1]]])
    # n(a) + n(b) has half its mass on each of two cells; whole has (3/4, 0, 0, 1/4): 1/4 + 1/2 + 1/4
    assert hist.composition_loss(a, b, whole).item() == pytest.approx(1)
    assert hist.composition_loss(a, b, a + 4 * b).item() == pytest.approx(0, abs=1e-6)
    assert hist.composition_loss(a, b, torch.zeros(1, 2, 2)).item() == pytest.approx(1)    # a vanished map is no way out
    for scale in (1e-7, 1e7):                                   # eps is far below the maps' own scale
        assert hist.composition_loss(scale * a, b, whole / scale).item() == pytest.approx(1, rel=1e-3)
    two = [torch.cat([x, y]) for x, y in ((a, a), (b, b), (whole, a + 4 * b))]
    assert hist.composition_loss(*two, weight=torch.tensor([0.25, 0.75])).item() == pytest.approx(0.25)
    assert hist.composition_loss(*two, weight=torch.zeros(2)).item() == 0


def test_composition_teaches_the_composite_not_the_parts():
    maps = [torch.rand(3, 4, 4, requires_grad=True) for _ in range(3)]
    hist.composition_loss(*maps).backward()
    assert maps[0].grad is None and maps[1].grad is None and maps[2].grad.abs().max() > 0


def test_the_parts_of_a_composite_come_from_the_teacher_and_do_not_teach_it():
    o = options()
    vocabulary, batch = batch_of(o)
    model, teacher = hist.HIST(o, vocabulary).eval(), hist.HIST(o, vocabulary).eval()
    text, maps = batch["composition"], {}
    n = len(text["rows"])
    for name, m in (("model", model), ("teacher", teacher)):
        image, (T, mask, _) = m.keys_values(model.encode_image(batch["image"])[2]), m.encode_text(text["ids"])
        maps[name], maps[f"{name}_match"] = hist.locate(m, T, mask, image, text["rows"].repeat(3), o.cam_layer)
    expected = {name: hist.composition_loss(maps[name][:n], maps[name][n:2 * n], maps["model"][2 * n:],
                                            maps[f"{name}_match"][:n] * maps[f"{name}_match"][n:2 * n]).item() for name in ("model", "teacher")}
    assert abs(expected["model"] - expected["teacher"]) > 1e-3
    for name, given in (("model", None), ("teacher", teacher)):
        losses, _ = hist.training_losses(model, batch, ("composition",), 0.0, o.cam_layer, given)
        assert losses["composition"].item() == pytest.approx(expected[name], abs=1e-4)
    losses["composition"].backward()
    assert all(p.grad is None for p in teacher.parameters()) and any(p.grad is not None and p.grad.any() for p in model.vit.parameters())


def test_a_step_of_all_levels_encodes_the_images_once():
    """Not again for a level, for the negatives, or for the teacher."""
    o = options()
    vocabulary, batch = batch_of(o)
    model, teacher = hist.HIST(o, vocabulary), hist.HIST(o, vocabulary)
    seen = []
    for m in (model, teacher):
        m.vit.patch_embed.register_forward_pre_hook(lambda _, x: seen.append(len(x[0])))
    hist.training_losses(model, batch, hist.LEVELS, 0.5, o.cam_layer, teacher)
    assert seen == [len(batch["image"])]


@pytest.mark.parametrize("compiled", [False, True])
def test_the_teacher_stays_as_it_was_while_the_model_trains(tmp_path, monkeypatch, compiled):
    """Also where the ViT is compiled: its copy must not run the model's own."""
    o = options(out=str(tmp_path), device="cpu", batch_size=4, base_steps=0, steps=4, composition_start=0, compile=compiled, lr=1e-2)
    image, seen, losses = torch.full((1, 3, o.image_size, o.image_size), 90, dtype=torch.uint8), {"model": [], "teacher": []}, hist.training_losses

    def watched(model, *rest):
        with torch.no_grad():
            for name, m in (("model", model), ("teacher", rest[-1])):
                if m is not None:
                    seen[name].append(m.eval().encode_image(image)[1][0].clone())
        return losses(model.train(), *rest)
    monkeypatch.setattr(hist, "training_losses", watched)
    monkeypatch.setattr(torch.nn.Module, "compile", functools.partialmethod(torch.nn.Module.compile, backend="eager"))
    scenes = hist.Scenes(100, o, "teacher", True)
    hist.train("hist", hist.LEVELS, hist.Samples(scenes, hist.build_vocabulary((scenes[i]["captions"][0] for i in range(50)), 100), o), o, o.steps)
    assert len(seen["teacher"]) == 3 and all(torch.equal(seen["teacher"][0], features) for features in seen["teacher"])
    assert not torch.allclose(seen["model"][1], seen["model"][-1], atol=1e-3)


def test_a_token_of_the_scenes_stem_is_centred_on_its_patch():
    """With all weights alike a token's gradient is its receptive field, and the middle of that must be the middle of the patch."""
    o = options()
    stem = hist.scenes_vit(o).patch_embed.backbone.eval()
    for p in stem.parameters():
        torch.nn.init.constant_(p, 0.01)
    side, patch = 2 * o.image_size, o.image_size // hist.scenes_vit(o).patch_embed.grid_size[0]     # twice the image: tokens far from an edge
    image = torch.ones(1, 3, side, side, requires_grad=True)
    for row, column in ((7, 7), (8, 6)):
        field, = torch.autograd.grad(stem(image)[0, :, row, column].sum(), image)
        field, at = field[0].sum(0), torch.arange(side)
        assert (field.sum(1) @ at.float() / field.sum()).item() == pytest.approx(patch * row + (patch - 1) / 2, abs=0.01)
        assert (field.sum(0) @ at.float() / field.sum()).item() == pytest.approx(patch * column + (patch - 1) / 2, abs=0.01)


def test_levels_are_switchable_and_every_loss_reaches_the_image():
    torch.manual_seed(0)
    vocabulary, batch = batch_of(options())
    model = hist.HIST(options(), vocabulary)
    names = {"caption": {"caption_itc", "caption_itm", "caption_mlm"}, "phrase": {"phrase_itc", "phrase_itm", "phrase_mlm"},
             "subject": {"subject_itc", "subject_itm"}, "composition": {"composition"}}
    for level in hist.LEVELS:
        losses, _ = hist.training_losses(model, batch, (level,), 0.5, -1)
        assert set(losses) == names[level]
        for value in losses.values():
            gradient, = torch.autograd.grad(value, model.vit.patch_embed.proj.weight, retain_graph=True)
            assert torch.isfinite(value) and gradient.abs().sum() > 0
    assert set(hist.training_losses(model, batch, hist.LEVELS, 0.5, -1)[0]) == set().union(*names.values())


def test_a_batch_overfits():
    torch.manual_seed(0)
    o = options(width=64)
    vocabulary, batch = batch_of(o, 8)
    model = hist.HIST(o, vocabulary)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(150):
        losses, _ = hist.training_losses(model, batch, hist.LEVELS[:3], 0.0, -1)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    floor = {level: entropy(batch[level]["positives"]) for level in hist.LEVELS[:3]}
    for name, value in losses.items():
        assert value.item() < 0.1 + floor[name.split("_")[0]] * name.endswith("itc"), name


def entropy(positives):
    """The least that itc_loss can be: the entropy of its targets, which are uniform over several positives."""
    one_way = lambda p: p.sum(1)[p.any(1)].float().log().mean().item()
    return (one_way(positives) + one_way(positives.T)) / 2


# -------------------------------------------------------------------------------------------- samples and batches
ODD = ["", "running quickly", "a dog", "a dog and a dog", "word " * 60, "😀 🚀", "一只猫坐在桌子上", "كلب على العشب", "a cat\x00 and\ta dog\n", "<b>a cat</b>"]


def test_odd_captions_train_without_a_nan():
    records = [{"image": np.full((48, 48, 3), 20 * i, np.uint8), "captions": [c], "targets": []} for i, c in enumerate(ODD)]
    o = options(data="odd")
    vocabulary, batch = batch_of(o, len(ODD), records)
    assert batch["caption"]["ids"].shape == (len(ODD), 61)      # 60 words and [CLS]
    assert len(batch["phrase"]["rows"]) < len(ODD)              # what has no phrase has no row there
    model = hist.HIST(o, vocabulary)
    losses, _ = hist.training_losses(model, batch, hist.LEVELS, 0.5, -1)
    sum(losses.values()).backward()
    assert all(torch.isfinite(v) for v in losses.values()) and len(losses) == 9
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("caption, levels", [("", {"caption"}), ("running quickly", {"caption"}), ("a dog", {"caption", "phrase", "subject"}),
                                             ("a dog and a dog", {"caption", "phrase", "subject"}),
                                             ("a dog and a cat", {"caption", "phrase", "subject", "composition"})])
def test_what_a_caption_contributes(caption, levels):
    record = {"image": np.zeros((48, 48, 3), np.uint8), "captions": [caption], "targets": []}
    _, batch = batch_of(options(data="x"), 1, [record])
    assert set(batch) == levels | {"image"}


def test_a_batch_of_nothing_but_one_caption_has_no_negatives_and_no_nan():
    record = {"image": np.zeros((48, 48, 3), np.uint8), "captions": ["a dog and a cat"], "targets": []}
    o = options(data="x")
    vocabulary, batch = batch_of(o, 3, [record])                # the same image three times
    losses, _ = hist.training_losses(hist.HIST(o, vocabulary), batch, hist.LEVELS, 1.0, -1)
    assert all(torch.isfinite(v) for v in losses.values())
    assert batch["caption"]["positives"].all()


def test_masked_words():
    rng = random.Random(0)
    ids = [hist.CLS, 10, 11, hist.UNK, 12, 13]
    hidden = 0
    for _ in range(500):
        masked, labels = hist.mask_words(ids, rng, 100)
        asked = [i for i, label in enumerate(labels) if label != -100]
        assert asked and all(labels[i] == ids[i] for i in asked) and 0 not in asked and 3 not in asked
        assert all(masked[i] == ids[i] for i in range(6) if i not in asked)
        hidden += len(asked)
    assert hidden / (500 * 4) == pytest.approx(0.3 + 0.7 ** 4 / 4, abs=0.03)    # 30% of four words, one where none was chosen
    assert hist.mask_words([hist.CLS], rng, 100) == ([hist.CLS], [-100])


def test_unknown_words():
    vocabulary = hist.build_vocabulary(["A dog, a cat", "a dog"], 3)
    assert list(vocabulary)[4:6] == ["a", "dog"] and len(vocabulary) == 7
    assert hist.encode(vocabulary, "A zebra") == [hist.CLS, vocabulary["a"], hist.UNK]
    assert hist.encode(vocabulary, "") == [hist.CLS]


def test_order_of_samples_is_by_position_and_covers_each_epoch():
    o = options(data="x")
    records = [{"image": np.full((48, 48, 3), i, np.uint8), "captions": ["a dog"], "targets": []} for i in range(7)]
    samples = hist.Samples(records, hist.build_vocabulary(["a dog"], 9), o)
    seen = [int(samples[p]["image"].float().mean()) for p in range(14)]
    assert sorted(seen[:7]) == sorted(seen[7:]) == list(range(7)) and seen[:7] != seen[7:]
    assert seen == [int(samples[p]["image"].float().mean()) for p in range(14)]


# --------------------------------------------------------------------------------------------------------- scenes
def test_masks_and_boxes_of_scenes_match_what_was_drawn():
    o = options(image_size=64)
    for i in range(60):
        record = hist.Scenes(100, o, "masks", False)[i]
        image, covered = record["image"].astype(float), np.zeros((64, 64), bool)
        for t in record["targets"]:
            colour = np.array(hist.COLOURS[t["phrase"].split()[1]])
            inside = t["mask"] & ~np.pad(~t["mask"], 1, mode="edge")[:-2, 1:-1] & ~np.pad(~t["mask"], 1, mode="edge")[2:, 1:-1]
            assert np.abs(np.median(image[inside], 0) - colour).max() < 60       # jittered ink, clipped
            ys, xs = np.nonzero(t["mask"])
            assert t["boxes"] == [[xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]]
            assert not (covered & t["mask"]).any()              # objects do not overlap
            covered |= t["mask"]
        edge = np.zeros_like(covered)
        for dy in (-1, 0, 1):
            for dx in (-1, 0, 1):
                edge |= np.roll(covered, (dy, dx), (0, 1))
        assert image[~edge].std(0).max() < 8                    # the rest is background: a tint and its grain


def test_every_shape_is_another_and_right_side_up():
    masks = {s: hist.shape_alpha(s, 40, 0)[0] > 0.5 for s in hist.SHAPES}
    for a in masks:
        for b in masks:
            assert a == b or (masks[a] ^ masks[b]).mean() > 0.08, (a, b)
    assert not masks["ring"][20, 20] and masks["circle"][20, 20] and masks["square"][5, 5]
    for pointed_down, pointed_up in (("heart", "triangle"), ("heart", "star")):
        assert masks[pointed_down][-6:].sum() < masks[pointed_down][4:10].sum()
        assert masks[pointed_up][:6].sum() < 40


def test_captions_of_scenes_are_true_and_parse_to_what_they_say():
    scenes = hist.Scenes(100_000, options(), "captions", False)
    records = [scenes[i] for i in range(60_000, 60_300)]
    for record in records:
        caption, truth = record["captions"][0], [t["phrase"].split(" ", 1)[1] for t in record["targets"]]
        for phrase, subject in record["said"]:
            words = phrase.split()
            assert phrase in caption and subject == words[-1]
            if words[-1] == "shapes":
                assert words[0] == hist.COUNT[len(truth)]
            elif len(words) > 2 and words[-1] != "shape":
                assert " ".join(words[-2:]) in truth                            # "a small red circle": it is there
        if " is " in caption and "there is" not in caption:
            *_, what, _, value = caption.replace(" a ", " ").split()            # "the circle is red", "the red shape is a circle"
            of_colour = what == "shape"
            same = [t for t in truth if t.split()[0] == caption.split(" shape is ")[0].split()[-1]] if of_colour else [t for t in truth if t.split()[1] == what]
            assert len(same) == 1 and value in same[0].split()
    precision, recall, f1 = ablation.subjects_found(records)
    assert recall == 1 and precision > 0.97 and precision < f1 < 1              # "the circle is orange" gives an orange too many
    swapped = [{**r, "said": [(p, "dog") for p, _ in r["said"]]} for r in records]
    assert ablation.subjects_found(swapped)[2] == 0


def test_a_fifth_of_the_pairs_is_in_test_scenes_only():
    assert len(hist.UNSEEN) == 13 and {c for c, _ in hist.UNSEEN} == set(hist.COLOURS) and {s for _, s in hist.UNSEEN} == set(hist.SHAPES)
    o, unseen = options(), {" ".join(pair) for pair in hist.UNSEEN}
    train, test = hist.Scenes(100_000, o, "train", False), hist.Scenes(1000, o, "held out", True)
    assert not any(t["phrase"].split(" ", 1)[1] in unseen or "unseen" in t["tags"] for i in range(50_000, 50_200) for t in train[i]["targets"])
    tagged = [("unseen" in t["tags"], t["phrase"].split(" ", 1)[1] in unseen) for i in range(200) for t in test[i]["targets"]]
    assert all(a == b for a, b in tagged) and 0.1 < np.mean(tagged) < 0.3
    for i in range(100):
        pairs = [t["phrase"].split()[1:] for t in test[i]["targets"]]
        for (colour, shape), t in zip(pairs, test[i]["targets"]):
            assert ("shared_colour" in t["tags"]) == ([c for c, _ in pairs].count(colour) > 1)
            assert ("shared_shape" in t["tags"]) == ([s for _, s in pairs].count(shape) > 1)


def test_questions_have_one_right_answer():
    test = hist.Scenes(1000, options(), "held out", True)
    for i in range(200):
        pairs = [tuple(t["phrase"].split()[1:]) for t in test[i]["targets"]]
        for kind, cloze, choices, answer in test[i]["questions"]:
            assert answer in choices
            right = {"colour": lambda w: [c for c, s in pairs if s == w[1]], "shape": lambda w: [s for c, s in pairs if c == w[1]],
                     "count": lambda w: [hist.COUNT[len(pairs)]], "is_there": lambda w: ["yes" if tuple(w[1:]) in pairs else "no"]}[kind](cloze.split())
            assert right == [answer], (cloze, pairs)


def test_positions_in_captions_are_true():
    scenes, checked = hist.Scenes(2000, options(), "where", True), 0
    centre = lambda b: ((b[0] + b[2]) / 2, (b[1] + b[3]) / 2)
    for i in range(900):
        record = scenes[i]
        caption, truth = record["captions"][0], {t["phrase"].split(" ", 1)[1]: t["boxes"][0] for t in record["targets"]}
        for words, sign, axis in (("left of", -1, 0), ("right of", 1, 0), ("above", -1, 1), ("over", -1, 1), ("below", 1, 1), ("under", 1, 1)):
            if f" {words} a" in caption:
                (one, _), (two, _) = [p for p in record["said"] if p[1] != "shapes"][:2]
                delta = centre(truth[" ".join(one.split()[-2:])])[axis] - centre(truth[" ".join(two.split()[-2:])])[axis]
                assert delta * sign > -1.5, caption             # half a pixel of rounding in each box
                checked += 1
    assert checked > 100


def test_held_out_scenes_are_not_training_scenes():
    o = options()
    train, held_out = hist.Scenes(100, o, "train", False), hist.Scenes(100, o, "held out", True)
    pictures = {train[i]["image"].tobytes() for i in range(100)}
    assert len(pictures) == 100 and not any(held_out[i]["image"].tobytes() in pictures for i in range(100))
    assert all(len(held_out[i]["targets"]) >= 2 for i in range(100))


# ------------------------------------------------------------------------------------------------------- measures
def test_measures_by_hand():
    heat = np.array([[0., 0, 0, 0], [0, 4, 2, 0], [0, 1, 0, 0], [0, 0, 0, 1]])
    one, two = np.zeros((4, 4), bool), np.zeros((4, 4), bool)
    one[1, 1:3], two[3, 3] = True, True
    assert hist.pointing_game(heat, one) and not hist.pointing_game(heat, two)
    assert hist.balance(heat, one, two) == pytest.approx(1 / 6) and hist.balance(np.zeros((4, 4)), one, two) == 0
    # cut at a fifth of 4: 4, 2, 1, 1 stay, of which three are in the union of three; at half: 4 and 2
    assert hist.multi_object_iou(heat, one | two, np.array([0.2, 0.5, 0.9])) == pytest.approx([3 / 4, 2 / 3, 1 / 3])
    assert hist.box_mask([[1, 1, 3, 2], [3, 3, 9, 9]], 4).tolist() == (one | two).tolist()


def test_evaluate_against_a_model_that_knows_the_answers(monkeypatch):
    """With maps drawn from the truth every measure is perfect; with maps of the background none hits."""
    o = options()
    records = [hist.Scenes(100, o, "answers", True)[i] for i in range(12)]
    vocabulary, _ = batch_of(o)
    model = hist.HIST(o, vocabulary)

    def answers(model, vocabulary, images, texts, rows, o):
        maps = []
        for text, row in zip(texts, rows):
            record = records[asked + row]
            maps.append(sum(t["mask"] / t["mask"].sum() for t in record["targets"] if any(
                p in (t["phrase"], t["phrase"].split()[-1]) for p in text.split(" and "))))
        return np.array(maps), []
    asked = 0
    monkeypatch.setattr(hist, "maps_of", answers)
    result, pairs = hist.evaluate(model, vocabulary, records, o)
    assert result["pointing_phrases"] == result["pointing_subjects"] == result["pointing_phrases_in_mask"] == 1
    assert result["balance"] > 0.99 and all(abs(masses[0] - masses[1]) < 0.01 for *_, masses in pairs)
    monkeypatch.setattr(hist, "maps_of", lambda *a: (lambda maps, _: (maps.max() - maps, []))(*answers(*a)))
    result, pairs = hist.evaluate(model, vocabulary, records, o)
    assert result["pointing_phrases"] == result["pointing_subjects"] == 0 and 0.2 < result["pointing_phrases_chance"] < 0.5


class Oracle(torch.nn.Module):
    """A model whose match logit is the mean of one patch of the image, and whose attention looks at that patch, or (wrong) elsewhere."""
    prefix, grid = 0, (2, 2)

    def __init__(self, right):
        super().__init__()
        self.right, self.scale = right, torch.nn.Parameter(torch.ones(()))

    def encode_image(self, images):
        patches = torch.nn.functional.avg_pool2d(images.float().mean(1, keepdim=True), images.shape[-1] // 2).flatten(1)
        return None, [patches[None, :, None, :, None]]

    def encode_text(self, ids):
        return torch.zeros(*ids.shape, 1), ids >= 0, None

    def match(self, T, mask, image, rows):
        patches = image[0][0, rows, 0, :, 0]                                   # (n, 4)
        weight = torch.tensor([4., 3, 2, 1])
        A = (weight if self.right else weight.flip(0)).expand(len(rows), 1, T.shape[1], 4) * self.scale
        score = patches @ weight + 0 * A.sum((1, 2, 3)) + A.mean((1, 2, 3))
        return torch.stack([-score, score], 1), [A]


@pytest.mark.parametrize("right", [True, False])
def test_occlusion_agrees_with_a_map_of_what_the_score_reads_and_not_with_its_reverse(right):
    o = options(cam_layer=0, image_size=16)
    image = np.zeros((16, 16, 3), np.uint8)
    image[:8, :8], image[:8, 8:], image[8:, :8], image[8:, 8:] = 250, 240, 230, 225
    image[0, 0], grey = 250, image.reshape(-1, 3).mean(0)
    agreement = ablation.occlusion_agreement(Oracle(right), {}, image, "", o)
    drops = [(image[y:y + 8, x:x + 8, 0].mean() - int(grey[0])) * w for (y, x), w in zip(((0, 0), (0, 8), (8, 0), (8, 8)), (4, 3, 2, 1))]
    ranks = lambda v: np.argsort(np.argsort(v))
    maps = [4, 3, 2, 1] if right else [1, 2, 3, 4]
    assert agreement == pytest.approx(np.corrcoef(ranks(maps), ranks(drops))[0, 1], abs=1e-5)


def test_reranking_asks_itm_about_the_nearest_only():
    o, k = options(), 2
    vocabulary, batch = batch_of(o)
    model = hist.HIST(o, vocabulary).eval()
    ids, images = batch["caption"]["ids"], batch["image"]
    with torch.no_grad():
        features, image, _ = model.encode_image(images)
        T, mask, text = model.encode_text(ids)
        n = len(ids)
        every = torch.stack([model.match(T, mask, image, torch.full((n,), i))[0].softmax(-1)[:, 1] for i in range(n)])
    similarity = features @ text.T
    to_text, to_image = hist.rerank(model, lambda a, b: images[a:b], T, mask, similarity, k)
    for i in range(n):
        near = similarity[i].topk(k).indices
        assert to_text[i].argmax() == near[every[i, near].argmax()] and (to_text[i] > -1).sum() == k
        near = similarity[:, i].topk(k).indices
        assert to_image[:, i].argmax() == near[every[near, i].argmax()] and (to_image[:, i] > -1).sum() == k


def test_ablation_table_by_hand():
    """Differences 2, 4 and 6 points: mean 4, sd 2, and t(0.975, 2) = 4.30: 4 +- 4.97."""
    every = [{row: {"pointing_phrases": 0.5 + 0.1 * seed + (0.02 * (seed + 1) if row == "all" else 0), "seconds": 100, "pointing_phrases_chance": 0.3}
              for row in ablation.ROWS} for seed in range(3)]
    line = next(line for line in ablation.table(every).splitlines() if "phrases" in line)
    cells = [c.strip() for c in line.strip("|").split("|")]
    assert cells[1] == "60.0 ± 10.0" and cells[-1] == "30.0"
    assert cells[1 + list(ablation.ROWS).index("all")] == "64.0 ± 12.0<br>+4.0 [-1.0, +9.0]"
