"""The READMEs tell the truth: their code runs, their commands parse, what they name exists."""

import importlib
import inspect
import re
import shlex
import textwrap

import pytest
import results
import torch
from conftest import ROOT

from common import load_image_set

torch.set_num_threads(1)
README = (ROOT / "README.md").read_text()
RESULTS = (ROOT / "tests" / "results" / "README.md").read_text()
SCRIPTS = sorted(path.stem for path in ROOT.glob("*.py") if path.stem != "common")
PYTHON_BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def commands_of(text: str) -> list[tuple[str, list[str]]]:
    """(program, arguments) of each command in shell blocks and in backticks."""
    blocks = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    lines = "\n".join(blocks).splitlines() + re.findall(r"`(python [^`\n]+)`", text)
    commands = []
    for line in lines:
        for program, arguments in re.findall(r"python (\S+\.py)([^&;#]*)", line):
            arguments = arguments.replace("$seed", "1")
            if "..." not in arguments and "--help" not in arguments:
                commands.append((program, shlex.split(arguments)))
    return commands


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 250


def run_code(code: str) -> None:
    exec(compile(code, "example", "exec"), {"__name__": "copied"})


@pytest.mark.parametrize("code", PYTHON_BLOCKS)
def test_python_blocks_run(code, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    if "last.pt" in code:
        flags = ["--dataset", "synthetic", "--epochs", "1", "--max-steps", "1"]
        importlib.import_module("wamal").main(flags)
        capsys.readouterr()
    run_code(code)
    if "last.pt" in code:
        assert capsys.readouterr().out.strip() in load_image_set("synthetic").classes


EXAMPLES = [
    "wamal.label_step",
    "maxl.label_step",
    "auxilearn.implicit_gradient",
    "maoal.importance_step",
    "soft_order.SoftOrder",
    "mtl_nas.Fusion",
]


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_method_on_a_network_of_your_own_takes_15_lines(name):
    """The example at the end of a docstring runs as it stands."""
    script, function = name.split(".")
    text = inspect.getdoc(getattr(importlib.import_module(script), function))
    code = textwrap.dedent(text[text.index("    import torch\n") :])
    assert 5 < len(code.splitlines()) <= 15
    assert f"from {script} import" in code
    run_code(code)


@pytest.mark.parametrize("text", [README, RESULTS], ids=["README", "results"])
def test_every_command_parses(text):
    commands = commands_of(text)
    assert {f"{script}.py" for script in SCRIPTS} <= {program for program, _ in commands}
    for program, arguments in commands:
        if program == "tests/results.py":
            results.parse_args(arguments)
        elif program == "tests/benchmark.py":
            assert arguments[::2] == [flag for flag in arguments if flag.startswith("--")]
        else:
            assert program.removesuffix(".py") in SCRIPTS
            importlib.import_module(program.removesuffix(".py")).parse_args(arguments)


def test_a_command_that_is_wrong_would_be_found(capsys):
    text = "```sh\npython wamal.py --no-such-flag 1  # a comment\n```"
    ((program, arguments),) = commands_of(text)
    assert (program, arguments) == ("wamal.py", ["--no-such-flag", "1"])
    with pytest.raises(SystemExit):
        importlib.import_module("wamal").parse_args(arguments)


def test_functions_that_are_named_exist():
    named = re.findall(rf"`({'|'.join(SCRIPTS)})\.(\w+)`", README)
    named = [(script, name) for script, name in named if name != "py"]
    assert len(named) >= 4
    for script, name in named:
        assert hasattr(importlib.import_module(script), name), f"{script}.{name}"


def test_the_heart_of_wamal_is_its_code():
    (block,) = re.findall(r"```py\n(.*?)```", README, re.DOTALL)
    code = (ROOT / "wamal.py").read_text()
    for line in block.splitlines():
        assert line.partition("  #")[0] in code


def test_links_and_files_exist():
    for folder, text in ((ROOT, README), (ROOT / "tests" / "results", RESULTS)):
        headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
        for path, anchor in re.findall(r"\]\((?!http)([^)#]*)(?:#([^)]*))?\)", text):
            assert (folder / path).exists(), path
            known = [re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings]
            assert not anchor or anchor in known, anchor


def test_no_line_is_over_100_columns():
    for text in (README, RESULTS):
        prose = [line for line in text.splitlines() if not line.startswith(("|", "python"))]
        assert max(map(len, prose)) <= 100
