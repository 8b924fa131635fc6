"""The scenes: what is drawn is where the masks say, what is said of it is true."""

import re

import numpy as np
import pytest
from common import options
from PIL import ImageColor

import hist
import parse
from tests.paper import choices

SIDE = 60


def scenes(count, name="held out", held_out=True, **changes):
    drawn = hist.Scenes(1_000_000, options(image_size=SIDE, **changes), name, held_out)
    return [drawn[i] for i in range(count)]


def kinds(record):
    """The (colour, shape) of each of a scene's targets."""
    return [tuple(target["phrase"].split()[1:]) for target in record["targets"]]


def grown(mask):
    """A mask and the pixels around it."""
    padded = np.pad(mask, 1)
    side = len(mask)
    shifts = [(y, x) for y in range(3) for x in range(3)]
    return np.logical_or.reduce([padded[y : y + side, x : x + side] for y, x in shifts])


def test_masks_and_boxes_are_where_something_was_drawn():
    for record in scenes(60):
        image, covered = record["image"].astype(float), np.zeros((SIDE, SIDE), bool)
        assert record["image"].shape == (SIDE, SIDE, 3) and record["image"].dtype == np.uint8
        for (colour, _), target in zip(kinds(record), record["targets"]):
            mask = target["mask"]
            inside = mask & ~grown(~mask)
            ink = np.median(image[inside if inside.sum() > 3 else mask], 0)
            assert np.abs(ink - ImageColor.getrgb(colour)).max() < 80  # jittered ink, clipped
            ys, xs = np.nonzero(mask)
            box = [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
            assert target["boxes"] == [box] and box[2] > box[0] + 4
            assert not (covered & mask).any()  # objects do not overlap
            covered |= mask
        assert image[~grown(covered)].std(0).max() < 8  # background: a tint and its grain
        assert image[~grown(covered)].mean() > 180


def test_every_shape_is_another_and_right_side_up():
    thing = {shape: hist.Thing("red", shape, 40, 0, 0) for shape in hist.SHAPES}
    masks = {shape: hist.coverage(thing[shape], 40) > 0.5 for shape in hist.SHAPES}
    for a in masks:
        for b in masks:
            assert a == b or (masks[a] ^ masks[b]).mean() > 0.08, (a, b)
    assert not masks["ring"][20, 20] and masks["circle"][20, 20] and masks["square"][5, 5]
    assert masks["cross"][20, 5] and masks["cross"][5, 20] and not masks["cross"][5, 5]
    for pointed_up in ("triangle", "star"):
        assert masks[pointed_up][:6].sum() < masks["heart"][4:10].sum()
    assert masks["heart"][-6:].sum() < masks["heart"][4:10].sum()
    moved = hist.coverage(hist.Thing("red", "square", 20, 15, 5), 40)
    ys, xs = np.nonzero(moved > 0.5)
    assert (ys.mean(), xs.mean()) == pytest.approx((14.5, 24.5), abs=0.6)


def captioned():
    """(caption, [(phrase, number of its object)] that it says, record)."""
    records = scenes(300, "captions", False) + scenes(100)
    return [(record["captions"][0], record["said"], record) for record in records]


def test_captions_are_true():
    sizes, clauses = 0, 0
    for caption, said, record in captioned():
        there = kinds(record)
        for phrase, number in said:
            words = set(phrase.split())
            assert phrase in caption
            assert words - {"a", "an", "the", "small", "large", "shape"} <= set(there[number])
            assert words & {"shape", there[number][1]}
            sizes += bool(words & {"small", "large"})
        clause = re.search(r"the (\w+) (shape )?is (?:an? )?(\w+)$", caption)
        if clause:
            what, of_colour, value = clause.groups()
            place = 0 if of_colour else 1
            same = [kind for kind in kinds(record) if kind[place] == what]
            assert len(same) == 1 and same[0][1 - place] == value, caption
            clauses += 1
    assert min(sizes, clauses) > 20


def test_small_and_large_are_so():
    seen = set()
    for _, said, record in captioned():
        for phrase, number in said:
            words = phrase.split()
            if words[1] in ("small", "large"):
                seen.add(words[1])
                x0, y0, x1, y1 = record["targets"][number]["boxes"][0]
                edge = max(x1 - x0, y1 - y0) / SIDE
                assert (
                    edge <= 0.25 if words[1] == "small" else edge > 0.18
                )  # the bar is thin, the diamond slim
    assert seen == {"small", "large"}


def test_positions_are_true():
    checked, centre = 0, {}
    for record in scenes(700, "where"):
        caption = record["captions"][0]
        for target in record["targets"]:
            x0, y0, x1, y1 = target["boxes"][0]
            centre[target["phrase"].split(" ", 1)[1]] = (x0 + x1) / 2, (y0 + y1) / 2
        found = re.search(r"(\w+ \w+) (left of|right of|above|below) an? (.*)", caption)
        if found:
            one, where, rest = found.groups()
            words = re.sub("^(small|large) ", "", rest).split()[:2]
            other = " ".join(words).strip(",")
            axis = int(where in ("above", "below"))
            sign = 1 if where in ("right of", "below") else -1
            assert sign * (centre[one][axis] - centre[other][axis]) > -1.5, caption
            checked += 1
    assert checked > 100


def test_captions_parse_to_what_they_say():
    """All that is said is found; little else (of "the circle is orange" an orange)."""
    found = right = wanted = 0
    for caption, said, _ in captioned():
        phrases = [phrase.text for phrase in parse.parse(caption).phrases]
        found, wanted = found + len(phrases), wanted + len(said)
        right += len(set(phrases) & {phrase for phrase, _ in said})
    assert right == wanted and right / found > 0.95


def test_a_fifth_of_the_kinds_is_in_held_out_scenes_only():
    assert len(hist.UNSEEN) == 39 and len(hist.SHAPES) == 24
    assert {colour for colour, _ in hist.UNSEEN} == set(hist.COLOURS)
    assert {shape for _, shape in hist.UNSEEN} == set(hist.SHAPES)
    train, test = scenes(200, "train", False), scenes(200)
    assert not any(set(kinds(record)) & hist.UNSEEN for record in train)
    tagged = []
    for record in test:
        for kind, target in zip(kinds(record), record["targets"]):
            assert ("unseen" in target["tags"]) == (kind in hist.UNSEEN)
            tagged.append(kind in hist.UNSEEN)
    assert 0.1 < np.mean(tagged) < 0.3


def test_what_is_shared_is_tagged():
    shared = 0
    for record in scenes(100):
        colours, shapes = zip(*kinds(record))
        for colour, shape, target in zip(colours, shapes, record["targets"]):
            assert ("shared_colour" in target["tags"]) == (colours.count(colour) > 1)
            assert ("shared_shape" in target["tags"]) == (shapes.count(shape) > 1)
            shared += len(target["tags"])
        assert len(set(kinds(record))) == len(record["targets"])
    assert shared > 100


def right_answers(record, question):
    """What a person who knows the scene would say to a question."""
    words, there = question["text"].split(), kinds(record)
    if question["kind"] == "colour":
        return [colour for colour, shape in there if shape == words[1]]
    if question["kind"] == "shape":
        return [shape for colour, shape in there if colour == words[1]]
    return ["yes" if tuple(words[1:]) in there else "no"]


def test_questions_have_one_right_answer():
    asked = set()
    for record in scenes(200):
        for question in record["questions"]:
            assert right_answers(record, question) == question["answers"], question
            assert question["answers"][0] in question["choices"]
            assert ("[MASK]" in question["text"]) == (question["kind"] != "is_there")
            asked.add((question["kind"], question["answers"][0]))
    assert {kind for kind, _ in asked} == {"colour", "shape", "is_there"}
    assert {("is_there", "yes"), ("is_there", "no")} <= asked


def test_an_absent_kind_shares_colour_or_shape_with_what_is_there():
    for record in scenes(50):
        colours, shapes = zip(*kinds(record))
        absent = [q["text"].split()[1:] for q in record["questions"] if q["answers"] == ["no"]]
        assert all(colour in colours or shape in shapes for colour, shape in absent) and absent


def test_no_two_sets_share_a_scene_and_a_number_is_a_scene():
    train, held_out = scenes(100, "train", False), scenes(100)
    pictures = [record["image"].tobytes() for record in train + held_out]
    assert len(set(pictures)) == 200
    assert scenes(1, "train", False)[0]["image"].tobytes() == pictures[0]
    assert scenes(1, "train", False, seed=1)[0]["image"].tobytes() != pictures[0]
    assert len(list(hist.Scenes(3, options(), "test", False))) == 3  # a loop over them ends


def test_three_to_six_objects_of_which_captions_name_most():
    counts, named = set(), []
    for _, said, record in captioned():
        counts.add(len(record["targets"]))
        named.append(len({number for _, number in said}) / len(record["targets"]))
    assert counts == {3, 4, 5, 6} and 0.6 < np.mean(named) < 0.85


def test_few_phrases_are_true_of_an_image_whose_caption_does_not_say_them():
    """False negatives: what would be matched as wrong though it is right. Sizes are left out, so
    that this counts a few too many."""
    assert 0.01 < choices.false_negatives(scenes(150, "captions", False)) < 0.06


def test_false_negatives_by_hand():
    """Of each scene's phrases the other does not say any; "the star" and "a red star" are true."""
    one = {"said": [("a small red star", 0)], "targets": [{"phrase": "a red star"}]}
    two = {"said": [("the star", 1), ("a blue cup", 0)]}
    two["targets"] = [{"phrase": "a blue cup"}, {"phrase": "a red star"}]
    assert choices.false_negatives([one, two]) == 2 / 3


def test_the_encoder_learns_first_from_scenes_of_one_object(monkeypatch):
    o, asked, draw = options(vit_steps=2, batch_size=4), [], hist.draw_scene

    def draw_scene(rng, side, wanted, unseen):
        asked.append((wanted, unseen))
        return draw(rng, side, wanted, unseen)

    monkeypatch.setattr(hist, "draw_scene", draw_scene)
    hist.name_shapes(hist.ALBEF(o, hist.Tokenizer(hist.Tokenizer.SPECIAL)), o)
    assert asked == 8 * [(1, False)]
