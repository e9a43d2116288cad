"""What a reader of the repository and of ``help(kdkernels)`` sees."""

import inspect
import re
from pathlib import Path

import kdkernels as kd

ROOT = Path(__file__).parent.parent
NOT_OURS = {".git", ".venv", ".hypothesis", ".pytest_cache", ".ruff_cache", "__pycache__", "build", "runs", "shared"}
TEXT = {".py", ".md", ".toml", ".txt", ".cpp", ".h", ".cu", ".yml", ".yaml", ".json", ".cfg", ".sh", ""}


def files():
    folders = [ROOT]
    while folders:
        for path in sorted(folders.pop().iterdir()):
            if path.is_dir() and path.name not in NOT_OURS and not path.name.endswith(".egg-info"):
                folders.append(path)
            elif path.is_file() and path.suffix in TEXT:
                yield path


def test_no_file_names_a_path_of_one_machine():
    place = re.compile(r"(?<![\w.])/(?:work|home|root|tmp|Users)/\w")
    found = [(str(path.relative_to(ROOT)), line) for path in files() for line in lines(path) if place.search(line)]
    assert found == []


def lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8", errors="replace").splitlines()


def test_files_stay_readable():
    long = {str(path.relative_to(ROOT)): len(lines(path)) for path in files() if path.suffix in (".py", ".cpp", ".h")}
    assert len(long) > 50
    assert {name: count for name, count in long.items() if count > 500} == {}


def test_every_public_name_has_a_docstring():
    undocumented = []
    for name in kd.__all__:
        thing = getattr(kd, name)
        members = {name: thing}
        if inspect.isclass(thing):
            own = {key: value for key, value in vars(thing).items() if not key.startswith("_") and callable_of(value)}
            members |= {f"{name}.{key}": callable_of(value) for key, value in own.items()}
        undocumented += [key for key, value in members.items() if not inspect.getdoc(value)]
    assert undocumented == []


def callable_of(member):
    """The function behind a method, classmethod or property; None for plain attributes."""
    member = getattr(member, "__func__", None) or getattr(member, "fget", None) or member
    return member if inspect.isfunction(member) else None
