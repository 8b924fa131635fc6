"""README.md says where the sections of hist.py begin. `python tests/test_readme.py` writes the lines of today into it."""
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ROW = re.compile(r"^\| \[\d+\]\(hist\.py#L\d+\) \| ([^|]+) \| (.*) \|$", re.M)


def sections():
    """{section of hist.py: its line}, from the headers `# ---- name`."""
    lines = enumerate((ROOT / "hist.py").read_text(encoding="utf-8").splitlines(), 1)
    return {m[1]: n for n, line in lines if (m := re.match(r"# -{10,} (.+)$", line))}


def table(readme):
    """The rows as they ought to be: a section that README.md has no words about gets none."""
    said = dict(ROW.findall(readme))
    return "\n".join(f"| [{n}](hist.py#L{n}) | {name} | {said.get(name, '')} |" for name, n in sections().items())


def test_the_lines_of_the_sections_of_hist_py_are_right():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    right = table(readme)
    assert "\n".join(m[0] for m in ROW.finditer(readme)) == right, f"python tests/test_readme.py writes these rows into README.md:\n{right}"
    assert all(words for _, words in ROW.findall(readme)), "a section of hist.py has no words in README.md"


def test_it_has_what_a_reader_looks_for():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for text in ("pip install -r requirements.txt && python hist.py", "python -m pytest", "python hist.py --ablate --seeds 5", "jupyter lab tutorial.ipynb",
                 "## What differs from the paper", "@article{luo2024barking"):
        assert text in readme, text


if __name__ == "__main__":
    path = ROOT / "README.md"
    readme = path.read_text(encoding="utf-8")
    rows = [m.span() for m in ROW.finditer(readme)]
    path.write_text(readme[:rows[0][0]] + table(readme) + readme[rows[-1][1]:], encoding="utf-8")
