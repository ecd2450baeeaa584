"""What every script promises, whatever its method: a script is held to it by its line in SCRIPTS."""

import ast
import importlib
import inspect
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from conftest import ROOT
from torch.utils._python_dispatch import TorchDispatchMode

IMAGES = ["--dataset", "synthetic", "--backbone", "tests/nets.py:mlp", "--epochs", "2"]


class Facts(NamedTuple):
    """What the tests must know of a script."""

    tiny: list[str]  # arguments of two epochs of three steps, in a second or so, on data made in memory
    networks: list[str]  # the entries of its checkpoint that must change in that run
    step: str = "primary_step"  # what each step of the loop calls, network first; it returns a tensor, or a tuple with one first
    steps_flag: str = "--max-steps"  # how many steps an epoch has
    metric: str = "test_accuracy"
    best: Callable = max
    unknown: str = "cifar100-20"  # a data set that the error about an unknown one must name
    missing: tuple[str, str, str] = ("cifar100-20", "CIFAR100", "cifar-100-python.tar.gz")  # data set, torchvision's, what to put
    reads: Sequence[list[str]] = ([],)  # flags of the runs whose reads from the device are counted
    lines: int = 780  # at most so many; auxilearn.py holds two methods, maoal.py three kinds of data
    downloads: bool = True  # whether that missing set is one that would be downloaded


SCRIPTS = {
    "wamal": Facts([*IMAGES, "--max-steps", "3"], ["primary", "label_network"], reads=[
        [], ["--aux-set", "0.2"], ["--method", "human"], ["--method", "single"], ["--cosine-batches", "2"]]),
    "maxl": Facts([*IMAGES, "--max-steps", "3"], ["primary", "label_network"], reads=[
        [], ["--held-out", "0.2"], ["--method", "maxl-first-order"], ["--method", "random"], ["--method", "single"],
        ["--same-iteration"], ["--no-mask"], ["--cosine-batches", "2"]]),
    "auxilearn": Facts([*IMAGES, "--max-steps", "3"], ["primary", "combiner", "label_network"],
        step="lower_step", lines=883, reads=[[], ["--aux-set", "0"], ["--combiner", "nonlinear"]]),
    "soft_order": Facts(
        ["--dataset", "synthetic", "--epochs", "2", "--epoch-steps", "3"], ["network"], "training_step", "--epoch-steps",
        "test_error", min, "omniglot", ("mnist", "MNIST", "train-images-idx3-ubyte"),
        [[], ["--method", "parallel"], ["--method", "permuted"], ["--method", "single"], ["--dropout", "0.5", "--identity-layer"],
         ["--dataset", "random", "--samples", "20"]]),
    "maoal": Facts([*IMAGES, "--max-steps", "3", "--lower-steps", "2"], ["network", "learned"], "lower_step", lines=827, reads=[
        [], ["--method", "auxl"], ["--method", "uncertainty"], ["--method", "gcs"], ["--method", "single"], ["--interval", "1"],
        ["--partition", "parameter"], ["--preset", "published-code"]]),
    "mtl_nas": Facts(
        ["--dataset", "synthetic-scenes", "--crop", "16", "--width", "2", "--depth", "1", "1", "1", "1", "1", "--epochs", "2",
         "--epoch-steps", "3"], ["network"], step="weight_step", steps_flag="--epoch-steps", metric="test_miou",
        unknown="synthetic-scenes", missing=("nyuv2", "CIFAR100", "nyuv2/{train,val}"), downloads=False, reads=[
            [], ["--relaxation", "deterministic", "--discretization", "deterministic"], ["--method", "supernet"],
            ["--method", "nddr"], ["--method", "multi-task"], ["--method", "single"]]),
}  # fmt: skip
PLUMBING = ["fail", "end_on_sigterm", "number", "choose_device", "capture", "run_folder", "open_run", "write_text",
            "save_checkpoint", "load_checkpoint", "log_epoch", "peak_memory_mib", "summarize", "run_seeds", "plot"]
SECTIONS = ["Networks", "Losses and the bi-level step", "Plumbing: the same text in all six scripts", "Training"]
TIMINGS = {"seconds", "images_per_second", "milliseconds_per_step", "peak_memory_mib"}


@pytest.fixture(params=SCRIPTS)
def script(request, monkeypatch):
    monkeypatch.chdir(ROOT)
    return importlib.import_module(request.param)


def name_of(script) -> str:
    return Path(script.__file__).stem


def facts(script) -> Facts:
    return SCRIPTS[name_of(script)]


def has_flags(script, arguments) -> bool:
    """Whether these arguments make sense for the script: it has the flag, and reads image folders where one is named."""
    if arguments[1:] == ["folder:/nowhere"]:
        arguments = ["--image-size"]
    if arguments == ["--pretrained"]:  # of a backbone that has no weights
        arguments = ["--backbone"]
    return arguments[0] in ("--no-such-flag", "--epoch") or hasattr(script.parse_args([]), arguments[0][2:].replace("-", "_"))


def tiny(script, out_dir, *more) -> list[str]:
    return [*facts(script).tiny, "--device", "cpu", "--out-dir", str(out_dir), *map(str, more)]


def shell(script, *arguments):
    return subprocess.run([sys.executable, script.__file__, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True)


def numbers(folder) -> list[dict]:
    """The run's metrics without what the clock decides."""
    lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMINGS} for line in lines]


def same_state(a, b) -> bool:
    """Two checkpoints, entry by entry, bit by bit; their histories without what the clock decides."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_state(a[k], b[k]) for k in a if k not in TIMINGS)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same_state(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def refuses(script, capsys, *arguments) -> str:
    """The script ends with code 2 and one line; returns it."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        script.main([str(a) for a in arguments])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith(f"{name_of(script)}.py: error: "), error
    return error


# ---------------------------------------- Shape ----------------------------------------


def test_sections_and_entry_points_come_in_the_common_order(script):
    source = Path(script.__file__).read_text()
    at = [source.index(f"# -------- {section} ") for section in SECTIONS]
    assert at == sorted(at)
    order = [source.index(f"\ndef {name}(") for name in ("parse_args", "fail", "evaluate", "train", "main")]
    assert order == sorted(order)
    assert source.startswith('"""') and source.rstrip().endswith("main()")
    assert len(source.splitlines()) <= facts(script).lines


def test_top_level_definitions_stand_apart(script):
    """By two blank lines (one below a section's heading), so that a file is not packed to meet its number of lines."""
    lines = Path(script.__file__).read_text().splitlines()
    for i, line in enumerate(lines):
        if line.startswith(("def ", "class ")):
            while lines[i - 1].startswith(("@", "#")) and not lines[i - 1].startswith("# ----"):
                i -= 1
            assert lines[i - 1] == "" and (lines[i - 2] == "" or lines[i - 2].startswith("# ----")), line


def test_plumbing_is_the_same_text_in_every_script(script):
    for name in (n for n in PLUMBING if n != "capture" or name_of(script) != "mtl_nas"):
        ours, first = (inspect.getsource(getattr(m, name)) for m in (script, importlib.import_module("wamal")))
        assert ours == first, f"{name} has drifted"


def test_scripts_import_no_sibling_and_public_functions_are_documented(script):
    tree = ast.parse(Path(script.__file__).read_text())
    imported = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    imported |= {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert not imported & ({"wamal", "maxl", "auxilearn", "maoal", "soft_order", "mtl_nas"} - {name_of(script)})
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            assert ast.get_docstring(node), node.name


def test_common_stays_within_its_limit():
    assert len((ROOT / "common.py").read_text().splitlines()) <= 945


def test_help_from_the_shell(script):
    result = shell(script, "--help")
    assert result.returncode == 0 and "--dataset" in result.stdout and result.stderr == ""


def test_every_flag_has_a_help_sentence(script, monkeypatch):
    import argparse

    seen = []
    original = argparse.ArgumentParser.parse_args
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", lambda p, *a: (seen.append(p), original(p, *a))[1])
    script.parse_args([])
    flags = [action for action in seen[0]._actions if action.dest != "help"]
    assert all(action.help for action in flags)
    wanted = {"dataset", "data_root", "method", "epochs", "max_steps", "batch_size", "lr", "seed", "seeds", "device", "out_dir"}
    assert wanted | {"resume", "plot"} <= {action.dest for action in flags}


# ---------------------------------------- A run ----------------------------------------


def test_tiny_run_leaves_its_files_and_changes_every_network(script, tmp_path):
    summary, metric = script.main(tiny(script, tmp_path)), facts(script).metric
    folder = Path(summary["folder"])
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "last.pt", "metrics.jsonl", "summary.json"]
    assert json.loads((folder / "summary.json").read_text()) == summary
    config = json.loads((folder / "config.json").read_text())
    assert config["machine"]["threads"] == torch.get_num_threads() and config["arguments"]["seed"] == 0
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in metrics] == [1, 2]
    assert all(line["images_per_second"] > 0 and line["milliseconds_per_step"] > 0 for line in metrics)
    assert summary[metric] == metrics[-1][metric]
    assert summary[f"best_{metric}"] == facts(script).best(line[metric] for line in metrics)

    one = Path(script.main(tiny(script, tmp_path / "one", "--epochs", 1))["folder"])
    states = [torch.load(f / "last.pt", weights_only=True) for f in (one, folder)]
    for network in facts(script).networks:
        for name, value in states[0][network].items():
            if name.endswith("weight"):
                assert not torch.equal(value, states[1][network][name]), f"{network}.{name} did not change in the second epoch"


def test_same_seed_same_numbers_other_seed_others(script, tmp_path):
    folders = [script.main(tiny(script, tmp_path / str(i), "--seed", s))["folder"] for i, s in enumerate((3, 3, 4))]
    assert numbers(folders[0]) == numbers(folders[1]) != numbers(folders[2])


def test_seeds_run_in_turn_and_are_summed_up(script, tmp_path, capsys):
    summary = script.main(tiny(script, tmp_path, "--epochs", 1, "--seeds", 0, 1, 2))
    metric = facts(script).metric
    values = [run[metric] for run in summary["runs"]]
    mean = sum(values) / 3
    std = math.sqrt(sum((v - mean) ** 2 for v in values) / 2)
    assert abs(summary[metric] - mean) < 1e-9 and abs(summary[f"{metric}_std"] - std) < 1e-9
    assert abs(summary[f"{metric}_interval95"] - 4.303 * std / math.sqrt(3)) < 1e-9
    assert len(list(tmp_path.iterdir())) == 3 and "95 % interval" in capsys.readouterr().out.splitlines()[-1]


def test_the_t_quantiles_of_the_interval(script, tmp_path):
    """Half the interval over the standard error is the t whose two-sided tail is 5 %, by integrating the density."""

    def tail(t, df):
        angles = [torch.linspace(a, math.pi / 2, 200001, dtype=torch.float64) for a in (math.atan(t / math.sqrt(df)), 0.0)]
        areas = [torch.trapezoid(a.cos().clamp(min=0) ** (df - 1), a) for a in angles]
        return float(areas[0] / areas[1])

    for n in (2, 3, 5, 10, 11, 12, 20, 100):
        values = iter([float(i) for i in range(n)])
        args = script.parse_args(tiny(script, tmp_path, "--seeds", *range(n)))
        summary = script.run_seeds(args, lambda run, values=values: {"m": next(values)}, "m")
        t = summary["m_interval95"] / (summary["m_std"] / math.sqrt(n))
        assert abs(tail(t, n - 1) - 0.05) < 2e-4, n


def test_killed_and_resumed_it_ends_with_the_same_bits(script, tmp_path):
    """SIGKILL as soon as the first epoch's checkpoint is there, then --resume, from the shell; beside a whole run."""
    whole = Path(script.main(tiny(script, tmp_path / "whole", "--epochs", 8))["folder"])
    folder = tmp_path / "cut" / whole.name
    process = start(script, *tiny(script, tmp_path / "cut", "--epochs", 8))
    wait_for(folder / "last.pt", process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = torch.load(folder / "last.pt", weights_only=True)["history"]
    assert 0 < len(done) < 8, "the run was over before it was killed"
    result = shell(script, *tiny(script, tmp_path / "cut", "--epochs", 8, "--resume"))
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1].endswith(str(folder)), "the last line names the folder"
    assert numbers(folder) == numbers(whole)
    states = [torch.load(f / "last.pt", weights_only=True) for f in (whole, folder)]
    assert same_state(*states)
    states[1]["rng"][100] ^= 1  # the comparison can fail
    assert not same_state(*states)


def start(script, *arguments):
    return subprocess.Popen([sys.executable, script.__file__, *map(str, arguments)], cwd=ROOT, stdout=subprocess.DEVNULL,
                            stderr=subprocess.PIPE, text=True, start_new_session=True)


def wait_for(path, process, seconds=60):
    end = time.time() + seconds
    while not path.exists():
        assert process.poll() is None and time.time() < end, f"no {path}"
        time.sleep(0.01)


def test_sigterm_leaves_a_valid_checkpoint(script, tmp_path):
    """To the whole process group, as schedulers send it, with a worker that reads files."""
    from test_common import write_folder

    flags = []
    if has_flags(script, ["--image-size"]):
        flags = ["--dataset", f"folder:{write_folder(tmp_path, 8)}", "--image-size", 32, "--batch-size", 8, "--workers", 1]
    process = start(script, *tiny(script, tmp_path / "runs", "--epochs", 1000, *flags))
    checkpoint = script.run_folder(script.parse_args(tiny(script, tmp_path / "runs", *flags))) / "last.pt"
    wait_for(checkpoint, process)
    os.killpg(process.pid, signal.SIGTERM)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 143 and error.count("\n") == 1 and "--resume" in error, error
    torch.load(checkpoint, weights_only=True)


@pytest.mark.parametrize("where", ["after_in_parent", "after_in_child"])
def test_sigterm_ends_the_run_where_an_exception_would_be_lost(script, where):
    """In a callback of a fork, and in a worker that was only just forked: one line, from the run's own process alone."""
    code = f"""
import os, signal, {name_of(script)} as script
script.end_on_sigterm()
def send():
    signal.raise_signal(signal.SIGTERM)
os.register_at_fork({where}=send)
child = os.fork()
if child:
    os.waitpid(child, 0)
    send()
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 143 and result.stderr.count("\n") == 1 and "--resume" in result.stderr, result.stderr


def test_ctrl_c_leaves_a_valid_checkpoint(script, tmp_path, capsys, monkeypatch):
    """In the second step of the second epoch."""
    step, calls = getattr(script, facts(script).step), []

    def interrupted_step(*args, **kwargs):
        calls.append(1)
        if len(calls) == 5:
            signal.raise_signal(signal.SIGINT)
        return step(*args, **kwargs)

    monkeypatch.setattr(script, facts(script).step, interrupted_step)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job's shell has it ignored
    try:
        with pytest.raises(SystemExit) as stop:
            script.main(tiny(script, tmp_path))
    finally:
        signal.signal(signal.SIGINT, before)
    error = capsys.readouterr().err
    assert stop.value.code == 130 and error.count("\n") == 1 and "--resume" in error, error
    (folder,) = tmp_path.iterdir()
    assert len(numbers(folder)) == 1
    torch.load(folder / "last.pt", weights_only=True)


def test_a_checkpoint_ahead_of_the_metrics_and_a_half_written_file_are_mended(script, tmp_path):
    """Killed between the checkpoint and the metrics line, or in the middle of a write."""
    folder = Path(script.main(tiny(script, tmp_path))["folder"])
    before = numbers(folder), (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text(before[1].splitlines()[0] + '\n{"epoch": 2, "lo')
    (folder / "last.pt.tmp").write_bytes(b"half a checkpo")
    (folder / "summary.json").unlink()
    script.main(tiny(script, tmp_path, "--resume"))
    assert numbers(folder) == before[0] and (folder / "summary.json").exists()


def test_resume_of_nothing_starts_and_of_a_finished_run_ends_at_once(script, tmp_path):
    first = script.main(tiny(script, tmp_path, "--resume"))
    assert script.main(tiny(script, tmp_path, "--resume")) == first


# ---------------------------------------- Nothing is read from the device inside an epoch ----------------------------


class CountReads(TorchDispatchMode):
    """Counts the operations that would wait for a GPU: reading a number (.item(), bool(), float()), boolean masks as
    indices, nonzero. Those that a CPU tensor answers without an operation are counted by `count_reads`."""

    def __init__(self):
        super().__init__()
        self.reads = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        aten, packet = torch.ops.aten, function.overloadpacket
        masks = [i for i in args[1] if i is not None and i.dtype == torch.bool] if packet in (aten.index, aten.index_put_) else []
        self.reads += packet in (aten._local_scalar_dense, aten.nonzero) or bool(masks)
        return function(*args, **(kwargs or {}))


@contextmanager
def count_reads():
    with CountReads() as mode, pytest.MonkeyPatch.context() as patch:
        for name in ("cpu", "tolist", "numpy", "__repr__"):
            original = getattr(torch.Tensor, name)

            def counted(*args, original=original, **kwargs):
                mode.reads += 1
                return original(*args, **kwargs)

            patch.setattr(torch.Tensor, name, counted)
        yield mode


def reads_of_a_run(script, out_dir, steps, *flags) -> int:
    with count_reads() as mode:
        script.main(tiny(script, out_dir, "--epochs", 1, facts(script).steps_flag, steps, *flags))
    return mode.reads


def test_an_epoch_reads_the_same_however_many_steps_it_has(script, tmp_path):
    for i, flags in enumerate(facts(script).reads):
        few, many = (reads_of_a_run(script, tmp_path / f"{i}-{n}", n, *flags) for n in (2, 7))
        assert few == many, flags


@pytest.mark.parametrize("read", [
    lambda t: t.item(), lambda t: bool(t > 0), lambda t: t.cpu(), lambda t: t.tolist(), lambda t: str(t), lambda t: t[t > 0],
], ids=["item", "bool", "cpu", "tolist", "print", "mask"])  # fmt: skip
def test_a_read_in_every_step_would_be_noticed(script, tmp_path, monkeypatch, read):
    step = getattr(script, facts(script).step)

    def reading_step(*args, **kwargs):
        result = step(*args, **kwargs)
        read(result[0] if isinstance(result, tuple) else result)
        return result

    monkeypatch.setattr(script, facts(script).step, reading_step)
    assert reads_of_a_run(script, tmp_path / "many", 7) >= reads_of_a_run(script, tmp_path / "few", 2) + 5


# ---------------------------------------- Wrong input ----------------------------------------


@pytest.mark.parametrize("arguments, said", [
    (["--dataset", "cifar1000"], "cifar100-20"),
    (["--dataset", "folder:/nowhere"], "/nowhere/train"),
    (["--backbone", "resnet19"], "resnet18"),
    (["--backbone", "nowhere.py:net"], "nowhere.py"),
    (["--backbone", "tests/nets.py:linear_first"], "last Linear"),
    (["--backbone", "vit_b_16"], "32x32"),
    (["--method", "best"], "choose from"),
    (["--epochs", "0"], "'0' is not a finite int from 1"),
    (["--epochs", "2.5"], "'2.5'"),
    (["--lr", "nan"], "'nan'"),
    (["--lr", "inf"], "'inf'"),
    (["--lr", "-1"], "'-1'"),
    (["--batch-size", "100000"], "100000"),
    (["--seed", "-1"], "'-1'"),
    (["--train-fraction", "1.5"], "'1.5'"),
    (["--device", "cuda:99"], "cuda:99"),
    (["--device", "gpu"], "cuda:N"),
    (["--cuda-graph"], "needs a CUDA device"),
    (["--no-such-flag"], "--no-such-flag"),
    (["--epoch", "3"], "--epoch"),
    (["--pretrained"], "nets.py"),
    (["--epochs", "9" * 400], "int from 1"),
    (["--lr", "1e300"], "'1e300'"),
    (["--device", "cuda:99999999999999999999"], "no device"),
    (["--backbone", "tests/nets.py:torch"], "nets.py"),
    (["--backbone", "resnet18:"], "unknown backbone"),
])  # fmt: skip
def test_wrong_arguments_get_one_line_and_code_2(script, tmp_path, capsys, arguments, said):
    if not has_flags(script, arguments):
        pytest.skip(f"{name_of(script)}.py has no {arguments[0]}")
    said = facts(script).unknown if said == "cifar100-20" else said
    assert said in refuses(script, capsys, *tiny(script, tmp_path / "runs"), *arguments)
    assert not (tmp_path / "runs").exists(), "nothing is left behind"


def test_wrong_argument_from_the_shell(script, tmp_path):
    result = shell(script, *tiny(script, tmp_path), "--lr", "nan")
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.startswith(f"{name_of(script)}.py: error: ") and result.stderr.count("\n") == 1


def test_missing_data_says_which_files_go_where(script, tmp_path, capsys, monkeypatch):
    import torchvision

    def no_network(*args, **kwargs):
        raise OSError("no network")

    dataset, downloaded, wanted = facts(script).missing
    monkeypatch.setattr(torchvision.datasets, downloaded, no_network)
    line = refuses(script, capsys, "--dataset", dataset, "--data-root", tmp_path / "data", "--out-dir", tmp_path / "runs")
    assert wanted in line and str(tmp_path / "data") in line and ("no network" in line) == facts(script).downloads


def test_a_run_is_never_overwritten(script, tmp_path, capsys):
    folder = Path(script.main(tiny(script, tmp_path, "--epochs", 1))["folder"])
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    assert "--resume" in refuses(script, capsys, *tiny(script, tmp_path, "--epochs", 1))
    assert "--resume" in refuses(script, capsys, *tiny(script, tmp_path, "--epochs", 1, "--seeds", 5, 0))
    assert "--lr" in refuses(script, capsys, *tiny(script, tmp_path, "--epochs", 1, "--resume", "--lr", 0.5))
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("name, text", [("last.pt", None), ("config.json", None), ("config.json", "{}"), ("config.json", "[]")])
def test_a_damaged_file_of_the_run_is_named(script, tmp_path, capsys, name, text):
    folder = Path(script.main(tiny(script, tmp_path, "--epochs", 1))["folder"])
    (folder / name).write_bytes((folder / name).read_bytes()[:100] if text is None else text.encode())
    assert str(folder / name) in refuses(script, capsys, *tiny(script, tmp_path, "--epochs", 1, "--resume"))


def test_a_run_from_before_a_flag_existed_goes_on(script, tmp_path):
    folder = Path(script.main(tiny(script, tmp_path))["folder"])
    config = json.loads((folder / "config.json").read_text())
    del config["arguments"]["lr"]
    (folder / "config.json").write_text(json.dumps(config))
    assert script.main(tiny(script, tmp_path, "--resume"))["epochs"] == 2


def test_an_out_dir_that_is_a_file_and_one_that_cannot_be_written(script, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert "file" in refuses(script, capsys, *tiny(script, tmp_path / "file"))
    if os.geteuid() != 0:  # root may write anywhere
        (tmp_path / "locked").mkdir(mode=0o500)
        assert "locked" in refuses(script, capsys, *tiny(script, tmp_path / "locked" / "runs"))


def test_other_threads_are_said_on_resume(script, tmp_path, capsys):
    script.main(tiny(script, tmp_path, "--epochs", 1))
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        script.main(tiny(script, tmp_path, "--epochs", 1, "--resume"))
    finally:
        torch.set_num_threads(before)
    assert f"threads was {before} and is now {before + 1}" in capsys.readouterr().out


def test_a_non_finite_loss_stops_with_code_3_and_keeps_the_checkpoint(script, tmp_path, capsys, monkeypatch):
    """From the second step of the second epoch on, the network's weights are infinite."""
    step, calls = getattr(script, facts(script).step), []

    def poisoned_step(network, *args, **kwargs):
        calls.append(1)
        if len(calls) >= 5:
            next(network.parameters()).data.mul_(math.inf)
        return step(network, *args, **kwargs)

    monkeypatch.setattr(script, facts(script).step, poisoned_step)
    with pytest.raises(SystemExit) as stop:
        script.main(tiny(script, tmp_path, "--epochs", 3))
    assert stop.value.code == 3
    error = capsys.readouterr().err
    assert "epoch 2" in error and "step 2" in error, error
    (folder,) = tmp_path.iterdir()
    assert len(numbers(folder)) == 1
    state = torch.load(folder / "last.pt", weights_only=True)
    assert all(t.isfinite().all() for network in facts(script).networks for t in state[network].values())


def test_a_network_ruined_by_the_last_step_is_not_saved(script, tmp_path, capsys, monkeypatch):
    """The loss before the last step is finite, what the step leaves is not."""
    step = getattr(script, facts(script).step)

    def ruining_step(network, *args, **kwargs):
        result = step(network, *args, **kwargs)
        next(network.parameters()).data.mul_(math.inf)
        return result

    monkeypatch.setattr(script, facts(script).step, ruining_step)
    with pytest.raises(SystemExit) as stop:
        script.main(tiny(script, tmp_path, "--epochs", 1, facts(script).steps_flag, 1, "--method", "single"))
    assert stop.value.code == 3 and "not finite" in capsys.readouterr().err
    assert not list(tmp_path.glob("*/last.pt"))


def test_plot_without_matplotlib_says_so_before_it_trains(script, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "matplotlib" in refuses(script, capsys, *tiny(script, tmp_path / "runs", "--plot"))


def test_plot_draws_the_curves(script, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is optional")
    folder = Path(script.main(tiny(script, tmp_path, "--plot"))["folder"])
    assert (folder / "curves.png").stat().st_size > 5000
