"""What CUDA needs of every script, tested without CUDA: whole epochs on the meta device, which has shapes and no values, and
whole runs with `torch.cuda.graph` in a version for the CPU that records each operation of a step and repeats it."""

import importlib
import traceback
import warnings
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from test_contract import SCRIPTS, numbers, same_state, tiny
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

CASES = [(name, flags) for name, facts in SCRIPTS.items() for flags in facts.reads]
CASES += [("wamal", ["--weighting", "batch"]), ("wamal", ["--normalize-weights"])]
SCENES = ["--mode", "combine", "--dataset", "synthetic-scenes", "--width", "2", "--levels", "2"]


def tensors_in(nested) -> list[torch.Tensor]:
    if isinstance(nested, dict):
        nested = list(nested.values())
    parts = nested if isinstance(nested, tuple | list) else ()
    return [nested] if isinstance(nested, torch.Tensor) else [t for part in parts for t in tensors_in(part)]


def arguments(script, out_dir, steps, flags) -> list[str]:
    """Of a tiny run with so many steps; scenes take no backbone."""
    name = script.__name__
    all_flags = tiny(script, out_dir, SCRIPTS[name].steps_flag, steps, *flags)
    at = all_flags.index("--backbone") if "combine" in flags else len(all_flags)
    return all_flags[:at] + all_flags[at + 2 :]


# ---------------------------------------- Shapes and control flow: an epoch on the meta device ----------------------


class Uploads(TorchDispatchMode):
    """Counts copies from the host to the device that wait for it: those of a CPU tensor to meta."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        comes_from = {t.device.type for t in tensors_in([args, kwargs or {}]) if t.dim()}
        self.count += "cpu" in comes_from and any(t.is_meta for t in tensors_in(out))
        return out

    def counting(self, make):
        """torch.tensor and its like, counting what they make of Python's numbers on the device."""

        def counted(*args, **kwargs):
            made = make(*args, **kwargs)
            self.count += made.is_meta and not isinstance(args[make.__name__ == "new_tensor"], torch.Tensor)
            return made

        return counted


def last_line_of_an_epoch(name, out_dir, steps, monkeypatch, *flags) -> tuple[str, int]:
    """Run an epoch on the meta device: the script's line that asked for a value, and the uploads until then."""
    script, generator = importlib.import_module(name), torch.Generator
    with monkeypatch.context() as patch, Uploads() as uploads:
        patch.setattr(script, "choose_device", lambda *_: torch.device("meta"))
        patch.setattr(torch, "Generator", lambda *_: generator())
        patch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # knows no meta device
        for optimizer in ("Adam", "SGD"):
            kind = getattr(torch.optim, optimizer)
            patch.setattr(torch.optim, optimizer, lambda *a, kind=kind, **k: kind(*a, **{**k, "fused": False, "foreach": False}))
        for owner, make in ((torch, "tensor"), (torch, "as_tensor"), (torch.Tensor, "new_tensor")):
            patch.setattr(owner, make, uploads.counting(getattr(owner, make)))
        with pytest.raises((RuntimeError, NotImplementedError)) as stop:
            script.main(arguments(script, out_dir, steps, ["--epochs", 1, *flags]))
    lines = [f.line for f in traceback.extract_tb(stop.value.__traceback__) if f.filename == script.__file__]
    return lines[-1], uploads.count


@pytest.mark.parametrize("name, flags", [*CASES, ("auxilearn", SCENES)], ids=lambda p: p if isinstance(p, str) else " ".join(p))
def test_no_step_depends_on_values(name, flags, tmp_path, monkeypatch):
    """The first line that needs one is the epoch's own, after its last step; and no step copies from the host."""
    monkeypatch.chdir(ROOT)
    runs = [last_line_of_an_epoch(name, tmp_path / str(n), n, monkeypatch, *flags) for n in (2, 7)]
    assert all(line.startswith("bad, seconds = int(first_bad)") for line, _ in runs), runs
    assert runs[0][1] == runs[1][1], "a step copies from the host"


@pytest.mark.parametrize("wrong", ["item", "branch", "mask", "upload"])
def test_a_step_that_depends_on_values_is_noticed(wrong, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    script = importlib.import_module("wamal")
    step = script.primary_step

    def wrong_step(*args, **kwargs):
        loss, logits = step(*args, **kwargs)
        if wrong == "item":
            loss.item()
        elif wrong == "branch" and loss > 0:
            loss = 2 * loss
        elif wrong == "mask":
            logits[logits > 0].sum()
        elif wrong == "upload":
            loss = loss * torch.tensor([1.0], device=loss.device)[0]
        return loss, logits

    monkeypatch.setattr(script, "primary_step", wrong_step)
    runs = [last_line_of_an_epoch("wamal", tmp_path / str(n), n, monkeypatch) for n in (2, 7)]
    if wrong == "upload":
        assert runs[1][1] == runs[0][1] + 5
    else:
        assert not any(line.startswith("bad, seconds") for line, _ in runs)


# ---------------------------------------- CUDA graphs, as far as a CPU can show them ----------------------------------


def aliases(nested):
    """The same with every tensor as another one in the same memory."""
    return tree_map(lambda t: t.detach() if isinstance(t, torch.Tensor) else t, nested)


class RecordedGraph:
    """torch.cuda.CUDAGraph for the CPU: replay() repeats the recorded operations on the same memory, with every number,
    address and shape as they were. Capturing leaves no trace in memory, as on CUDA, where nothing runs then."""

    made = 0  # graphs in all
    replays = 0

    def __init__(self):
        self.operations = []
        RecordedGraph.made += 1

    @torch.no_grad()
    def replay(self):
        RecordedGraph.replays += 1
        for function, args, kwargs, outputs in self.operations:
            args, kwargs = aliases([args, kwargs])  # of their own: some operations change a tensor's shape in place
            for old, new in zip(outputs, tensors_in(function(*args, **kwargs)), strict=True):
                if old.untyped_storage()._cdata != new.untyped_storage()._cdata and not old._is_zerotensor():
                    old.copy_(new)  # neither a view of an input, nor the input itself


class Recorder(TorchDispatchMode):
    def __init__(self, graph: RecordedGraph):
        super().__init__()
        self.graph, self.before = graph, {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero):
            raise RuntimeError("operation not permitted when stream is capturing")
        for t in tensors_in([args, kwargs or {}]):
            storage = t.untyped_storage()
            if storage._cdata not in self.before and not t._is_zerotensor():
                self.before[storage._cdata] = storage, storage.clone()
        recorded = aliases([args, kwargs or {}])
        out = function(*args, **(kwargs or {}))
        for t in tensors_in(out):  # made here, so there is nothing to put back; held, so that its address stays its own
            self.before.setdefault(t.untyped_storage()._cdata, (t.untyped_storage(), None))
        self.graph.operations.append((function, *recorded, aliases(tensors_in(out))))
        return out


@contextmanager
def record(graph, stream, capture_error_mode):
    random_state = torch.get_rng_state()
    with Recorder(graph) as recorder:
        yield
    for storage, contents in recorder.before.values():
        if contents is not None:
            storage.copy_(contents)
    torch.set_rng_state(random_state)


class Stream:
    def wait_stream(self, other):
        assert isinstance(other, Stream)


@pytest.fixture
def graphs(monkeypatch):
    """A machine whose CUDA device is the CPU."""
    monkeypatch.chdir(ROOT)
    for name in SCRIPTS:
        monkeypatch.setattr(importlib.import_module(name), "choose_device", lambda *_: torch.device("cpu"))
    for name, stand_in in {"CUDAGraph": RecordedGraph, "graph": record, "Stream": Stream, "current_stream": Stream,
                           "stream": lambda _: nullcontext()}.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, stand_in)
    RecordedGraph.made = RecordedGraph.replays = 0
    return RecordedGraph


class Watched(TorchDispatchMode):
    """Changes nothing, but in its presence, as in a Recorder's, autograd chooses formulas that round differently."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


def run(name, out_dir, *flags):
    """The run's metrics and checkpoint."""
    script = importlib.import_module(name)
    with warnings.catch_warnings(), Watched():
        warnings.simplefilter("ignore")
        folder = Path(script.main(arguments(script, out_dir, 7, flags))["folder"])
    return numbers(folder), torch.load(folder / "last.pt", weights_only=True)


GRAPHED = [(name, flags) for name, flags in CASES if name != "mtl_nas"] + [
    ("wamal", ["--schedule", "cosine", "--momentum", "0.9"]), ("maxl", ["--schedule", "cosine"]),
    ("auxilearn", ["--schedule", "cosine", "--upper-every", "1"]), ("auxilearn", ["--method", "human"]),
    ("auxilearn", ["--backbone", "tests/nets.py:dropout", "--upper-every", "1"]),
    ("auxilearn", [*SCENES, "--upper-every", "1"]), ("auxilearn", [*SCENES, "--method", "dwa"]),
    ("auxilearn", [*SCENES, "--method", "gcs"]), ("auxilearn", [*SCENES, "--method", "uncertainty"]),
    ("maoal", ["--lower-steps", "1"]), ("maoal", ["--method", "auxl", "--lower-steps", "1"]),
]  # fmt: skip


@pytest.mark.parametrize("name, flags", GRAPHED, ids=lambda p: p if isinstance(p, str) else " ".join(p))
def test_a_run_from_graphs_ends_with_the_same_bits(name, flags, tmp_path, graphs):
    metrics, state = run(name, tmp_path / "graphs", *flags, "--cuda-graph")
    assert graphs.replays >= 6 and graphs.made < graphs.replays
    plain = run(name, tmp_path / "plain", *flags)
    assert metrics == plain[0]
    for optimizer in (entry for entry in (*state, *plain[1]) if entry.endswith("optimizer")):
        for group in (*state[optimizer]["param_groups"], *plain[1][optimizer]["param_groups"]):
            group.pop("capturable", None)
    assert same_state(state, plain[1])


@pytest.mark.parametrize("name", ["wamal", "maxl", "maoal"])
def test_a_network_with_dropout_keeps_its_hypergradients_out_of_the_graph(name, tmp_path, graphs, monkeypatch):
    flags = ["--backbone", "tests/nets.py:dropout", *(["--lower-steps", "1"] if name == "maoal" else [])]
    metrics, _ = run(name, tmp_path / "graphs", *flags, "--cuda-graph")
    assert graphs.replays > 0 and metrics == run(name, tmp_path / "plain", *flags)[0]
    monkeypatch.setattr(importlib.import_module(name), "draws_random_numbers", lambda *_: False)
    assert metrics != run(name, tmp_path / "wrong", *flags, "--cuda-graph")[0], "its tangents would meet other masks"


def test_a_step_that_a_graph_cannot_hold_is_noticed(tmp_path, graphs, monkeypatch):
    """One that depends on a number of Python's that changes."""
    script, calls = importlib.import_module("wamal"), []

    def counting(loss):
        calls.append(1)
        return loss * (1 + 0.1 * len(calls))

    total_loss = script.total_loss
    monkeypatch.setattr(script, "total_loss", lambda *args: counting(total_loss(*args)))
    plain = run("wamal", tmp_path / "plain", "--method", "single")[0]
    calls.clear()
    assert run("wamal", tmp_path / "graphs", "--method", "single", "--cuda-graph")[0] != plain
