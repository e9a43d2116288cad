"""Options of the benchmarks, and what their JSON says about the machine."""

import time

import environment
import pytest
from cases import SETS
from measure import CaseRun, key

LIMIT = 490  # seconds after which no further implementation is started: ten minutes with what is under way then


def pytest_addoption(parser):
    parser.addoption("--device", choices=("cpu", "cuda"), default="cpu")
    parser.addoption("--shapes", choices=tuple(SETS), default="tiny")


def pytest_configure(config):
    config.deadline = time.monotonic() + LIMIT
    config.refused = []


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


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: "cell" in item.fixturenames)  # the overheads first: a minute, and no time limit


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
    output_json["commit_info"] = {}  # machine_info has what matters
    output_json["shapes"] = config.getoption("--shapes")
    output_json["refused"] = config.refused
