"""`python -m kdkernels.demo [--seeds N] [--output DIRECTORY] [--set section.key=value ...]`"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the demo and prints its report; exit status 0, 1 where it cannot run, 130 when interrupted."""
    parser = argparse.ArgumentParser(
        prog="python -m kdkernels.demo", description="Distils a small student and its controls, and reports."
    )
    parser.add_argument("--seeds", type=_positive, default=1, help="repetitions of everything but the teacher")
    parser.add_argument("--output", type=Path, default=Path("runs/demo"), help="an earlier demo there is deleted")
    parser.add_argument("--set", metavar="SECTION.KEY=VALUE", action="append", default=[], help="for every training")
    options = parser.parse_args(arguments)

    from kdkernels.demo.run import run_demo

    try:
        report = run_demo(options.output, options.seeds, options.set)
    except (FileExistsError, FileNotFoundError, RuntimeError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("demo: interrupted; the next one starts afresh", file=sys.stderr)
        return 130
    print(f"\n{report.read_text(encoding='utf-8')}\nwritten to {report}")
    return 0


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected an integer >= 1, got {text}")
    return number


if __name__ == "__main__":
    sys.exit(main())
