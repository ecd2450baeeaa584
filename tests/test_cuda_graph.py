"""--cuda-graph, as far as a CPU can show it: whole runs from recorded steps.

A stand-in for torch.cuda.CUDAGraph records each operation of a step, and repeats them on the same
memory with every number as it was.
"""

import importlib
import inspect
import warnings
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from test_contract import numbers, same_state, tiny
from test_no_host_reads import tensors_in, without_backbone
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

SCENES = "--mode combine --dataset synthetic-scenes --width 2 --levels 2"
CASES = [
    ("wamal", ""),
    ("wamal", "--aux-set 0.2"),
    ("wamal", "--method human"),
    ("wamal", "--method single --schedule cosine --momentum 0.9"),
    ("wamal", "--optimizer adam"),
    ("maxl", "--schedule cosine"),
    ("maxl", "--held-out 0.2 --same-iteration"),
    ("maxl", "--method maxl-first-order --cosine-batches 2"),
    ("maxl", "--method maxl-latent"),
    ("auxilearn", "--schedule cosine --upper-every 1"),
    ("auxilearn", "--aux-set 0 --upper-every 2"),
    ("auxilearn", "--method human"),
    ("auxilearn", f"{SCENES} --upper-every 1 --neumann-steps 1 --upper-batch-size 2"),
    ("auxilearn", f"{SCENES} --method gcs"),
    ("auxilearn", f"{SCENES} --method dwa"),
    ("auxilearn", f"{SCENES} --method uncertainty"),
    ("maoal", "--lower-steps 1"),
    ("maoal", "--lower-steps 1 --method auxl"),
    ("maoal", "--method gcs"),
    ("maoal", "--method uncertainty"),
    ("maoal", "--method single --interval 1"),
    ("maoal", "--lower-steps 1 --dataset synthetic-ratings"),
]


def aliases(nested):
    """The same with every tensor as another one in the same memory."""
    return tree_map_only(torch.Tensor, torch.Tensor.detach, nested)


class RecordedGraph:
    """torch.cuda.CUDAGraph for the CPU. Capturing leaves no trace in memory, as on CUDA."""

    made = 0
    replays = 0

    def __init__(self):
        self.operations = []
        RecordedGraph.made += 1

    @torch.no_grad()
    def replay(self):
        RecordedGraph.replays += 1
        for function, args, kwargs, outputs in self.operations:
            args, kwargs = aliases([args, kwargs])  # some operations change a tensor's shape
            for old, new in zip(outputs, tensors_in(function(*args, **kwargs)), strict=True):
                same_memory = old.untyped_storage()._cdata == new.untyped_storage()._cdata
                if not same_memory and not old._is_zerotensor():
                    old.copy_(new)


class Recorder(TorchDispatchMode):
    """Records into a RecordedGraph; keeps what the touched memory held before."""

    def __init__(self, graph: RecordedGraph):
        super().__init__()
        self.graph = graph
        self.before = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        reads = (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero)
        if function.overloadpacket in reads:
            raise RuntimeError("operation not permitted when stream is capturing")
        for t in tensors_in([args, kwargs]):
            storage = t.untyped_storage()
            if storage._cdata not in self.before and not t._is_zerotensor():
                self.before[storage._cdata] = (storage, storage.clone())
        recorded = aliases([args, kwargs])
        out = function(*args, **kwargs)
        for t in tensors_in(out):  # held, so that its address stays its own
            storage = t.untyped_storage()
            self.before.setdefault(storage._cdata, (storage, None))
        self.graph.operations.append((function, *recorded, aliases(tensors_in(out))))
        return out


@contextmanager
def record(graph, capture_error_mode):
    with Recorder(graph) as recorder:
        yield
    for storage, contents in recorder.before.values():
        if contents is not None:
            storage.copy_(contents)


class Watched(TorchDispatchMode):
    """Changes nothing, but under it, as under a Recorder, autograd's formulas round differently."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


@pytest.fixture
def graphs(monkeypatch):
    """A machine whose CUDA device is the CPU."""
    monkeypatch.chdir(ROOT)
    for name in ("wamal", "maxl", "auxilearn", "maoal"):
        script = importlib.import_module(name)
        monkeypatch.setattr(script, "choose_device", lambda *_: torch.device("cpu"))
    for kind in ("Adam", "AdamW"):
        optimizer = getattr(torch.optim, kind)

        def on_cpu(*args, optimizer=optimizer, **options):
            return optimizer(*args, **{**options, "capturable": False, "fused": True})

        monkeypatch.setattr(torch.optim, kind, on_cpu)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", RecordedGraph)
    monkeypatch.setattr(torch.cuda, "graph", record)
    monkeypatch.setattr(torch.cuda, "get_rng_state", torch.get_rng_state)
    RecordedGraph.made = RecordedGraph.replays = 0
    return RecordedGraph


def train(name, out_dir, flags):
    """The run's metrics and checkpoint, after two epochs of five steps."""
    script = importlib.import_module(name)
    arguments = tiny(script, out_dir, "--max-steps", 5, "--epochs", 2, *flags.split())
    if "combine" in arguments or "synthetic-ratings" in arguments:
        arguments = without_backbone(arguments)
    with warnings.catch_warnings(), Watched():
        warnings.simplefilter("ignore")
        folder = Path(script.main(arguments)["folder"])
    return numbers(folder), torch.load(folder / "last.pt", weights_only=True)


@pytest.mark.parametrize("name, flags", CASES)
def test_a_run_from_graphs_ends_with_the_same_bits(name, flags, tmp_path, graphs):
    metrics, state = train(name, tmp_path / "graphs", f"{flags} --cuda-graph")
    assert graphs.made >= 2 and graphs.replays >= 3 * graphs.made
    plain_metrics, plain_state = train(name, tmp_path / "plain", flags)
    assert metrics == plain_metrics
    assert same_state(state, plain_state)


def test_a_step_that_a_graph_cannot_hold_is_noticed(tmp_path, graphs, monkeypatch):
    """One that depends on a number of Python's that changes."""
    script = importlib.import_module("wamal")
    total_loss = script.total_loss
    calls = []

    def counting(*args):
        calls.append(1)
        return total_loss(*args) * (1 + 0.1 * len(calls))

    monkeypatch.setattr(script, "total_loss", counting)
    metrics, _ = train("wamal", tmp_path / "graphs", "--method single --cuda-graph")
    calls.clear()
    assert metrics != train("wamal", tmp_path / "plain", "--method single")[0]


@pytest.mark.parametrize("name", ["wamal", "maxl", "auxilearn", "maoal"])
def test_a_network_with_dropout_is_refused(name, tmp_path, graphs, capsys):
    with pytest.raises(SystemExit) as stop:
        train(name, tmp_path, "--backbone tests/nets.py:dropout --cuda-graph")
    assert stop.value.code == 2
    assert "--cuda-graph is for networks without dropout" in capsys.readouterr().err


def test_a_network_that_reads_from_the_device_is_refused(tmp_path, graphs, monkeypatch, capsys):
    script = importlib.import_module("wamal")
    total_loss = script.total_loss

    def reading(*args):
        return total_loss(*args) * (1 + float(args[0].sum() > 0))

    monkeypatch.setattr(script, "total_loss", reading)
    with pytest.raises(SystemExit) as stop:
        train("wamal", tmp_path, "--cuda-graph")
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert "--cuda-graph cannot hold this network: operation not permitted" in error


def test_graphs_are_the_same_text_in_every_script():
    scripts = [importlib.import_module(n) for n in ("wamal", "maxl", "auxilearn", "maoal")]
    assert len({inspect.getsource(script.Graph) for script in scripts}) == 1


@pytest.mark.parametrize("name", ["wamal", "maxl", "auxilearn", "maoal"])
def test_graphs_need_cuda(name, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    script = importlib.import_module(name)
    with pytest.raises(SystemExit) as stop:
        script.main(tiny(script, tmp_path, "--cuda-graph"))
    assert stop.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
