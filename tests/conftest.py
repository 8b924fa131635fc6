"""What all tests share: the path to hist.py and parse.py, and an empty folder to work in."""

import os
import sys
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # sums in one order: runs are compared bit for bit
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder, and the working one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
