"""What each model of the demo answers to some held-out prompts, greedily: read by people, and kept."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from kdkernels.data.jsonl import json_line
from kdkernels.demo.lm.answers import answers, load_sampler, read
from kdkernels.training.run.atomic import write_text


def sample(models: Mapping[str, Path], prompts: Sequence[str], longest: int, directory: Path) -> dict[str, list[str]]:
    """The answers of each of the `models` to the `prompts`, in `directory` once they are there."""
    directory.mkdir(parents=True, exist_ok=True)
    found = {}
    for name, model in models.items():
        file = directory / f"{name}.jsonl"
        if not file.is_file():
            print(f"sample answers of {name}", flush=True)
            write_text(file, "".join(map(json_line, answers(load_sampler(model), prompts, longest))))
        lines = read(file)
        found[name] = [line["messages"][1]["content"] + ("" if line["finished"] else " ...") for line in lines]
    return found
