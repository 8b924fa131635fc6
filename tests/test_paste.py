"""Copy and paste: losses, Grad-CAM and the pointing game of hist.py work alone, and parse.py."""

import ast
import inspect
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import hist
import parse

CAPTIONS = [
    "An orange cat laying on a white and brown cat in a bed.",
    "A group of people riding two brown horses next to a fire hydrant.",
    "a small pink ring and the square is yellow",
    "A mans hat, and 3 teddy bears' beds!",
    "running quickly",
    "",
]
# the lines of parse.py at which its parts begin: what the hierarchy needs stands before the tree
TREE, COMMANDS = "# ==== (b) ", "# ==== (c) "


def pasted(function):
    """The function as its source makes it in a file with import torch, torch.nn.functional as F."""
    space = {"torch": torch, "F": F}
    exec(inspect.getsource(function), space)
    return space[function.__name__]


def test_itc_loss():
    image, text = torch.tensor([[1.0, 0], [0, 1]]), torch.tensor([[1.0, 0], [0, 1], [1, 0]])
    positives = torch.tensor([[True, False, True], [False, True, False]])
    exists, e = torch.ones(3, dtype=torch.bool), math.e
    # similarities (1, 0, 1) and (0, 1, 0)
    to_text = (-math.log(e / (2 * e + 1)) - math.log(e / (e + 2))) / 2
    to_image = -math.log(e / (e + 1))
    loss = pasted(hist.itc_loss)(image, text, positives, exists, 1.0)
    assert loss.item() == pytest.approx((to_text + to_image) / 2)


def test_find_positives():
    found = pasted(hist.find_positives)(torch.tensor([[1, 2], [2, 3]]), torch.tensor([1, 2, 9]))
    assert found.tolist() == [[True, True, False], [False, True, False]]


def test_draw_negatives():
    torch.manual_seed(0)
    allowed = torch.tensor([[False, True, True, True], [False] * 4]).repeat(3000, 1)
    similarity = torch.tensor([[9.0, 0, 2, 0]]).repeat(6000, 1)
    for hardness, expected in ((0.0, 1 / 3), (1.0, math.exp(2) / (math.exp(2) + 2))):
        column, found = pasted(hist.draw_negatives)(similarity, allowed, hardness)
        assert found.tolist() == [True, False] * 3000 and (column[found] != 0).all()
        assert (column[found] == 2).float().mean().item() == pytest.approx(expected, abs=0.03)


def test_itm_loss():
    logits, labels = torch.tensor([[0.0, 0], [0, 2], [5, 0]]), torch.tensor([1, 1, 0])
    expected = (math.log(2) + math.log(1 + math.exp(-2))) / 2  # the third weighs nothing
    loss = pasted(hist.itm_loss)(logits, labels, torch.tensor([1.0, 1, 0]))
    assert loss.item() == pytest.approx(expected)


def test_mlm_loss():
    logits, labels = torch.zeros(2, 2, 4), torch.tensor([[-100, 3], [-100, -100]])
    logits[0, 1, 3] = 1
    loss = pasted(hist.mlm_loss)(logits, labels)
    assert loss.item() == pytest.approx(-math.log(math.e / (math.e + 3)))


def test_composition_loss():
    rows = ([4.0, 0], [0.0, 1], [3.0, 1])
    a, b, whole = (torch.tensor([[row, [0.0, 0]]], requires_grad=True) for row in rows)
    # half on each of two patches, against three quarters and one
    loss = pasted(hist.composition_loss)(a, b, whole, torch.ones(1))
    loss.backward()
    assert loss.item() == pytest.approx(0.5)
    assert a.grad is None and b.grad is None and whole.grad.abs().max() > 0


def test_grad_cam():
    """One text, one head, two tokens, a [CLS] and two patches."""
    A = torch.tensor([[[[0.5, 0.2, 0.3], [0.1, 0.4, 0.5]]]], requires_grad=True)
    slope = torch.tensor([[[[9.0, 2, -3], [9.0, 1, 4]]]])
    cam, both, first = pasted(hist.grad_cam), torch.tensor([[True, True]]), [[True, False]]
    score = (A * slope).sum((1, 2, 3))
    expected = torch.tensor([[[(0.2 * 2 + 0.4 * 1) / 2, 0.5 * 4 / 2]]])
    assert torch.allclose(cam(A, score, both, (1, 2)), expected)
    alone = cam(A, score, torch.tensor(first), (1, 2))
    assert torch.allclose(alone, torch.tensor([[[0.2 * 2, 0.0]]]))
    squares = cam(A, (A**2 / 2).sum((1, 2, 3)), both, (1, 2), create_graph=True)
    (again,) = torch.autograd.grad(squares.sum(), A)
    # the map is A * A / 2: it can be differentiated again
    assert torch.allclose(again[..., 1:], A[..., 1:])


@pytest.mark.parametrize("kind", [np.array, torch.tensor])
def test_pointing_game(kind):
    heat = kind([[0.1, 0.2], [0.9, 0.3], [0.0, 0.8]])
    here, there = np.zeros((3, 2), bool), np.ones((3, 2), bool)
    here[1, 0], there[1, 0] = True, False
    assert pasted(hist.pointing_game)(heat, kind(here)) is True
    assert pasted(hist.pointing_game)(heat, kind(there)) is False


def names(node, context):
    """The names that a piece of a program reads (ast.Load) or binds (ast.Store)."""
    found = [n for n in ast.walk(node) if isinstance(n, ast.Name)]
    return {n.id for n in found if isinstance(n.ctx, context)}


def binds(statement):
    """The names that a statement of a module binds."""
    if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
        return {statement.name}
    if isinstance(statement, (ast.Import, ast.ImportFrom)):
        return {(alias.asname or alias.name).split(".")[0] for alias in statement.names}
    return names(statement, ast.Store)


def closure(source, name):
    """The statements of a module that a name of it needs, in their order.

    Those that bind what is needed, and the loops that fill it.
    """
    statements = ast.parse(source).body
    needed, kept = {name}, set()
    while True:
        more = set()
        for n, statement in enumerate(statements):
            fills = isinstance(statement, ast.For) and names(statement, ast.Load) & needed
            if n not in kept and (fills or binds(statement) & needed):
                more.add(n)
        if not more:
            return "\n".join(ast.get_source_segment(source, statements[n]) for n in sorted(kept))
        kept |= more
        needed |= set().union(*(names(statements[n], ast.Load) for n in more))


def parse_alone(path, code):
    """What a new file with this code makes of CAPTIONS, without hist.py and parse.py."""
    ending = """
import importlib.util, json, sys
assert not any(map(importlib.util.find_spec, ("hist", "parse")))
print(json.dumps([parse(caption) for caption in json.loads(sys.argv[1])]))
"""
    path.write_text(code + ending, encoding="utf-8")
    command = [sys.executable, "-I", str(path), json.dumps(CAPTIONS)]
    ran = subprocess.run(command, cwd=path.parent, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


def test_parse(tmp_path):
    expected = json.loads(json.dumps([parse.parse(caption) for caption in CAPTIONS]))
    source = Path(parse.__file__).read_text(encoding="utf-8")
    needed = closure(source, "parse")
    assert "def parse(" in needed and "def tree(" not in needed and "argparse" not in needed
    assert parse_alone(tmp_path / "mine.py", needed) == expected
    # from the top of the file down to the tree: the hierarchy; down to the commands: the tree too
    assert source.count(TREE) == source.count(COMMANDS) == 1
    assert parse_alone(tmp_path / "hierarchy.py", source[: source.index(TREE)]) == expected
    tree = "\nassert graph(parse('a red cat on a bed')).root['word'] == 'cat'"
    assert parse_alone(tmp_path / "top.py", source[: source.index(COMMANDS)] + tree) == expected
