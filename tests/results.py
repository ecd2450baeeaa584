"""Several runs at once: tables, tests, curves, and the recorded results of this repository.

    python tests/results.py table runs/*                 mean, deviation and interval over seeds
    python tests/results.py compare runs/wamal-*-wamal-s* --against runs/wamal-*-single-s*
    python tests/results.py plot runs/* -o curves.png
    python tests/results.py plot runs/maoal-* -o alpha.png --metric importance    MAOAL's Fig. 4
    python tests/results.py plot runs/mnist-* -o mnist.png --by tasks    each method's last figures
    python tests/results.py record runs/* --group NAME   copy finished runs to tests/results/NAME/
    python tests/results.py readme                       rebuild tests/results/README.md's tables

A run is a folder that a script left, or a folder that holds such folders. Runs that differ in
nothing but their seed form a group; a group is named by what it differs in from the others.
Everything is read from config.json, metrics.jsonl and summary.json; no script is imported.

A recorded run lies in tests/results/GROUP/OUT-DIR/RUN/, where OUT-DIR is the last part of its
--out-dir. In tests/results/README.md, whatever stands between <!-- results: GROUP --> and
<!-- end --> is the table of a group. Between <!-- measured --> and <!-- end --> stands a table
written by hand whose first column is a command; its columns "measured", "seeds", "device" and
"minutes" are filled from the recorded runs with that command.
"""

import argparse
import json
import math
import os
import re
import shlex
import statistics
import sys
import textwrap
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "tests" / "results"
SCRIPTS = sorted(path.stem for path in ROOT.glob("*.py") if path.stem != "common")

# The metric that stands for a run, where --metric names none: the first of these that it has
MAIN_METRICS = ["test_accuracy", "test_error", "train_error", "test_rmse", "test_miou"]

# Arguments that change nothing about what a run's numbers mean; plot and analyze belong to versions
# of the scripts that some recorded runs were made with
NEUTRAL = {"seed", "seeds", "out_dir", "data_root", "workers", "device", "resume"}
NEUTRAL |= {"plot", "analyze", "cosine_batches", "cuda_graph"}


class InputError(ValueError):
    """The user's input is at fault: the message is one line that says what is wrong."""


@dataclass
class Run:
    """What a script left in a run folder, as read_run returns it.

    flags: the command line, by argument name: {"lr": ["0.1"], ...}. metrics: a dict an epoch.
    summary: None where there is no summary.json.
    """

    folder: Path
    script: str
    flags: dict
    arguments: dict
    machine: dict
    metrics: list
    summary: dict | None

    @property
    def seed(self) -> int:
        return self.arguments["seed"]

    @property
    def finished(self) -> bool:
        """Whether the run reached its last epoch."""
        return len(self.metrics) == self.arguments["epochs"]


# -------- Reading runs -------------------------------------------------------------------------


def read_runs(paths: list, finished: bool = True) -> list[Run]:
    """The runs in these folders and below them, each once.

    Raises InputError for a folder without runs, and for an unfinished run if `finished`.
    """
    folders = []
    for path in map(Path, paths):
        if not path.is_dir():
            reason = "it is no folder" if path.exists() else "there is no such folder"
            raise InputError(f"{path}: {reason}")
        found = [config.parent for config in sorted(path.rglob("config.json"))]
        if not found:
            raise InputError(f"{path}: there is no run in it, for it has no config.json")
        known = {folder.resolve() for folder in folders}
        folders += [folder for folder in found if folder.resolve() not in known]

    runs = [read_run(folder) for folder in folders]
    for run in runs:
        if finished and not run.finished:
            done = f"{len(run.metrics)} of {run.arguments['epochs']} epochs"
            raise InputError(f"{run.folder}: not finished, it has {done}")
    return runs


def read_run(folder: Path) -> Run:
    """One run's files. Raises InputError where they are missing or cannot be read."""
    folder = Path(folder)
    config = read_json(folder / "config.json")
    metrics = read_json(folder / "metrics.jsonl", lines=True)
    summary = None
    if (folder / "summary.json").exists():
        summary = read_json(folder / "summary.json")

    try:
        program, *tokens = config["command"].split()
        config["arguments"]["seed"], config["arguments"]["epochs"]
        script = Path(program).stem
        if script not in SCRIPTS:  # started from a notebook or a test
            script = folder.resolve().name.partition("-")[0]
        return Run(
            folder=folder,
            script=script,
            flags=parse_flags(tokens),
            arguments=config["arguments"],
            machine=config.get("machine", {}),
            metrics=metrics,
            summary=summary,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{folder / 'config.json'}: not a run's ({error!r})") from error


def read_json(path: Path, lines: bool = False):
    """A JSON file's content; lines: a list with one object a line, at least one."""
    if not path.exists():
        raise InputError(f"{path.parent}: the run has no {path.name}")
    try:
        text = path.read_text()
        content = [json.loads(line) for line in text.splitlines()] if lines else json.loads(text)
    except ValueError as error:
        raise InputError(f"{path}: cannot be read ({error})") from error
    if lines and not content:
        raise InputError(f"{path.parent}: the run has no epoch in its {path.name}")
    return content


def parse_flags(tokens: list[str]) -> dict[str, list[str]]:
    """The flags of a command line by argument name, each with its values as they were written."""
    flags = {}
    values = []  # of the flag before the present token
    for token in tokens:
        if token.startswith("--"):
            flag, equals, value = token[2:].partition("=")
            values = [value] if equals else []
            flags[flag.replace("-", "_")] = values
        else:
            values.append(token)
    return flags


# -------- Groups -------------------------------------------------------------------------------


def group_runs(runs: list[Run]) -> dict[str, list[Run]]:
    """Runs that differ in nothing but their seed, by the group's name, sorted by seed.

    Raises InputError where a group has the same seed twice: such runs are one sample, not two.
    """
    by_meaning = {}
    for run in runs:
        by_meaning.setdefault(meaning(run), []).append(run)

    groups = {}
    names = name_groups([members[0] for members in by_meaning.values()])
    for name, members in zip(names, by_meaning.values(), strict=True):
        if name in groups:
            raise InputError(f"{members[0].folder}: another group is called {name}, too")
        groups[name] = sorted(members, key=lambda run: run.seed)
        for first, second in zip(groups[name], groups[name][1:], strict=False):
            if first.seed == second.seed:
                both = f"{first.folder} and {second.folder}"
                raise InputError(f"{both} have the same settings and the same seed")
    return groups


def meaning(run: Run, besides: str = "seed") -> str:
    """Equal for two runs that differ in nothing but their seed, and the argument `besides`.

    An option that is off counts as one that the script of an older run did not have yet.
    """
    arguments = {}
    for name, value in run.arguments.items():
        off = value is None or value is False
        if name not in NEUTRAL and name != besides and not off:
            arguments[name] = value
    return json.dumps([run.script, arguments], sort_keys=True)


def name_groups(representatives: list[Run]) -> list[str]:
    """A name for each of these runs: what it differs in from the others."""
    if len(representatives) == 1:
        (run,) = representatives
        return [" ".join([run.script, *(run.arguments.get(n, "") for n in ("dataset", "method"))])]

    several_scripts = len({run.script for run in representatives}) > 1
    differing = find_differing(representatives)
    given = {"dataset", "method"}.union(*(run.flags for run in representatives))
    asked_for = [name for name in differing if name in given]  # not what follows from a method

    names = [describe(run, asked_for, several_scripts) for run in representatives]
    if len(set(names)) < len(names):
        names = [describe(run, differing, several_scripts) for run in representatives]
    return names


def find_differing(runs: list[Run]) -> list[str]:
    """The arguments in which runs of the same script differ; data set and method: of any."""
    differing = []
    for name in dict.fromkeys(name for run in runs for name in run.arguments):
        compared = {}
        for run in runs:
            script = "any" if name in ("dataset", "method") else run.script
            compared.setdefault(script, set()).add(json.dumps(run.arguments.get(name)))
        if name not in NEUTRAL and any(len(values) > 1 for values in compared.values()):
            differing.append(name)
    return sorted(differing, key=lambda name: (name != "dataset", name != "method"))


def describe(run: Run, names: list[str], with_script: bool) -> str:
    """The run's values of the named arguments, as in "single, lr 0.1, no pretrained"."""
    parts = []
    for name in names:
        value = run.arguments.get(name)
        flag = name.replace("_", "-")
        if name not in run.arguments:
            continue
        if name in ("dataset", "method"):
            parts.append(str(value))
        elif isinstance(value, bool):
            parts.append(flag if value else f"no {flag}")
        elif isinstance(value, list):
            parts.append(" ".join([flag, *map(str, value)]))
        else:
            parts.append(f"{flag} {'default' if value is None else value}")
    script = f"{run.script} " if with_script else ""
    return (script + ", ".join(parts)).strip()


# -------- Metrics ------------------------------------------------------------------------------


def known_metrics(run: Run) -> list[str]:
    """The names of the numbers that the run's epochs and its summary hold."""
    lines = [*run.metrics, run.summary or {}]
    names = {name for line in lines for name, value in line.items() if is_number(value)}
    return sorted(names - {"epoch", "epochs", "iteration", "iterations"})


def is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def choose_metric(runs: list[Run], metric: str | None = None) -> str:
    """The metric asked for, or the one that stands for these runs.

    Raises InputError where a run lacks it, and where the runs' main metrics differ.
    """
    if metric is None:
        mains = [next((m for m in MAIN_METRICS if m in known_metrics(run)), None) for run in runs]
        if len(set(mains)) > 1 or mains[0] is None:
            raise InputError("these runs have no main metric in common: choose one with --metric")
        return mains[0]
    for run in runs:
        known = known_metrics(run)
        if metric not in known:
            raise InputError(f"{run.folder} has no metric {metric}; it has {', '.join(known)}")
    return metric


def final_value(run: Run, metric: str) -> float:
    """The metric after the last epoch; from the summary if the epochs do not log it."""
    value = run.metrics[-1].get(metric)
    if not is_number(value):
        value = (run.summary or {}).get(metric)
    if not is_number(value):
        raise InputError(f"{run.folder} has no {metric} after its last epoch")
    if not math.isfinite(value):
        raise InputError(f"{run.folder}: {metric} is {value} after its last epoch")
    return value


def unit(metric: str) -> str:
    """The unit of a metric, or "" for a pure number."""
    if metric.endswith("_per_second"):
        return metric.removesuffix("_per_second") + "/s"
    if "depth" in metric:  # the relative error is a share
        return "" if "relative" in metric else "m"
    if re.search(r"accuracy|error|miou|within", metric):
        return "%"
    if re.search(r"normal_(mean|median|rmse)", metric):
        return "degrees"
    if metric == "seconds":
        return "s"
    if metric.startswith("milliseconds"):
        return "ms"
    if metric.endswith("_mib"):
        return "MiB"
    return ""


def format_value(value: float, metric: str) -> str:
    """Two decimals for percentages and degrees, four significant digits for the rest."""
    if unit(metric) in ("%", "degrees"):
        return f"{value:.2f}"
    return f"{value:.4g}"


# -------- Statistics ---------------------------------------------------------------------------


def half_interval(values: list[float]) -> float | None:
    """Half the 95 % interval of the mean, Student's t with n - 1 degrees; None of one value."""
    from scipy.stats import t

    n = len(values)
    if n < 2:
        return None
    return float(t.ppf(0.975, n - 1)) * statistics.stdev(values) / math.sqrt(n)


def welch(a: list[float], b: list[float]) -> dict | None:
    """Welch's two-sided t-test of mean(a) - mean(b): variances may differ.

    Returns difference, low and high (its 95 % interval), t, df and p; None where a side has one
    value, or where neither side varies.
    """
    from scipy.stats import ttest_ind

    if min(len(a), len(b)) < 2 or statistics.stdev(a) + statistics.stdev(b) == 0:
        return None
    result = ttest_ind(a, b, equal_var=False)
    interval = result.confidence_interval(0.95)
    return {
        "difference": statistics.fmean(a) - statistics.fmean(b),
        "low": float(interval.low),
        "high": float(interval.high),
        "t": float(result.statistic),
        "df": float(result.df),
        "p": float(result.pvalue),
    }


# -------- table, compare -----------------------------------------------------------------------


def make_table(runs: list[Run], metric: str | None = None) -> str:
    """Markdown: n, mean, sample standard deviation and 95 % t interval of each group."""
    metric = choose_metric(runs, metric)
    lines = [
        f"| {label(metric)} | n | mean | standard deviation | 95 % interval |",
        "|---|---|---|---|---|",
    ]
    for name, members in group_runs(runs).items():
        values = [final_value(run, metric) for run in members]
        mean = statistics.fmean(values)
        half = half_interval(values)
        if half is None:
            deviation = interval = "n/a"
        else:
            deviation = format_value(statistics.stdev(values), metric)
            low = format_value(mean - half, metric)
            high = format_value(mean + half, metric)
            interval = f"{low} to {high}"
        mean = format_value(mean, metric)
        lines.append(f"| {name} | {len(values)} | {mean} | {deviation} | {interval} |")
    return "\n".join(lines)


def make_comparison(runs: list[Run], against: list[Run], metric: str | None = None) -> str:
    """Markdown: Welch's test of each group of `runs` with each group of `against`."""
    metric = choose_metric([*runs, *against], metric)
    ours = {meaning(run) for run in runs}
    theirs = {meaning(run) for run in against}
    if ours & theirs:
        raise InputError("the same group stands on both sides of --against")

    groups = group_runs([*runs, *against])
    first = {name: members for name, members in groups.items() if meaning(members[0]) in ours}
    second = {name: members for name, members in groups.items() if meaning(members[0]) in theirs}
    lines = [
        f"| {label(metric)} | n | difference of means | 95 % interval | t | df | p |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, members in first.items():
        for other_name, other_members in second.items():
            a = [final_value(run, metric) for run in members]
            b = [final_value(run, metric) for run in other_members]
            cells = [f"{name} - {other_name}", f"{len(a)}, {len(b)}", *compare_cells(a, b, metric)]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def compare_cells(a: list[float], b: list[float], metric: str) -> list[str]:
    """Difference, interval, t, df and p as text."""
    test = welch(a, b)
    if test is None:
        difference = statistics.fmean(a) - statistics.fmean(b)
        return [format_value(difference, metric), "n/a", "n/a", "n/a", "n/a"]
    low = format_value(test["low"], metric)
    high = format_value(test["high"], metric)
    return [
        format_value(test["difference"], metric),
        f"{low} to {high}",
        f"{test['t']:.2f}",
        f"{test['df']:.2f}",
        "< 0.0001" if test["p"] < 1e-4 else f"{test['p']:.2g}",
    ]


def label(metric: str) -> str:
    """The metric's name in words, with its unit: "test accuracy (%)"."""
    words = metric.replace("_", " ").replace("miou", "mIoU")
    if not unit(metric):
        return words
    return f"{words} ({unit(metric)})"


# -------- plot ---------------------------------------------------------------------------------


def draw(runs: list[Run], metric: str | None = None):
    """A matplotlib figure: each group's mean over its seeds, with the 95 % interval.

    The x axis counts iterations where the metrics do, epochs elsewhere. A group's curve covers
    the epochs that all its seeds have; with one seed it has no interval.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    metric = choose_metric(runs, metric)
    groups = group_runs(runs)
    axis = choose_axis(runs)
    few = len(groups) <= 6

    figure = Figure(figsize=(7.0 if few else 10.0, 4.5), dpi=150, layout="constrained")
    axes = figure.subplots()
    colors = choose_colors(len(groups))
    steps = set()
    for number, (name, members) in enumerate(groups.items()):
        x, means, halves = make_curve(members, axis, metric)
        steps.update(x)
        style = {
            "label": f"{name} (n = {len(members)})",
            "color": colors[number],
            "marker": "osD^vP"[number % 6],
            "markersize": 4,
            "markevery": math.ceil(len(x) / 20),
        }
        if len(x) == 1:  # a band of one point could not be seen: bars, side by side
            beside = x[0] * (1 + 0.05 * (number - (len(groups) - 1) / 2))
            axes.errorbar([beside], means, yerr=halves, capsize=4, **style)
            continue
        axes.plot(x, means, **style)
        if halves is not None:
            low = [mean - half for mean, half in zip(means, halves, strict=True)]
            high = [mean + half for mean, half in zip(means, halves, strict=True)]
            alpha = 0.15 if few else 0.08
            axes.fill_between(x, low, high, color=colors[number], alpha=alpha, linewidth=0)

    if len(steps) == 1:
        axes.set_xticks(list(steps))
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel(axis)
    axes.set_ylabel(label(metric))
    axes.grid(alpha=0.3)
    axes.set_title(make_title(groups), fontsize="medium")
    if few:
        axes.legend(fontsize="small")
    else:
        figure.legend(loc="outside right upper", fontsize="small")
    return figure


def draw_importance(runs: list[Run]):
    """MAOAL's Fig. 4, a matplotlib figure: the importance of each module over training.

    A panel for each group and auxiliary task, a curve for each module: the mean over the seeds with
    its 95 % interval.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    flat_runs = []
    for run in runs:
        if not all(isinstance(line.get("importance"), dict) for line in run.metrics):
            raise InputError(f"{run.folder} has no importance: maoal.py --method maoal logs it")
        flat_runs.append(replace(run, metrics=[flatten_importance(line) for line in run.metrics]))

    panels = []
    for name, members in group_runs(flat_runs).items():
        panels += [(name, members, task) for task in members[0].metrics[0]["importance"]]
    columns = min(len(panels), 4)
    rows = math.ceil(len(panels) / columns)
    size = (4.0 * columns + 1.5, 3.2 * rows)
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes in grid[len(panels) :]:
        axes.remove()
    for axes, (name, members, task) in zip(grid, panels, strict=False):
        modules = members[0].metrics[0]["importance"][task]
        for color, module in zip(choose_colors(len(modules)), modules, strict=True):
            x, means, halves = make_curve(members, "epoch", f"{task}: {module}")
            axes.plot(x, means, color=color, label=module)
            if halves is not None:
                low = [mean - half for mean, half in zip(means, halves, strict=True)]
                high = [mean + half for mean, half in zip(means, halves, strict=True)]
                axes.fill_between(x, low, high, color=color, alpha=0.1, linewidth=0)
        axes.set_title(f"{name}: {task}", fontsize="medium")
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend(fontsize="x-small")
    grid[0].set_ylabel("importance")
    return figure


def flatten_importance(line: dict) -> dict:
    """An epoch's metrics, to which the importance of each module is added: "task: module"."""
    flat = dict(line)
    for task, row in line["importance"].items():
        flat.update({f"{task}: {module}": value for module, value in row.items()})
    return flat


def draw_by(runs: list[Run], argument: str, metric: str | None = None, baseline: str | None = None):
    """A matplotlib figure: the metric after the last epoch over an argument, a curve for a method.

    baseline: a method. Each run's metric is then divided by that of this method's run with the
    same argument and seed. A point is the mean over the seeds, with its 95 % interval.
    """
    from matplotlib.figure import Figure

    metric = choose_metric(runs, metric)
    argument = argument.replace("-", "_")
    finals = {}
    groups = {}  # of runs that differ in their seeds
    firsts = {}  # each method's first run
    for run in runs:
        method = run.arguments["method"]
        x = run.arguments.get(argument)
        if not is_number(x):
            known = sorted(name for name, value in run.arguments.items() if is_number(value))
            raise InputError(f"{run.folder} has no number {argument}; it has {', '.join(known)}")
        first = firsts.setdefault(method, run)
        if meaning(run, besides=argument) != meaning(first, besides=argument):
            both = f"{run.folder} and {first.folder}"
            raise InputError(f"{both} differ in more than {argument} and seed")
        if (method, x, run.seed) in finals:
            raise InputError(f"{run.folder}: another run has its method, seed and {argument}")
        finals[method, x, run.seed] = final_value(run, metric)
        groups.setdefault((method, x), []).append(run)

    points = {}  # values over the seeds by method and x
    for (method, x, seed), value in finals.items():
        if baseline == method:
            continue
        if baseline is not None:
            if (baseline, x, seed) not in finals:
                raise InputError(f"there is no run of {baseline} with {argument} {x}, seed {seed}")
            if finals[baseline, x, seed] == 0:
                raise InputError(f"{baseline} has {metric} 0 with {argument} {x}, seed {seed}")
            value = value / finals[baseline, x, seed]
        points.setdefault(method, {}).setdefault(x, []).append(value)
    if not points:
        raise InputError(f"all these runs are of {baseline}: there is nothing to compare with it")

    figure = Figure(figsize=(7.0, 4.5), dpi=150, layout="constrained")
    axes = figure.subplots()
    for number, (method, values) in enumerate(sorted(points.items())):
        x = sorted(values)
        means = [statistics.fmean(values[at]) for at in x]
        halves = []
        for at in x:
            half = half_interval(values[at])
            halves.append(math.nan if half is None else half)  # of one seed, no bar
        marker = "osD^vP"[number % 6]
        axes.errorbar(x, means, yerr=halves, label=method, marker=marker, capsize=4)
    axes.set_xticks(sorted({x for _, x, _ in finals}))
    axes.set_xlabel(argument)
    axes.set_ylabel(label(metric))
    if baseline is not None:
        axes.set_ylabel(f"{label(metric).partition(' (')[0]} / that of {baseline}")
        axes.axhline(1.0, color="gray", linewidth=1)
    axes.grid(alpha=0.3)
    axes.set_title(make_title(groups), fontsize="medium")
    axes.legend(fontsize="small")
    return figure


def make_title(groups: dict) -> str:
    """What all curves have in common: the data set, and how the seeds are drawn.

    groups: lists of runs that differ in nothing but their seed, by any name.
    """
    runs = [run for members in groups.values() for run in members]
    parts = []
    datasets = {run.arguments.get("dataset") for run in runs}
    if len(datasets) == 1:
        parts.append(str(datasets.pop()))
    if len(runs) > len(groups):
        parts.append("mean over seeds with 95 % t interval")
    return ": ".join(parts)


def choose_axis(runs: list[Run]) -> str:
    """What the x axis counts: iterations if every run logs them, else epochs."""
    for name in ("iteration", "iterations"):
        if all(name in line for run in runs for line in run.metrics):
            return name
    return "epoch"


def choose_colors(count: int) -> list:
    """So many colours that are told apart."""
    from matplotlib import colormaps

    if count <= 10:
        return [f"C{number}" for number in range(count)]
    return [colormaps["turbo"]((number + 0.5) / count) for number in range(count)]


def make_curve(runs: list[Run], axis: str, metric: str):
    """x, mean and half the 95 % interval (None of one seed) where all these runs have a value."""
    curves = []
    for run in runs:
        points = {}
        for line in run.metrics:
            value = line.get(metric)
            if is_number(value) and math.isfinite(value):
                points[line[axis]] = value
        if not points:
            raise InputError(f"{run.folder} has {metric} in its summary alone: there is no curve")
        curves.append(points)

    x = [step for step in curves[0] if all(step in points for points in curves)]
    if not x:
        raise InputError(f"the runs like {runs[0].folder} have no {axis} in common")
    values = [[points[step] for points in curves] for step in x]
    means = [statistics.fmean(v) for v in values]
    if len(runs) == 1:
        return x, means, None
    return x, means, [half_interval(v) for v in values]


# -------- record -------------------------------------------------------------------------------


def record(paths: list, group: str, results: Path) -> list[Path]:
    """Copy finished runs' config, metrics and summary to results/GROUP; returns the new folders.

    Absolute paths are cut to their last part: they tell of a machine, not of a run. Raises
    InputError for an unfinished run and for one that is there already; then nothing is copied.
    """
    runs = read_runs(paths)
    targets = []
    for run in runs:
        if run.summary is None:
            raise InputError(f"{run.folder}: not finished, it has no summary.json")
        out_dir = run.folder.resolve().parent.name
        target = results / group / out_dir / run.folder.resolve().name
        if target.exists() or target in targets:
            raise InputError(f"{target}: there is a run already")
        targets.append(target)

    for run, target in zip(runs, targets, strict=True):
        config = read_json(run.folder / "config.json")
        config["command"] = " ".join(map(without_folders, config["command"].split()))
        metrics = "".join(json.dumps(without_machine(line)) + "\n" for line in run.metrics)
        target.mkdir(parents=True)
        (target / "config.json").write_text(dump(without_machine(config)))
        (target / "metrics.jsonl").write_text(metrics)
        (target / "summary.json").write_text(dump(without_machine(run.summary)))
    return targets


def dump(content: dict) -> str:
    return json.dumps(content, indent=2) + "\n"


def without_machine(content):
    """The same JSON with every text that is an absolute path cut to the path's last part."""
    if isinstance(content, dict):
        return {name: without_machine(value) for name, value in content.items()}
    if isinstance(content, list):
        return [without_machine(value) for value in content]
    if isinstance(content, str):
        return without_folders(content)
    return content


def without_folders(text: str) -> str:
    """/a/b/c to c, also in --flag=/a/b/c and in folder:/a/b/c; other texts as they are."""
    match = re.fullmatch(r"(--[\w-]+=|folder:|)(/.*|~.*|\.\./.*)", text)
    if match is None:
        return text
    return match[1] + os.path.basename(match[2].rstrip("/"))


# -------- readme -------------------------------------------------------------------------------


def rebuild(text: str, results: Path) -> str:
    """The text of tests/results/README.md with its tables made anew from the recorded runs."""
    groups = sorted(path.name for path in results.iterdir() if path.is_dir())
    for group in groups:
        if f"<!-- results: {group} -->" not in text:
            raise InputError(f"tests/results/README.md has no <!-- results: {group} -->")
    runs = read_runs([results / group for group in groups])
    begun = len(re.findall(r"<!-- (?:results: \S+|measured) -->\n", text))
    if begun != text.count("<!-- end -->"):
        raise InputError("tests/results/README.md: a table lacks its <!-- end -->")

    def make_anew(match):
        """The table of a group."""
        begin, group, _, end = match.groups()
        if group not in groups:
            raise InputError(f"there is no recorded group {group}; there are {', '.join(groups)}")
        return begin + recorded_table(read_runs([results / group])) + end

    def fill(match):
        """The table that was written by hand."""
        begin, table, end = match.groups()
        return begin + fill_table(table, runs) + end

    group_block = r"(<!-- results: (\S+) -->\n)(.*?)(<!-- end -->)"
    measured_block = r"(<!-- measured -->\n)(.*?)(<!-- end -->)"
    text = re.sub(group_block, make_anew, text, flags=re.DOTALL)
    return re.sub(measured_block, fill, text, flags=re.DOTALL)


def recorded_table(runs: list[Run]) -> str:
    """Markdown: the flags that all runs have in common, and a row for each group's own command."""
    groups = list(group_runs(runs).values())
    commands = [own_flags(members[0].flags) for members in groups]
    common = [flag for flag in commands[0] if all(flag in command for command in commands)]
    common = [flag for flag in common if not flag.startswith("--mode ")]  # others depend on it
    lines = []
    if common:
        flags = textwrap.wrap(f"`{' '.join(common)}`.", 100, break_on_hyphens=False)
        lines += ["All with", *flags, ""]
    lines += [
        "The last epoch's metric, mean and half the 95 % t interval over the seeds:",
        "",
        "| command | result | each seed | seeds | device | minutes a run |",
        "|---|---|---|---|---|---|",
    ]
    rows = {}
    columns = ["measured", "each seed", "seeds", "device", "minutes"]
    for members, command in zip(groups, commands, strict=True):
        own = [flag for flag in command if flag not in common]
        command = " ".join(["python", f"{members[0].script}.py", *own])
        if command in rows:
            folder = members[0].folder
            raise InputError(f"{folder}: another run has its command, with other arguments")
        cells = describe_group(members)
        rows[command] = f"| `{command}` | {' | '.join(cells[column] for column in columns)} |"
    return "\n".join([*lines, *(rows[command] for command in sorted(rows))]) + "\n"


def own_flags(flags: dict[str, list[str]]) -> list[str]:
    """The flags that say what a run is, each with its values: ["--lr 0.1", ...]."""
    own = []
    for name, values in flags.items():
        if name not in NEUTRAL:
            own.append(shlex.join([f"--{name.replace('_', '-')}", *values]))
    return own


def describe_group(runs: list[Run]) -> dict[str, str]:
    """The cells of a group's row: measured, each seed, seeds, device and minutes."""
    metric = choose_metric(runs)
    values = [final_value(run, metric) for run in runs]
    half = half_interval(values)
    measured = format_value(statistics.fmean(values), metric)
    if half is not None:
        measured += f" +- {format_value(half, metric)}"

    devices = dict.fromkeys(device_of(run) for run in runs)
    minutes = statistics.fmean(final_value(run, "seconds") for run in runs) / 60
    return {
        "measured": measured,
        "each seed": ", ".join(format_value(value, metric) for value in values),
        "seeds": " ".join(str(run.seed) for run in runs),
        "device": "; ".join(devices),
        "minutes": f"{minutes:.1f}",
    }


def device_of(run: Run) -> str:
    """What a run was made on: a GPU's name, or a CPU's threads."""
    device = run.machine.get("device", "")
    threads = run.machine.get("threads", 0)
    if device == "cpu":
        return f"CPU, {threads} thread{'s' if threads > 1 else ''}"
    return device


def fill_table(table: str, runs: list[Run]) -> str:
    """The table with the cells below "measured", "seeds", "device", "minutes" from the runs.

    A row's runs are those whose script and flags are the row's; flags that change nothing about
    the result (--seed, --device, --out-dir, ...) may differ.
    """
    header, rule, *rows = table.splitlines()
    columns = [cell.strip() for cell in header.strip("|").split("|")]
    lines = [header, rule]
    for row in rows:
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        script, *tokens = shlex.split(cells[0].strip("`").removeprefix("python "))
        wanted = sorted(own_flags(parse_flags(tokens)))
        found = [run for run in runs if f"{run.script}.py" == script]
        found = [run for run in found if sorted(own_flags(run.flags)) == wanted]
        figures = {}
        if found:
            groups = list(group_runs(found).values())
            if len(groups) > 1:
                folders = f"{groups[0][0].folder} and {groups[1][0].folder}"
                raise InputError(f"{folders} have the same command and other arguments")
            figures = describe_group(groups[0])
        for number, column in enumerate(columns):
            if column in ("measured", "seeds", "device", "minutes"):
                cells[number] = figures.get(column, "")
        lines.append("|" + "".join(f" {cell} |" if cell else " |" for cell in cells))
    return "\n".join(lines) + "\n"


# -------- Command line -------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """Wrong usage is one line and exit code 2, as every other fault."""

    def error(self, message):
        fail(message)


def fail(message):
    print(f"results.py: error: {' '.join(str(message).split())}", file=sys.stderr)
    raise SystemExit(2)


def parse_args(argv=None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    runs = {"nargs": "+", "metavar": "RUN", "help": "a run's folder, or a folder of such folders"}
    metric = {"metavar": "NAME", "help": "one of the metrics (default: test accuracy, or the like)"}

    table = commands.add_parser("table", help="mean, deviation and 95 %% interval by group")
    table.add_argument("runs", **runs)
    table.add_argument("--metric", **metric)

    compare = commands.add_parser("compare", help="Welch's t-test between groups")
    compare.add_argument("runs", **runs)
    compare.add_argument("--against", required=True, **runs)
    compare.add_argument("--metric", **metric)

    plot = commands.add_parser("plot", help="curves by group, mean and 95 %% interval")
    plot.add_argument("runs", **runs)
    plot.add_argument("-o", "--output", required=True, metavar="FILE", help="the picture, as PNG")
    drawn = metric | {"help": f"{metric['help']}, or importance: maoal.py's, by module"}
    plot.add_argument("--metric", **drawn)
    by = "the last epoch's metric over this argument, a curve for each method"
    plot.add_argument("--by", metavar="ARGUMENT", help=by)
    baseline = "with --by: divided by this method's metric for the same argument and seed"
    plot.add_argument("--baseline", metavar="METHOD", help=baseline)

    recording = commands.add_parser("record", help="copy finished runs to tests/results/")
    recording.add_argument("runs", **runs)
    recording.add_argument("--group", required=True, metavar="NAME", help="tests/results/NAME/")

    readme = commands.add_parser("readme", help="rebuild the tables of tests/results/README.md")
    readme.add_argument("--check", action="store_true", help="only compare; exit 1 if they differ")
    return parser.parse_args(argv)


def run_command(args) -> int:
    """Do what the command line asks for; returns the exit code."""
    if args.command == "table":
        print(make_table(read_runs(args.runs), args.metric))
    elif args.command == "compare":
        print(make_comparison(read_runs(args.runs), read_runs(args.against), args.metric))
    elif args.command == "plot":
        if not args.output.endswith(".png"):
            raise InputError(f"-o {args.output}: the picture's name must end with .png")
        if args.baseline is not None and args.by is None:
            raise InputError("--baseline goes with --by")
        runs = read_runs(args.runs, finished=args.by is not None)
        if args.by is not None:
            figure = draw_by(runs, args.by, args.metric, args.baseline)
        elif args.metric == "importance":
            figure = draw_importance(runs)
        else:
            figure = draw(runs, args.metric)
        figure.savefig(args.output)
        print(args.output)
    elif args.command == "record":
        for folder in record(args.runs, args.group, RESULTS):
            print(folder)
    else:
        path = RESULTS / "README.md"
        before = path.read_text()
        after = rebuild(before, RESULTS)
        if args.check and before != after:
            print("tests/results/README.md differs from the runs: python tests/results.py readme")
            return 1
        if not args.check:
            path.write_text(after)
    return 0


def main(argv=None) -> int:
    """Run the command line; returns the exit code."""
    args = parse_args(argv)
    try:
        return run_command(args)
    except ModuleNotFoundError as error:
        fail(f"this needs the package {error.name}: pip install {error.name}")
    except (InputError, OSError) as error:
        fail(error)


if __name__ == "__main__":
    sys.exit(main())
