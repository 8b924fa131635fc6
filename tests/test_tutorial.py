"""tutorial.ipynb: runs from top to bottom, its checks take what is right and refuse what is wrong,
and it is stored as a reader wants it."""

import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[1]
STORED = ROOT / "tutorial.ipynb"
PARTS = [
    "The problem",
    "The parse",
    "The model in three pictures",
    "ITC, ITM and MLM by hand",
    "Cross-attention and Grad-CAM",
    "Phrases and subjects",
    "Composition",
    "The whole training",
    "Photographs",
    "What none of this shows",
]

# For each exercise a plausible wrong answer, and what the sentence must have by which the check
# refuses it.
WRONG = {
    "pointing": (
        "lambda heat, region: bool(heat[region].sum() > heat[~region].sum())",
        "highest point",
    ),
    "balance": (
        "lambda heat, mask1, mask2: heat[mask1].sum() / heat[mask2].sum()",
        "smaller over the larger",
    ),
    "subject": ("lambda tokens: tokens[-1].text", "compounds"),
    "composites": (
        "lambda phrases: [f'{a} and {b}' for a, b in itertools.combinations(phrases, 2)]",
        "no pair",
    ),
    "shape": (
        "lambda texts, side, patch, heads: (len(texts), heads, max(len(t.split()) for t "
        "in texts), (side // patch) ** 2)",
        "axis L",
    ),
    "one_way": (
        "lambda logits, positives: F.cross_entropy(logits, torch.arange(len(logits)))",
        "two rows that share two texts",
    ),
    "mlm": (
        "lambda logits, labels: F.cross_entropy(logits.flatten(0, 1), labels.flatten(), "
        "ignore_index=-100)",
        "nan",
    ),
    "attention": (
        "lambda q, k, v, keep: ((A := (q @ k.transpose(-2, -1)).masked_fill(~keep[:, "
        "None, None, :], -torch.inf).softmax(-1)) @ v, A)",
        "root of d",
    ),
    "grad_cam": (
        "lambda A, gradient, mask, grid, prefix: ((A * gradient).mean(1) * mask[..., "
        "None]).sum(1).div(mask.sum(1, keepdim=True))"
        "[:, prefix:].reshape(-1, *grid)",
        "ReLU",
    ),
    "positives": (
        "lambda texts, parses: torch.tensor([[t in parse for t in texts] for parse in parses])",
        "describe",
    ),
    "negatives": (
        "lambda positives: (torch.multinomial((~torch.eye(*positives.shape, "
        "dtype=torch.bool)).float(), 1)[:, 0], (~positives).any(1))",
        "a false one",
    ),
    "composition": (
        "lambda part1, part2, whole: (lambda n: (n(whole) - n(part1.detach() + "
        "part2.detach())).abs().sum((1, 2)).mean())"
        "(lambda M: M / M.sum((1, 2), keepdim=True))",
        "before they are added",
    ),
    "backwards": (
        "lambda part1, part2, whole: composition_loss(part1, part2, whole)",
        "side to detach",
    ),
    "iou": (
        "lambda heat, union, fraction: ((heat >= fraction) & union).sum() / ((heat >= "
        "fraction) | union).sum()",
        "maximum",
    ),
    "recall": ("lambda similarity, owner: (similarity.argmax(0) == owner).float().mean()", "a row"),
    "box": (
        "lambda box, width, height, side: [v * side / max(width, height) for v in box]",
        "different factors",
    ),
    "record": (
        "lambda name, caption, phrase, coco_box: json.dumps({'image': name, 'captions': "
        "[caption], 'split': 'val',"
        " 'targets': [{'phrase': phrase, 'boxes': [coco_box]}]})",
        "corners",
    ),
    "interval": (
        "lambda a, b, t=2.776: (b.mean() - a.mean(), t * np.sqrt((a.var(ddof=1) + "
        "b.var(ddof=1)) / len(a)))",
        "differences first",
    ),
}


def cells(notebook, tag):
    return [cell for cell in notebook.cells if tag in cell.metadata.get("tags", [])]


def text_of(cell):
    return "".join(output.get("text", "") for output in cell.outputs)


def asked(check):
    """The name of the exercise of a check or solution cell: its last line asks check_NAME."""
    return re.fullmatch(r"check_(\w+)\(\w+\)", check.source.strip().splitlines()[-1])[1]


@pytest.fixture(scope="module")
def stored():
    return nbformat.read(STORED, as_version=4)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The notebook after a run in the short setting, and for each exercise what its check said of
    the wrong answer."""
    folder, notebook = tmp_path_factory.mktemp("tutorial"), nbformat.read(STORED, as_version=4)
    for name in ("hist.py", "parse.py"):
        shutil.copy(ROOT / name, folder)
    judged = (
        [
            nbformat.v4.new_code_cell(
                f"wrong_answers = {json.dumps({k: v[0] for k, v in WRONG.items()})}\nrefused = {{}}"
            )
        ]
        + [
            nbformat.v4.new_code_cell(
                textwrap.dedent(f"""
            try:
                check_{name}(eval(wrong_answers["{name}"]))
                refused["{name}"] = ""
            except AssertionError as e:
                refused["{name}"] = str(e)""")
            )
            for name in WRONG
        ]
        + [nbformat.v4.new_code_cell("print(json.dumps(refused))")]
    )
    notebook.cells += judged
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HIST_TUTORIAL_SHORT", "1")
        NotebookClient(
            notebook,
            timeout=600,
            kernel_name="python3",
            resources={"metadata": {"path": str(folder)}},
        ).execute()
    refused = json.loads(text_of(notebook.cells[-1]))
    del notebook.cells[-len(judged) :]
    return notebook, refused


def test_it_runs_from_top_to_bottom_and_every_solution_is_right(run):
    notebook, _ = run
    assert not [
        output
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if output.output_type == "error"
    ]
    assert all(text_of(cell).startswith("not done yet: ") for cell in cells(notebook, "check"))
    for cell in cells(notebook, "solution"):
        assert text_of(cell).startswith("right: "), cell.source


def test_every_exercise_refuses_a_wrong_answer_and_says_why(run):
    notebook, refused = run
    assert (
        set(WRONG)
        == {asked(cell) for cell in cells(notebook, "check")}
        == {asked(cell) for cell in cells(notebook, "solution")}
    )
    for name, (_, hint) in WRONG.items():
        assert hint in refused[name] and len(refused[name]) > 40, (
            f"check_{name} says of a wrong answer: {refused[name]!r}"
        )


def test_its_order_and_its_exercises(stored):
    headers = re.findall(
        r"^## (\d+)\. (.*)$",
        "\n".join(cell.source for cell in stored.cells if cell.cell_type == "markdown"),
        re.M,
    )
    assert [int(n) for n, _ in headers] == list(range(1, 11)) and all(
        title.startswith(part) for (_, title), part in zip(headers, PARTS)
    )
    starts = [n for n, cell in enumerate(stored.cells) if cell.source.startswith("## ")] + [
        len(stored.cells)
    ]
    for first, after in zip(
        starts, starts[1:]
    ):  # each part: prose, an equation, code, a picture, one or two exercises
        part = nbformat.v4.new_notebook(cells=stored.cells[first:after])
        assert "$$" in "".join(
            cell.source for cell in part.cells if cell.cell_type == "markdown"
        ), part.cells[0].source[:30]
        assert any(
            "image/png" in output.get("data", {})
            for cell in part.cells
            for output in cell.get("outputs", [])
        ), part.cells[0].source[:30]
        assert 1 <= len(cells(part, "exercise")) <= 2, part.cells[0].source[:30]
    exercises, checks, solutions = (cells(stored, tag) for tag in ("exercise", "check", "solution"))
    assert len(exercises) == len(checks) == len(solutions) >= 12
    for exercise, check, solution in zip(exercises, checks, solutions):
        n = stored.cells.index(exercise)
        assert (
            stored.cells[n + 1] is check
            and stored.cells[n + 3] is solution
            and asked(check) == asked(solution)
        )
        assert exercise.source.startswith(f"def my_{asked(check)}(") and exercise.source.endswith(
            "raise NotImplementedError"
        )
        assert (
            solution.metadata["jupyter"]["source_hidden"]
            and solution.metadata["cellView"] == "form"
            and solution.source.startswith("#@title Solution")
        )


def test_it_is_stored_with_the_outputs_of_a_full_run(stored):
    nbformat.validate(stored)
    assert STORED.stat().st_size <= 4 * 2**20 and stored.metadata.kernelspec.name == "python3"
    code = [cell for cell in stored.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert not [
        output
        for output in outputs
        if output.output_type == "error" or output.get("name") == "stderr"
    ]
    # A machine that others use too is slow by the clock; a run in the short setting says so.
    spent = re.fullmatch(
        r"[\d.]+ minutes by the clock, in which this process had a core for ([\d.]+); "
        r"threads: (\d+)",
        text_of(code[-1]).strip(),
    )
    assert spent and float(spent[1]) / int(spent[2]) <= 15
    plain = "".join(
        output.get("text", "")
        + str({k: v for k, v in output.get("data", {}).items() if k != "image/png"})
        for output in outputs
    )
    assert not re.search(r"(?<![\w.])/(?:home|root|tmp|work|opt|usr|Users)/|\r|\x1b", plain)
    sources = "".join(cell.source for cell in stored.cells)
    assert not re.search(r"TODO|FIXME|XXX|/home/|/tmp/|\.\./shared", sources)
    assert all(text_of(cell).startswith("not done yet: ") for cell in cells(stored, "check"))
    assert all(text_of(cell).startswith("right: ") for cell in cells(stored, "solution"))


def test_its_first_cell_fetches_what_is_missing(stored, tmp_path):
    code = next(cell for cell in stored.cells if cell.cell_type == "code")
    assert code.metadata.tags == ["bootstrap"]
    script, empty, repository = tmp_path / "cell.py", tmp_path / "empty", tmp_path / "repository"
    empty.mkdir()
    repository.mkdir()
    for name in ("hist.py", "parse.py"):
        shutil.copy(ROOT / name, repository)
    (repository / "requirements.txt").write_text(
        "numpy\n"
    )  # there already: nothing is fetched from a package registry
    git = ["git", "-C", str(repository), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "all"]):
        subprocess.run(git + command, check=True)
    script.write_text(code.source + "\nimport parse; print(parse.__file__)")

    def start(where, address):
        environment = {**os.environ, "HIST_REPOSITORY": address}
        command = [sys.executable, str(script)]
        return subprocess.run(command, cwd=where, capture_output=True, text=True, env=environment)

    unset, unreachable = start(empty, ""), start(empty, str(tmp_path / "nowhere"))
    assert (
        "write into REPOSITORY" in unset.stderr
        and "could not be cloned" in unreachable.stderr
        and not list(empty.iterdir())
    )
    for _ in range(2):  # and again, when it is there
        fetched = start(empty, str(repository))
        assert (
            fetched.returncode == 0
            and Path(fetched.stdout.strip()) == empty / "hist-in-one-file/parse.py"
        ), fetched.stderr
    beside = start(repository, "")
    assert beside.returncode == 0 and Path(beside.stdout.strip()) == repository / "parse.py", (
        beside.stderr
    )
