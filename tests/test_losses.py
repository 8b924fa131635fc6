"""The losses: hand cases, and what each level and the composition are given and give back."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from common import batch_of, options, record
from torch._subclasses.fake_tensor import FakeTensorMode

import hist

EVERY = [*hist.LEVELS, "composition"]
NAMES = {
    "caption": ["caption_itc", "caption_itm", "caption_mlm"],
    "phrase": ["phrase_itc", "phrase_itm", "phrase_mlm"],
    "subject": ["subject_itc", "subject_itm"],
    "composition": ["composition"],
}


# ------------------------------------------------------------------------------------------- ITC
def softmax_by_hand(scores, truth):
    """Mean over the truth of minus log softmax, with no tensor in it."""
    total = sum(math.exp(score) for score in scores)
    return -sum(math.log(math.exp(scores[k]) / total) for k in truth) / len(truth)


def itc_by_hand(image, text, positives, temperature):
    """Both ways over rows and columns that have a positive, in plain Python."""
    logits = (image.double() @ text.double().T / temperature).tolist()
    losses = []
    for scores, truth in ((logits, positives.tolist()), (zip(*logits), positives.T.tolist())):
        way = []
        for row, right in zip(scores, truth):
            if any(right):
                way.append(softmax_by_hand(list(row), [k for k, yes in enumerate(right) if yes]))
        losses.append(sum(way) / len(way))
    return sum(losses) / 2


def some_features(*counts):
    return [F.normalize(torch.randn(n, 8), dim=1) for n in counts]


def test_itc_loss_by_hand():
    image, text = torch.tensor([[1.0, 0], [0, 1]]), torch.tensor([[1.0, 0], [0, 1], [1, 0]])
    positives = torch.tensor([[True, False, True], [False, True, False]])  # 1 and 3: one string
    # with t = 1: rows (1, 0, 1) and (0, 1, 0); to the images: columns (1, 0), (0, 1), (1, 0)
    e = math.e
    to_text = (-math.log(e / (2 * e + 1)) - math.log(e / (e + 2))) / 2
    to_image = -math.log(e / (e + 1))
    loss = hist.itc_loss(image, text, positives, torch.ones(3, dtype=torch.bool), 1.0)
    assert loss.item() == pytest.approx((to_text + to_image) / 2)
    assert loss.item() == pytest.approx(itc_by_hand(image, text, positives, 1))


def test_itc_with_one_positive_each_is_cross_entropy_both_ways():
    torch.manual_seed(0)
    image, text = some_features(5, 5)
    logits, diagonal = image @ text.T / 0.1, torch.arange(5)
    expected = (F.cross_entropy(logits, diagonal) + F.cross_entropy(logits.T, diagonal)) / 2
    everything = torch.eye(5, dtype=torch.bool), torch.ones(5, dtype=torch.bool)
    torch.testing.assert_close(hist.itc_loss(image, text, *everything, 0.1), expected)


def test_itc_leaves_out_an_image_or_a_text_without_a_positive():
    torch.manual_seed(0)
    image, text = some_features(4, 5)
    positives = torch.rand(4, 5) < 0.4
    positives[2], positives[:, 1], positives[0, 0] = False, False, True
    loss = hist.itc_loss(image, text, positives, torch.ones(5, dtype=torch.bool), 0.3)
    assert loss.item() == pytest.approx(itc_by_hand(image, text, positives, 0.3), rel=1e-5)
    nothing = hist.itc_loss(image, text, positives & False, torch.ones(5, dtype=torch.bool), 0.3)
    assert nothing.item() == 0


def test_itc_does_not_see_a_text_that_does_not_exist():
    torch.manual_seed(0)
    image, text = some_features(4, 6)
    positives, exists = torch.rand(4, 6) < 0.5, torch.tensor([1, 0, 1, 1, 0, 1]).bool()
    positives = positives & exists
    loss = hist.itc_loss(image, text, positives, exists, 0.2)
    expected = itc_by_hand(image, text[exists], positives[:, exists], 0.2)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_itc_does_not_push_a_repeated_phrase_away_from_its_other_image():
    """Two images of "a dog" and one text each: at equal features no gradient is left between."""
    features = F.normalize(torch.tensor([[1.0, 0.2], [1, 0.2], [0, 1]]), dim=1).requires_grad_()
    both, exists = torch.eye(3, dtype=torch.bool), torch.ones(3, dtype=torch.bool)
    both[0, 1] = both[1, 0] = True
    loss = hist.itc_loss(features, features.detach(), both, exists, 0.01)
    (gradient,) = torch.autograd.grad(loss, features)
    assert gradient[:2].abs().max() < 1e-6
    apart = F.normalize(torch.tensor([[1.0, 0.2], [1, 0.3], [0, 1]]), dim=1).requires_grad_()
    for positives, sign in ((both, 1), (torch.eye(3, dtype=torch.bool), -1)):
        loss = hist.itc_loss(apart, apart.detach(), positives, exists, 0.1)
        (gradient,) = torch.autograd.grad(loss, apart)
        towards = (apart[1] - apart[0]).detach()
        assert sign * (-gradient[0] @ towards) > 0  # the step nears it, or leaves it


# -------------------------------------------------------------------------------------- negatives
@pytest.mark.parametrize("hardness", [0.0, 0.5, 1.0])
def test_a_positive_is_never_drawn_as_a_negative(hardness):
    torch.manual_seed(0)
    similarity, allowed = 50 * torch.randn(20, 30), torch.rand(20, 30) > 0.7
    allowed[3], allowed[4], allowed[4, 7] = False, False, True  # nothing to draw; one thing
    similarity[~allowed] = 100  # the most tempting ones are the positives
    for _ in range(200):
        column, found = hist.draw_negatives(similarity, allowed, hardness)
        assert found.tolist() == [i != 3 for i in range(20)] and column[4] == 7
        assert allowed[torch.arange(20), column][found].all()


def test_negatives_go_from_uniform_to_hard():
    torch.manual_seed(0)
    similarity = torch.tensor([[0.0, 0, 3, 0]]).repeat(4000, 1)
    allowed = torch.tensor([[False, True, True, True]]).repeat(4000, 1)
    hard = math.exp(3) / (math.exp(3) + 2)
    for hardness, share in ((0.0, 1 / 3), (0.5, (1 / 3 + hard) / 2), (1.0, hard)):
        column, _ = hist.draw_negatives(similarity, allowed, hardness)
        assert (column == 2).float().mean().item() == pytest.approx(share, abs=0.03)


# ------------------------------------------------------------------------------------- ITM, MLM
def test_itm_loss_by_hand():
    logits, labels = torch.tensor([[0.0, 0], [0, 2], [5, 0]]), torch.tensor([1, 1, 0])
    expected = (math.log(2) + math.log(1 + math.exp(-2))) / 2
    weight = torch.tensor([True, True, False])
    assert hist.itm_loss(logits, labels, weight).item() == pytest.approx(expected)
    assert hist.itm_loss(logits, labels, torch.zeros(3)).item() == 0


def test_mlm_loss_by_hand():
    logits, labels = torch.zeros(2, 2, 4), torch.tensor([[-100, 3], [-100, 0]])
    logits[0, 1, 3] = 1
    expected = (-math.log(math.e / (math.e + 3)) + math.log(4)) / 2
    assert hist.mlm_loss(logits, labels).item() == pytest.approx(expected)
    nothing = torch.full((2, 2), -100)
    assert hist.mlm_loss(logits, nothing).item() == 0  # nothing asked: no NaN


# ------------------------------------------------------------------------------------ composition
def square(*values):
    return torch.tensor(values, dtype=torch.float32).view(1, 2, 2)


def test_composition_loss_by_hand():
    one = torch.ones(1)
    a, b, whole = square(4, 0, 0, 0), square(0, 1, 0, 0), square(3, 0, 0, 1)
    # n(a) + n(b) has half its mass on each of two cells; whole has (3/4, 0, 0, 1/4)
    assert hist.composition_loss(a, b, whole, one).item() == pytest.approx(1)
    assert hist.composition_loss(a, b, a + 4 * b, one).item() == pytest.approx(0, abs=1e-6)
    vanished = torch.zeros(1, 2, 2)
    assert hist.composition_loss(a, b, vanished, one).item() == pytest.approx(1)  # no way out
    for scale in (1e-7, 1e7):  # eps is far below the maps' own scale
        scaled = hist.composition_loss(scale * a, b, whole / scale, one)
        assert scaled.item() == pytest.approx(1, rel=1e-3)
    two = [torch.cat(maps) for maps in ((a, a), (b, b), (whole, a + 4 * b))]
    assert hist.composition_loss(*two, torch.tensor([0.25, 0.75])).item() == pytest.approx(0.25)
    assert hist.composition_loss(*two, torch.zeros(2)).item() == 0


def test_where_parts_overlap_their_maps_add_up():
    """(1/2, 1/2) and (1/2, 0, 1/2): the sum has half of its mass on the first cell, the maximum
    a third."""
    a, b = square(3, 3, 0, 0), square(1, 0, 1, 0)
    for whole, expected in ((square(2, 1, 1, 0), 0), (square(1, 1, 1, 0), 1 / 3)):
        loss = hist.composition_loss(a, b, whole, torch.ones(1))
        assert loss.item() == pytest.approx(expected, abs=1e-6)


def test_composition_teaches_the_composite_not_the_parts():
    maps = [torch.rand(3, 4, 4, requires_grad=True) for _ in range(3)]
    hist.composition_loss(*maps, torch.ones(3)).backward()
    assert maps[0].grad is None and maps[1].grad is None and maps[2].grad.abs().max() > 0


def test_composition_asks_the_teacher_about_the_parts_and_the_model_about_the_whole(monkeypatch):
    asked = []
    maps = {"part1": square(4, 0, 0, 0), "part2": square(0, 0, 0, 1), "whole": square(1, 1, 1, 1)}
    matches = {"part1": [0.5, 0.9], "part2": [0.5, 0.9], "whole": [0.1, 0.1]}

    def project(name):
        def project_image(V):
            assert not (name == "teacher" and V.requires_grad)
            return [name, V]

        return SimpleNamespace(project_image=project_image)

    def locate(model, ids, image_kv, cam_layer, create_graph=False):
        asked.append((ids, image_kv[0], cam_layer, create_graph))
        assert torch.equal(image_kv[1], V)
        map_of = torch.cat([maps[ids], maps[ids]]).requires_grad_()
        return map_of, torch.tensor(matches[ids])

    monkeypatch.setattr(hist, "locate", locate)
    V = torch.rand(2, 4, 8, requires_grad=True)
    pair = {name: name for name in maps} | {"exists": torch.tensor([True, False])}
    model, teacher = project("model"), project("teacher")
    loss, figures = hist.composition_losses(model, teacher, V, pair, 3)
    expected = [("part1", "teacher", 3, False), ("part2", "teacher", 3, False)]
    assert sorted(asked) == [*expected, ("whole", "model", 3, True)]
    # n(whole) = 1/4 everywhere, the target (1/2, 0, 0, 1/2): the second pair does not exist
    assert loss.item() == pytest.approx(1)
    assert figures["trust"].item() == pytest.approx(0.25 / 2)
    assert figures["map_mass"].item() == pytest.approx(4)
    assert figures["map_entropy"].item() == pytest.approx(1)
    maps["whole"] = square(0, 2, 0, 0)
    _, figures = hist.composition_losses(model, teacher, V, pair, 3)
    assert figures["map_mass"].item() == pytest.approx(2)
    assert figures["map_entropy"].item() == pytest.approx(0)
    no_pair = pair | {"exists": torch.tensor([False, False])}
    _, figures = hist.composition_losses(model, teacher, V, no_pair, 3)
    assert figures["map_mass"].item() == 0  # of composites alone: there is none


def test_a_pair_that_does_not_exist_or_match_teaches_nothing(monkeypatch):
    """The loss is a mean by weight: the probabilities that the parts match, by the teacher."""
    rows = {"part1": [0.8, 0.5, 0.9], "part2": [0.5, 0.5, 0.9], "whole": [0.3, 0.3, 0.3]}
    maps = {
        "part1": torch.cat([square(1, 0, 0, 0)] * 3),
        "part2": torch.cat([square(0, 1, 0, 0)] * 3),
        "whole": torch.cat([square(1, 1, 0, 0), square(0, 0, 0, 1), square(0, 0, 1, 0)]),
    }

    def locate(model, ids, *rest, **more):
        return maps[ids], torch.tensor(rows[ids])

    monkeypatch.setattr(hist, "locate", locate)
    model = SimpleNamespace(project_image=list)
    pair = {name: name for name in maps} | {"exists": torch.tensor([True, True, False])}
    loss, _ = hist.composition_losses(model, model, torch.rand(3, 4, 8), pair, 0)
    assert loss.item() == pytest.approx((0.4 * 0 + 0.25 * 2) / 0.65, rel=1e-5)


def test_composition_of_a_model_is_its_formula():
    """Against Grad-CAM and softmax called one by one, here, of another teacher than the model."""
    o = options()
    tokenizer, batch = batch_of(o)
    torch.manual_seed(1)  # of a model of which no map vanishes
    model, teacher = hist.ALBEF(o, tokenizer).eval(), hist.ALBEF(o, tokenizer).eval()
    V, pair, found = model.encode_image(batch["image"])[1], batch["pair"], {}
    for name, of in (("part1", teacher), ("part2", teacher), ("whole", model)):
        T, mask, _ = of.encode_text(pair[name])
        logits, attentions = of.match(T, mask, of.project_image(V))
        A = attentions[1]
        cam = hist.grad_cam(A, logits[:, 1], mask, model.grid, 0)
        assert (cam.sum((1, 2)) > 0).all()
        found[name] = cam / cam.sum((1, 2), keepdim=True), logits.softmax(-1)[:, 1]
    target = (found["part1"][0] + found["part2"][0]) / 2
    distance = (found["whole"][0] - target).abs().sum((1, 2))
    weight = found["part1"][1] * found["part2"][1] * pair["exists"]
    expected = (distance * weight).sum() / weight.sum()
    losses, figures = hist.hist_losses(model, batch, ["composition"], 0.0, 1, teacher)
    assert losses["composition"].item() == pytest.approx(expected.item(), rel=1e-4)
    assert figures["trust"].item() == pytest.approx(weight.mean().item(), rel=1e-4)
    by_itself, _ = hist.hist_losses(model, batch, ["composition"], 0.0, 1, model)
    assert abs(by_itself["composition"] - losses["composition"]) > 1e-3
    losses["composition"].backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert any(p.grad is not None and p.grad.any() for p in model.vit.parameters())


# ---------------------------------------------------------------------------------------- a level
class Recorder:
    """A model of level_losses whose text and image tokens are their numbers, so that what match is
    given can be read back; the match head is set by hand."""

    language_kind = "mlm"

    def __init__(self, text_features, temperature=1.0, head=None):
        self.text_features, self.head = text_features, head
        self.log_temperature = torch.tensor(math.log(temperature))

    def encode_text(self, ids):
        T = torch.arange(len(ids)).view(-1, 1, 1)
        return T, torch.ones(len(ids), 1, dtype=torch.bool), self.text_features

    def match(self, T, mask, image_kv):
        self.texts, self.images = T[:, 0, 0].tolist(), image_kv[0][0, :, 0, 0, 0].tolist()
        assert torch.equal(image_kv[0], image_kv[1]) and len(mask) == len(T)
        return self.head(self.texts, self.images), None

    def language_loss(self, text, image_kv):
        return torch.tensor(7.0)


def level(model, image_features, positives, exists=None, hardness=0.0, language=False):
    """level_losses of a Recorder; positives: for each image the texts that its caption holds."""
    n = len(positives)
    keys = [sorted(held) + [hist.NO_KEY] * (n - len(held)) for held in positives]
    exists = torch.ones(n, dtype=torch.bool) if exists is None else torch.tensor(exists)
    own = torch.arange(n).where(exists, torch.tensor(hist.NO_TEXT))
    text = {"ids": torch.zeros(n, 2), "text_keys": own, "image_keys": torch.tensor(keys)}
    text["exists"] = exists
    kv = torch.arange(n).view(1, n, 1, 1, 1).expand(2, -1, -1, -1, -1)
    return hist.level_losses(model, image_features, [kv, kv], text, language, hardness)


def head_that_knows(positives):
    """Match logits that are right: 20 for a text that the image's caption holds, else -20."""

    def head(texts, images):
        right = [text in positives[image] for text, image in zip(texts, images)]
        return torch.tensor([[0.0, 20.0] if yes else [0.0, -20.0] for yes in right])

    return head


def constant_head(texts, images):
    return torch.tensor([[0.0, 1.5]]).repeat(len(texts), 1)


POSITIVES = [{0, 3}, {1}, {2}, {3, 0}]  # images 0 and 3 hold the same two texts


def test_matching_gets_own_pairs_wrong_images_and_wrong_texts_with_their_labels():
    torch.manual_seed(0)
    features = some_features(4, 4)
    model = Recorder(features[1], head=head_that_knows(POSITIVES))
    seen = set()
    for _ in range(40):
        losses = level(model, features[0], POSITIVES)
        assert losses["itm"].item() < 1e-6  # a head that knows the truth is right: labels are true
        pairs = list(zip(model.texts, model.images))
        assert pairs[:4] == [(i, i) for i in range(4)] and len(pairs) == 12
        assert [text for text, _ in pairs[4:8]] == [0, 1, 2, 3]
        assert [image for _, image in pairs[8:]] == [0, 1, 2, 3]
        assert not any(text in POSITIVES[image] for text, image in pairs[4:])
        seen |= set(pairs[4:])
    every = {(t, i) for t in range(4) for i in range(4) if t not in POSITIVES[i]}
    assert seen == every  # uniformly: each wrong pair has its turn


def test_matching_is_one_right_pair_against_two_wrong_ones():
    """A head that says 1.5: a third of the pairs cost log(1 + e^-1.5), two log(1 + e^1.5)."""
    features = some_features(4, 4)
    losses = level(Recorder(features[1], head=constant_head), features[0], POSITIVES)
    right, wrong = math.log(1 + math.exp(-1.5)), math.log(1 + math.exp(1.5))
    assert losses["itm"].item() == pytest.approx((right + 2 * wrong) / 3)


def test_an_image_of_which_everything_is_said_has_no_wrong_text():
    """Image 0 holds all texts: no wrong text for it; text 0 is held by all: no wrong image."""
    positives = [{0, 1, 2}, {0, 1}, {0, 2}]
    features = some_features(3, 3)
    losses = level(Recorder(features[1], head=constant_head), features[0], positives)
    right, wrong = math.log(1 + math.exp(-1.5)), math.log(1 + math.exp(1.5))
    assert losses["itm"].item() == pytest.approx((3 * right + 4 * wrong) / 7)


def test_texts_that_do_not_exist_are_neither_right_nor_wrong():
    """Text 1 and 2 of four do not exist; whatever the head says of them costs nothing."""
    exists = [True, False, False, True]
    positives = [{0}, set(), set(), {3}]

    def head(texts, images):
        rows = []
        for text, image in zip(texts, images):
            if not exists[text]:
                rows.append([0.0, -50.0] if text == image else [0.0, 50.0])
            else:
                rows.append([0.0, 20.0] if text in positives[image] else [0.0, -20.0])
        return torch.tensor(rows)

    torch.manual_seed(0)
    features = some_features(4, 4)
    model = Recorder(features[1], 0.5, head)
    for _ in range(20):
        losses = level(model, features[0], positives, exists)
        assert losses["itm"].item() < 1e-6
        # every image, also one without a text of its own, has a wrong text that exists, or is
        # left out
        wrong = list(zip(model.texts, model.images))[8:]
        for text, image in wrong:
            assert exists[text] and text not in positives[image] or not exists[image]
    held = torch.tensor([[i in positives[b] for i in range(4)] for b in range(4)])
    expected = itc_by_hand(features[0], features[1][[0, 3]], held[:, [0, 3]], 0.5)
    assert losses["itc"].item() == pytest.approx(expected, rel=1e-5)


def test_hard_negatives_are_the_most_similar_wrong_ones_both_ways():
    """Each image's most similar wrong text, and each text's most similar wrong image, differ."""
    similarity = torch.tensor(
        [
            [9.0, 5, 0, 1],  # of image 0 to texts 0, 1, 2, 3: text 1 is the hardest
            [0, 9, 7, 1],  # image 1: text 2
            [4, 0, 9, 3],  # image 2: text 0
            [1, 0, 2, 9],  # image 3: text 2
        ]
    )
    model = Recorder(torch.eye(4), 0.01, constant_head)
    level(model, similarity / similarity.norm(), [{0}, {1}, {2}, {3}], hardness=1.0)
    assert model.texts[8:] == [1, 2, 0, 2]  # for images 0 to 3
    assert model.images[4:8] == [2, 0, 1, 2]  # for texts 0 to 3, down the columns


def test_contrast_of_a_level_by_hand():
    """With its temperature, which is kept between 0.01 and 1."""
    torch.manual_seed(0)
    features = some_features(4, 4)
    held = torch.tensor([[i in POSITIVES[b] for i in range(4)] for b in range(4)])
    for temperature, used in ((0.2, 0.2), (0.001, 0.01), (3, 1)):
        model = Recorder(features[1], temperature, constant_head)
        losses = level(model, features[0], POSITIVES)
        expected = itc_by_hand(*features, held, used)
        assert losses["itc"].item() == pytest.approx(expected, rel=1e-5)
    assert list(losses) == ["itc", "itm"]
    assert level(model, features[0], POSITIVES, language=True)["mlm"].item() == 7


# ------------------------------------------------------------------------------------- all of them
def test_levels_are_switchable_and_every_loss_reaches_the_image():
    torch.manual_seed(0)
    tokenizer, batch = batch_of(options())
    model = hist.ALBEF(options(), tokenizer)
    teacher = hist.make_teacher(model)
    for name in EVERY:
        losses, figures = hist.hist_losses(model, batch, [name], 0.5, 1, teacher)
        assert list(losses) == NAMES[name]
        assert bool(figures) == (name == "composition")
        for value in losses.values():
            weight = model.vit.patch_embed.proj.weight
            (gradient,) = torch.autograd.grad(value, weight, retain_graph=True)
            assert torch.isfinite(value) and gradient.abs().sum() > 0
    losses, _ = hist.hist_losses(model, batch, EVERY, 0.5, 1, teacher)
    assert list(losses) == [name for level in EVERY for name in NAMES[level]]


def test_a_step_encodes_the_images_once_and_projects_them_once():
    """Not again for a level, for the negatives, or for the teacher."""
    o = options()
    tokenizer, batch = batch_of(o)
    model, seen = hist.ALBEF(o, tokenizer), []
    teacher = hist.make_teacher(model)
    model.vit.patch_embed.register_forward_pre_hook(lambda _, x: seen.append(len(x[0])))
    for layer in model.fusion_layers:
        layer.cross_attention.key_value.register_forward_pre_hook(lambda *_: seen.append("kv"))
    hist.hist_losses(model, batch, list(hist.LEVELS), 0.5, 0)
    assert seen == [6, "kv", "kv"]
    seen.clear()
    hist.hist_losses(model, batch, EVERY, 0.5, 0, teacher)
    assert seen.count(6) == 1


def test_the_hardness_and_the_layer_that_are_asked_for_are_used(monkeypatch):
    tokenizer, batch = batch_of(options())
    model, asked = hist.ALBEF(options(), tokenizer), []
    one, other = hist.level_losses, hist.composition_losses
    monkeypatch.setattr(hist, "level_losses", lambda *a: asked.append(a[-1]) or one(*a))
    monkeypatch.setattr(hist, "composition_losses", lambda *a: asked.append(a[-1]) or other(*a))
    teacher = hist.make_teacher(model)
    hist.hist_losses(model, batch, EVERY, 0.25, 0, teacher)
    assert asked == [0.25, 0.25, 0.25, 0]


def test_each_level_learns_from_its_own_texts():
    """Another phrase in a batch changes the phrase's losses alone."""
    tokenizer, batch = batch_of(options())
    model, before = hist.ALBEF(options(), tokenizer).eval(), {}
    for part in (None, "caption", "phrase", "subject"):
        changed = {k: dict(v) if isinstance(v, dict) else v for k, v in batch.items()}
        if part:
            for name in ("ids", "masked"):
                words = changed[part][name]
                changed[part][name] = words.where(words < 4, 4 + (words - 3) % 20)
        torch.manual_seed(0)
        losses, _ = hist.hist_losses(model, changed, list(hist.LEVELS), 0.0, 0)
        for name, value in losses.items():
            if part:
                same = value.item() == pytest.approx(before[name], abs=1e-7)
                assert same != name.startswith(part), (part, name)
            else:
                before[name] = value.item()


# -------------------------------------------------------------------------------------- odd batches
ODD = ["", "running quickly", "a dog", "a dog and a dog", "word " * 60, "😀 🚀"]
ODD += ["一只猫坐在桌子上"]
ODD += ["كلب على العشب", "a cat\x00 and\ta dog\n", "<b>a cat</b>"]


def step(model, batch, levels=EVERY, hardness=0.5):
    """One step's losses, checked to be finite along with all gradients."""
    losses, figures = hist.hist_losses(model, batch, levels, hardness, 0, hist.make_teacher(model))
    sum(losses.values()).backward()
    assert all(torch.isfinite(value) for value in (losses | figures).values())
    for parameter in model.parameters():
        assert parameter.grad is None or torch.isfinite(parameter.grad).all()
    return losses


@pytest.mark.parametrize("base", hist.MODELS)
def test_odd_captions_train_without_a_nan(base):
    records = [record(caption, 20 * i) for i, caption in enumerate(ODD)]
    tokenizer, batch = batch_of(options(data="odd"), len(ODD), records)
    assert batch["caption"]["ids"].shape == (len(ODD), 61)  # 60 words and [CLS]
    assert 0 < batch["phrase"]["exists"].sum() < len(ODD)
    assert len(step(hist.MODELS[base](options(), tokenizer), batch)) == 9


def test_a_batch_of_one_caption_has_no_negatives_and_no_nan():
    for captions in ("a dog and a cat", ""):
        tokenizer, batch = batch_of(options(data="x"), 3, [record(captions)])
        model = hist.ALBEF(options(), tokenizer)
        step(model, batch, hardness=1.0)
        text = batch["caption"]
        held = hist.find_positives(text["image_keys"], text["text_keys"])
        assert held.all() == bool(captions)


def entropy(text):
    """The least that itc_loss can be: the entropy of its targets, uniform over the positives."""
    positives = hist.find_positives(text["image_keys"], text["text_keys"])
    ways = [way.sum(1)[way.any(1)].float().log().mean() for way in (positives, positives.T)]
    return sum(ways).item() / 2


def test_a_batch_overfits():
    torch.manual_seed(0)
    o = options(width=64)
    tokenizer, batch = batch_of(o, 8)
    model = hist.ALBEF(o, tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    last = []
    for _ in range(150):
        losses, _ = hist.hist_losses(model, batch, list(hist.LEVELS), 0.0, 1)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        last.append({name: value.item() for name, value in losses.items()})
    for name in losses:
        floor = entropy(batch[name.split("_")[0]]) if name.endswith("itc") else 0
        assert np.mean([values[name] for values in last[-10:]]) < 0.2 + floor, name


# ------------------------------------------------------------------------------ devices and dtypes
def fake(batch):
    if isinstance(batch, dict):
        return {name: fake(value) for name, value in batch.items()}
    return torch.empty_like(batch, device="cuda")


def test_losses_of_a_gpu_stay_on_it_in_float32_under_bfloat16():
    """Fake tensors have a device and a dtype and no numbers: no GPU is needed. What mixes devices
    or copies a tensor to the host fails."""
    tokenizer, batch = batch_of(options())
    model = hist.ALBEF(options(), tokenizer)
    overwrite = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            model.to_empty(device="cuda")
            batch = fake(batch)
            torch.set_autocast_enabled("cuda", True)
            torch.set_autocast_dtype("cuda", torch.bfloat16)
            assert model.match_head(torch.empty(2, 32, device="cuda")).dtype == torch.bfloat16
            losses, _ = hist.hist_losses(model, batch, list(hist.LEVELS), 0.5, 0)
    finally:
        torch.set_autocast_enabled("cuda", before[0])
        torch.set_autocast_dtype("cuda", before[1])
        torch.__future__.set_overwrite_module_params_on_conversion(overwrite)
    assert len(losses) == 8
    for name, loss in losses.items():
        assert loss.device.type == "cuda" and loss.dtype == torch.float32, name


@pytest.mark.parametrize("base", hist.MODELS)
def test_a_step_under_bfloat16_is_finite_and_its_losses_float32(base):
    tokenizer, batch = batch_of(options())
    torch.manual_seed(0)
    model = hist.MODELS[base](options(), tokenizer)
    full, _ = hist.hist_losses(model, batch, EVERY, 0.0, 0, hist.make_teacher(model))
    torch.manual_seed(0)
    model = hist.MODELS[base](options(), tokenizer)
    asked, grad_cam = [], hist.grad_cam
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            hist, "grad_cam", lambda A, *rest: asked.append(A.dtype) or grad_cam(A, *rest)
        )
        with torch.autocast("cpu", torch.bfloat16):
            losses = step(model, batch, hardness=0.0)
    assert asked == [torch.float32] * 3  # the gradient of a gradient is no matter for 8 bits
    for name, loss in losses.items():
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(full[name].item(), rel=0.05), name
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}
