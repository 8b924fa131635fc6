"""Tokenizer, keys, pairs and batches: what a step is given, read back from decoded samples."""

import random
from collections import Counter

import numpy as np
import pytest
import torch
from common import batch_of, options, record, samples_of

import hist
import parse

SPECIAL = hist.Tokenizer.SPECIAL


# ------------------------------------------------------------------------------------ tokenizer
def test_known_and_unknown_words():
    tokenizer = hist.Tokenizer.build(["A dog, a cat", "a dog"], 3)
    assert tokenizer.words[:6] == ["[PAD]", "[CLS]", "[MASK]", "[UNK]", "a", "dog"]
    assert len(tokenizer.words) == 7
    assert tokenizer.encode("A zebra") == [1, 4, 3]
    assert tokenizer.encode("") == [1]
    assert tokenizer.decode([1, 4, 5, 0, 0]) == "a dog"


def test_a_mask_in_a_text_stays_one_where_it_stands():
    tokenizer = hist.Tokenizer.build(["the circle is red", "two shapes"], 99)
    words = [tokenizer.words[i] for i in tokenizer.encode("The circle is [MASK]")]
    assert words == ["[CLS]", "the", "circle", "is", "[MASK]"]
    words = [tokenizer.words[i] for i in tokenizer.encode("[MASK] shapes")]
    assert words == ["[CLS]", "[MASK]", "shapes"]


def test_texts_are_cut_and_padded():
    tokenizer = hist.Tokenizer.build(["word"], 9)
    ids = tokenizer.batch(["word " * 90, "word", ""])
    assert ids.shape == (3, hist.MAX_TOKENS)
    assert (ids != 0).sum(1).tolist() == [hist.MAX_TOKENS, 2, 1] and (ids[:, 0] == 1).all()


def test_masked_words_are_hidden_replaced_or_kept_and_asked_for_in_their_place():
    tokenizer, rng = hist.Tokenizer([*SPECIAL, *"abcdefghij"]), random.Random(0)
    ids = [1, 8, 9, tokenizer.unk_id, 10, 11]
    counts, asked = Counter(), 0
    for _ in range(4000):
        masked, labels = tokenizer.mask_words(ids, rng)
        places = [i for i, label in enumerate(labels) if label != -100]
        assert places and 0 not in places and 3 not in places
        for i in range(6):
            if i in places:
                assert labels[i] == ids[i]
                kind = "kept" if masked[i] == ids[i] else "another"
                counts["[MASK]" if masked[i] == tokenizer.mask_id else kind] += 1
                assert masked[i] == tokenizer.mask_id or masked[i] >= len(SPECIAL)
            else:
                assert masked[i] == ids[i]
        asked += len(places)
    # 30% of four words; one where none was chosen
    assert asked / (4000 * 4) == pytest.approx(0.3 + 0.7**4 / 4, abs=0.02)
    # another word is now and then the same one: one of ten
    for kind, share in (("[MASK]", 0.8), ("another", 0.1 * 0.9), ("kept", 0.1 * 1.1)):
        assert counts[kind] / asked == pytest.approx(share, abs=0.02)
    assert tokenizer.mask_words([1], rng) == ([1], [-100])
    assert tokenizer.mask_words([1, 3], rng) == ([1, 3], [-100, -100])


# ----------------------------------------------------------------------------------------- keys
def test_a_text_s_key_forgets_case_and_a_leading_article_and_nothing_else():
    for one, other in (("A Dog", "the dog"), ("dog", "an DOG"), ("a  dog", "a dog")):
        assert hist.text_key(one) == hist.text_key(other)
    for one, other in (("dog", "dogs"), ("another dog", "dog"), ("a", ""), ("the", "a")):
        assert hist.text_key(one) != hist.text_key(other)
    assert hist.text_key("this dog") != hist.text_key("dog")
    assert hist.text_key("a red dog") != hist.text_key("red a dog")
    assert 0 <= hist.text_key("\ud800 dog") < 2**63


def test_positives_by_hand():
    images = torch.tensor([[5, 7, hist.NO_KEY], [7, 9, hist.NO_KEY], [hist.NO_KEY] * 3])
    texts = torch.tensor([5, 7, hist.NO_TEXT])
    expected = [[True, True, False], [False, True, False], [False, False, False]]
    assert hist.find_positives(images, texts).tolist() == expected


def test_what_an_image_s_captions_say_is_its_positive_whoever_says_it():
    records = [
        record(["a dog on a bed", "A red ball"], 0),
        record("the dog by a door", 99),
        record("a cat", 200),
    ]
    _, batch = batch_of(options(data="x"), 3, records)
    shades = batch["image"].float().mean((1, 2, 3)).tolist()
    order = [min(range(3), key=lambda i: abs((0, 99, 200)[i] - shade)) for shade in shades]
    said = [{"dog", "bed", "ball"}, {"dog", "door"}, {"cat"}]
    text = batch["subject"]
    positives = hist.find_positives(text["image_keys"], text["text_keys"])
    for row, image in enumerate(order):
        truth = {hist.text_key(subject) for subject in said[image]}
        expected = [key in truth for key in text["text_keys"].tolist()]
        assert positives[row].tolist() == expected
        keys = set(text["image_keys"][row].tolist()) - {hist.NO_KEY}
        assert keys == truth


def test_an_image_of_many_texts_is_cut_but_keeps_its_own():
    words = [f"word{i:04}" for i in range(300)]
    captions = [f"a {word}" for word in words]
    samples = samples_of(options(data="x"), [record(captions)])
    for position in range(8):
        row = samples[position]["phrase"]
        assert len(row["image_keys"]) == hist.MAX_KEYS == len(set(row["image_keys"]))
        assert row["text_keys"] in row["image_keys"]


# ---------------------------------------------------------------------------------------- pairs
def pairs_of(captions, count=60):
    """The composites drawn for an image with these captions: {(part, part, whole)}."""
    parses = [parse.parse(caption) for caption in captions]
    found = set()
    for seed in range(count):
        rng = random.Random(seed)
        parsed = rng.choice(parses)
        chosen = rng.choice(parsed.phrases)
        pair = hist.draw_pair(chosen, parsed, parses, rng)
        assert not pair or chosen.text in pair[:2]
        found.add(tuple(pair or ()))
    return found


def test_a_composite_is_two_phrases_in_the_caption_s_order():
    assert pairs_of(["a dog, a cat and a bird"]) == {
        ("a dog", "a cat", "a dog and a cat"),
        ("a dog", "a bird", "a dog and a bird"),
        ("a cat", "a bird", "a cat and a bird"),
    }


def test_a_composite_has_two_different_phrases():
    assert pairs_of(["a dog and the dog"]) == {()}
    assert pairs_of(["a dog"]) == {()}


def test_where_a_caption_has_one_phrase_another_caption_lends_one():
    expected = {("a dog", "a red car", "a dog and a red car")}
    expected |= {("a red car", "a dog", "a red car and a dog")}
    assert pairs_of(["a dog", "a red car"]) == expected


def test_a_caption_with_two_phrases_borrows_none():
    pairs = pairs_of(["a dog and a cat", "a red car"], 200)
    assert not any("car" in pair[1] for pair in pairs if pair[0] in ("a dog", "a cat"))


# -------------------------------------------------------------------------------------- samples
def test_a_sample_decoded():
    """Caption, phrase, the subject of that phrase, and a composite that holds that phrase."""
    caption = "a small dog, two red cars and a wooden table by the old house"
    samples = samples_of(options(data="x"), [record(caption), record("a bird", 200)])
    subjects = {"a small dog": "dog", "two red cars": "cars", "a wooden table": "table"}
    subjects |= {"the old house": "house", "a bird": "bird"}
    decode, seen = samples.tokenizer.decode, Counter()
    for position in range(40):
        sample = samples[position]
        texts = {name: decode(sample[name]["ids"]) for name in hist.LEVELS}
        assert subjects[texts["phrase"]] == texts["subject"]
        seen[texts["phrase"]] += 1
        assert texts["caption"].startswith(("a small dog , two red", "a bird"))
        parts = [decode(sample["pair"][name]) for name in ("part1", "part2")]
        if sample["pair"]["exists"]:
            assert texts["phrase"] in parts
            assert decode(sample["pair"]["whole"]) == " and ".join(parts)
            assert caption.index(parts[0]) < caption.index(parts[1])
        assert sample["pair"]["exists"] == (texts["phrase"] != "a bird")
        for name in hist.LEVELS:
            row = sample[name]
            for at, (word, hidden, label) in enumerate(
                zip(row["ids"], row["masked"], row["labels"])
            ):
                assert label in (-100, word), at
                assert label != -100 or hidden == word, at
    assert set(seen) == set(subjects)


@pytest.mark.parametrize(
    "caption, exist",
    [
        ("", [False, False, False, False]),
        ("running quickly", [True, False, False, False]),
        ("a dog", [True, True, True, False]),
        ("a dog and a dog", [True, True, True, False]),
        ("a dog and a cat", [True, True, True, True]),
    ],
)
def test_what_a_caption_contributes(caption, exist):
    _, batch = batch_of(options(data="x"), 1, [record(caption)])
    assert [batch[name]["exists"].item() for name in (*hist.LEVELS, "pair")] == exist
    for name in hist.LEVELS:
        positives = hist.find_positives(batch[name]["image_keys"], batch[name]["text_keys"])
        assert positives.item() == batch[name]["exists"].item()


def test_a_batch_has_the_shapes_it_says():
    _, batch = batch_of(options(), 5)
    assert batch["image"].shape == (5, 3, 24, 24) and batch["image"].dtype == torch.uint8
    for name in hist.LEVELS:
        text = batch[name]
        assert text["ids"].shape == text["masked"].shape == text["labels"].shape
        assert text["text_keys"].shape == (5,) and text["exists"].dtype == torch.bool
        assert text["image_keys"].shape == (5, hist.MAX_KEYS)
        padding = text["ids"] == hist.Tokenizer.pad_id
        assert (text["masked"][padding] == 0).all() and (text["labels"][padding] == -100).all()
    assert set(batch["pair"]) == {"part1", "part2", "whole", "exists"}
    moved = hist.to_device(batch, "meta")
    assert moved["phrase"]["ids"].device.type == moved["image"].device.type == "meta"


def test_each_epoch_has_each_record_once_in_another_order():
    records = [record("a dog", 10 * i) for i in range(9)]

    def shades(seed):
        samples = samples_of(options(data="x", seed=seed), records)
        return [int(samples[p]["image"].float().mean()) for p in range(27)]

    seen = shades(0)
    epochs = [seen[:9], seen[9:18], seen[18:]]
    for epoch in epochs:
        assert sorted(epoch) == [10 * i for i in range(9)]
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert shades(0) == seen != shades(1)


def test_scenes_come_in_their_own_order_and_whole():
    o = options()
    samples, scenes = samples_of(o), hist.Scenes(1000, o, "test", held_out=True)
    for position in (0, 7):
        whole = torch.from_numpy(scenes[position]["image"].copy()).permute(2, 0, 1)
        assert torch.equal(samples[position]["image"], whole)


def test_photographs_are_cropped_anew_each_time_and_never_by_more_than_three_tenths():
    ramp = np.tile(np.arange(200, dtype=np.uint8)[None, :, None], (200, 1, 3))
    picture = record("a dog") | {"image": ramp}
    samples = samples_of(options(data="x", image_size=32), [picture])
    seen = []
    for position in range(60):
        columns = samples[position]["image"][0].float().mean(0)
        seen.append((columns[0].item(), columns[-1].item()))
    widths = [last - first for first, last in seen]
    assert len(set(seen)) > 40 and max(widths) > 180 and 125 < min(widths) < 150
    lefts = [first for first, _ in seen]
    assert min(lefts) < 10 and max(lefts) > 25
    whole = hist.read_image(ramp, 32)[0].float().mean(0)  # to evaluate on, none is cropped
    assert whole[0] < 5 and whole[-1] > 194


def test_a_picture_that_cannot_be_read_is_replaced_by_the_next_record(here):
    o = options(data="x", out="run")
    records = [record(f"thing{i} here", 20 * i) for i in range(8)]
    order = hist.epoch_order(8, 0, 0)
    bad = order[3]
    records[bad]["image"] = "nowhere.png"
    samples = samples_of(o, records)
    sample = samples[3]
    following = order[4]
    assert int(sample["image"].float().mean()) == 20 * following
    assert f"thing{following}" in samples.tokenizer.decode(sample["caption"]["ids"])
    (row,) = samples.skipped.rows()
    assert row["kind"] == "image" and row["which"] == "nowhere.png" and "readable" in row["why"]
    assert samples.skipped.count() == 1
    samples[3]
    assert len(samples.skipped.rows()) == 1  # the same again is not listed twice
    for broken in records:
        broken["image"] = "nowhere.png"
    with pytest.raises(hist.UserError, match="none of the 8 pictures"):
        samples[0]


def test_given_parses_are_trained_on(here):
    given = (
        '{"caption": "a dog and a cat", "phrases": [{"text": "dog and a cat", "subject": "cat"}]}'
    )
    (here / "given.jsonl").write_text(given + "\n")
    records = [record("a dog and a cat"), record("a bird", 200)]
    samples = samples_of(options(data="x", parses="given.jsonl"), records)
    decode = samples.tokenizer.decode
    said = {
        (decode(samples[p]["phrase"]["ids"]), decode(samples[p]["subject"]["ids"]))
        for p in range(10)
    }
    assert said == {("dog and a cat", "cat"), ("a bird", "bird")}
