"""`kdkernels curate`: the dataset of a recipe's section [curation]."""

import argparse

from kdkernels.curation.config import CurationConfig, read_curation
from kdkernels.training import with_reason
from kdkernels.training.cli.common import add_set
from kdkernels.training.processes.exits import DONE, INTERRUPTED, STATUSES, end, status_of

DESCRIPTION = """\
Asks the teachers of a recipe's section [curation] every query of its data, keeps the answers that are good and differ,
and writes them as a dataset that `kdkernels train` reads (docs/TWT.md). Every answer is kept as it comes: the same
command again goes on after a crash, and asks no teacher twice.
"""


def add(commands) -> None:
    command = commands.add_parser(
        "curate",
        help="make a dataset of several teachers' answers",
        description=DESCRIPTION,
        epilog=STATUSES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.set_defaults(run=_run)
    command.add_argument("recipe", metavar="RECIPE.toml")
    add_set(command)
    command.add_argument(
        "--dry-run", action="store_true", help="check everything, show the first question and how many there are"
    )


def _run(options: argparse.Namespace) -> int:
    try:
        config = read_curation(options.recipe, options.set)
        return _preview(config) if options.dry_run else _curate(config)
    except KeyboardInterrupt:
        return end(INTERRUPTED, "interrupted; all answers are kept: the same again goes on")
    except Exception as error:
        status = status_of(error)
        if status is None:
            raise
        return end(status, error)


def _preview(config: CurationConfig) -> int:
    with with_reason():
        from kdkernels.curation.run import plan_of
    plan = plan_of(config)
    print(f"The first of {len(plan.queries)} queries, as each of {len(plan.teachers)} teachers is asked it:\n")
    print(plan.asked(plan.queries[0])[0]["content"])
    return DONE


def _curate(config: CurationConfig) -> int:
    with with_reason():
        from kdkernels.curation.files import REPORT
        from kdkernels.curation.run import curate  # torch: seconds
    dataset = curate(config)
    report = dataset.with_name(REPORT)
    print(f"{report.read_text(encoding='utf-8').splitlines()[2]}\ndataset: {dataset}\nreport: {report}")
    return DONE
