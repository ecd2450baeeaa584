"""What every script promises, whatever its method: a script is held to it by its line in SCRIPTS.

What stands in the last section, whose text is the same in all six, is tested on wamal.py alone.
"""

import argparse
import ast
import importlib
import inspect
import io
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from conftest import ROOT
from PIL import Image

NETS = str(ROOT / "tests/nets.py")
IMAGES = ["--dataset", "synthetic", "--backbone", f"{NETS}:mlp", "--epochs", "2"]
SCENES = "--mode combine --dataset synthetic-scenes --width 2 --levels 2"
SMALL_SUPERNET = ["--crop", "16", "--width", "2", "--depth", "1", "1", "1", "1", "1"]


class Facts(NamedTuple):
    """What the tests must know of a script."""

    tiny: list[str]  # arguments of two epochs of three steps, in a second or so, on made-up data
    networks: list[str]  # the entries of its checkpoint that must change in that run
    step: str = "primary_step"  # what each step calls, network first; a tensor or a tuple with one
    steps_flag: str = "--max-steps"  # how many steps an epoch has
    metric: str = "test_accuracy"
    best: Callable = max
    known: str = "cifar100-20"  # a data set that the error about an unknown one must name
    missing: tuple[str, str] = ("cifar100-20", "cifar-100-python.tar.gz")  # data set, what to put
    flags: Sequence[str] = ("",)  # of the runs whose steps are seen not to read from the device


SCRIPTS = {
    "wamal": Facts(
        tiny=[*IMAGES, "--max-steps", "3"],
        networks=["primary", "label_network"],
        flags=[
            "",
            "--aux-set 0.2",
            "--method human",
            "--method single",
            "--weighting batch",
            "--normalize-weights",
        ],
    ),
    "maxl": Facts(
        tiny=[*IMAGES, "--max-steps", "3"],
        networks=["primary", "label_network"],
        flags=[
            "",
            "--held-out 0.2",
            "--method maxl-first-order",
            "--method maxl-latent",
            "--method random",
            "--method single",
            "--same-iteration",
            "--no-mask",
            "--cosine-batches 2",
        ],
    ),
    "auxilearn": Facts(
        tiny=[*IMAGES, "--max-steps", "3"],
        networks=["primary", "combiner", "label_network"],
        step="lower_step",
        flags=[
            "",
            "--aux-set 0",
            "--combiner nonlinear",
            SCENES,
            f"{SCENES} --combiner conv --upper-every 1",
            f"{SCENES} --method gcs",
        ],
    ),
    "soft_order": Facts(
        tiny=["--dataset", "synthetic", "--epochs", "2", "--epoch-steps", "3"],
        networks=["network"],
        step="training_step",
        steps_flag="--epoch-steps",
        metric="test_error",
        best=min,
        known="omniglot",
        missing=("mnist", "train-images-idx3-ubyte"),
        flags=[
            "",
            "--method parallel",
            "--method permuted",
            "--method single",
            "--dropout 0.5 --identity-layer",
            "--dataset random --samples 20",
        ],
    ),
    "maoal": Facts(
        tiny=[*IMAGES, "--max-steps", "3", "--lower-steps", "2"],
        networks=["network", "learned"],
        step="lower_step",
        flags=[
            "",
            "--method auxl",
            "--method uncertainty",
            "--method gcs",
            "--method single",
            "--interval 1",
            "--partition parameter",
            "--preset published-code",
            "--dataset synthetic-scenes --backbone tests/nets.py:stages --batch-size 4",
            "--dataset synthetic-ratings",
        ],
    ),
    "mtl_nas": Facts(
        tiny=[
            *["--dataset", "synthetic-scenes", *SMALL_SUPERNET],
            *["--epochs", "2", "--epoch-steps", "3"],
        ],
        networks=["network"],
        step="weight_step",
        steps_flag="--epoch-steps",
        metric="test_miou",
        known="synthetic-scenes",
        missing=("nyuv2", "nyuv2/{train,val}"),
        flags=[
            "",
            "--relaxation deterministic --discretization deterministic",
            "--method supernet",
            "--method nddr",
            "--method multi-task",
            "--method single",
        ],
    ),
}

SHARED = [
    *["fail", "number", "choose_device", "run_folder", "holds_run", "lock_folder", "open_run"],
    *["write_bytes", "write_text", "write_metrics", "finish_epoch", "load_checkpoint", "speed"],
    *["check_finite", "log_epoch", "summarize", "run_seeds"],
]
TIMINGS = {"seconds", "images_per_second"}
READS = "# The epoch's figures: its only reads from the device"


@pytest.fixture(scope="module", params=SCRIPTS)
def script(request):
    return importlib.import_module(request.param)


@pytest.fixture(scope="module")
def wamal():
    return importlib.import_module("wamal")


def name_of(script) -> str:
    return Path(script.__file__).stem


def facts(script) -> Facts:
    return SCRIPTS[name_of(script)]


def tiny(script, out_dir, *more) -> list[str]:
    """The arguments of the script's tiny run."""
    return [*facts(script).tiny, "--device", "cpu", "--out-dir", str(out_dir), *map(str, more)]


def parser_of(script) -> argparse.ArgumentParser:
    """The script's parser, caught as it parses."""
    caught = []
    original = argparse.ArgumentParser.parse_args

    def parse(parser, *args):
        caught.append(parser)
        return original(parser, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse)
        script.parse_args([])
    return caught[0]


def numbers(folder) -> list[dict]:
    """The run's metrics without what the clock decides."""
    lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMINGS} for line in lines]


def checkpoint(folder) -> dict:
    return torch.load(Path(folder) / "last.pt", weights_only=True)


def same_state(a, b) -> bool:
    """Two checkpoints, entry by entry, bit by bit; their histories without what the clock says."""
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


@contextmanager
def patched_step(script, before=None, after=None):
    """Call before(network, n) or after(network, result, n) around the n-th step, n from 1."""
    step = getattr(script, facts(script).step)
    calls = []

    def patched(network, *args, **kwargs):
        calls.append(1)
        if before is not None:
            before(network, len(calls))
        result = step(network, *args, **kwargs)
        if after is not None:
            after(network, result, len(calls))
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, facts(script).step, patched)
        yield


def run_in_fork(run) -> int:
    """Run it in a child process; returns what os.wait says of its end, 0 if nothing was raised."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            run()
            code = 0
        finally:
            os._exit(code)
    return os.waitpid(child, 0)[1]


@pytest.fixture(scope="module")
def finished(script, tmp_path_factory):
    """A finished tiny run: its summary, and the checkpoint's state after each epoch."""
    states = []
    finish_epoch = script.finish_epoch

    def watched(folder, state, *args):
        finish_epoch(folder, state, *args)
        states.append(checkpoint(folder))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "finish_epoch", watched)
        summary = script.main(tiny(script, tmp_path_factory.mktemp("finished")))
    return summary, states


# ---------------------------------------- Shape ----------------------------------------


def test_sections_come_in_the_common_order(script):
    source = Path(script.__file__).read_text()
    banners = re.findall(r"^# -------- (.+?) -+$", source, re.MULTILINE)
    assert banners[:2] == ["Networks", "Losses"]
    assert banners[-5:] == [
        "Training",
        "Data and networks of the run",
        "Evaluation, and what the paper shows",
        "Command line",
        "Device and run folder: the same in every script",
    ]
    order = [source.index(f"\ndef {name}(") for name in ("train", "evaluate", "parse_args", "main")]
    assert order == sorted(order)
    last = source[source.index("# -------- Device and run folder") :]
    assert re.findall(r"^def (\w+)", last, re.MULTILINE) == SHARED
    assert source.startswith('"""') and source.rstrip().endswith("main()")
    assert len(script.__doc__.splitlines()) <= 36
    assert source.count(READS) == 1


def test_the_last_section_is_the_same_text_in_every_script(script, wamal):
    for name in SHARED:
        ours, first = (inspect.getsource(getattr(module, name)) for module in (script, wamal))
        assert ours == first, f"{name} has drifted"


def test_no_line_is_wider_than_100_columns():
    for path in [*ROOT.glob("*.py"), *ROOT.glob("tests/*.py")]:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            assert len(line) <= 100, f"{path.name}:{number}"


def test_scripts_import_no_sibling_and_public_functions_are_documented(script):
    tree = ast.parse(Path(script.__file__).read_text())
    imported = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    imported |= {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert not imported & (SCRIPTS.keys() - {name_of(script)})
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            assert ast.get_docstring(node), node.name


def test_every_flag_has_a_help_sentence_and_the_common_ones_are_there(script):
    flags = [action for action in parser_of(script)._actions if action.dest != "help"]
    assert all(action.help for action in flags)
    wanted = "dataset data_root method epochs max_steps batch_size lr seeds device out_dir resume"
    assert set(wanted.split()) <= {action.dest for action in flags}


def test_help(script, capsys):
    with pytest.raises(SystemExit) as stop:
        script.main(["--help"])
    captured = capsys.readouterr()
    assert stop.value.code == 0 and "--dataset" in captured.out and captured.err == ""


# ---------------------------------------- A run ----------------------------------------


def test_a_run_leaves_its_files_and_sums_them_up(script, finished):
    summary, _ = finished
    folder = Path(summary["folder"])
    files = {p.name for p in folder.iterdir()}
    assert {"config.json", "last.pt", "metrics.jsonl", "summary.json"} <= files
    assert not [name for name in files if name.endswith(".tmp")]
    assert json.loads((folder / "summary.json").read_text()) == summary

    config = json.loads((folder / "config.json").read_text())
    assert config["machine"]["threads"] == torch.get_num_threads()
    assert config["arguments"]["seed"] == 0

    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    metric = facts(script).metric
    assert [line["epoch"] for line in metrics] == [1, 2]
    assert all(line["images_per_second"] > 0 for line in metrics)
    figures = [name for name in metrics[-1] if name.startswith("test_")]
    figures = [name for name in figures if isinstance(metrics[-1][name], float)]
    for name in {metric, *figures}:
        assert summary[name] == metrics[-1][name]
        mean = (metrics[0][name] + metrics[1][name]) / 2
        assert summary[f"{name}_last15"] == pytest.approx(mean)
    assert summary[f"best_{metric}"] == facts(script).best(line[metric] for line in metrics)


def test_an_epoch_changes_every_network(script, finished):
    _, (first, second) = finished
    for network in facts(script).networks:
        for name, value in first[network].items():
            if name.endswith("weight"):
                assert not torch.equal(value, second[network][name]), f"{network}.{name}"


def test_another_seed_gives_other_numbers(script, finished, tmp_path):
    other = script.main(tiny(script, tmp_path, "--seed", 4, "--epochs", 1))
    assert numbers(other["folder"])[0] != numbers(finished[0]["folder"])[0]


def test_killed_and_resumed_it_ends_with_the_same_bits(script, finished, tmp_path):
    """SIGKILL in the second step of the second epoch, then --resume; beside the whole run."""

    def kill(network, n):
        if n == 5:
            os.kill(os.getpid(), signal.SIGKILL)

    def run():
        with patched_step(script, before=kill):
            script.main(tiny(script, tmp_path))

    assert run_in_fork(run) == signal.SIGKILL
    whole = Path(finished[0]["folder"])
    folder = tmp_path / whole.name
    assert len(checkpoint(folder)["history"]) == 1

    script.main(tiny(script, tmp_path, "--resume"))
    assert numbers(folder) == numbers(whole)
    states = [checkpoint(whole), checkpoint(folder)]
    assert same_state(*states)
    states[1]["rng"][100] ^= 1  # the comparison can fail
    assert not same_state(*states)
    assert {p.name for p in folder.iterdir()} == {p.name for p in whole.iterdir()}


def test_killed_while_a_checkpoint_is_written_the_one_before_stays(wamal, tmp_path):
    """Half a file is written when SIGKILL comes, in the second epoch."""
    write = Path.write_bytes
    written = []

    def half(path, contents):
        if path.name != "last.pt.tmp":
            return write(path, contents)
        written.append(1)
        if len(written) == 2:
            write(path, contents[: len(contents) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        return write(path, contents)

    def run():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Path, "write_bytes", half)
            wamal.main(tiny(wamal, tmp_path / "cut"))

    assert run_in_fork(run) == signal.SIGKILL
    (folder,) = (tmp_path / "cut").iterdir()
    assert (folder / "last.pt.tmp").exists() and len(checkpoint(folder)["history"]) == 1
    wamal.main(tiny(wamal, tmp_path / "cut", "--resume"))
    whole = wamal.main(tiny(wamal, tmp_path / "whole"))["folder"]
    assert same_state(checkpoint(folder), checkpoint(whole))
    assert not (folder / "last.pt.tmp").exists()


def test_a_full_disk_is_one_line_and_the_run_goes_on_once_there_is_room(wamal, tmp_path, capsys):
    """Files of this process may not grow beyond half a checkpoint, from the second epoch on."""
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write then fails with an OSError

    def fill(network, n):
        if n == 4:
            (path,) = tmp_path.glob("*/last.pt")
            resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size // 2, limits[1]))

    try:
        with patched_step(wamal, before=fill):
            error = refuses(wamal, capsys, *tiny(wamal, tmp_path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    (folder,) = tmp_path.iterdir()
    assert f"cannot write {folder / 'last.pt'}: File too large" in error
    assert not (folder / "last.pt.tmp").exists() and len(checkpoint(folder)["history"]) == 1
    assert wamal.main(tiny(wamal, tmp_path, "--resume"))["epochs"] == 2


@pytest.mark.parametrize("name", ["wamal", "maxl", "soft_order"])
def test_a_picture_is_written_whole_or_not_at_all(name, tmp_path, capsys, monkeypatch):
    """By the function that writes checkpoints, then."""
    script = importlib.import_module(name)
    write = script.write_bytes

    def full(path, contents):
        if path.suffix == ".png":
            raise script.InputError(f"cannot write {path}: no room")
        write(path, contents)

    monkeypatch.setattr(script, "write_bytes", full)
    assert "cannot write" in refuses(script, capsys, *tiny(script, tmp_path))
    assert not list(tmp_path.rglob("*.png"))


def test_a_folder_that_vanishes_is_one_line(wamal, tmp_path, capsys):
    def remove(network, n):
        if n == 2:
            shutil.rmtree(tmp_path / "runs")

    with patched_step(wamal, before=remove):
        error = refuses(wamal, capsys, *tiny(wamal, tmp_path / "runs"))
    assert "cannot write" in error and "last.pt: No such file or directory" in error


def test_a_second_process_on_the_same_run_ends_with_one_line(wamal, tmp_path, capsys):
    """While the first trains; it is refused fresh and with --resume, the first goes on."""
    statuses = []

    def second(*flags):
        statuses.append(run_in_fork(lambda: refuses(wamal, capsys, *tiny(wamal, tmp_path), *flags)))

    def meet(network, n):
        if n == 2:
            second()
        if n == 5:
            second("--resume")

    with patched_step(wamal, before=meet):
        folder = Path(wamal.main(tiny(wamal, tmp_path))["folder"])
    assert statuses == [0, 0], "the second process was let in"
    assert len(numbers(folder)) == 2
    assert run_in_fork(lambda: wamal.main(tiny(wamal, tmp_path, "--resume"))) == 0


def test_a_lost_checkpoint_is_not_overwritten(wamal, tmp_path, capsys):
    """People delete checkpoints to save space; what is left of the run is theirs."""
    folder = Path(wamal.main(tiny(wamal, tmp_path))["folder"])
    for name in ("last.pt", "config.json"):
        contents = (folder / name).read_bytes()
        (folder / name).unlink()
        before = {p.name: p.read_bytes() for p in folder.iterdir()}
        assert "--resume" in refuses(wamal, capsys, *tiny(wamal, tmp_path))
        assert f"lost its {name}" in refuses(wamal, capsys, *tiny(wamal, tmp_path, "--resume"))
        assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
        (folder / name).write_bytes(contents)


def test_a_run_without_a_finished_epoch_may_be_started_afresh(wamal, tmp_path):
    """With other arguments, and nothing to delete by hand."""

    def interrupt(network, n):
        raise KeyboardInterrupt

    with patched_step(wamal, before=interrupt), pytest.raises(SystemExit):
        wamal.main(tiny(wamal, tmp_path))
    summary = wamal.main(tiny(wamal, tmp_path, "--lr", 0.5))
    config = json.loads((Path(summary["folder"]) / "config.json").read_text())
    assert config["arguments"]["lr"] == 0.5


def test_too_little_memory_is_one_line(wamal, tmp_path, capsys):
    """What torch says of 2^60 bytes on the CPU, and of a GPU."""
    gpu = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has")
    for cause, size in ((None, "bytes"), (gpu, "20.00 MiB")):

        def ask(network, n, cause=cause):
            if cause is not None:
                raise cause
            torch.empty(2**58)

        with patched_step(wamal, before=ask):
            error = refuses(wamal, capsys, *tiny(wamal, tmp_path))
        assert "out of memory" in error and size in error and "--batch-size" in error


@pytest.mark.parametrize(
    "name, network, said",
    [
        ("wamal", "no_forward_mode", "jvp"),
        ("maxl", "no_forward_mode", "jvp"),
        ("auxilearn", "no_second_derivative --upper-every 2", "hardsigmoid"),
        ("maoal", "no_second_derivative", "hardsigmoid"),
    ],
)
def test_a_layer_without_the_derivative_that_a_step_takes_is_one_line(
    name, network, said, tmp_path, capsys
):
    """The methods without such a step train it."""
    script = importlib.import_module(name)
    flags = f"--backbone {NETS}:{network}".split()
    assert said in refuses(script, capsys, *tiny(script, tmp_path), *flags)
    script.main([*tiny(script, tmp_path), *flags[:2], "--method", "single"])


def write_pictures(folder: Path) -> str:
    """--dataset for twelve pictures of two classes, read by workers."""
    for part in ("train", "test"):
        for name in ("cat", "dog"):
            (folder / part / name).mkdir(parents=True)
            for i in range(6):
                Image.new("RGB", (40, 40)).save(folder / part / name / f"{i}.png")
    return f"folder:{folder}"


def reading_pictures(dataset: str, out_dir) -> list[str]:
    small = ["--image-size", "32", "--batch-size", "2", "--backbone", f"{NETS}:mlp"]
    return ["--dataset", dataset, *small, "--workers", "2", "--out-dir", str(out_dir)]


def test_a_worker_that_dies_is_one_line(wamal, tmp_path, capsys, monkeypatch):
    """Also where all die at once: torch's own handler would raise again while one is reported."""

    def kill(network, n):
        if n == 2:
            for worker in multiprocessing.active_children():
                worker.kill()

    wait = torch.utils.data.dataloader._MultiProcessingDataLoaderIter._try_get_data
    monkeypatch.setattr(wait, "__defaults__", (0.1,))  # the time until workers are looked at
    before = signal.getsignal(signal.SIGCHLD)
    arguments = reading_pictures(write_pictures(tmp_path / "pictures"), tmp_path / "runs")
    with patched_step(wamal, before=kill):
        assert "--workers 0" in refuses(wamal, capsys, *arguments)
    assert signal.getsignal(signal.SIGCHLD) is before


def test_ctrl_c_reaches_all_processes_and_is_one_line(wamal, tmp_path):
    """As a terminal sends it: to the workers as well. Once an epoch is finished, and so saved."""
    arguments = reading_pictures(write_pictures(tmp_path / "pictures"), tmp_path / "runs")
    process = subprocess.Popen(
        [sys.executable, wamal.__file__, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # a background job's shell has it ignored
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    for line in process.stdout:
        if line.startswith("epoch 1"):
            break
    os.killpg(process.pid, signal.SIGINT)
    error = process.communicate()[1]
    assert process.returncode == 130
    assert error.count("\n") == 1 and "--resume" in error, error


def test_metrics_behind_the_checkpoint_are_mended(wamal, tmp_path):
    """Killed between the checkpoint and the metrics line."""
    folder = Path(wamal.main(tiny(wamal, tmp_path))["folder"])
    before = numbers(folder)
    first = (folder / "metrics.jsonl").read_text().splitlines()[0]
    (folder / "metrics.jsonl").write_text(first + '\n{"epoch": 2, "lo')
    (folder / "summary.json").unlink()
    wamal.main(tiny(wamal, tmp_path, "--resume"))
    assert numbers(folder) == before and (folder / "summary.json").exists()


def test_resume_of_nothing_starts_and_of_a_finished_run_ends_at_once(wamal, tmp_path):
    first = wamal.main(tiny(wamal, tmp_path, "--resume"))
    assert wamal.main(tiny(wamal, tmp_path, "--resume")) == first


def test_seeds_run_in_turn_and_are_summed_up(wamal, tmp_path, capsys):
    summary = wamal.main(tiny(wamal, tmp_path, "--epochs", 1, "--seeds", 0, 1, 2))
    values = [run["test_accuracy"] for run in summary["runs"]]
    mean = sum(values) / 3
    std = math.sqrt(sum((v - mean) ** 2 for v in values) / 2)
    assert abs(summary["test_accuracy"] - mean) < 1e-9
    assert abs(summary["test_accuracy_std"] - std) < 1e-9
    assert len(list(tmp_path.iterdir())) == 3
    assert f"{mean:.4g} +- {std:.2g}" in capsys.readouterr().out.splitlines()[-1]


def test_a_terminal_that_lacks_a_folders_letters_shows_escapes(wamal, tmp_path, monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    wamal.main(tiny(wamal, tmp_path / "\u2192", "--epochs", 1))
    terminal.flush()
    assert rb"\u2192" in terminal.buffer.getvalue().splitlines()[-1]


def test_ctrl_c_leaves_a_valid_checkpoint(wamal, tmp_path, capsys):
    """In the second step of the second epoch."""

    def interrupt(network, n):
        if n == 5:
            signal.raise_signal(signal.SIGINT)

    # a background job's shell has it ignored
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with patched_step(wamal, before=interrupt), pytest.raises(SystemExit) as stop:
            wamal.main(tiny(wamal, tmp_path))
    finally:
        signal.signal(signal.SIGINT, before)
    error = capsys.readouterr().err
    assert stop.value.code == 130 and error.count("\n") == 1 and "--resume" in error, error
    (folder,) = tmp_path.iterdir()
    assert len(checkpoint(folder)["history"]) == 1


def test_a_non_finite_network_stops_with_code_3_and_keeps_the_checkpoint(script, tmp_path, capsys):
    """The last step of the second epoch leaves it so; the loss before that step was finite."""

    def ruin(network, result, n):
        if n == 6:
            next(network.parameters()).data.mul_(math.inf)

    with patched_step(script, after=ruin), pytest.raises(SystemExit) as stop:
        script.main(tiny(script, tmp_path, "--method", "single"))
    assert stop.value.code == 3
    assert "epoch 2" in capsys.readouterr().err
    (folder,) = tmp_path.iterdir()
    state = checkpoint(folder)
    assert len(state["history"]) == len(numbers(folder)) == 1
    values = [t for t in state[facts(script).networks[0]].values() if t.is_floating_point()]
    assert all(t.isfinite().all() for t in values)


def test_a_non_finite_loss_stops_with_code_3(script, tmp_path, capsys):
    """From the second step on, the network's weights are infinite."""

    def poison(network, n):
        if n >= 2:
            next(network.parameters()).data.mul_(math.inf)

    with patched_step(script, before=poison), pytest.raises(SystemExit) as stop:
        script.main(tiny(script, tmp_path, "--epochs", 1))
    assert stop.value.code == 3
    assert "epoch 1" in capsys.readouterr().err
    assert not list(tmp_path.glob("*/last.pt"))


# ---------------------------------------- Wrong input ----------------------------------------

WRONG = [
    ("--dataset cifar1000", "KNOWN"),
    ("--dataset folder:/nowhere", "/nowhere/train"),
    ("--backbone resnet19", "known are FILE.py:FUNCTION, vgg16-cifar, resnet18-cifar"),
    ("--backbone nowhere.py:net", "backbone nowhere.py:net: no file /"),
    (f"--backbone {NETS}:linear_first", "last Linear"),
    (f"--backbone {NETS}:for_64_pixels", "32x32"),
    (f"--backbone {NETS}:no_parameters", "has nothing to train"),
    (f"--backbone {NETS}:torch", "nets.py"),
    (f"--backbone {NETS}:no_linear", "nets.py:no_linear: a ReLU without a Linear layer"),
    ("--backbone=", "unknown backbone ''"),
    ("--backbone resnet18:", "unknown backbone"),
    ("--method best", "choose from"),
    ("--epochs 0", "'0' is not a finite int from 1"),
    ("--epochs 2.5", "'2.5'"),
    ("--epochs " + "9" * 400, "int from 1"),
    ("--lr nan", "'nan'"),
    ("--lr inf", "'inf'"),
    ("--lr -1", "'-1'"),
    ("--lr 1e300", "'1e300'"),
    ("--batch-size 100000", "100000"),
    ("--seed -1", "'-1'"),
    ("--train-fraction 1.5", "'1.5'"),
    ("--device cuda:99", "cuda:99"),
    ("--device gpu", "there are cpu"),
    ("--device cuda:99999999999999999999", "no device"),
    ("--no-such-flag", "--no-such-flag"),
    ("--epoch 3", "--epoch"),
    ("--pretrained", "nets.py"),
]


def has_flag(script, arguments: str) -> bool:
    """Whether these arguments make sense for the script."""
    if arguments.startswith("--dataset folder:"):
        flag = "image_size"
    elif arguments == "--pretrained":  # of a backbone that has no weights
        flag = "backbone"
    else:
        flag = re.match(r"--([\w-]+)", arguments)[1].replace("-", "_")
    if flag in ("no_such_flag", "epoch", "seed"):
        return True
    if name_of(script) == "soft_order" and flag in ("backbone", "image_size"):
        return False  # for celeba alone: test_soft_order.py
    return hasattr(script.parse_args([]), flag)


@pytest.mark.parametrize("arguments, said", WRONG, ids=[a[:40] for a, _ in WRONG])
def test_wrong_arguments_get_one_line_and_code_2(script, tmp_path, capsys, arguments, said):
    if not has_flag(script, arguments):
        pytest.skip(f"{name_of(script)}.py has no such flag")
    if said == "KNOWN":
        said = facts(script).known
    error = refuses(script, capsys, *tiny(script, tmp_path / "runs"), *arguments.split())
    assert said in error
    assert not (tmp_path / "runs").exists(), "nothing is left behind"


@pytest.mark.parametrize("name", ["wamal", "maxl", "auxilearn"])
@pytest.mark.parametrize("method", ["single", "human"])
def test_sub_classes_are_refused_where_none_are_made_up(name, method, tmp_path, capsys):
    script = importlib.import_module(name)
    arguments = tiny(script, tmp_path, "--psi", 3, "--method", method)
    assert "--psi is for" in refuses(script, capsys, *arguments)


def test_no_pretrained_is_known_to_each_script_that_advises_it(script):
    """The error of weights that cannot be had names it: common.load_pretrained."""
    dataset = ["--dataset", "celeba"] if name_of(script) == "soft_order" else []
    assert script.parse_args([*dataset, "--no-pretrained"]).pretrained is False


def test_a_wrong_argument_from_the_shell(wamal, tmp_path):
    """Also that Python's own traceback and the usage text stay away."""
    command = [sys.executable, wamal.__file__, *tiny(wamal, tmp_path), "--lr", "nan"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.startswith("wamal.py: error: ") and result.stderr.count("\n") == 1


def test_missing_data_says_which_files_go_where(script, tmp_path, capsys, monkeypatch):
    import torchvision

    def no_network(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(torchvision.datasets, "CIFAR100", no_network)
    monkeypatch.setattr(torchvision.datasets, "MNIST", no_network)
    dataset, wanted = facts(script).missing
    places = ["--data-root", tmp_path / "data", "--out-dir", tmp_path / "runs"]
    error = refuses(script, capsys, "--dataset", dataset, *places)
    assert wanted in error and str(tmp_path / "data") in error
    assert ("no network" in error) == (dataset != "nyuv2")  # which nothing downloads


def test_a_run_is_never_overwritten(wamal, tmp_path, capsys):
    folder = Path(wamal.main(tiny(wamal, tmp_path, "--epochs", 1))["folder"])
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    again = tiny(wamal, tmp_path, "--epochs", 1)
    assert "--resume" in refuses(wamal, capsys, *again)
    assert "--resume" in refuses(wamal, capsys, *again, "--seeds", 5, 0)
    assert "--lr" in refuses(wamal, capsys, *again, "--resume", "--lr", 0.5)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert len(list(tmp_path.iterdir())) == 1


DAMAGE = [("last.pt", None), ("config.json", None), ("config.json", "{}"), ("config.json", "[]")]


@pytest.mark.parametrize("name, text", DAMAGE)
def test_a_damaged_file_of_the_run_is_named(wamal, tmp_path, capsys, name, text):
    folder = Path(wamal.main(tiny(wamal, tmp_path, "--epochs", 1))["folder"])
    path = folder / name
    path.write_bytes(path.read_bytes()[:100] if text is None else text.encode())
    assert str(path) in refuses(wamal, capsys, *tiny(wamal, tmp_path, "--epochs", 1, "--resume"))


def test_an_out_dir_that_is_a_file_and_one_that_cannot_be_written(wamal, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert "file" in refuses(wamal, capsys, *tiny(wamal, tmp_path / "file"))
    assert "--out-dir is empty" in refuses(wamal, capsys, *tiny(wamal, ""))
    for flag in ("--out-dir", "--data-root"):
        nobody = ["--dataset", "cifar10", flag, "~nobody-of-this-name/runs"]
        assert "home directory" in refuses(wamal, capsys, *tiny(wamal, tmp_path, *nobody))
    if os.geteuid() != 0:  # root may write anywhere
        (tmp_path / "locked").mkdir(mode=0o500)
        assert "locked" in refuses(wamal, capsys, *tiny(wamal, tmp_path / "locked" / "runs"))
