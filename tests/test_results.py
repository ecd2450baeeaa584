"""The README's tables of results are those of the files in tests/results/."""

import json
import shutil

import pytest
from conftest import ROOT
from results import RESULTS, group_table, read_runs, rebuild

README = (ROOT / "README.md").read_text()


def test_the_tables_are_those_of_the_files():
    assert rebuild(README) == README, "python tests/results.py rebuilds them"
    for group in sorted(path.name for path in RESULTS.iterdir()):
        assert f"<!-- results: {group} -->" in README, f"{group} has no table"


def test_the_files_name_no_machine_and_no_folder_of_one():
    for run in read_runs(RESULTS):
        text = json.dumps({k: run[k] for k in ("command", "arguments", "machine")})
        assert "/home" not in text and "/tmp" not in text and "/work" not in text
        assert run["arguments"]["data_root"] == "data" and run["arguments"]["out_dir"].startswith("runs")


def test_another_figure_makes_another_table_and_an_unfinished_run_none(tmp_path):
    group = next(iter(sorted(RESULTS.iterdir())))
    copy = shutil.copytree(group, tmp_path / group.name)
    assert group_table(copy) == group_table(group)
    metrics = sorted(copy.rglob("metrics.jsonl"))[0]
    lines = metrics.read_text().splitlines()
    last = json.loads(lines[-1])
    metrics.write_text("\n".join([*lines[:-1], json.dumps(last | {"test_accuracy": 100.0})]) + "\n")
    assert group_table(copy) != group_table(group)
    metrics.write_text("\n".join(lines[:-1]) + "\n")
    with pytest.raises(ValueError, match="no result"):
        group_table(copy)


def test_a_run_on_a_gpu_fills_the_row_of_its_command(tmp_path):
    """With the first command of wamal.py's table, in files made up here."""
    import wamal

    arguments = vars(wamal.parse_args(["--dataset", "cifar100-20", "--r", "5"]))
    for seed, accuracy in ((0, 50.0), (1, 52.0)):
        run = tmp_path / "gpu" / f"s{seed}"
        run.mkdir(parents=True)
        config = {"arguments": arguments | {"seed": seed}, "machine": {"device": "Some GPU", "threads": 1}, "command": "wamal.py"}
        (run / "config.json").write_text(json.dumps(config))
        line = {"test_accuracy": accuracy, "seconds": 600.0}
        (run / "metrics.jsonl").write_text((json.dumps(line) + "\n") * arguments["epochs"])
    readme = README[README.index("| command (`python wamal.py") :].split("\n\n")[0] + "\n"
    filled = rebuild(readme, tmp_path)
    assert "| `--dataset cifar100-20 --r 5` | 80.22 | 51.00 +- 12.71 | 0 1 | Some GPU | 10.0 |" in filled
    assert sum(a != b for a, b in zip(readme.splitlines(), filled.splitlines(), strict=True)) == 1
