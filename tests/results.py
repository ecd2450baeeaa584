"""The README's tables of finished runs, rebuilt from the runs' own files in tests/results/.

    python tests/results.py                              write the tables into README.md
    python tests/results.py add GROUP RUN [RUN ...]      first copy these run folders' config.json and metrics.jsonl to GROUP

A run lies in tests/results/GROUP/OUT-DIR/RUN/, where OUT-DIR is the last part of its --out-dir. In the README a line
<!-- results: GROUP --> begins the table of a group, with a row for each set of runs that differ in nothing but their seed,
and <!-- end --> ends it. A table whose columns end in "measured | seeds | GPU | minutes" has a row for each command; those four
are filled from the runs on a GPU with this command's arguments, and are empty where there are none.
"""

import contextlib
import importlib
import io
import json
import re
import shlex
import shutil
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "tests" / "results"
# What changes no result's meaning
ELSEWHERE = {"seed", "seeds", "out_dir", "data_root", "workers", "device", "resume", "plot", "cuda_graph"}
METRICS = {"soft_order": "test_error", "mtl_nas": "test_miou"}  # the others': test_accuracy
sys.path.insert(0, str(ROOT))


def read_runs(folder: Path) -> list[dict]:
    """The finished runs below the folder: script, command's flags, arguments, machine, metrics by epoch."""
    runs = []
    for path in sorted(folder.rglob("config.json")):
        config = json.loads(path.read_text())
        metrics = [json.loads(line) for line in (path.parent / "metrics.jsonl").read_text().splitlines()]
        if len(metrics) != config["arguments"]["epochs"]:
            raise ValueError(f"{path.parent} has {len(metrics)} of {config['arguments']['epochs']} epochs: no result")
        script, *flags = shlex.split(config["command"])
        runs.append({**config, "script": Path(script).stem, "flags": flags, "metrics": metrics})
    return runs


def same_meaning(arguments: dict) -> str:
    return json.dumps({k: v for k, v in arguments.items() if k not in ELSEWHERE}, sort_keys=True)


def summarize(runs: list[dict]) -> dict:
    """Of runs that differ in their seed: the last epoch's metric, mean and 95 % interval, the seeds, machine and minutes."""
    script = importlib.import_module(runs[0]["script"])
    metric = METRICS.get(runs[0]["script"], "test_accuracy")
    runs = sorted(runs, key=lambda run: run["arguments"]["seed"])
    seeds = [run["arguments"]["seed"] for run in runs]
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"two runs of seed {seeds} are the same command: {runs[0]['command']}")
    values = iter([{metric: run["metrics"][-1][metric]} for run in runs])
    arguments = script.argparse.Namespace(seeds=seeds, resume=True, out_dir="", dataset="", method="", seed=0)
    with contextlib.redirect_stdout(io.StringIO()):  # the scripts' own mean, deviation and interval
        total = script.run_seeds(arguments, lambda _: next(values), metric)
    result = f"{total[metric]:.2f}" + (f" +- {total[f'{metric}_interval95']:.2f}" if len(runs) > 1 else "")
    machine, minutes = runs[0]["machine"], statistics.fmean(run["metrics"][-1]["seconds"] for run in runs) / 60
    threads = f"{machine['threads']} thread" + "s" * (machine["threads"] > 1)
    device = f"CPU, {threads}" if machine["device"] == "cpu" else machine["device"]
    return {"result": result, "each": ", ".join(f"{run['metrics'][-1][metric]:.2f}" for run in runs),
            "seeds": " ".join(map(str, seeds)), "device": device, "minutes": f"{minutes:.1f}"}


def command_of(run: dict) -> list[str]:
    """The run's flags, without those of ELSEWHERE, each with its values: ["--lr 0.1", ...]."""
    flags = re.split(r" (?=--)", " ".join(map(shlex.quote, run["flags"])))
    return [flag for flag in flags if flag.split()[0][2:].replace("-", "_") not in ELSEWHERE]


def group_table(folder: Path) -> str:
    """Markdown: what all runs have in common, and a row for each set of them."""
    sets = {}
    for run in read_runs(folder):
        sets.setdefault((run["script"], same_meaning(run["arguments"])), []).append(run)
    common = [flag for flag in command_of(next(iter(sets.values()))[0]) if all(flag in command_of(r[0]) for r in sets.values())]
    order = sorted(sets, key=lambda key: (key[0], " ".join(command_of(sets[key][0]))))
    lines = [f"All with `{' '.join(common)}`;", "the last epoch's metric, mean and half the 95 % t interval over the seeds:", "",
             "| command | result | each seed | seeds | device | minutes a run |", "|---|---|---|---|---|---|"]  # fmt: skip
    for key in order:
        own, s = [flag for flag in command_of(sets[key][0]) if flag not in common], summarize(sets[key])
        command = " ".join(["python", f"{key[0]}.py", *own])
        lines.append(f"| `{command}` | {s['result']} | {s['each']} | {s['seeds']} | {s['device']} | {s['minutes']} |")
    return "\n".join(lines) + "\n"


def fill_row(row: str, script_name: str, runs: list[dict]) -> str:
    """A row `| command | published | measured | seeds | GPU | minutes |` with the last four from the runs."""
    cells = row.strip("|").split("|")
    script = importlib.import_module(script_name)
    wanted = same_meaning(json.loads(json.dumps(vars(script.parse_args(shlex.split(cells[0].strip().strip("`")))))))
    found = [run for run in runs if run["script"] == script_name and run["machine"]["device"] != "cpu"]
    found = [run for run in found if same_meaning(run["arguments"]) == wanted]
    s = summarize(found) if found else dict.fromkeys(("result", "seeds", "device", "minutes"), "")
    return "|".join(["", *cells[:-4], *(f" {s[k]} " if s[k] else " " for k in ("result", "seeds", "device", "minutes")), ""])


def rebuild(readme: str, results: Path = RESULTS) -> str:
    """The README with its tables made anew."""
    readme = re.sub(r"(<!-- results: (\S+) -->\n).*?(<!-- end -->)",
                    lambda m: m[1] + group_table(results / m[2]) + m[3], readme, flags=re.DOTALL)  # fmt: skip
    runs = read_runs(results)
    head = r"\| command \(`python (\w+)\.py \.\.\.`\) \|[^\n]*\| measured \| seeds \| GPU \| minutes \|\n\|[-|]+\|\n"

    def filled(match):
        return match[1] + "".join(fill_row(row, match[2], runs) + "\n" for row in match[3].splitlines())

    return re.sub(rf"({head})((?:\|[^\n]*\n)+)", filled, readme)


def main(argv=None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["add"] and len(argv) > 2:
        for run in map(Path, argv[2:]):
            target = RESULTS / argv[1] / run.resolve().parent.name / run.name
            target.mkdir(parents=True)
            for name in ("config.json", "metrics.jsonl"):
                shutil.copy(run / name, target / name)
    elif argv:
        raise SystemExit(__doc__)
    readme = ROOT / "README.md"
    readme.write_text(rebuild(readme.read_text()))


if __name__ == "__main__":
    main()
