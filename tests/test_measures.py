"""The measures by hand, and evaluate on models and maps that know the answers, or know nothing."""

import itertools
import random

import numpy as np
import pytest
import torch
from common import batch_of, options, record, samples_of

import hist


# ---------------------------------------------------------------------------------------- by hand
def test_pointing_iou_and_balance_by_hand():
    heat = np.array([[0.0, 0, 0, 0], [0, 4, 2, 0], [0, 1, 0, 0], [0, 0, 0, 1]])
    one, two = np.zeros((4, 4), bool), np.zeros((4, 4), bool)
    one[1, 1:3], two[3, 3] = True, True
    assert hist.pointing_game(heat, one) is True and hist.pointing_game(heat, two) is False
    assert hist.balance(heat, one, two) == hist.balance(heat, two, one) == pytest.approx(1 / 6)
    assert hist.balance(np.zeros((4, 4)), one, two) == 0
    # cut at a fifth of 4: 4, 2, 1, 1 stay, three of them in the union of three; at half: 4 and 2
    cut = hist.multi_object_iou(heat, one | two, np.array([0.2, 0.5, 0.9]))
    assert cut == pytest.approx([3 / 4, 2 / 3, 1 / 3])
    assert len(hist.multi_object_iou(heat, one)) == len(hist.THRESHOLDS) == 19
    assert (hist.multi_object_iou(np.zeros((4, 4)), one) == 0).all()
    assert hist.box_mask([[1, 1, 3, 2], [3, 3, 9, 9]], 4).tolist() == (one | two).tolist()
    assert hist.box_mask([[0.5, 1.2, 1.5, 1.8]], 4).sum() == 2  # what a box touches


def test_space_around_an_answer_does_not_count():
    """As the official evaluation strips all before it compares."""
    assert hist.vqa_accuracy("two", ["two "] * 10) == hist.vqa_accuracy("two\n", ["two"] * 10) == 1
    assert hist.vqa_accuracy("two", ["\ttwo"]) == 1 and hist.vqa_accuracy("two", ["t wo"]) == 0


def test_vqa_accuracy_by_hand():
    assert hist.vqa_accuracy("red", ["red"]) == 1 and hist.vqa_accuracy("red", ["blue"]) == 0
    # the official formula: over the ten ways to leave one out, min(others who said it / 3, 1)
    for n, expected in ((0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)):
        answers = ["red"] * n + ["blue"] * (10 - n)
        ways = [answers[:k] + answers[k + 1 :] for k in range(10)]
        mean = sum(min(way.count("red") / 3, 1) for way in ways) / 10
        assert hist.vqa_accuracy("red", answers) == pytest.approx(mean) == pytest.approx(expected)
    few = ["red", "dark red", "red "]  # fewer than ten: one who says any of them is right
    assert [hist.vqa_accuracy(said, few) for said in ("red", "dark red", "blue")] == [1, 1, 0]


def test_recalls_by_hand():
    scores = torch.tensor([[3.0, 2, 1, 0, -1, -2], [0, 1, 2, 3, 4, 5]])
    right = torch.zeros(2, 6, dtype=torch.bool)
    right[0, 0] = right[1, 1] = True  # the first is ranked 1st, the second 5th
    assert hist.recalls(scores, right) == {1: 0.5, 5: 1, 10: 1}
    right[1] = torch.tensor([1, 0, 0, 0, 0, 0])  # ranked 6th
    assert hist.recalls(scores, right) == {1: 0.5, 5: 0.5, 10: 1}


def pair(which, best, balance=0.5, area=0.25):
    """A Pair whose IoU is 0.9 at one threshold, 0.1 elsewhere."""
    iou = np.full(len(hist.THRESHOLDS), 0.1)
    iou[best] = 0.9
    return hist.Pair(which, balance, iou, area)


def test_a_half_s_iou_is_cut_where_the_other_half_is_best():
    first, second = {"image": 1}, {"image": 2}
    pairs = [pair(first, 3, 0.2), pair(second, 7, 0.4, 0.75), pair(first, 3, 0.6)]
    found = hist.pair_measures(pairs, [])
    assert found["multi_object_iou"] == pytest.approx(0.1)  # each half's own best is 0.9
    assert found["balance"] == pytest.approx(0.4)
    assert found["multi_object_iou_chance_pixel"] == pytest.approx(1.25 / 3)
    alike = [pair(first, 5), pair(second, 5), pair({"image": 3}, 5)]
    assert hist.pair_measures(alike, [])["multi_object_iou"] == pytest.approx(0.9)
    assert hist.pair_measures([pair(first, 3)], [])["multi_object_iou"] == pytest.approx(0.1)


def test_val_s_threshold_is_taken_where_there_is_one():
    val = [pair({}, 3), pair({}, 3), pair({}, 7)]
    found = hist.pair_measures([pair({"image": 1}, 3), pair({"image": 2}, 7)], val)
    assert found["multi_object_iou"] == pytest.approx(0.5)


def test_best_threshold():
    assert hist.best_threshold([pair({}, 3), pair({}, 3), pair({}, 7)]) == 3
    assert hist.THRESHOLDS[hist.best_threshold([])] == pytest.approx(0.5)


# ---------------------------------------------------------------------------------------- targets
def test_targets_are_scaled_to_the_square():
    mask = np.zeros((20, 40), bool)
    mask[10:, 20:] = True
    cat = {"phrase": "a cat", "boxes": [[0, 0, 10, 10]], "mask": mask, "tags": ["t"], "object": "x"}
    dog = {"phrase": "a dog", "boxes": [[20, 0, 40, 20]]}
    vanishes = {"phrase": "a fly", "boxes": [[0, 0, 4, 4]], "mask": np.zeros((20, 40), bool)}
    targets = {"targets": [cat, dog, vanishes]}
    one, two, three = hist.targets_of(targets, (20, 40, 3), 8)
    assert one.boxes.sum() == 2 * 4 and one.boxes[:4, :2].all()
    assert one.mask.sum() == 16 and one.mask[4:, 4:].all()
    assert (one.tags, one.object, two.tags, two.object) == (["t"], "x", [], 1)
    assert two.boxes[:, 4:].all() and two.boxes.sum() == 32 and (two.mask == two.boxes).all()
    assert (three.mask == three.boxes).all() and three.boxes.any()


def target(phrase, thing, tags=()):
    nothing = np.zeros((4, 4), bool)
    return hist.Target(phrase, nothing, nothing, list(tags), thing)


def test_texts_to_find_are_phrases_subjects_and_pairs_of_objects():
    targets = [
        target("a red dog", 0, ["unseen"]),
        target("a blue dog", 1),
        target("a cat", 2),
        target("the kitten", 2),
    ]
    found = hist.texts_to_find(targets, random.Random(0))
    kinds = [(kinds, text, [t.object for t in named]) for kinds, text, named in found]
    assert kinds[:4] == [
        (["phrases", "unseen"], "a red dog", [0]),
        (["phrases"], "a blue dog", [1]),
        (["phrases"], "a cat", [2]),
        (["phrases"], "the kitten", [2]),
    ]
    subjects = [(["subjects"], "dog", [0, 1]), (["subjects"], "cat", [2])]
    assert kinds[4:7] == [*subjects, (["subjects"], "kitten", [2])]
    pairs = kinds[7:]
    assert len(pairs) == 3  # of three objects, whichever mention names the last
    for kind, text, (one, two) in pairs:
        names = {0: ["a red dog"], 1: ["a blue dog"], 2: ["a cat", "the kitten"]}
        expected = [f"{a} and {b}" for a, b in itertools.product(names[one], names[two])]
        assert kind == [] and one < two and text in expected
    assert len({text for _, text, _ in pairs}) == 3
    many = [target(f"a thing{i}", i) for i in range(6)]
    assert sum(not kinds for kinds, *_ in hist.texts_to_find(many, random.Random(0))) == 3


# ------------------------------------------------------------------------------------ measure_maps
LEFT = {"phrase": "a cat", "boxes": [[0, 0, 12, 24]], "tags": ["big"]}
RIGHT = {"phrase": "a dog", "boxes": [[12, 0, 24, 12]]}


def maps_that_point(monkeypatch, *where):
    """maps_of in which each text's map has its one highest point at (row, column)."""
    asked = []

    def maps_of(model, tokenizer, image, texts, cam_layer):
        asked.append((list(texts), cam_layer))
        maps = np.full((len(texts), 24, 24), 0.1)
        for heat, (row, column) in zip(maps, where):
            heat[row, column] = 1
        return maps, [0.5] * len(texts)

    monkeypatch.setattr(hist, "maps_of", maps_of)
    return asked


def test_pointing_and_its_chances_by_hand(monkeypatch):
    """Texts: a cat, a dog; cat, dog; their pair. The cat is found, the dog is looked for in it."""
    asked = maps_that_point(monkeypatch, (20, 3), (20, 3), (0, 0), (2, 20), (0, 0))
    records = [record("a cat and a dog", targets=[LEFT, RIGHT], split="val")]
    values, pairs = hist.measure_maps(None, None, records, options(cam_layer=1), ())
    assert asked == [(["a cat", "a dog", "cat", "dog", "a cat and a dog"], 1)]
    assert values["pointing_phrases"] == [True, False] and values["pointing_big"] == [True]
    assert values["pointing_subjects"] == [True, True]
    assert values["pointing_phrases_chance"] == [1 / 2, 1 / 2]
    assert values["pointing_phrases_chance_pixel"] == [1 / 2, 1 / 4]  # a half, a quarter of all
    assert values["pointing_phrases_in_mask"] == [True, False]
    (found,) = pairs
    assert found.area == pytest.approx(3 / 4) and found.record["split"] == "val"
    cat, dog = 0.1 * 12 * 24 + 0.9, 0.1 * 12 * 12
    assert found.balance == pytest.approx(dog / cat)
    both = hist.box_mask(LEFT["boxes"], 24) | hist.box_mask(RIGHT["boxes"], 24)
    heat = np.full((24, 24), 0.1)
    heat[0, 0] = 1
    assert found.iou == pytest.approx(hist.multi_object_iou(heat, both))


def test_two_of_three_objects_are_named_by_their_subject(monkeypatch):
    """ "dog" names two of three: pointing at either is right, and chance is two thirds."""
    dogs = [RIGHT | {"phrase": f"a {size} dog", "object": size} for size in ("small", "large")]
    dogs[1] = dogs[1] | {"boxes": [[12, 12, 24, 24]]}
    maps_that_point(monkeypatch, *[(20, 20)] * 8)
    records = [record("x", targets=[LEFT, *dogs], split="val")]
    values, _ = hist.measure_maps(None, None, records, options(), ())
    assert values["pointing_subjects"] == [False, True]
    assert values["pointing_subjects_chance"] == [1 / 3, 2 / 3]
    assert values["pointing_subjects_chance_pixel"] == [1 / 2, 1 / 2]
    assert values["pointing_phrases"] == [False, False, True]


def test_in_mask_and_in_box_are_told_apart(monkeypatch):
    mask = np.zeros((24, 24), bool)
    mask[:, :6] = True
    maps_that_point(monkeypatch, (3, 9), (3, 3))
    records = [record("x", targets=[LEFT | {"mask": mask}], split="val")]
    values, pairs = hist.measure_maps(None, None, records, options(), ())
    assert values["pointing_phrases"] == [True] and values["pointing_phrases_in_mask"] == [False]
    assert values["pointing_subjects_in_mask"] == [True] and pairs == []


def test_questions_are_asked_of_their_image_and_rated(monkeypatch):
    asked = []

    def answer(model, tokenizer, image, text, choices):
        asked.append((text, choices))
        return "red"

    monkeypatch.setattr(hist, "answer", answer)
    choice = {"text": "it is [MASK]", "kind": "colour", "choices": ["red", "blue"]}
    right, wrong = choice | {"answers": ["red"]}, choice | {"answers": ["blue"]}
    free = {"text": "what? [MASK]", "kind": "open", "answers": ["red"] * 2 + ["blue"] * 8}
    records = [record("x", questions=[right, wrong, free], split="val")]
    values, _ = hist.measure_maps(None, None, records, options(), ["red", "blue", "one", "two"])
    assert asked[0] == ("it is [MASK]", ["red", "blue"])
    assert asked[2] == ("what? [MASK]", ["red", "blue", "one", "two"])
    assert values["vqa"] == pytest.approx([1, 0, 0.6]) and values["vqa_colour"] == [1, 0]
    nothing, _ = hist.measure_maps(None, None, records[:1], options(), [])
    assert len(nothing["vqa"]) == 2  # a question without choices is not asked
    assert values["vqa_chance"] == [1 / 2, 1 / 2, 1 / 4] and values["vqa_open"] == [0.6]


def test_evaluate_against_maps_that_know_the_answers(monkeypatch):
    """Maps drawn from the truth are perfect in every measure; of the background none hits."""
    o = options()
    scenes = hist.Scenes(100, o, "answers", True)
    records = [scenes[i] for i in range(12)]
    tokenizer, _ = batch_of(o)
    model = hist.ALBEF(o, tokenizer)
    by_pixels = {r["image"].tobytes(): r for r in records}

    def truth(model, tokenizer, image, texts, cam_layer):
        targets = by_pixels[image.permute(1, 2, 0).numpy().tobytes()]["targets"]
        maps = []
        for text in texts:
            parts = text.split(" and ")
            named = [t for t in targets if {t["phrase"], t["phrase"].split()[-1]} & set(parts)]
            maps.append(sum(t["mask"] / t["mask"].sum() for t in named))
        return np.array(maps), [1.0] * len(texts)

    def background(*arguments):
        maps, match = truth(*arguments)
        return maps.max() - maps, match

    monkeypatch.setattr(hist, "maps_of", truth)
    results, pairs = hist.evaluate(model, tokenizer, records, o)
    (result,) = results.values()
    for name in ("pointing_phrases", "pointing_subjects", "pointing_phrases_in_mask"):
        assert result[name] == 1
    assert result["balance"] > 0.99 and result["multi_object_iou"] > 0.9 and pairs
    monkeypatch.setattr(hist, "maps_of", background)
    results, _ = hist.evaluate(model, tokenizer, records, o)
    result = results["test"]
    assert result["pointing_phrases"] == result["pointing_subjects"] == 0
    assert 0.2 < result["pointing_phrases_chance"] < 0.5


def test_each_split_by_itself_with_val_s_threshold(monkeypatch):
    records = [record(f"a thing{i}", split=split) for i, split in enumerate(["val", "a", "a", "b"])]
    best = {"val": 3, "a": 3, "b": 7}

    def measure_maps(model, tokenizer, some, options, answers):
        values = {"vqa": [len(some), 0], "pointing_phrases": [1.0] * 5}
        return values, [pair(r, best[r["split"]]) for r in some]

    monkeypatch.setattr(hist, "measure_maps", measure_maps)
    monkeypatch.setattr(hist, "retrieval", lambda model, tokenizer, some, o: {"r1": len(some)})
    results, pairs = hist.evaluate(torch.nn.Identity(), None, records, options())
    assert {split: result["vqa"] for split, result in results.items()} == {
        "val": 0.5,
        "a": 1,
        "b": 0.5,
    }
    for split, images in (("val", 1), ("a", 2), ("b", 1)):
        counts = {name: results[split][name] for name in ("images", "phrases", "pairs")}
        assert counts == {"images": images, "phrases": 5, "pairs": images}
    two = [record("x", split="val"), record("y", split="val")]
    marks = iter([3, 7])
    halves = [pair(r, next(marks)) for r in two]
    monkeypatch.setattr(hist, "measure_maps", lambda *a: ({"pointing_phrases": [1]}, halves))
    by_itself, _ = hist.evaluate(torch.nn.Identity(), None, two, options())
    assert by_itself["val"]["multi_object_iou"] == pytest.approx(0.1)  # val is halved too
    assert [results[split]["r1"] for split in ("val", "a", "b")] == [1, 2, 1]
    assert results["a"]["multi_object_iou"] == pytest.approx(0.9)  # val's best threshold
    assert results["b"]["multi_object_iou"] == pytest.approx(0.1) and len(pairs) == 4


# ------------------------------------------------------------------------------- maps and answers
def test_maps_are_upsampled_bicubically_each_for_its_text():
    o = options()
    tokenizer, batch = batch_of(o)
    model = hist.ALBEF(o, tokenizer).eval()
    texts = ["a red circle", "a blue star and a red circle"]
    image = batch["image"][2]
    maps, match = hist.maps_of(model.train(), tokenizer, image, texts, 0)
    assert maps.shape == (2, 24, 24) and not model.training
    for text, heat, probability in zip(texts, maps, match):
        image_kv = model.project_image(model.encode_image(image[None])[1])
        small, alone = hist.locate(model, tokenizer.batch([text]), image_kv, 0)
        assert probability == pytest.approx(alone.item(), rel=1e-4)
        how = dict(size=(24, 24), mode="bicubic")
        expected = torch.nn.functional.interpolate(small[None].detach(), **how)[0, 0]
        np.testing.assert_allclose(heat, expected.clamp(min=0), rtol=1e-3, atol=1e-9)


def test_an_answer_is_read_at_the_mask_and_nowhere_else(monkeypatch):
    o = options()
    tokenizer, batch = batch_of(o)
    model, asked = hist.ALBEF(o, tokenizer), []

    def word_logits(ids, place, image_kv):
        asked.append(tokenizer.words[ids[0, place]])
        logits = torch.zeros(len(tokenizer.words))
        logits[tokenizer.ids["blue"]], logits[tokenizer.ids["a"]] = 1, 9
        return logits

    monkeypatch.setattr(model, "word_logits", word_logits)
    for text in ("the circle is [MASK]", "[MASK] shapes", "a [MASK] circle"):
        said = hist.answer(model, tokenizer, batch["image"][0], text, ["red", "blue", "green"])
        assert said == "blue"
    assert asked == ["[MASK]"] * 3


@pytest.mark.parametrize("bias, expected", [(5.0, "yes"), (-5.0, "no")])
def test_a_question_without_a_mask_is_answered_by_the_match_head(bias, expected):
    o = options()
    tokenizer, batch = batch_of(o)
    model = hist.ALBEF(o, tokenizer)
    with torch.no_grad():
        model.match_head.bias[1] += bias
    said = hist.answer(model, tokenizer, batch["image"][0], "a red circle", ["no", "yes"])
    assert said == expected


def test_common_answers_are_words_of_the_vocabulary_most_frequent_first():
    tokenizer = hist.Tokenizer.build(["red blue yes"], 99)
    answers = [["red", "blue", "blue"], ["yes", "blue", "green", "green"], ["yes"]]
    records = [record("x", questions=[{"answers": said}]) for said in answers] + [record("y")]
    assert hist.common_answers(records, tokenizer) == ["blue", "yes", "red"]
    assert hist.common_answers(hist.Scenes(9, options(), "x", False), tokenizer) == []


# -------------------------------------------------------------------------------------- retrieval
class Known(torch.nn.Module):
    """A model whose features are a table: images by shade, texts by first word; and whose match
    head likes the text that is the image's number best."""

    def __init__(self, similarity, tokenizer):
        super().__init__()
        self.similarity, self.tokenizer, self.asked = similarity, tokenizer, []

    def encode_image(self, images):
        rows = images[:, 0, 0, 0].long()
        return self.similarity[rows], rows.view(-1, 1, 1).float()

    def encode_text(self, ids):
        columns = torch.tensor([int(self.tokenizer.words[row[1]][4:]) for row in ids])
        return columns, ids > 0, torch.eye(self.similarity.shape[1])[columns]

    def project_image(self, V):
        return [V.view(1, -1, 1, 1, 1)]

    def match(self, T, mask, image_kv):
        rows = image_kv[0].flatten().long().expand(len(T))
        self.asked += list(zip(rows.tolist(), T.tolist()))
        likes = -(T // 2 - rows).abs().float()
        return torch.stack([-likes, likes], 1), None


def known(similarity):
    """(model, tokenizer, records) of images with two captions each: "text0", "text1"; …"""
    n = len(similarity)
    records = [record([f"text{2 * i}", f"text{2 * i + 1}"], i, split="val") for i in range(n)]
    captions = [caption for r in records for caption in r["captions"]]
    tokenizer = hist.Tokenizer.build(captions, 99)
    return Known(similarity, tokenizer), tokenizer, records


def test_retrieval_by_hand_each_way():
    """Three images of two captions: all find one of their own, half of the captions theirs."""
    similarity = torch.tensor(
        [
            [9.0, 0, 8, 8, 8, 8],
            [0, 7, 9, 0, 7, 7],
            [0, 0, 0, 0, 9, 0],
        ]
    )
    # down the columns: image 0 (right), 1, 1 (right), 0, 2 (right), 0
    result = hist.retrieval(*known(similarity), options())
    assert result["r1_image_to_text"] == 1
    assert result["r1_text_to_image"] == pytest.approx(3 / 6)
    assert result["r5_text_to_image"] == 1 and result["r1_text_to_image_chance"] == 1 / 3
    assert result["r5_image_to_text_chance"] == 1
    # a match head that knows is asked about all of so few
    assert result["r1_image_to_text_itm"] == result["r1_text_to_image_itm"] == 1
    worse = torch.tensor([[0.0, 0, 8, 8, 0, 0], [9, 0, 0, 0, 0, 0], [0, 0, 0, 0, 9, 9]])
    result = hist.retrieval(*known(worse), options())
    assert result["r1_image_to_text"] == pytest.approx(1 / 3)
    assert result["r1_text_to_image"] == pytest.approx((0 + 1 + 0 + 0 + 2) / 6)


def test_reranking_asks_itm_about_the_nearest_only(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(hist, "RERANKED", 2)
    similarity = torch.randn(5, 10)
    model, tokenizer, records = known(similarity)
    ids = tokenizer.batch([caption for r in records for caption in r["captions"]])
    to_text, to_image = hist.rerank(model, records, ids, similarity, options())
    near = {
        (row, column) for row in range(5) for column in similarity[row].topk(2).indices.tolist()
    }
    beside = {(row, c) for c in range(10) for row in similarity[:, c].topk(2).indices.tolist()}
    assert sorted(model.asked) == sorted(near | beside)
    for row, column in itertools.product(range(5), range(10)):
        likes = -abs(column // 2 - row)
        expected = 1 / (1 + np.exp(-2 * likes))
        for found, asked in ((to_text, near), (to_image, beside)):
            value = expected if (row, column) in asked else -np.inf
            assert found[row, column].item() == pytest.approx(value, rel=1e-5)


def test_retrieval_of_a_model_is_that_of_its_features():
    """Chunks, records and captions keep their places: against one matrix product of a batch."""
    o = options()
    records = [hist.Scenes(50, o, "r", True)[i] for i in range(9)]
    for r in records[:4]:
        r["captions"] = r["captions"] + ["a second caption of it"]
    samples = samples_of(o, records)
    model = hist.ALBEF(o, samples.tokenizer).eval()
    images = torch.stack([hist.read_image(r["image"], 24) for r in records])
    captions = [caption for r in records for caption in r["captions"]]
    owner = [n for n, r in enumerate(records) for _ in r["captions"]]
    with torch.no_grad():
        features, _ = model.encode_image(images)
        scores = features @ model.encode_text(samples.tokenizer.batch(captions))[2].T
    to_image = [owner[c] in scores[:, c].topk(1).indices.tolist() for c in range(len(captions))]
    five = [n in [owner[c] for c in scores[n].topk(5).indices.tolist()] for n in range(9)]
    result = hist.retrieval(model, samples.tokenizer, records, o)
    assert result["r1_text_to_image"] == pytest.approx(np.mean(to_image))
    assert result["r5_image_to_text"] == pytest.approx(np.mean(five))


# ------------------------------------------------------------------------------------------ table
def test_the_table_has_a_line_a_measure_and_a_column_a_training():
    baseline = {"pointing_phrases": 0.123, "pointing_phrases_chance": 0.4, "r1_text_to_image": 0.5}
    baseline["pointing_phrases_chance_pixel"] = 0.07
    full = baseline | {"pointing_phrases": 0.789}
    rows = [line.split() for line in hist.table({"baseline": baseline, "hist": full}).splitlines()]
    assert ["baseline", "hist"] == rows[0][:2]
    assert ["pointing_phrases", "12.3", "78.9", "40.0", "7.0"] in rows
    assert ["r1_text_to_image", "50.0", "50.0"] in rows and len(rows) == 3
