"""What `kdkernels` answers without torch, DeepSpeed and transformers, and that names of the package still arrive."""

import inspect
import os
import re
import subprocess
import sys
from dataclasses import MISSING, fields
from pathlib import Path

import pytest

import kdkernels as kd
from kdkernels.training.recipe import signatures
from kdkernels.training.recipe.config import Config
from kdkernels.training.recipe.read import read_recipe, section_class
from kdkernels.training.recipe.schema import describe
from kdkernels.training.recipe.signatures import known_objectives, objective_options

ROOT = Path(__file__).parent.parent
HEAVY = ("torch", "deepspeed", "transformers", "numpy")
# What is heavy cannot be imported, and whoever asks for it is noticed.
PROGRAM = f"""
import sys
asked = []
class Refusing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {HEAVY}:
            asked.append(name)
            raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, Refusing())
from kdkernels.cli import main
try:
    status = main(sys.argv[1:])
except SystemExit as error:
    status = error.code
print("asked for:", asked)
sys.exit(status)
"""
RECIPE = str(ROOT / "recipes" / "demo" / "student.toml")


def run(*arguments, cwd, program: str = PROGRAM) -> subprocess.CompletedProcess:
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=240)


@pytest.mark.parametrize(
    ("arguments", "status", "told"),
    [
        (["--version"], 0, f"kdkernels {kd.__version__}"),
        (["--help"], 0, "kdkernels train recipe.toml --resume"),
        (["train", "--help"], 0, "[optimizer] lr, betas, weight_decay"),
        (["train", "--help"], 0, "130  interrupted"),
        (["train"], 2, "RECIPE.toml"),
        (["eval", "--help"], 0, "--lm-eval [TASKS]"),
        (["eval"], 2, "MODEL"),
        (["eval", "m"], 2, "kdkernels: eval: expected either DATA.jsonl or --lm-eval"),
        (["eval", "m", "d", "--limit=0"], 2, "argument --limit: expected an integer from 1 to 999999, got '0'"),
        (["eval", "m", "nowhere.jsonl"], 2, "kdkernels: DATA.jsonl: no such file: nowhere.jsonl"),
        (["eval", "./m", RECIPE], 2, "kdkernels: MODEL: no such directory: ./m"),
        (["eval", "m", RECIPE, "--answer=("], 2, "kdkernels: --answer: not a regular expression"),
        (["eval", "m", RECIPE, "--chat"], 2, "kdkernels: --chat belongs to --lm-eval"),
        (["eval", "m", RECIPE, "--output=no/a"], 2, "kdkernels: --output: no such directory: no"),
        (["eval", "m", "--lm-eval"], 2, "mbpp: code that the model writes would be run on this machine"),
        (["eval", "m", "--lm-eval=gsm8k"], 2, "--lm-eval needs lm_eval: pip install kdkernels[lm-eval]"),
        (["report", "--help"], 0, "kdkernels[report]"),
        (
            ["report", "nowhere"],
            2,
            "nowhere: expected the directory of a run ([run] output), but config.toml is missing",
        ),
        (["train", "nowhere.toml"], 2, "kdkernels: nowhere.toml: cannot be read: No such file"),
        (["train", RECIPE, "--set=trian.steps=1"], 2, "unknown section 'trian'; did you mean 'train'?"),
        (["train", RECIPE, "--set=train.stepz=1"], 2, "[train] unknown key 'stepz'; did you mean 'steps'?"),
        (
            ["train", RECIPE, "--set=train.steps=1", "--set=train.epochs=2"],
            2,
            "expected one of train.steps and train.epochs",
        ),
        (["train", RECIPE, "--set=train.steps=many"], 2, "[train] steps: expected an integer >= 1, got 'many'"),
        (["train", RECIPE, "--set=objective.name=NOPE"], 2, "[objective] name: expected one of 'GKD', 'SFT', 'TSDKD'"),
        (["train", RECIPE, "--set=objective.name=GKD", "--set=objective.bata=1"], 2, "'bata'; did you mean 'beta'?"),
        (["train", RECIPE, "--set=objective.name=TSDKD", "--set=objective.k=2.5"], 2, "k: expected an integer, got"),
        (["train", RECIPE, "none.toml", "--dry-run"], 2, "--dry-run: expected one recipe, got 2"),
        (["train", "none.toml", RECIPE], 2, "none.toml: cannot be read: No such file"),
        (["train", RECIPE, "--set=data.train=no.jsonl"], 2, "[data] train: no such file: no.jsonl"),
    ],
)
def test_answers_that_need_no_torch(tmp_path, arguments, status, told):
    done = run(*arguments, cwd=tmp_path)
    assert done.returncode == status and told in done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "asked for: []"
    assert not list(tmp_path.iterdir())


def test_without_a_toml_parser(tmp_path):
    """Python 3.10 has none: recipes name what to install, all else answers."""
    program = "import sys; sys.modules.update(tomllib=None, tomli=None)" + PROGRAM
    for arguments in (["--version"], ["--help"], ["train", "--help"], ["new", "mine.toml"]):
        assert run(*arguments, cwd=tmp_path, program=program).returncode == 0
    done = run("train", "mine.toml", cwd=tmp_path, program=program)
    assert done.returncode == 2 and "recipes need tomli on Python 3.10: pip install kdkernels[train]" in done.stderr


def test_a_new_recipe_has_every_key_and_is_one(tmp_path, monkeypatch):
    done = run("new", "mine.toml", cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "asked for: []"
    text = (tmp_path / "mine.toml").read_text()
    for section in fields(Config):
        if section.name == "teachers":  # as [teacher]
            assert "[teachers.NAME]" in text
            continue
        block = re.split(rf"\n(?:# )?\[{section.name}\]\n", text)[1].split("\n[")[0]
        for entry in fields(section_class(section.type)):
            assert entry.name == "options" or re.search(rf"^(# )?{entry.name} =", block, re.MULTILINE), entry.name
    for name in ("data", "models/student", "models/teacher"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").write_text("{}")
    for name in ("train", "test"):
        (tmp_path / f"data/{name}.jsonl").write_text('{"question": "1 + 1", "answer": "2"}\n')
    monkeypatch.chdir(tmp_path)
    as_written = read_recipe("mine.toml")
    assert as_written.train.steps == 1000 and as_written.evaluation.metrics == ("cross_entropy", "kl")
    sections = [part for part in text.split("\n\n") if not re.search(r"\n# \[\w+\]\n", part)]  # but the absent
    shown = "\n\n".join(sections)
    shown = re.sub(r"^# (\w+ = .*  # )", r"\1", shown, flags=re.MULTILINE)  # the defaults in comments are the defaults
    assert shown.count("\n# ") < text.count("\n# ") - 10
    (tmp_path / "shown.toml").write_text(shown)
    assert read_recipe("shown.toml") == as_written


def test_a_new_recipe_overwrites_nothing(tmp_path):
    (tmp_path / "mine.toml").write_text("mine")
    done = run("new", "mine.toml", cwd=tmp_path)
    assert done.returncode == 2 and "mine.toml: expected a file that is not there yet" in done.stderr
    assert (tmp_path / "mine.toml").read_text() == "mine"
    done = run("new", "nowhere/mine.toml", cwd=tmp_path)
    assert done.returncode == 2 and "nowhere/mine.toml: cannot be written: No such file" in done.stderr


def test_importing_the_package_waits_with_torch():
    program = (
        "import sys, kdkernels as kd; dir(kd); assert 'torch' not in sys.modules; kd.SFT; assert 'torch' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], env={"PYTHONPATH": str(ROOT)}, check=True)


def test_every_public_name_arrives():
    names = {}
    exec("from kdkernels import *", names)
    assert set(kd.__all__) <= names.keys() and set(kd.__all__) <= set(dir(kd))
    assert all(names[name] is getattr(kd, name) for name in kd.__all__)
    assert {*kd._HOME, "modules"} == set(kd.__all__)
    assert kd.divergence.__module__ == "kdkernels.functional" and kd.objectives.SFT is kd.SFT
    for missing in ("TSDK", "_nothing", "nothing"):
        with pytest.raises(AttributeError, match=missing):
            getattr(kd, missing)


def test_the_first_commands_of_the_readme(tmp_path):
    line = re.compile(r"^\.venv/bin/kdkernels (train recipes/first\.toml.*?)(?: +#.*)?$", re.M)
    commands = line.findall((ROOT / "README.md").read_text())
    assert [command.split()[2:] for command in commands] == [["--dry-run"], [], ["--resume"]]
    few = ["--set=train.steps=2", f"--set=run.output={tmp_path / 'run'}"]
    command = [sys.executable, "-m", "kdkernels", *commands[1].split(), *few]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith(f"kdkernels {kd.__version__}: recipes/first.toml: loading libraries")
    model, report = done.stdout.splitlines()[-2:]
    assert model == f"model: {tmp_path}/run/final" and report == f"report: {tmp_path}/run/report.md"
    assert (tmp_path / "run" / "final" / "config.json").is_file()
    assert "left out 0" in (tmp_path / "run" / "report.md").read_text()


def test_a_launcher_starts_the_trainer():
    """Two processes, each before torch is there; what they say is the help of one command."""
    recipe = "recipes/qwen2.5-14b-to-1.5b-tsd-kd.toml"
    launcher = "torch.distributed.run --standalone --nproc-per-node 2 -m kdkernels.training.cli"  # torchrun
    command = [sys.executable, "-m", *launcher.split(), "train", recipe, "--help"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("usage: kdkernels train [-h]") == 2


def test_the_command_has_the_trainers_commands(capsys):
    from kdkernels import cli
    from kdkernels.training.cli import main

    for start in (cli.main, main):
        with pytest.raises(SystemExit):
            start(["--help"])
        assert {"train", "plan", "eval", "report", "export", "new"} <= set(capsys.readouterr().out.split())


def test_the_reference_of_recipes_is_current():
    from kdkernels.training.recipe.reference import reference

    assert (ROOT / "docs" / "RECIPES.md").read_text(encoding="utf-8") == reference()
    assert "| `betas` | an array of 2 values" in reference() and '### name = "TSDKD"' in reference()


def test_options_are_those_of_the_constructors():
    from kdkernels import objectives

    exported = {name: getattr(objectives, name) for name in objectives.__all__}
    classes = {name: kind for name, kind in exported.items() if inspect.isclass(kind)}
    names = [name for name, kind in classes.items() if issubclass(kind, objectives.Objective) and name != "Objective"]
    assert len(names) >= 5 and known_objectives() == tuple(names)
    for name in names:
        parameters = inspect.signature(classes[name], eval_str=True).parameters.values()
        expected = {
            one.name: (describe(one.annotation), repr(one.default))
            for one in parameters
            if one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)  # those of nn.Module
        }
        options = objective_options(name).items()
        assert {one: (describe(kind), repr(default)) for one, (kind, default) in options} == expected, name


def test_options_of_an_objective_that_is_new(tmp_path, monkeypatch):
    (tmp_path / "__init__.py").write_text('from .new import Far, Near\n__all__ = ["Far", "Near", "helper"]\n')
    (tmp_path / "new.py").write_text(
        "class Near(Objective):\n"
        "    def __init__(\n"
        "        self, rule: Literal['a', 'b'], edges: tuple[float, ...] = (1.0,), *, low: int | Own = -1\n"
        "    ): ...\n"
        "class Far(Near):\n    needs_target = True\n"
    )
    monkeypatch.setattr(signatures, "FOLDER", tmp_path)
    assert known_objectives() == ("Far", "Near")
    options = objective_options("Far")
    assert {name: (describe(kind), default) for name, (kind, default) in options.items()} == {
        "rule": ("one of 'a', 'b'", MISSING),
        "edges": ("an array of values, each a number", (1.0,)),
        "low": ("an integer", -1),
    }


def test_what_nobody_foresaw_has_its_status(tmp_path):
    done = run("train", RECIPE, f"--set=student.architecture.{'a.' * 3000}a=1", cwd=tmp_path)
    assert done.returncode == 70 and "an error that nobody foresaw: RecursionError" in done.stderr
