"""What the tests share: importable scripts, one thread, data made once, real data in $AUX_DATA."""

import functools
import json
import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import common  # noqa: E402 - found through the line above

torch.set_num_threads(1)  # two workers share two cores, and tiny operations only wait on threads
common.make_synthetic = functools.cache(common.make_synthetic)
common.make_scenes = functools.cache(common.make_scenes)


@pytest.fixture
def real_data() -> str:
    """The --data-root with real data sets; the test is skipped where there is none."""
    root = os.environ.get("AUX_DATA")
    if not root:
        pytest.skip("AUX_DATA names no folder with real data sets")
    return root


TINY_IMAGES = ["--dataset", "synthetic", "--backbone", "tests/nets.py:mlp", "--device", "cpu"]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs a script on images for three steps a phase; returns its folder and its metrics."""
    monkeypatch.chdir(ROOT)

    def runner(script, *flags, name="run"):
        places = ["--out-dir", str(tmp_path / name), "--max-steps", "3"]
        folder = Path(script.main([*TINY_IMAGES, *places, *map(str, flags)])["folder"])
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        return folder, [json.loads(line) for line in lines]

    return runner


def relative_difference(a, b) -> float:
    """Largest entry of a - b over the largest entry of b."""
    return float((a - b).abs().max() / b.abs().max())
