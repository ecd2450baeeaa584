"""The README tells the truth: its code runs, its flag tables are --help's, its commands parse."""

import argparse
import importlib
import re
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT

README = (ROOT / "README.md").read_text()
SCRIPTS = sorted(path.stem for path in ROOT.glob("*.py") if path.stem != "common")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)


def parser_of(script: str) -> argparse.ArgumentParser:
    """The script's parser, caught as it parses."""
    caught, original = [], argparse.ArgumentParser.parse_args
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", lambda p, *args: (caught.append(p), original(p, *args))[1])
        importlib.import_module(script).parse_args([])
    return caught[0]


def flag_table(script: str) -> str:
    """The README's table of a script's flags, made from its parser."""
    rows = ["| flag | default | what |", "|---|---|---|"]
    for action in parser_of(script)._actions:
        if action.dest != "help":
            given = action.default is not None and action.default is not False and action.dest != "workers"
            default = action.default if given else ""
            default = " ".join(map(str, default)) if isinstance(default, list) else default
            flags = " ".join(f"`{flag}`" for flag in action.option_strings)
            choices = f" ({', '.join(action.choices)})" if action.choices and action.dest != "method" else ""
            rows.append(f"| {flags} | {default} | {action.help.replace('%%', '%')}{choices} |")
    return "\n".join(rows)


@pytest.mark.parametrize("script", SCRIPTS)
def test_flag_tables_are_those_of_help(script):
    assert flag_table(script) in README, f"the table should be:\n{flag_table(script)}"


@pytest.mark.parametrize("code", [code for language, code in BLOCKS if language == "python"])
def test_python_blocks_run(tmp_path, code):
    assert len(code.splitlines()) <= 25
    (tmp_path / "copied.py").write_text(code)
    result = subprocess.run([sys.executable, tmp_path / "copied.py"], env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_every_command_parses():
    commands = "".join(code for language, code in BLOCKS if language == "sh")
    found = re.findall(r"python (\w+)\.py([^&;#\n]*)", commands)
    assert len(found) >= 5
    for script, flags in found:
        importlib.import_module(script).parse_args(shlex.split(flags.replace("$seed", "1")))
    tools = {"tests/benchmark.py", "tests/results.py"}
    assert set(re.findall(r"python (\S+\.py)", README)) <= {f"{script}.py" for script in SCRIPTS} | tools


def test_links_and_files_exist():
    for path in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / path).exists(), path
