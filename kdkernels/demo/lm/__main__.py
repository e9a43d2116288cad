"""`python -m kdkernels.demo.lm`: the demo of a language model; `--help` says what may be asked for."""

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from kdkernels.errors import InputError, MissingPackage

HELP = "Distils SmolLM2-135M-Instruct into a student of its own layers, and reports. Started again, it goes on."


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the demo; exit status 0, 1 where it cannot run or an arm that has to learn did not, 130 when interrupted."""
    parser = argparse.ArgumentParser(prog="python -m kdkernels.demo.lm", description=HELP)
    parser.add_argument("--output", type=Path, default=Path("runs/demo-lm"), help="one that is there goes on")
    parser.add_argument("--data", type=Path, help='JSON lines, {"prompt": TEXT} each, in place of our own prompts')
    parser.add_argument("--set", metavar="SECTION.KEY=VALUE", action="append", default=[], help="for every training")
    parser.add_argument("--store", type=Path, metavar="DIRECTORY", help="also copies report and figures there")
    options = parser.parse_args(arguments)
    try:
        from kdkernels.demo.lm.run import Settings, run_demo
        from kdkernels.training.errors import Collapsed, DiskError, Stopped
    except ImportError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    try:
        report, failed = run_demo(options.output, Settings(data=options.data, overrides=tuple(options.set)))
    except (InputError, MissingPackage, RuntimeError, FloatingPointError, Collapsed, DiskError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, Stopped) as error:
        print(f"demo: interrupted {error}; the same command goes on from here", file=sys.stderr)
        return 130
    if options.store is not None:
        options.store.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(report, options.store / "README.md")
        for figure in report.parent.glob("*.png"):
            shutil.copyfile(figure, options.store / figure.name)
    print(f"\n{report.read_text(encoding='utf-8')}\nwritten to {report}")
    for title in failed:
        print(f"demo: {title}: expected a KL to the teacher clearly below the start's; see {report}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
