"""A student made of its teacher's own layers: the same model without some of them."""

import copy
from collections.abc import Sequence
from pathlib import Path

from kdkernels.errors import InputError
from kdkernels.training.processes import distributed
from kdkernels.training.run.atomic import write_directory


def without_layers(teacher: Path, dropped: Sequence[int], directory: Path) -> Path:
    """Writes the model of `teacher` without its layers `dropped` (from 0), and its tokenizer, to `directory`, unless
    that is there already. Embedding, head, the norm behind the layers and the layers that stay are the teacher's.

    Raises:
        InputError: a layer that the teacher does not have.
        DiskError: what the disk did not take.
    """
    if not directory.is_dir():
        distributed.start()
        write_directory(directory, lambda path: _shorten(teacher, frozenset(dropped), path))
    return directory


def _shorten(teacher: Path, dropped: frozenset[int], directory: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(teacher, dtype="auto")
    layers = model.get_decoder().layers
    unknown = sorted(dropped.difference(range(len(layers))))
    if unknown:
        raise InputError(
            f"dropped layers: expected some of 0 to {len(layers) - 1}, those of {teacher}, got {unknown[0]}"
        )
    kept = [number for number in range(len(layers)) if number not in dropped]
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = len(kept)
    student = type(model)(config).to(model.dtype)
    for new, old in enumerate(kept):
        student.get_decoder().layers[new].load_state_dict(layers[old].state_dict())
    rest = {name: one for name, one in model.state_dict().items() if ".layers." not in name}
    student.load_state_dict(rest, strict=False)
    student.generation_config = model.generation_config
    student.save_pretrained(directory)
    AutoTokenizer.from_pretrained(teacher).save_pretrained(directory)
