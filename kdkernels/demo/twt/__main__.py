"""`python -m kdkernels.demo.twt [--seeds N] [--output DIRECTORY]`"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the rehearsal and prints its report; exit status 0, 1 where it cannot run, 130 when interrupted."""
    parser = argparse.ArgumentParser(prog="python -m kdkernels.demo.twt", description="Rehearses TwT, and reports.")
    parser.add_argument("--seeds", type=int, default=3, help="repetitions of all stages (default: 3)")
    parser.add_argument("--output", type=Path, default=Path("runs/twt"), help="what is there already is gone on with")
    options = parser.parse_args(arguments)

    from kdkernels.demo.twt.run import rehearse

    try:
        report = rehearse(options.output, options.seeds)
    except (FileNotFoundError, RuntimeError, ValueError) as error:
        print(f"twt: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("twt: interrupted; the same again goes on", file=sys.stderr)
        return 130
    print(f"\n{report.read_text(encoding='utf-8')}\nwritten to {report}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
