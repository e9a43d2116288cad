"""docs/RECIPES.md from the dataclasses: python -m kdkernels.training.recipe.reference > docs/RECIPES.md"""

import inspect
from dataclasses import MISSING, fields, is_dataclass

from kdkernels.training.recipe.config import TEACHERS, Config, ObjectiveConfig
from kdkernels.training.recipe.read import section_class
from kdkernels.training.recipe.resolve import NO_JUDGE
from kdkernels.training.recipe.schema import describe, toml_value
from kdkernels.training.recipe.signatures import known_objectives, objective_options
from kdkernels.training.recipe.stages import REASONING, STAGES, ReasoningConfig, StageConfig

EXTENDING = """\
Above its first section a recipe may name another one, as `extends = "other.toml"` (the path starts at the recipe's own
directory): it then is that recipe, but for the keys that it sets itself. An `[objective]` of another `name` replaces
the whole section, and keys of which a recipe has one replace each other: `steps` and `epochs` (for `--set` too), a
`path` and what stands for it (`architecture`, `kind`, `base`), `messages` and `prompt` with `response`.
`kdkernels train RECIPE.toml --dry-run` shows what comes of it."""


def reference() -> str:
    """Every section, key, type and default of a recipe, as Markdown."""
    lines = ["# Recipes", "", "Every section and key. Written by `python -m kdkernels.training.recipe.reference`."]
    lines += ["", EXTENDING]
    for section in fields(Config):
        if section.name == TEACHERS:  # as [teacher]
            continue
        kind = section_class(section.type)
        lines += ["", f"## [{section.name}]", "", inspect.getdoc(kind), ""]
        known = {entry.name: (entry.type, entry.default) for entry in fields(kind) if entry.name != "options"}
        lines += _table(known)
        for entry in fields(kind):
            inner = section_class(entry.type)
            if is_dataclass(inner):
                keys = {one.name: (one.type, one.default) for one in fields(inner)}
                lines += ["", f"### [{section.name}.{entry.name}]", "", inspect.getdoc(inner), "", *_table(keys)]
        if kind is ObjectiveConfig:
            for name in known_objectives():
                options = objective_options(name)
                lines += ["", f'### name = "{name}"', ""]
                lines += (
                    [f"`help(kdkernels.{name})` says what they mean.", "", *_table(options)]
                    if options
                    else ["No options."]
                )
                required = any(default is MISSING for _, default in options.values())
                if not required and ObjectiveConfig(name=name).build().needs_weights:
                    lines += ["", f"With these defaults {name} {NO_JUDGE}."]
    for title, kind in ((f"[{REASONING}]", ReasoningConfig), (f"[[{STAGES}]]", StageConfig)):
        known = {entry.name: (entry.type, entry.default) for entry in fields(kind)}
        lines += ["", f"## {title}", "", inspect.getdoc(kind), "", *_table(known)]
    return "\n".join(lines) + "\n"


def _table(known: dict) -> list[str]:
    lines = ["| key | value | default |", "|---|---|---|"]
    for name, (kind, default) in known.items():
        shown = (
            "required" if default is MISSING else "not set" if default is None else f"`{toml_value(_plain(default))}`"
        )
        lines.append(f"| `{name}` | {describe(kind)} | {shown} |")
    return lines


def _plain(default: object) -> object:
    return list(default) if isinstance(default, tuple) else default


if __name__ == "__main__":
    print(reference(), end="")
