"""tutorial.ipynb: runs from top to bottom, its checks take what is right and refuse what is wrong,
and it is stored as a reader wants it."""

import ast
import base64
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from PIL import Image

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

# For each exercise two plausible wrong answers, and what the sentence must have by which the check
# refuses each.
WRONG = {
    "pointing": [
        ("lambda heat, region: bool(heat[region].sum() > heat[~region].sum())", "highest point"),
        (
            "lambda heat, region: bool(region[heat.argmin() // 8, heat.argmin() % 8])",
            "highest point",
        ),
    ],
    "balance": [
        ("lambda heat, a, b: heat[a].sum() / heat[b].sum()", "smaller over the larger"),
        ("lambda heat, a, b: min(heat[a].sum(), heat[b].sum()) / heat.sum()", "hold"),
    ],
    "flat": [
        ("lambda area1, area2: 1", "by its area"),
        ("lambda area1, area2: area1 / area2", "by its area"),
    ],
    "subject": [
        ("lambda tokens: tokens[-1].text", "compounds"),
        ("lambda tokens: ' '.join(t.text for t in tokens if t.tag == 'NOUN')", "not every noun"),
    ],
    "composites": [
        ("lambda p: [f'{a} and {b}' for a, b in itertools.combinations(p, 2)]", "no pair"),
        (
            "lambda p: [f'{a} and {b}' for a, b in zip(p, p[1:]) if a.lower() != b.lower()]",
            "composites, you give",
        ),
    ],
    "shape": [
        (
            "lambda texts, side, patch, heads: (len(texts), heads, "
            "max(len(t.split()) for t in texts), (side // patch) ** 2)",
            "axis L",
        ),
        (
            "lambda texts, side, patch, heads: (len(texts), heads, "
            "1 + max(len(t.split()) for t in texts), 1 + (side // patch) ** 2)",
            "axis N",
        ),
    ],
    "logits": [
        ("lambda: {'s', 'probability'}", "Softmax"),
        ("lambda: {'s', 'probability', 'map'}", "Softmax"),
    ],
    "pull": [
        (
            "lambda logits, P: (logits.softmax(1) - P.float()) / len(logits)",
            "rows of two positives",
        ),
        (
            "lambda logits, P: (logits.softmax(1) - P / P.sum(1, keepdim=True).clamp(min=1)) "
            "/ len(logits)",
            "a row without any positive",
        ),
    ],
    "mlm": [
        (
            "lambda logits, labels: F.cross_entropy(logits.flatten(0, 1), labels.flatten(), "
            "ignore_index=-100)",
            "nan",
        ),
        (
            "lambda logits, labels: (F.cross_entropy(logits.flatten(0, 1), labels.flatten(), "
            "reduction='sum') / max(1, (labels != -100).sum())).item()",
            "graph",
        ),
    ],
    "attention": [
        (
            "lambda q, k, v, keep: ((A := (q @ k.transpose(-2, -1)).masked_fill(~keep[:, None, "
            "None, :], -torch.inf).softmax(-1)) @ v, A)",
            "root of d",
        ),
        (
            "lambda q, k, v, keep: ((A := (q @ k.transpose(-2, -1) / 4).softmax(-1) "
            "* keep[:, None, None, :]) @ v, A)",
            "before the softmax",
        ),
    ],
    "grad_cam": [
        (
            "lambda A, g, mask, grid, prefix: ((A * g).mean(1) * mask[..., None]).sum(1)"
            ".div(mask.sum(1, keepdim=True))[:, prefix:].reshape(-1, *grid)",
            "ReLU",
        ),
        (
            "lambda A, g, mask, grid, prefix: (A * g.relu()).mean((1, 2))[:, prefix:]"
            ".reshape(-1, *grid)",
            "no padding",
        ),
    ],
    "belief": [
        ("lambda f: 0.5", "cross-entropy is least at"),
        ("lambda f: 1 - f / 2", "cross-entropy is least at"),
    ],
    "positives": [
        (
            "lambda texts, parses: torch.tensor([[t in p for t in texts] for p in parses])",
            "describe",
        ),
        (
            "lambda texts, parses: torch.tensor([[any(t.lower().split(' ', 1)[-1] in o.lower() "
            "for o in p) for t in texts] for p in parses])",
            "does not describe",
        ),
    ],
    "negatives": [
        (
            "lambda P: (torch.multinomial((~torch.eye(*P.shape, dtype=torch.bool)).float(), 1)"
            "[:, 0], (~P).any(1))",
            "a false one",
        ),
        ("lambda P: ((~P).float().argmax(1), (~P).any(1))", "times each"),
    ],
    "composition": [
        (
            "lambda a, b, whole: (lambda n: (n(whole) - n(a.detach() + b.detach())).abs()"
            ".sum((1, 2)).mean())(lambda M: M / (M.sum((1, 2), keepdim=True) + 1e-12))",
            "before they are added",
        ),
        (
            "lambda a, b, whole: (lambda n: (n(whole) - n(n(a.detach()) + n(b.detach()))).abs()"
            ".sum((1, 2)).mean())(lambda M: M / M.sum((1, 2), keepdim=True))",
            "vanished",
        ),
    ],
    "backwards": [
        ("lambda a, b, whole: hist.composition_loss(a, b, whole, torch.ones(4))", "side to detach"),
        (
            "lambda a, b, whole: hist.composition_loss(a, b, whole.detach(), torch.ones(4))",
            "all three maps are detached",
        ),
    ],
    "iou": [
        (
            "lambda heat, union, f: ((heat >= f) & union).sum() / ((heat >= f) | union).sum()",
            "maximum",
        ),
        (
            "lambda heat, union, f: ((m := heat >= f * heat.max()) & union).sum() "
            "/ (m | union).sum()",
            "vanished",
        ),
    ],
    "recall": [
        ("lambda S, owner: (S.argmax(0) == owner).float().mean()", "a row"),
        ("lambda S, owner: (S.argmax(1) == torch.arange(len(S))).float().mean()", "a row"),
    ],
    "patch": [
        (
            "lambda place, w, h, side, patch: [(v + e) * patch * f / side for e in (0, 1) "
            "for v, f in zip(divmod(place, side // patch), (w, h))]",
            "in row",
        ),
        (
            "lambda place, w, h, side, patch: [(v + e) * patch * max(w, h) / side "
            "for e in (0, 1) for v in divmod(place, side // patch)[::-1]]",
            "different factors",
        ),
    ],
    "record": [
        (
            "lambda name, caption, phrase, box: json.dumps({'image': name, 'captions': [caption], "
            "'split': 'val', 'targets': [{'phrase': phrase, 'boxes': [box]}]})",
            "corners",
        ),
        (
            "lambda name, caption, phrase, b: json.dumps({'image': name, 'captions': [caption], "
            "'targets': [{'phrase': phrase, 'boxes': [[b[0], b[1], b[0] + b[2], b[1] + b[3]]]}]})",
            "held out",
        ),
    ],
    "interval": [
        (
            "lambda a, b, t=2.776: (b.mean() - a.mean(), t * np.sqrt((a.var(ddof=1) + "
            "b.var(ddof=1)) / len(a)))",
            "differences first",
        ),
        (
            "lambda a, b, t=2.776: ((b - a).mean(), t * (b - a).std() / math.sqrt(len(a)))",
            "K - 1",
        ),
    ],
}


def cells(notebook, tag):
    return [cell for cell in notebook.cells if tag in cell.metadata.get("tags", [])]


def text_of(cell):
    return "".join(output.get("text", "") for output in cell.outputs)


def folded(cell):
    return cell.metadata.get("jupyter", {}).get("source_hidden") and "cellView" in cell.metadata


def is_statement(node):
    return isinstance(node, ast.stmt)


def asked(check):
    return re.search(r"check_(\w+)\(my_\w+\)$", check.source.strip())[1]


def solved(cell):
    """(name, Python) of a solution, which is folded Markdown."""
    text = re.search(r"<details>.*?```python\n(.*?)\n```", cell.source, re.S)[1]
    return re.search(r"def solution_(\w+)\(", text)[1], text


@pytest.fixture(scope="module")
def stored():
    return nbformat.read(STORED, as_version=4)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The notebook after a run in the short setting, and what each check said of the solution and
    of the wrong answers: {name: [said, …]}."""
    folder, notebook = tmp_path_factory.mktemp("tutorial"), nbformat.read(STORED, as_version=4)
    for name in ("hist.py", "parse.py"):
        shutil.copy(ROOT / name, folder)
    count, lines = len(notebook.cells), ["verdicts = {}"]
    for name, text in map(solved, cells(notebook, "solution")):
        answers = [f"solution_{name}", *(code for code, _ in WRONG[name])]
        lines += [text, f"verdicts[{name!r}] = []"]
        for answer in answers:
            lines += [f"check_{name}({answer})", f"verdicts[{name!r}].append(check_{name}.said)"]
    notebook.cells.append(nbformat.v4.new_code_cell("\n".join(lines)))
    notebook.cells.append(nbformat.v4.new_code_cell("print(json.dumps(verdicts))"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HIST_TUTORIAL_SHORT", "1")
        NotebookClient(
            notebook,
            timeout=600,
            kernel_name="python3",
            resources={"metadata": {"path": str(folder)}},
        ).execute()
    verdicts = json.loads(text_of(notebook.cells[-1]))
    del notebook.cells[count + 1 :]
    return notebook, verdicts


def test_it_runs_from_top_to_bottom_and_every_solution_is_right(run):
    notebook, verdicts = run
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert not [output for output in outputs if output.output_type == "error"]
    assert all(text_of(cell).startswith("not done yet: ") for cell in cells(notebook, "check"))
    for name, (said, *_) in verdicts.items():
        assert said.startswith("right: "), f"{name}: {said}"


def test_it_reads_in_a_light_and_in_a_dark_theme(run):
    """Pictures are opaque, and white at the corner; coloured text has a ground of its own."""
    notebook, _ = run
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    data = [output.data for output in outputs if "data" in output]
    pictures = [d[kind] for d in data for kind in ("image/png", "image/gif") if kind in d]
    assert len(pictures) > 25
    for encoded in pictures:
        picture = Image.open(io.BytesIO(base64.b64decode(encoded)))
        assert "transparency" not in picture.info and picture.mode in ("P", "RGB", "L")
        assert min(picture.convert("RGB").getpixel((0, 0))) > 245  # of few colours: nearly white
    said = [d["text/html"] for d in data if "text/html" in d]  # what the checks say in red
    assert said and all("color:" in text and "background:" in text for text in said)


def test_every_exercise_refuses_two_wrong_answers_and_says_why(run):
    notebook, verdicts = run
    assert set(WRONG) == set(verdicts) == {asked(cell) for cell in cells(notebook, "check")}
    for name, wrong in WRONG.items():
        assert len(wrong) == 2
        for (_, hint), said in zip(wrong, verdicts[name][1:], strict=True):
            good = said.startswith("not right yet: ") and hint in said and len(said) > 50
            assert good, f"check_{name} says of a wrong answer: {said!r}"


def test_its_order_and_its_exercises(stored):
    prose = "\n".join(cell.source for cell in stored.cells if cell.cell_type == "markdown")
    headers = re.findall(r"^## (\d+)\. (.*)$", prose, re.M)
    assert [int(n) for n, _ in headers] == list(range(1, 11))
    assert all(title.startswith(part) for (_, title), part in zip(headers, PARTS))
    starts = [n for n, cell in enumerate(stored.cells) if cell.source.startswith("## ")]
    for first, after in zip(starts, [*starts[1:], len(stored.cells)]):
        part = nbformat.v4.new_notebook(cells=stored.cells[first:after])
        text = "".join(cell.source for cell in part.cells if cell.cell_type == "markdown")
        assert "$$" in text and 1 <= len(cells(part, "exercise")) <= 3, part.cells[0].source[:30]
        code = "".join(cell.source for cell in part.cells if cell.cell_type == "code")
        assert "show()" in code or "draw_pairs(" in code, part.cells[0].source[:30]
        numbers = [n for n, cell in enumerate(part.cells) if cell.source.startswith("source(")]
        tried = [n for n, cell in enumerate(part.cells) if cell in cells(part, "exercise")]
        assert not numbers or min(numbers) > max(tried)  # first the exercise, then the answer
    exercises, checks, solutions = (cells(stored, tag) for tag in ("exercise", "check", "solution"))
    assert len(exercises) == len(checks) == len(solutions) >= 16
    for prediction in cells(stored, "prediction"):  # then a cell that shows what happened
        after = stored.cells[stored.cells.index(prediction) + 1 :]
        shown = next(n for n, cell in enumerate(after) if "predicted(" in cell.source)
        assert not any("prediction" in cell.metadata.get("tags", []) for cell in after[:shown])
    assert len(cells(stored, "prediction")) >= 11
    for exercise, check, solution in zip(exercises, checks, solutions):
        n = stored.cells.index(exercise)
        assert stored.cells[n + 1] is check and stored.cells[n + 2] is solution
        assert asked(check) == solved(solution)[0]
        assert exercise.source.startswith(f"def my_{asked(check)}(")
        assert exercise.source.endswith("raise NotImplementedError")
        assert folded(check)


def test_it_reads_well(stored):
    nbformat.validate(stored)
    assert STORED.stat().st_size <= 1.5 * 2**20 and stored.metadata.kernelspec.name == "python3"
    code = [cell for cell in stored.cells if cell.cell_type == "code"]
    long = [line for cell in code for line in cell.source.split("\n") if len(line) > 90]
    assert not long
    for cell in code:
        starts = [node.lineno for node in ast.walk(ast.parse(cell.source)) if is_statement(node)]
        assert len(starts) == len(set(starts)), f"two statements in a line of\n{cell.source}"
        assert folded(cell) or "plt." not in cell.source, f"drawing unfolded:\n{cell.source}"
        assert not folded(cell) or cell.source.startswith("# @title ")
    sources = "".join(cell.source for cell in stored.cells)
    assert not re.search(r"TODO|FIXME|XXX|/home/|/tmp/|\.\./shared", sources)


def test_its_outputs_are_those_of_a_run(stored):
    """Where it is stored with outputs."""
    code = [cell for cell in stored.cells if cell.cell_type == "code"]
    outputs = [output for cell in code for output in cell.outputs]
    if not outputs:
        pytest.skip("stored without outputs")
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    for output in outputs:
        assert output.output_type != "error" and output.get("name") != "stderr"
    assert "the short setting" not in text_of(code[-1])
    plain = ""
    for output in outputs:
        kinds = {k: v for k, v in output.get("data", {}).items() if not k.startswith("image/")}
        plain += output.get("text", "") + str(kinds)
    assert not re.search(r"(?<![\w.])/(?:home|root|tmp|work|opt|usr|Users)/|\r|\x1b", plain)


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
