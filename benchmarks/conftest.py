"""Options of the benchmarks, the order of what they measure, and their JSON and report, written after each of it."""

import time
from pathlib import Path

import environment
import pytest
import report
from cases import SETS
from measure import CaseRun, key

BEGUN = 0.8  # share of the limit after which no further implementation is started
USUAL = 490 / BEGUN  # seconds, without a limit: ten minutes with what is under way then
FIRST = {"cpu": 0, "cuda": 3}  # so many cases come before the overheads, which take a minute and know no limit


def pytest_addoption(parser):
    parser.addoption("--device", choices=("cpu", "cuda"), default="cpu")
    parser.addoption("--shapes", choices=tuple(SETS), default="tiny")
    parser.addoption("--seconds", type=float, default=USUAL)
    parser.addoption("--results", type=Path, help="JSON; report.md is written beside it")


def pytest_configure(config):
    config.deadline = time.monotonic() + BEGUN * config.getoption("--seconds")
    config.refused, config.left = [], 0


def pytest_generate_tests(metafunc):
    if "cell" in metafunc.fixturenames:
        shapes = metafunc.config.getoption("--shapes")
        cells = [
            (number, key(loss, implementation))
            for number, case in enumerate(SETS[shapes])
            for loss in case.losses
            for implementation in case.implementations
        ]
        metafunc.parametrize("cell", cells, ids=[f"{SETS[shapes][n].name} | {name}" for n, name in cells])


def pytest_collection_modifyitems(config, items):
    first = FIRST[config.getoption("--device")]

    def turn(item) -> int:
        return 1 if "cell" not in item.fixturenames else 0 if item.callspec.params["cell"][0] < first else 2

    if config.getoption("--shapes") == "compare":
        items[:] = [item for item in items if "cell" in item.fixturenames]
    items.sort(key=turn)


def pytest_collection_finish(session):
    session.config.left = len(session.items)
    write(session.config)


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item):
    item.config.left -= 1
    write(item.config)


def write(config) -> None:
    """JSON and report of all that was measured so far; the plots come at the end (run.py)."""
    path, hook, session = config.getoption("--results"), config.hook, config._benchmarksession
    if path is None:
        return
    if not hasattr(config, "about"):
        config.about = session.get_machine_info()
    both = {"config": config, "benchmarks": session.benchmarks}
    data = hook.pytest_benchmark_generate_json(**both, include_data=True, machine_info=config.about, commit_info={})
    hook.pytest_benchmark_update_json(**both, output_json=data)
    report.save(path, data)
    report.write(path, plotted=False)


@pytest.fixture(scope="session")
def device(request):
    return request.config.getoption("--device")


@pytest.fixture(scope="session")
def measured(request, device):
    """The cells of a case by number; the first one asked for measures them all, in turns. Keeps one case's inputs."""
    done = {}

    def cells(number: int) -> dict:
        if number not in done:
            case = SETS[request.config.getoption("--shapes")][number]
            done[number] = CaseRun(case, device, request.config.deadline).measure()
        return done[number]

    return cells


@pytest.fixture(scope="session")
def refused(request) -> list:
    """What has no time, and why, for the report."""
    return request.config.refused


@pytest.hookimpl
def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info.clear()  # it names the host
    machine_info.update(environment.describe(config.getoption("--device")))


@pytest.hookimpl
def pytest_benchmark_update_json(config, benchmarks, output_json):
    output_json["left"] = config.left
    output_json["shapes"] = config.getoption("--shapes")
    output_json["refused"] = config.refused
