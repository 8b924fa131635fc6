"""Training: schedules against their formulas, a step of a model that is one weight, what a run is
given step by step, and what a run that was killed comes back to."""

import json
import math
import os
import shutil
from pathlib import Path

import pytest
import torch
from common import batch_of, lines, options, record, samples_of

import hist
import parse

EVERY = [*hist.LEVELS, "composition"]


# -------------------------------------------------------------------------------------- schedules
def test_learning_rate_warms_up_and_falls_along_a_cosine():
    half = [(1 + math.cos(math.pi * step / 20)) / 2 for step in range(20)]
    expected = [3 * 0.5 * half[0]] + [3 * value for value in half[1:]]  # two steps of warm-up
    rates = [hist.learning_rate(step, 20, 3) for step in range(20)]
    assert rates == pytest.approx([max(rate, 0.03) for rate in expected])
    assert rates[-1] == pytest.approx(0.03)  # never less than a hundredth
    long = [hist.learning_rate(step, 10_000, 1) for step in (0, 9, 49, 99, 5000, 9999)]
    assert long == pytest.approx([0.01, 0.1, 0.5, 1, 0.5, 0.01], abs=3e-4)
    assert hist.learning_rate(0, 1, 5) == 5  # a run of one step


def test_ramp():
    assert [hist.ramp(done, 0.5, 0.25) for done in (0, 0.5, 0.5625, 0.625, 0.75, 1)] == [
        0,
        0,
        0.25,
        0.5,
        1,
        1,
    ]


# ------------------------------------------------------------------------- a step, of one weight
class Line(torch.nn.Module):
    """A model whose losses are slopes of its one weight: batches are numbers."""

    def __init__(self):
        super().__init__()
        self.w, self.asked = torch.nn.Parameter(torch.zeros(2)), []

    def forward(self, batch, levels, hardness, cam_layer, teacher):
        self.asked.append((levels, hardness, cam_layer, teacher))
        losses = {"caption_itc": batch * self.w[0], "phrase_itm": 0 * self.w[0] + 5}
        if "composition" in levels:
            losses["composition"] = 8 * self.w[1]
        return losses, {"map_mass": batch}


def step_of(model, batches, composition=0.0, levels=EVERY, **changes):
    """What train_step says of these batches; plain gradient descent at rate 1."""
    o = options(**changes)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    batches = iter([torch.tensor(float(batch)) for batch in batches])
    values = hist.train_step(model, None, batches, optimizer, o, levels, 0.3, composition)
    return dict(values)


def test_a_step_follows_the_gradient():
    model = Line()
    values = step_of(model, [0.5])
    assert model.w.tolist() == [-0.5, 0] and values["gradient"] == pytest.approx(0.5)
    assert values["phrase_itm"] == 5 and values["map_mass"] == 0.5
    step_of(model, [0.25])
    assert model.w.tolist() == [-0.75, 0]  # the last step's gradient is gone


def test_a_gradient_is_clipped_to_length_one():
    model = Line()
    values = step_of(model, [30], composition=5.0)
    assert values["gradient"] == pytest.approx(50)  # as it was: (30, 5 * 8)
    assert model.w.tolist() == pytest.approx([-0.6, -0.8])


@pytest.mark.parametrize("weight", [0.05, 0.1])
def test_lambda_weighs_composition_and_nothing_else(weight):
    model = Line()
    step_of(model, [0.5], composition=weight)
    assert model.w.tolist() == pytest.approx([-0.5, -8 * weight])


def test_a_level_without_weight_is_not_computed():
    model = Line()
    assert "composition" not in step_of(model, [0.5], composition=0.0)
    assert model.asked[0][0] == list(hist.LEVELS)
    step_of(model, [0.5], composition=0.1, cam_layer=1)
    assert model.asked[1] == (EVERY, 0.3, 1, None)


def test_accumulated_parts_are_one_step_of_their_mean():
    model = Line()
    values = step_of(model, [0.1, 0.7, 0.4], accumulate=3)
    assert model.w.tolist() == pytest.approx([-0.4, 0])
    assert values["caption_itc"] == 0 and values["map_mass"] == pytest.approx(0.4)
    assert values["phrase_itm"] == pytest.approx(5) and values["gradient"] == pytest.approx(0.4)


def test_a_gradient_that_is_not_finite_changes_nothing():
    model = Line()
    values = step_of(model, [float("inf")])
    assert model.w.tolist() == [0, 0] and not math.isfinite(values["gradient"])


# --------------------------------------------------------------- a run, as its steps are told it
@pytest.fixture
def told(monkeypatch):
    """train_step replaced by one that writes down what it is given, and the images it reads."""
    rows = []

    def train_step(model, teacher, batches, optimizer, o, levels, hardness, composition):
        images = torch.cat([next(batches)["image"] for _ in range(o.accumulate)])
        keys = [image.float().sum().item() for image in images]
        (rate,) = {group["lr"] for group in optimizer.param_groups}
        row = dict(rate=rate, hardness=hardness, composition=composition, levels=levels)
        row |= dict(images=keys, teacher=teacher, draw=torch.rand(()).item())
        row["start"] = model.state_dict()["match_head.bias"].clone()
        rows.append(row)
        with torch.no_grad():
            model.match_head.bias += 1  # so that weights tell how many steps they have seen
        return {"caption_itc": 1.0}

    monkeypatch.setattr(hist, "train_step", train_step)
    return rows


def column(rows, name):
    return [row[name] for row in rows]


def test_a_run_step_by_step(here, told):
    """Base, baseline and HIST of 20 steps in all, 12 of them the base's."""
    o = options(base_steps=12, steps=8, batch_size=2, lr=4.0, composition_weight=3.0, out=".")
    o.composition_start, o.levels = 0.7, ",".join(EVERY)
    samples = samples_of(o)
    hist.train("base", ["caption"], samples, o, 12)
    hist.train("baseline", ["caption"], samples, o, 8)
    hist.train("hist", EVERY, samples, o, 8)
    base, baseline, full = told[:12], told[12:20], told[20:]
    cosine = [max(0.01, (1 + math.cos(math.pi * step / 12)) / 2) for step in range(12)]
    assert column(base, "rate") == pytest.approx([4 * rate for rate in cosine])
    cosine = [max(0.01, (1 + math.cos(math.pi * step / 8)) / 2) for step in range(8)]
    for rows in (baseline, full):  # what goes on from a base has half the rate
        assert column(rows, "rate") == pytest.approx([2 * rate for rate in cosine])
    done = [step / 20 for step in range(20)]
    hardness = [0.5 * min(1, max(0, (share - 0.5) / 0.3)) for share in done]
    assert column(base, "hardness") == pytest.approx(hardness[:12])
    assert column(baseline, "hardness") == column(full, "hardness")
    assert column(full, "hardness") == pytest.approx(hardness[12:])
    composition = [3 * min(1, max(0, (share - 0.7) / 0.1)) for share in done]
    assert column(full, "composition") == pytest.approx(composition[12:])
    assert column(full, "levels") == [EVERY] * 8 and column(base, "levels") == [["caption"]] * 12
    # the same images for both, none of the base's, in the order of the scenes
    assert column(baseline, "images") == column(full, "images")
    in_order = [samples[i]["image"].float().sum().item() for i in range(40)]
    assert sum(column(base, "images") + column(full, "images"), []) == in_order
    # each step draws its own negatives, the same for both
    assert column(baseline, "draw") == column(full, "draw")
    assert len(set(column(base + full, "draw"))) == 20
    # both start from the base's weights
    begun = told[0]["start"]
    for rows, steps in ((base, 0), (baseline, 12), (full, 12)):
        for step, row in enumerate(rows):
            torch.testing.assert_close(row["start"], begun + steps + step)
    # the teacher: the model as it was when composition began, at 0.75 of all steps
    teachers = column(full, "teacher")
    assert teachers[:3] == [None] * 3 and teachers[3] is not None
    assert all(teacher is teachers[3] for teacher in teachers[3:])
    torch.testing.assert_close(teachers[3].match_head.bias, full[3]["start"])
    assert not any(column(base, "teacher") + column(baseline, "teacher"))


def test_a_run_without_a_base_has_the_whole_rate_and_its_seed_s_weights(here, told):
    o = options(base_steps=0, steps=3, batch_size=4, accumulate=2, lr=4.0, out=".")
    samples = samples_of(o)
    for name in ("baseline", "hist"):
        hist.train(name, ["caption"], samples, o, 3)
    assert told[0]["rate"] == pytest.approx(4) and told[1]["rate"] == pytest.approx(3)
    assert torch.equal(told[0]["start"], told[3]["start"])
    assert column(told[:3], "images") == column(told[3:], "images")
    assert len(told[0]["images"]) == 4
    torch.manual_seed(0)
    fresh = hist.ALBEF(o, samples.tokenizer).match_head.bias
    torch.testing.assert_close(told[0]["start"], fresh)
    hist.train("other", ["caption"], samples, options(**vars(o) | {"seed": 1}), 1)
    assert not torch.equal(told[6]["start"], fresh)


def test_a_resumed_run_goes_on_where_it_was(here, told):
    o = options(base_steps=0, steps=6, batch_size=2, save_every=2, out=".", composition_start=0.2)
    samples = samples_of(o)
    _, seconds = hist.train("hist", EVERY, samples, o, 6)
    whole = list(told)
    state = torch.load("hist.pt", weights_only=True)
    assert state["step"] == 6 and state["seconds"] == pytest.approx(seconds)
    state["step"], state["seconds"] = 4, 1000.0
    torch.save(state, "hist.pt")
    told.clear()
    o.resume = True
    _, seconds = hist.train("hist", EVERY, samples, o, 6)
    for name in ("rate", "hardness", "composition", "images"):
        assert column(told, name) == column(whole[4:], name)
    teacher = told[0]["teacher"]
    assert seconds > 1000
    torch.testing.assert_close(teacher.match_head.bias, whole[2]["start"])
    assert not teacher.training and [row["step"] for row in lines("metrics.jsonl")] == [
        *range(1, 7)
    ]
    told.clear()
    hist.train("hist", EVERY, samples, o, 6)  # a run that is over does nothing
    assert told == []


def test_a_resumed_run_has_the_rate_that_was_typed(here, told):
    o = options(base_steps=0, steps=6, batch_size=2, save_every=2, out=".", lr=4.0)
    samples = samples_of(o)
    hist.train("baseline", ["caption"], samples, o, 4)
    whole = column(told, "rate")
    o.resume, o.lr = True, 0.4
    hist.train("baseline", ["caption"], samples, o, 6)
    cosine = [(1 + math.cos(math.pi * step / 6)) / 2 for step in (4, 5)]
    assert column(told, "rate")[4:] == pytest.approx([0.4 * rate for rate in cosine])
    assert column(told, "rate")[:4] == whole


def test_ranks_share_a_step_s_images(monkeypatch):
    o = options(batch_size=8, accumulate=2)
    samples = samples_of(o)
    alone = torch.cat([batch["image"] for batch in hist.loader(samples, o, 8, 24)])
    assert len(alone) == 16
    parts = []
    monkeypatch.setattr(hist, "WORLD", 2)
    for rank in (0, 1):
        monkeypatch.setattr(hist, "RANK", rank)
        parts.append([batch["image"] for batch in hist.loader(samples, o, 8, 24)])
    assert [len(image) for image in parts[0]] == [len(image) for image in parts[1]] == [2] * 4
    together = torch.cat([image for pair in zip(*parts) for image in pair])
    assert torch.equal(together, alone)


def test_checkpoints_and_damage_are_looked_at_as_often_as_asked(here, told, monkeypatch):
    o = options(
        base_steps=0, steps=7, batch_size=2, save_every=3, out=".", max_bad=0.0, data="drawn"
    )
    samples, saved = samples_of(o), []
    monkeypatch.setattr(hist, "write_whole", lambda path, data: saved.append((path.name, data)))
    hist.train("baseline", ["caption"], samples, o, 7)
    assert [data["step"] for name, data in saved if name == "baseline.pt"] == [3, 6, 7]
    samples.skipped.add("image", "one.png", "broken")
    with pytest.raises(hist.UserError, match="more than --max-bad 0.0"):
        hist.train("baseline", ["caption"], samples, o, 7)


def test_metrics_of_a_killed_run_are_kept_up_to_its_checkpoint(here):
    rows = [{"run": "base", "step": 9}, *({"run": "hist", "step": step} for step in (1, 2, 3))]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    Path("metrics.jsonl").write_text(text + '{"run": "hist", "st')
    with hist.open_metrics(Path("metrics.jsonl"), "hist", 2) as metrics:
        metrics.write('{"run": "hist", "step": 3, "again": 1}\n')
    assert lines("metrics.jsonl") == [*rows[:3], {"run": "hist", "step": 3, "again": 1}]


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs a list of open files")
def test_no_file_is_renamed_while_it_is_open(here, told, monkeypatch):
    """Windows would refuse."""
    renamed, replace = [], os.replace

    def then_closed(old, new):
        opened = [os.path.realpath(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd")]
        assert not {os.path.realpath(old), os.path.realpath(new)} & set(opened)
        renamed.append(str(new))
        replace(old, new)

    monkeypatch.setattr(os, "replace", then_closed)
    o = options(base_steps=0, steps=2, batch_size=2, save_every=1, out=".", data="drawn")
    for name in ("baseline", "hist"):
        hist.train(name, ["caption"], samples_of(o), o, 2)
    assert renamed == ["metrics.jsonl", *["baseline.pt"] * 2, "metrics.jsonl", *["hist.pt"] * 2]


# --------------------------------------------------------------------------------- real trainings
SHORT = dict(
    data="drawn", base_steps=0, steps=6, batch_size=4, save_every=2, composition_start=0.3, lr=0.01
)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """A training of six steps with a teacher from the third on: (folder, options)."""
    folder = tmp_path_factory.mktemp("unbroken")
    o = options(out=str(folder), **SHORT)
    states, write = {}, hist.write_whole
    with pytest.MonkeyPatch.context() as patch:

        def kept(path, data):
            write(path, data)
            if path.suffix == ".pt":
                states[data["step"]] = torch.load(path, weights_only=True)

        patch.setattr(hist, "write_whole", kept)
        hist.train("hist", EVERY, samples_of(o), o, o.steps)
    return folder, states


def same(one, other):
    """Whether two states, or parts of them, are equal bit for bit."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return torch.equal(one, other) if torch.is_tensor(one) else one == other


def test_a_checkpoint_holds_all_that_is_needed_and_runs_no_code(unbroken):
    folder, states = unbroken
    state = states[6]
    expected = {"model", "optimizer", "step", "seconds", "words", "options", "teacher"}
    assert set(state) == expected
    assert state["words"][:4] == hist.Tokenizer.SPECIAL and state["options"]["steps"] == 6
    o = options(**SHORT)
    model, tokenizer, _ = hist.read_checkpoint(folder / "hist.pt", o)
    assert tokenizer.words == state["words"] and same(dict(model.state_dict()), state["model"])
    (folder / "bad.pt").write_bytes(b"no checkpoint")
    for path, changes in (("bad.pt", {}), ("none.pt", {}), ("hist.pt", {"width": 64})):
        with pytest.raises(hist.UserError, match=f"{path} is no checkpoint"):
            hist.read_checkpoint(folder / path, options(**SHORT | changes))


def test_the_teacher_is_the_model_as_composition_began_and_stays_so(unbroken):
    _, states = unbroken
    assert states[2]["teacher"] is None
    for step in (4, 6):
        teacher = states[step]["teacher"]
        assert not any(name.startswith("vit.") for name in teacher) and len(teacher) > 30
        for name, value in teacher.items():
            assert torch.equal(value, states[2]["model"][name]), name
    moved = states[6]["model"]["match_head.weight"] - states[2]["model"]["match_head.weight"]
    assert moved.abs().max() > 1e-4


def test_more_steps_that_put_composition_off_put_off_its_teacher(unbroken, tmp_path):
    shutil.copytree(unbroken[0], tmp_path / "run")
    o = options(out=str(tmp_path / "run"), resume=True, **SHORT | {"steps": 20})
    hist.train("hist", EVERY, samples_of(o), o, 7)  # 0.3 of 20 is not over
    assert torch.load(tmp_path / "run/hist.pt", weights_only=True)["teacher"] is None


def test_a_line_a_step(unbroken):
    folder, _ = unbroken
    rows = lines(folder / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    figures = ["composition", "map_mass", "map_entropy", "trust"]
    levels = [
        f"{level}_{kind}" for level in ("caption", "phrase") for kind in ("itc", "itm", "mlm")
    ]
    levels += ["subject_itc", "subject_itm"]
    for row in rows:
        more = figures if row["step"] > 2 else []
        assert list(row) == ["run", "step", *levels, *more, "gradient"]
        assert row["run"] == "hist" and row["gradient"] > 0
        assert all(isinstance(value, float) for value in list(row.values())[2:])


@pytest.mark.parametrize("stop", [2, 4])
def test_resume_ends_bit_for_bit_where_an_unbroken_run_ends(unbroken, here, monkeypatch, stop):
    """Killed right after a checkpoint, before and after there is a teacher; metrics were written
    beyond it."""
    folder, states = unbroken
    o = options(out=".", resume=True, **SHORT)
    torch.save(states[stop], "hist.pt")
    text = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    Path("metrics.jsonl").write_text("".join(text[: stop + 1]) + '{"run": "hi')
    hist.train("hist", EVERY, samples_of(o), o, o.steps)
    state = torch.load("hist.pt", weights_only=True)
    for part in ("model", "optimizer", "teacher", "words", "step"):
        assert same(state[part], states[6][part]), part
    assert lines("metrics.jsonl") == lines(folder / "metrics.jsonl")


def test_hist_is_not_resumed_with_other_words(unbroken, here):
    folder, _ = unbroken
    o = options(out=str(folder), resume=True, **SHORT)
    samples = samples_of(o, tokenizer=hist.Tokenizer.build(["other words"], 9))
    with pytest.raises(hist.UserError, match="of other captions"):
        hist.train("hist", EVERY, samples, o, o.steps)


def test_the_same_step_draws_the_same_negatives_on_its_own_seed(unbroken, here):
    """Another seed is another run; the number of a step, and not the steps before it, draws."""
    folder, _ = unbroken
    o = options(out=".", **SHORT | {"steps": 2, "seed": 1})
    hist.train("hist", ["caption"], samples_of(o), o, 2)
    one, other = lines("metrics.jsonl")[0], lines(folder / "metrics.jsonl")[0]
    assert one["caption_itc"] != other["caption_itc"]


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(here, monkeypatch, where):
    losses_of, calls = hist.hist_losses, []

    def broken(model, batch, *rest):
        losses, figures = losses_of(model, batch, *rest)
        calls.append(1)
        if len(calls) == 4 and where == "loss":
            losses["caption_mlm"] = losses["caption_mlm"] * torch.nan
        if len(calls) == 4 and where == "gradient":  # the root's slope at 0 is infinite
            nothing = (model.match_head.bias - model.match_head.bias.detach()).abs().sum()
            losses["caption_itm"] = losses["caption_itm"] + nothing.sqrt()
        return losses, figures

    monkeypatch.setattr(hist, "hist_losses", broken)
    o = options(out=".", **SHORT | {"save_every": 3})
    with pytest.raises(hist.UserError, match="step 4 of baseline is not finite.*--resume") as stop:
        hist.train("baseline", ["caption"], samples_of(o), o, 6)
    assert ("'caption_mlm': nan" in str(stop.value)) == (where == "loss")
    saved = torch.load("baseline.pt", weights_only=True)
    assert saved["step"] == 3
    assert all(torch.isfinite(value).all() for value in saved["model"].values())


def last_words(parsed):
    """A level of one's own: the last word of each phrase of a `Parse`."""
    return [phrase.text.split()[-1] for phrase in parsed.phrases]


def test_a_level_is_added_by_one_entry_and_one_function(here, monkeypatch):
    monkeypatch.setitem(hist.LEVELS, "ending", hist.Level(last_words, language=True))
    monkeypatch.setitem(hist.LEVELS, "newlevel", hist.Level(parse.subject_texts, language=False))
    o = options(out=".", **SHORT | {"steps": 1})
    o.levels = "caption,ending,newlevel"
    hist.check_options(o)
    samples = samples_of(o)
    said = samples.tokenizer.decode(samples[0]["ending"]["ids"])
    assert said in samples.tokenizer.decode(samples[0]["phrase"]["ids"]).split()
    hist.train("hist", o.levels.split(","), samples, o, 1)
    (row,) = lines("metrics.jsonl")
    found = [name for name in row if name.startswith(("ending", "newlevel"))]
    assert found == ["ending_itc", "ending_itm", "ending_mlm", "newlevel_itc", "newlevel_itm"]
    assert all(0 < row[name] < 20 for name in found)


def test_accumulated_parts_of_a_real_step_are_the_mean_of_each_alone(here):
    o = options(out=".", **SHORT | {"steps": 1, "batch_size": 8, "accumulate": 2})
    samples = samples_of(o)
    hist.train("parts", ["caption"], samples, o, 1)
    torch.manual_seed(0)
    model = hist.ALBEF(o, samples.tokenizer)
    torch.manual_seed(0)  # the seed of the first step: its negatives
    expected = {}
    for part in (range(4), range(4, 8)):
        batch = hist.collate([samples[i] for i in part])
        losses, _ = hist.hist_losses(model, batch, ["caption"], 0.0, 0)
        for name, value in losses.items():
            expected[name] = expected.get(name, 0) + value.item() / 2
    (row,) = lines("metrics.jsonl")
    for name, value in expected.items():
        assert row[name] == pytest.approx(value, abs=2e-5)


def test_nothing_is_learnt_but_what_a_picture_that_can_be_read_says(here):
    """A run over damaged pictures has no step that does not see a full batch."""
    o = options(out=".", **SHORT | {"steps": 4})
    records = [record(f"a dog and a thing{i}", 20 * i) for i in range(8)]
    records[2]["image"], records[5]["image"] = "nowhere.png", "elsewhere.png"
    samples = samples_of(o, records)
    samples.skipped.total, samples.skipped.max_bad = 8, 0.5
    hist.train("baseline", ["caption"], samples, o, 4)
    assert len(lines("metrics.jsonl")) == 4 and samples.skipped.count() == 2
    samples.skipped.max_bad = 0.2
    with pytest.raises(hist.UserError, match="2 of 8 images cannot be used, more than"):
        hist.train("baseline", ["caption"], samples, o, 4)


def test_a_full_disk_is_reported_and_leaves_the_last_checkpoint(here):
    """RLIMIT_FSIZE stands in for a full disk: a write fails half-way."""
    resource = pytest.importorskip("resource")
    path = here / "model.pt"
    hist.write_whole(path, {"model": torch.zeros(1000)})
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        for what in ({"model": torch.zeros(1_000_000)}, "x" * 1_000_000):
            with pytest.raises(
                hist.UserError, match="could not be written.*the one before is kept"
            ):
                hist.write_whole(path, what)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before and os.listdir() == ["model.pt"]


def test_a_batch_moves_as_one():
    _, batch = batch_of(options(), 2)
    assert hist.to_device(batch, "cpu")["pair"]["whole"] is batch["pair"]["whole"]
