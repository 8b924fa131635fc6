"""README.md is one page, and says where the sections of hist.py begin.

`python tests/test_readme.py` writes the lines of today into it.
"""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
ROW = re.compile(r"^\| \[\d+\]\(hist\.py#L\d+\) \| ([^|]+) \| (.*) \|$", re.M)
MOST_LINES, MOST_BYTES = 150, 12_288


def sections():
    """{section of hist.py: its line}, from the headers `# ---- name`."""
    found = {}
    for number, line in enumerate((ROOT / "hist.py").read_text(encoding="utf-8").split("\n"), 1):
        header = re.match(r"# -{10,} (.+)$", line)
        if header:
            found[header[1]] = number
    return found


def table(readme):
    """The rows as they ought to be: a section that README.md has no words about gets none."""
    said, rows = dict(ROW.findall(readme)), []
    for name, number in sections().items():
        rows.append(f"| [{number}](hist.py#L{number}) | {name} | {said.get(name, '')} |")
    return "\n".join(rows)


def test_the_lines_of_the_sections_of_hist_py_are_right():
    readme = README.read_text(encoding="utf-8")
    right = table(readme)
    shown = "\n".join(row[0] for row in ROW.finditer(readme))
    assert shown == right, f"python tests/test_readme.py writes these rows:\n{right}"
    assert all(words for _, words in ROW.findall(readme)), "a section has no words in README.md"


def test_it_is_one_page():
    text = README.read_bytes()
    assert text.count(b"\n") <= MOST_LINES
    assert len(text) <= MOST_BYTES


def test_it_has_what_a_reader_looks_for():
    readme = README.read_text(encoding="utf-8")
    for text in (
        "pip install -r requirements.txt && python hist.py",
        "pip install -r requirements.txt && python -m pytest -n auto --dist loadfile",
        "python hist.py --ground PICTURE",
        "python hist.py --data my.jsonl",
        "python -m tests.paper.ablate --seeds 5",
        "torchrun --nproc_per_node=4 hist.py",
        "python parse.py",
        "jupyter lab tutorial.ipynb",
        "OMP_NUM_THREADS",
        "## What differs from the paper",
        "@article{luo2024barking",
        "MIT licence",
    ):
        assert text in readme, text


def test_every_file_that_a_page_links_to_is_there():
    for page in (README, ROOT / "tests/paper/README.md"):
        for link in re.findall(r"\]\((?!http)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / link).exists(), f"{page}: {link}"


def test_every_command_that_a_page_names_is_there():
    for page in (README, ROOT / "tests/paper/README.md"):
        for name in re.findall(r"python -m (tests\.paper\.[a-z]+)", page.read_text("utf-8")):
            assert (ROOT / name.replace(".", "/")).with_suffix(".py").exists(), name


if __name__ == "__main__":
    page = README.read_text(encoding="utf-8")
    spans = [row.span() for row in ROW.finditer(page)]
    page = page[: spans[0][0]] + table(page) + page[spans[-1][1] :]
    README.write_text(page, encoding="utf-8")
