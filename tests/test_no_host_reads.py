"""Epochs on the meta device, which has shapes and no values: no step may ask for one."""

import importlib
import traceback
from pathlib import Path

import pytest
import torch
from test_contract import READS, SCRIPTS, tiny
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CASES = [(name, flags) for name, facts in SCRIPTS.items() for flags in facts.flags]


def tensors_in(nested) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(nested) if isinstance(leaf, torch.Tensor)]


class Uploads(TorchDispatchMode):
    """Counts copies from the host that a device waits for: those of a CPU tensor to meta."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        comes_from = {t.device.type for t in tensors_in([args, kwargs or {}]) if t.dim()}
        if "cpu" in comes_from and any(t.is_meta for t in tensors_in(out)):
            self.count += 1
        return out

    def counting(self, make):
        """torch.tensor and its like, counting what they make of Python's numbers on the device."""

        def counted(*args, **kwargs):
            made = make(*args, **kwargs)
            data = args[1] if make.__name__ == "new_tensor" else args[0]
            if made.is_meta and not isinstance(data, torch.Tensor):
                self.count += 1
            return made

        return counted


def without_backbone(arguments: list[str]) -> list[str]:
    """auxilearn.py's scenes and maoal.py's ratings take no backbone."""
    at = arguments.index("--backbone")
    return arguments[:at] + arguments[at + 2 :]


def epoch_on_meta(name, out_dir, steps, flags, monkeypatch) -> tuple[bool, int]:
    """Whether all of an epoch's steps ran before a value was asked for, and its uploads."""
    script = importlib.import_module(name)
    generator = torch.Generator
    flags = [SCRIPTS[name].steps_flag, steps, "--epochs", 1, *flags.split()]
    arguments = tiny(script, out_dir, *flags)
    if "combine" in arguments or "synthetic-ratings" in arguments:
        arguments = without_backbone(arguments)

    with monkeypatch.context() as patch, Uploads() as uploads:
        patch.setattr(script, "choose_device", lambda *_: torch.device("meta"))
        patch.setattr(torch, "Generator", lambda *_: generator())
        for optimizer in ("Adam", "SGD"):  # whose fast versions know no meta device
            kind = getattr(torch.optim, optimizer)

            def plain(*args, kind=kind, **options):
                return kind(*args, **{**options, "fused": False, "foreach": False})

            patch.setattr(torch.optim, optimizer, plain)
        for owner, make in ((torch, "tensor"), (torch, "as_tensor"), (torch.Tensor, "new_tensor")):
            patch.setattr(owner, make, uploads.counting(getattr(owner, make)))
        with pytest.raises((RuntimeError, NotImplementedError)) as stop:
            script.main(arguments)

    frames = traceback.extract_tb(stop.value.__traceback__)
    asked = [f.lineno for f in frames if f.filename == script.__file__ and f.name == "train"]
    source = Path(script.__file__).read_text()
    figures = source[: source.index(READS)].count("\n") + 1
    return asked[-1] > figures, uploads.count


@pytest.mark.parametrize("name, flags", CASES)
def test_no_step_depends_on_values(name, flags, tmp_path, monkeypatch):
    """The first line that needs one is the epoch's own, after its last step; none uploads."""
    few = epoch_on_meta(name, tmp_path / "few", 2, flags, monkeypatch)
    many = epoch_on_meta(name, tmp_path / "many", 5, flags, monkeypatch)
    assert few[0] and many[0], "a step asked for a value"
    assert few[1] == many[1], "a step copies from the host"


def item(loss, logits):
    loss.item()


def branch(loss, logits):
    assert loss > 0


def mask(loss, logits):
    logits[logits > 0].sum()


def upload(loss, logits):
    torch.tensor([1.0], device=loss.device)


@pytest.mark.parametrize("wrong", [item, branch, mask, upload])
def test_a_step_that_depends_on_values_is_noticed(wrong, tmp_path, monkeypatch):
    script = importlib.import_module("wamal")
    step = script.primary_step

    def wrong_step(*args, **kwargs):
        loss, logits = step(*args, **kwargs)
        wrong(loss, logits)
        return loss, logits

    monkeypatch.setattr(script, "primary_step", wrong_step)
    few = epoch_on_meta("wamal", tmp_path / "few", 2, "", monkeypatch)
    many = epoch_on_meta("wamal", tmp_path / "many", 5, "", monkeypatch)
    if wrong is upload:
        assert many[1] == few[1] + 3
    else:
        assert not few[0]
