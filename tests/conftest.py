"""What the tests share: importable scripts, one thread, data made once, real data in $AUX_DATA."""

import functools
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


def relative_difference(a, b) -> float:
    """Largest entry of a - b over the largest entry of b."""
    return float((a - b).abs().max() / b.abs().max())
