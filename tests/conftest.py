"""What all kinds of tests may ask for."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections import Counter
from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING, Any

import hypothesis
import pytest

from tests.support import aftermath, interruption, lanes

if TYPE_CHECKING:
    from tests.support.pbs.virtual import VirtualPbs
    from tests.support.slurm.virtual import VirtualSlurm


hypothesis.settings.register_profile("same", derandomize=True, deadline=None)
hypothesis.settings.register_profile("fresh", deadline=None, database=None)
hypothesis.settings.load_profile("fresh" if "GATEWAY_FRESH" in os.environ else "same")

STARTS_A_PROCESS = ("subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "os.system")
"""Events of Python's own audit."""
REBUILT_AT_MOST = 3
"""So often what the tests of a file share is made anew, because it could not be made."""

_no_process_in: pytest.Item | None = None
_failed_to_set_up: Counter[str] = Counter()
_interruption = interruption.Interruption()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The order of the two workers, and ``process`` for every test outside ``unit``: all of them start some."""
    for item in items:
        if lanes.folder_of(item.nodeid) != "unit":
            item.add_marker(pytest.mark.process)
    items[:] = lanes.ordered(items)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Which of two workers runs what."""
    return lanes.scheduler(config, log)


def pytest_sessionstart(session: pytest.Session) -> None:
    """Signals end a run in order; failures are shown as they come, where workers run the tests."""
    _interruption.install()
    plugins = session.config.pluginmanager
    if plugins.hasplugin("dsession"):
        plugins.register(aftermath.AtOnce(plugins.getplugin("terminalreporter")))


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """After a signal the workers end their gateways and Slurms before xdist ends the workers."""
    _interruption.ending = True
    plugins = session.config.pluginmanager
    if (workers := plugins.getplugin("dsession")) is not None:
        interruption.end_workers(workers, plugins.getplugin("terminalreporter").write_line)


def _audit(event: str, _arguments: tuple[Any, ...]) -> None:
    if _no_process_in is not None and event in STARTS_A_PROCESS:
        raise AssertionError(f"{_no_process_in.nodeid} starts a process: mark it with pytest.mark.process")


sys.addaudithook(_audit)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None, object, object]:
    """A test without the mark ``process`` starts none: so ``make test-fast`` stays what it says."""
    return (yield from _guarded(item))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """Not in the teardown: after a worker's last test it ends what other tests shared, with the programs for that."""
    return (yield from _guarded(item))


def _guarded(item: pytest.Item) -> Generator[None, object, object]:
    global _no_process_in
    if item.get_closest_marker("process") is None:
        _no_process_in = item
    try:
        return (yield)
    finally:
        _no_process_in = None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A failed test's report has what its gateways say."""
    report = yield
    if report.failed:
        report.sections += [(f"gateway {made.folder}", aftermath.state_of(made)) for made in aftermath.running]
        item.stash[aftermath.FAILED] = report.when
    return report


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_teardown(item: pytest.Item) -> None:
    """One failure costs one test: what a failed test shared with others, gateways and Slurm, is ended with it; the next
    test has its own."""
    when = item.stash.get(aftermath.FAILED, None)
    if when is None:
        return
    _failed_to_set_up[str(item.path)] += when == "setup"
    if _failed_to_set_up[str(item.path)] <= REBUILT_AT_MOST:
        item.session._setupstate.teardown_exact(None)


@pytest.fixture(autouse=True)
def own_signals() -> Iterator[None]:
    """Ctrl-C works in every test and its children: not so in a background job's, nor where a command was interrupted
    in this process before, which then ignores it on purpose."""
    signal.signal(signal.SIGINT, _interruption)
    before = {number: signal.getsignal(number) for number in interruption.SIGNALS}
    yield
    for number, handler in before.items():
        if handler is not None:
            signal.signal(number, handler)


@pytest.fixture(autouse=True)
def own_logs() -> Iterator[None]:
    """What a controller, an ingress or a desk of a test logs goes to its own folder: not so what the next one's does,
    when that folder is gone."""
    yield
    for name in ("gateway.controller", "gateway.ingress", "gateway.desk"):
        logger = logging.getLogger(name)
        for handler in [one for one in logger.handlers if isinstance(one, logging.FileHandler)]:
            logger.removeHandler(handler)
            handler.close()
            logger.propagate = True


@pytest.fixture(scope="session")
def slurm_cluster() -> Iterator[VirtualSlurm]:
    """One virtual Slurm for the whole run; tests take ``slurm``."""
    from tests.support.slurm.virtual import missing, virtual_slurm  # imports Ray: not for tests that need no Slurm

    if (reason := missing()) is not None:
        pytest.skip(reason)
    with virtual_slurm() as cluster:
        yield cluster


@pytest.fixture
def slurm(slurm_cluster: VirtualSlurm, monkeypatch: pytest.MonkeyPatch) -> Iterator[VirtualSlurm]:
    """The virtual Slurm, found by this process's own commands, with an empty queue and all nodes up."""
    monkeypatch.setenv("SLURM_CONF", str(slurm_cluster.places.conf))
    yield slurm_cluster
    slurm_cluster.clear()


@pytest.fixture
def pbs(monkeypatch: pytest.MonkeyPatch) -> Iterator[VirtualPbs]:
    """A stand-in for PBS whose commands this process finds."""
    from tests.support.pbs.virtual import virtual_pbs

    with virtual_pbs() as standin:
        monkeypatch.setenv("PATH", f"{standin.bin}:{os.environ['PATH']}")
        yield standin
