"""tests/results.py: its statistics against hand-written formulas and the papers' tables, its
pictures against the data, and the recorded results against their files."""

import json
import math
import re
import shutil
import statistics

import pytest
import results
from results import RESULTS, InputError, draw, make_comparison, make_table, read_runs

README = RESULTS / "README.md"


def make_run(
    root, method="wamal", seed=0, values=(50.0,), name="test_accuracy", epochs=None, **more
):
    """A finished run's folder with these values of a metric, one an epoch.

    more: further arguments; those named in `flags`, if any, are on the command line too.
    """
    flags = {key: more[key] for key in more.pop("flags", ())}
    command = f"wamal.py --method {method} --seed {seed} " + " ".join(
        f"--{key.replace('_', '-')} {value}" for key, value in flags.items()
    )
    arguments = {"dataset": "synthetic", "method": method, "seed": seed, "out_dir": str(root)}
    arguments |= {"data_root": "/somewhere/data", "epochs": epochs or len(values)} | more
    folder = root / "-".join(["wamal", "synthetic", method, *map(str, flags.values()), f"s{seed}"])
    folder.mkdir(parents=True)
    machine = {"device": "cpu", "threads": 1}
    config = {"arguments": arguments, "machine": machine, "command": command.strip()}
    (folder / "config.json").write_text(json.dumps(config))
    lines = [
        {"epoch": number, name: value, "psi": [5], "seconds": 60.0 * number}
        for number, value in enumerate(values, 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    summary = {name: values[-1], f"best_{name}": max(values), "folder": str(folder)}
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def make_seeds(root, method, mean, deviation, **more):
    """Three runs of this mean and sample standard deviation."""
    values = [mean - deviation, mean, mean + deviation]
    return [make_run(root, method, seed, [v], **more) for seed, v in enumerate(values)]


def error_of(capsys, *argv) -> str:
    """What results.py says on stderr, after exit code 2."""
    with pytest.raises(SystemExit) as exit_:
        results.main([str(argument) for argument in argv])
    assert exit_.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("results.py: error: ") and message.count("\n") == 1
    return message


# -------- Statistics ---------------------------------------------------------------------------


def test_the_interval_is_students():
    """With 97.5 % quantiles from a printed table of the t distribution."""
    for values, quantile in (
        ([1.0, 4.0], 12.706),
        ([31.0, 32.0, 36.0], 4.303),
        ([1, 2, 3, 5, 8], 2.776),
    ):
        n = len(values)
        mean = sum(values) / n
        variance = sum((value - mean) ** 2 for value in values) / (n - 1)
        expected = quantile * math.sqrt(variance / n)
        assert results.half_interval(values) == pytest.approx(expected, rel=3e-4)
    assert results.half_interval([1.0]) is None


def t_tail(t: float, df: float) -> float:
    """P(|T| > |t|) of Student's t, by Simpson's rule over its density."""
    scale = math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2)) / math.sqrt(df * math.pi)
    n = 2000
    inside = 0.0
    for i in range(n + 1):
        weight = 1 if i in (0, n) else 4 if i % 2 else 2
        inside += weight * scale * (1 + (i / n * t) ** 2 / df) ** (-(df + 1) / 2)
    return 1 - 2 * inside * abs(t) / n / 3


def test_welch_is_the_formula():
    a = [78.1, 79.4, 80.2, 81.0]
    b = [73.5, 77.9, 75.0]
    test = results.welch(a, b)
    error_a = statistics.variance(a) / len(a)
    error_b = statistics.variance(b) / len(b)
    error = math.sqrt(error_a + error_b)
    df = error**4 / (error_a**2 / (len(a) - 1) + error_b**2 / (len(b) - 1))

    assert test["difference"] == pytest.approx(sum(a) / 4 - sum(b) / 3)
    assert test["t"] == pytest.approx(test["difference"] / error)
    assert test["df"] == pytest.approx(df)
    assert test["p"] == pytest.approx(t_tail(test["t"], df), abs=1e-8)
    assert (test["low"] + test["high"]) / 2 == pytest.approx(test["difference"])
    half = (test["high"] - test["low"]) / 2
    assert t_tail(half / error, df) == pytest.approx(0.05, abs=1e-8)


def test_welch_regenerates_wamals_tables_7_and_11(tmp_path):
    """From the means and deviations of its Tables 6 and 10, of 3 runs each, in percent."""
    rows = {}
    for dataset, figures in (
        ("cifar100-20", {"single": (73.78, 0.28), "maxl": (77.26, 0.05), "wamal": (80.22, 0.23)}),
        ("svhn", {"single": (93.95, 0.03), "maxl": (94.54, 0.12), "wamal": (95.54, 0.12)}),
    ):
        for method, (mean, deviation) in figures.items():
            rows[dataset, method] = make_seeds(tmp_path / dataset, method, mean, deviation)

    def differs(dataset, first, second, difference, low, high, p):
        text = make_comparison(read_runs(rows[dataset, first]), read_runs(rows[dataset, second]))
        cells = [cell.strip() for cell in text.splitlines()[-1].strip("|").split("|")]
        found = [float(number) for number in (cells[2], *cells[3].split(" to "))]
        assert found == pytest.approx([difference, low, high], abs=0.015)
        if p < 1e-4:
            assert cells[6] == "< 0.0001"
        else:
            assert float(cells[6]) == pytest.approx(p, rel=0.15)  # the tables round the deviations

    differs("cifar100-20", "single", "maxl", -3.48, -4.14, -2.82, 0.0016)
    differs("cifar100-20", "single", "wamal", -6.44, -7.03, -5.85, 1e-5)
    differs("cifar100-20", "maxl", "wamal", -2.96, -3.50, -2.42, 0.0013)
    differs("svhn", "maxl", "wamal", -1.00, -1.27, -0.73, 5.2e-4)


# -------- table, compare -----------------------------------------------------------------------


def test_table_groups_by_everything_but_the_seed(tmp_path):
    make_seeds(tmp_path, "wamal", 80.0, 1.0, lr=0.01, flags=["lr"])
    make_seeds(tmp_path, "wamal", 70.0, 2.0, lr=0.1, flags=["lr"])
    make_run(tmp_path, "single", 0, [60.0], lr=0.01, flags=["lr"], clip=3)
    expected = """\
| test accuracy (%) | n | mean | standard deviation | 95 % interval |
|---|---|---|---|---|
| single, lr 0.01 | 1 | 60.00 | n/a | n/a |
| wamal, lr 0.01 | 3 | 80.00 | 1.00 | 77.52 to 82.48 |
| wamal, lr 0.1 | 3 | 70.00 | 2.00 | 65.03 to 74.97 |"""
    assert make_table(read_runs([tmp_path])) == expected
    best = make_table(read_runs([tmp_path]), "best_test_accuracy")
    assert best == expected.replace("test accuracy", "best test accuracy")


def test_groups_have_names_that_tell_them_apart(tmp_path):
    single = make_run(tmp_path / "a", "wamal", aux_set=0.0)
    other = make_run(tmp_path / "b", "wamal", aux_set=0.1)  # on no command line
    names = list(results.group_runs(read_runs([single, other])))
    assert names == ["aux-set 0.0", "aux-set 0.1"]
    assert list(results.group_runs(read_runs([single]))) == ["wamal synthetic wamal"]
    values = {"same_iteration": True, "mask": False, "crop": None, "psi": [3, 2]}
    run = read_runs([make_run(tmp_path / "c", **values)])[0]
    text = results.describe(run, [*values, "unknown"], with_script=True)
    assert text == "wamal same-iteration, no mask, crop default, psi 3 2"


def test_compare_takes_each_group_with_each_other_one(tmp_path, capsys):
    wamal = make_seeds(tmp_path, "wamal", 80.0, 1.0)
    maxl = make_seeds(tmp_path, "maxl", 78.0, 1.0)
    single = make_run(tmp_path, "single", 0, [70.0])
    text = make_comparison(read_runs([*wamal, *maxl]), read_runs([single]))
    assert "| wamal - single | 3, 1 | 10.00 | n/a | n/a | n/a | n/a |" in text
    assert "| maxl - single | 3, 1 | 8.00 | n/a | n/a | n/a | n/a |" in text
    assert "both sides" in error_of(capsys, "compare", *wamal, "--against", wamal[0], single)


def test_what_is_wrong_is_said_in_one_line(tmp_path, capsys):
    run = make_run(tmp_path / "good", values=[1.0, 2.0])
    assert "no such folder" in error_of(capsys, "table", tmp_path / "nothing")
    assert "--against" in error_of(capsys, "compare", run)
    assert "COMMAND" in error_of(capsys)
    message = error_of(capsys, "table", run, "--metric", "accuracy")
    assert "it has best_test_accuracy, seconds, test_accuracy" in message and "psi" not in message
    assert "no curve" in error_of(
        capsys, "plot", run, "-o", tmp_path / "a.png", "--metric", "best_test_accuracy"
    )
    assert ".png" in error_of(capsys, "plot", run, "-o", tmp_path / "a.jpg")
    assert "nowhere" in error_of(capsys, "plot", run, "-o", tmp_path / "nowhere" / "a.png")

    (tmp_path / "empty").mkdir()
    assert "no config.json" in error_of(capsys, "table", tmp_path / "empty")
    twice = shutil.copytree(run, tmp_path / "again" / run.name)
    assert "the same settings and the same seed" in error_of(capsys, "table", run, twice)
    assert len(read_runs([run, run.parent / ".." / "good"])) == 1, "each once"
    (tmp_path / "a.txt").write_text("")
    assert "it is no folder" in error_of(capsys, "table", tmp_path / "a.txt")
    endless = make_run(tmp_path / "endless", values=[math.inf])
    assert "test_accuracy is inf after its last epoch" in error_of(capsys, "table", endless)
    ratings = make_run(tmp_path / "ratings", "equal", name="test_rmse")
    assert "--metric" in error_of(capsys, "table", run, ratings)

    half = make_run(tmp_path / "half", values=[1.0], epochs=2)
    assert "1 of 2 epochs" in error_of(capsys, "table", half)
    (half / "metrics.jsonl").write_text("")
    assert "no epoch" in error_of(capsys, "plot", half, "-o", tmp_path / "a.png")
    (half / "metrics.jsonl").unlink()
    assert "no metrics.jsonl" in error_of(capsys, "table", half)
    (half / "config.json").write_text("{")
    assert "cannot be read" in error_of(capsys, "table", half)


def test_a_missing_package_is_named(tmp_path, capsys, monkeypatch):
    run = make_run(tmp_path)
    for package, argv in (("scipy", ["table", run]), ("matplotlib", ["plot", run, "-o", "a.png"])):
        with monkeypatch.context() as patch:
            for name in ("", ".stats", ".figure"):
                patch.setitem(__import__("sys").modules, package + name, None)
            assert f"pip install {package}" in error_of(capsys, *argv)


# -------- plot ---------------------------------------------------------------------------------


def test_the_picture_is_drawn_from_the_data(tmp_path, capsys):
    for seed, values in enumerate(([10.0, 20.0, 30.0], [12.0, 22.0, 36.0])):
        make_run(tmp_path, "wamal", seed, values)
    make_run(tmp_path, "single", 0, [5.0, 6.0], epochs=9)  # still under way
    (axes,) = draw(read_runs([tmp_path], finished=False)).axes

    single, wamal = axes.get_lines()
    assert list(wamal.get_xdata()) == [1, 2, 3] and list(wamal.get_ydata()) == [11.0, 21.0, 33.0]
    assert list(single.get_xdata()) == [1, 2] and list(single.get_ydata()) == [5.0, 6.0]
    assert wamal.get_marker() != single.get_marker() and "None" not in single.get_marker()
    (band,) = axes.collections  # one seed has none
    low, high = (band.get_datalim(axes.transData).y0, band.get_datalim(axes.transData).y1)
    assert high == pytest.approx(33.0 + 12.706 * 3.0, abs=0.01)
    assert low == pytest.approx(min(11.0 - 12.706, 33.0 - 12.706 * 3.0), abs=0.01)
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("epoch", "test accuracy (%)")
    texts = [text.get_text() for text in axes.get_legend().get_texts()]
    assert texts == ["single (n = 1)", "wamal (n = 2)"]

    assert results.main(["plot", str(tmp_path), "-o", str(tmp_path / "curves.png")]) == 0
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert "curves.png" in capsys.readouterr().out


def test_one_epoch_can_be_seen_and_one_group_has_a_name(tmp_path):
    runs = [make_run(tmp_path, seed=seed, values=[40.0 + seed]) for seed in range(3)]
    (axes,) = draw(read_runs(runs)).axes
    (container,) = axes.containers  # bars, for a band of one point could not be seen
    line, caps, _ = container
    assert list(line.get_ydata()) == [41.0] and line.get_marker() == "o"
    assert caps[1].get_ydata()[0] == pytest.approx(41.0 + 4.303 / math.sqrt(3), abs=0.01)
    assert axes.get_legend().get_texts()[0].get_text() == "wamal synthetic wamal (n = 3)"
    (axes,) = draw(read_runs(runs[:1])).axes
    assert axes.get_lines()[0].get_marker() == "o"


def test_iterations_are_the_axis_where_runs_count_them(tmp_path):
    folder = make_run(tmp_path, values=[30.0, 20.0], name="test_error")
    path = folder / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    counted = [line | {"iterations": 500 * line["epoch"]} for line in lines]
    path.write_text("".join(json.dumps(line) + "\n" for line in counted))
    (axes,) = draw(read_runs([folder])).axes
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("iterations", "test error (%)")
    assert list(axes.get_lines()[0].get_xdata()) == [500, 1000]


def test_many_groups_have_as_many_colours(tmp_path):
    for number in range(12):
        make_run(tmp_path, lr=number, flags=["lr"], values=[1.0, 2.0])
    figure = draw(read_runs([tmp_path]))
    lines = figure.axes[0].get_lines()
    assert len({tuple(line.get_color()) for line in lines}) == 12
    assert len(figure.legends[0].get_texts()) == 12


def make_importance(root, seed: int, rows: list[dict], dataset="synthetic"):
    """A run of MAOAL's with an importance {task: {module: value}} for each epoch."""
    folder = make_run(root, "maoal", seed, [50.0] * len(rows), dataset=dataset)
    path = folder / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines = [line | {"importance": row} for line, row in zip(lines, rows, strict=True)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_the_importance_is_drawn_for_each_task_and_module(tmp_path):
    pytest.importorskip("matplotlib")
    for seed, shift in ((0, 0.0), (1, 0.2)):
        rows = []
        for epoch in range(3):
            depth = {"stem": 1 + epoch + shift, "stage1": 1.0}
            rows.append({"depth": depth, "normals": {"stem": -epoch - shift, "stage1": 0.5}})
        make_importance(tmp_path / "a", seed, rows)
    figure = results.draw_importance(read_runs([tmp_path / "a"]))
    depth, normals = figure.axes
    assert "depth" in depth.get_title() and "normals" in normals.get_title()
    curves = {line.get_label(): line for line in normals.get_lines()}
    assert list(curves) == ["stem", "stage1"]
    assert curves["stem"].get_xdata().tolist() == [1, 2, 3]
    assert curves["stem"].get_ydata().tolist() == pytest.approx([-0.1, -1.1, -2.1])
    assert len(depth.collections) == 2, "the intervals over the seeds"

    make_importance(tmp_path / "b", 0, [{"L2": {"head": 2.0}}], dataset="other")
    figure = results.draw_importance(read_runs([tmp_path / "a", tmp_path / "b"]))
    assert len(figure.axes) == 3
    output = tmp_path / "alpha.png"
    argv = ["plot", tmp_path / "a", "-o", output, "--metric", "importance"]
    assert results.main([str(a) for a in argv]) == 0
    assert output.read_bytes().startswith(b"\x89PNG")


def test_other_runs_have_no_importance(tmp_path, capsys):
    run = make_run(tmp_path)
    argv = ["plot", run, "-o", tmp_path / "a.png", "--metric", "importance"]
    assert "has no importance" in error_of(capsys, *argv)
    assert not (tmp_path / "a.png").exists()


def test_last_figures_are_drawn_over_an_argument(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    finals = {
        ("parallel", 2): [4.0, 2.0],
        ("parallel", 5): [5.0, 10.0],
        ("soft", 2): [2.0, 3.0],
        ("soft", 5): [2.0, 5.0],
    }
    for (method, tasks), values in finals.items():
        for seed, value in enumerate(values):
            folder = tmp_path / "runs" / str(tasks)
            make_run(folder, method, seed, [9.0, value], name="test_error", tasks=tasks)
    runs = read_runs([tmp_path / "runs"])
    (axes,) = results.draw_by(runs, "tasks").axes
    _, soft = axes.containers
    assert list(soft[0].get_xdata()) == [2, 5]
    assert list(soft[0].get_ydata()) == [2.5, 3.5]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("tasks", "test error (%)")
    assert axes.get_title() == "synthetic: mean over seeds with 95 % t interval"

    (axes,) = results.draw_by(runs, "tasks", baseline="parallel").axes
    (soft,) = axes.containers
    assert soft.get_label() == "soft"
    line, caps, _ = soft
    assert list(line.get_ydata()) == pytest.approx([(0.5 + 1.5) / 2, (0.4 + 0.5) / 2])
    assert caps[1].get_ydata()[0] == pytest.approx(1.0 + 12.706 * 0.5, abs=1e-3)
    assert axes.get_ylabel() == "test error / that of parallel"

    plot = ["plot", tmp_path / "runs", "-o", tmp_path / "by.png"]
    assert results.main([str(a) for a in [*plot, "--by", "tasks", "--baseline", "parallel"]]) == 0
    assert (tmp_path / "by.png").read_bytes().startswith(b"\x89PNG")
    capsys.readouterr()
    assert "--baseline goes with --by" in error_of(capsys, *plot, "--baseline", "soft")
    wrong = error_of(capsys, *plot, "--by", "dataset")
    assert "has no number dataset; it has epochs, seed, tasks" in wrong
    wrong = error_of(capsys, "plot", tmp_path / "runs", *plot[2:], "--by", "train-fraction")
    assert "has no number train_fraction; it has" in wrong
    wrong = [*plot, "--by", "tasks", "--baseline", "hard"]
    assert "no run of hard with tasks 2, seed 0" in error_of(capsys, *wrong)
    alone = [tmp_path / "runs" / tasks / "wamal-synthetic-soft-s0" for tasks in "25"]
    wrong = ["plot", *alone, *plot[2:], "--by", "tasks", "--baseline", "soft"]
    assert "all these runs are of soft" in error_of(capsys, *wrong)
    (axes,) = results.draw_by(read_runs(alone), "tasks").axes
    (bars,) = axes.containers
    assert math.isnan(bars[1][0].get_ydata()[0]), "one seed has no interval"

    make_run(tmp_path / "runs" / "again", "soft", 1, [9.0, 1.0], name="test_error", tasks=5)
    assert "another run has its method, seed and" in error_of(capsys, *plot, "--by", "tasks")
    shutil.rmtree(tmp_path / "runs" / "again")
    values = [9.0, 1.0]
    make_run(tmp_path / "runs" / "other", "soft", 2, values, name="test_error", tasks=5, lr=0.1)
    assert "differ in more than tasks and seed" in error_of(capsys, *plot, "--by", "tasks")
    make_run(tmp_path / "right", "parallel", 0, [0.0], name="test_error", tasks=5)
    make_run(tmp_path / "right", "soft", 0, [1.0], name="test_error", tasks=5)
    wrong = ["plot", tmp_path / "right", *plot[2:], "--by", "tasks", "--baseline", "parallel"]
    assert "parallel has test_error 0 with tasks 5, seed 0" in error_of(capsys, *wrong)


# -------- record, readme -----------------------------------------------------------------------


def test_record_copies_finished_runs_without_machine_paths(tmp_path, capsys):
    run = make_run(tmp_path / "runs", lr=0.1, flags=["lr"], backbone=f"{tmp_path}/net.py:build")
    config = json.loads((run / "config.json").read_text())
    config["command"] = (
        f"{tmp_path}/wamal.py --out-dir {tmp_path}/runs --data-root=/data/sets --lr 1"
    )
    (run / "config.json").write_text(json.dumps(config))
    (target,) = results.record([run], "group", tmp_path / "results")
    assert target == tmp_path / "results" / "group" / "runs" / run.name
    assert sorted(p.name for p in target.iterdir()) == [
        "config.json",
        "metrics.jsonl",
        "summary.json",
    ]
    copied = json.loads((target / "config.json").read_text())
    assert copied["command"] == "wamal.py --out-dir runs --data-root=sets --lr 1"
    assert copied["arguments"] == config["arguments"] | {
        "out_dir": "runs", "data_root": "data", "backbone": "net.py:build"
    }  # fmt: skip
    assert str(tmp_path) not in "".join(path.read_text() for path in target.iterdir())
    assert (target / "metrics.jsonl").read_text() == (run / "metrics.jsonl").read_text()
    with pytest.raises(InputError, match="already"):
        results.record([run], "group", tmp_path / "results")


def test_record_refuses_unfinished_runs_and_copies_nothing(tmp_path):
    finished = make_run(tmp_path / "runs")
    short = make_run(tmp_path / "runs", seed=1, epochs=2)
    with pytest.raises(InputError, match="1 of 2 epochs"):
        results.record([finished, short], "group", tmp_path / "results")
    stopped = make_run(tmp_path / "runs", seed=2)
    (stopped / "summary.json").unlink()
    with pytest.raises(InputError, match=re.escape("no summary.json")):
        results.record([finished, stopped], "group", tmp_path / "results")
    assert not (tmp_path / "results").exists()


def test_the_recorded_tables_are_those_of_the_files(capsys):
    assert results.main(["readme", "--check"]) == 0, capsys.readouterr().out


def test_check_fails_on_a_changed_table_and_readme_mends_it(tmp_path, capsys, monkeypatch):
    copy = shutil.copytree(RESULTS, tmp_path / "results")
    monkeypatch.setattr(results, "RESULTS", copy)
    text = README.read_text()
    first = re.search(r"\| (\d+\.\d\d) \+- ", text)
    changed = text[: first.start(1)] + "99.99" + text[first.end(1) :]
    (copy / "README.md").write_text(changed)
    assert results.main(["readme", "--check"]) == 1
    assert (copy / "README.md").read_text() == changed
    assert "python tests/results.py readme" in capsys.readouterr().out
    assert results.main(["readme"]) == 0
    assert (copy / "README.md").read_text() == text

    (copy / "README.md").write_text(text.replace("<!-- end -->\n", "", 1))
    assert "a table lacks its <!-- end -->" in error_of(capsys, "readme")
    (copy / "README.md").write_text(text.replace("<!-- results: control -->", ""))
    assert "<!-- results: control -->" in error_of(capsys, "readme", "--check")


def test_a_groups_row_names_every_device(tmp_path):
    runs = read_runs([make_run(tmp_path, seed=seed) for seed in (0, 1, 2)])
    runs[1].machine = {"device": "NVIDIA H200", "threads": 16}
    assert results.describe_group(runs)["device"] == "CPU, 1 thread; NVIDIA H200"


def test_depths_are_in_metres():
    assert results.format_value(0.46557, "test_depth_error") == "0.4656"
    assert results.unit("test_depth_error") == "m"
    assert results.unit("test_depth_relative_error") == ""


def test_another_figure_makes_another_table(tmp_path):
    group = shutil.copytree(RESULTS / "control", tmp_path / "control")
    before = results.recorded_table(read_runs([group]))
    path = min(group.rglob("metrics.jsonl"))
    lines = path.read_text().splitlines()
    last = json.loads(lines[-1]) | {"test_accuracy": 100.0}
    path.write_text("\n".join([*lines[:-1], json.dumps(last)]) + "\n")
    assert results.recorded_table(read_runs([group])) != before


def test_a_recorded_run_fills_the_row_of_its_command(tmp_path):
    for seed in (0, 1):
        make_run(tmp_path, "wamal", seed, [50.0 + 2 * seed], r=5, flags=["r"])
    before = """\
| command | paper | measured | seeds | device | minutes |
|---|---|---|---|---|---|
| `python wamal.py --r 5 --method wamal --out-dir runs/x` | 80.22 | | | | |
| `python wamal.py --r 15 --method wamal` | 1.00 | 2 | 3 | 4 | 5 |
"""
    after = before.replace(
        "80.22 | | | | |", "80.22 | 51.00 +- 12.71 | 0 1 | CPU, 1 thread | 1.0 |"
    )
    after = after.replace("1.00 | 2 | 3 | 4 | 5 |", "1.00 | | | | |")
    assert results.fill_table(before, read_runs([tmp_path])) == after


def test_runs_without_a_flag_in_common_are_not_said_to_have_one(tmp_path):
    make_run(tmp_path, r=5, flags=["r"])
    assert results.recorded_table(read_runs([tmp_path])).startswith(
        "All with\n`--method wamal --r 5`."
    )
    make_run(tmp_path, method="single")
    for path in tmp_path.rglob("config.json"):
        config = json.loads(path.read_text())
        config["command"] = config["command"].replace("--method wamal", "")
        path.write_text(json.dumps(config))
    assert results.recorded_table(read_runs([tmp_path])).startswith("The last epoch's metric")


def test_an_option_that_came_later_and_is_off_splits_no_group(tmp_path):
    make_run(tmp_path, seed=0, values=[50.0])
    make_run(tmp_path, seed=1, values=[52.0], landmarks=False, sizes=None)
    table = results.recorded_table(read_runs([tmp_path]))
    assert "| 51.00 +- 12.71 | 50.00, 52.00 | 0 1 |" in table


def test_no_row_of_a_table_hides_another(tmp_path):
    make_run(tmp_path, seed=0, values=[50.0])
    make_run(tmp_path, seed=1, values=[52.0], landmarks=True)  # not on its command line
    with pytest.raises(InputError, match="another run has its command"):
        results.recorded_table(read_runs([tmp_path]))


def test_recorded_files_name_no_machine_and_no_folder_of_one():
    for path in RESULTS.rglob("*.json*"):
        assert not re.search(r'["= :]/\w', path.read_text()), path
    for run in read_runs([RESULTS]):
        assert run.arguments["data_root"] == "data" and run.arguments["out_dir"].startswith("runs")
