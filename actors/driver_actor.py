"""The process that drives a run, and the command line's end of the wire to it."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.client_actor import adopt_environment, forwarded_environment
from actors.metrics import counting_commits
from actors.ray_errors import ActorLoss, classify_error
from actors.ray_pool import RayPool
from actors.session import ensure_ray
from fedtailor.core.config import importing, resolve
from fedtailor.core.errors import WorkerError
from fedtailor.core.settings import EngineConfig
from fedtailor.federated.pool import OnEvent

POLL_S = 0.25
"""Longest time between two looks at ``should_stop``."""


class Reporter:
    """Events on their way from a run to whoever watches it; safe between threads."""

    def __init__(self) -> None:
        self._events: list[dict[str, Any]] = []
        self._first = 0
        self._news = threading.Condition()

    def event(self, event: dict[str, Any]) -> None:
        """Appends one event."""
        with self._news:
            self._events.append(event)
            self._news.notify_all()

    def read(self, since: int, wait_s: float = 0.0) -> list[dict[str, Any]]:
        """Events from number ``since`` on; waits ``wait_s`` seconds for one; forgets those before."""
        with self._news:
            self._news.wait_for(lambda: self._first + len(self._events) > since, timeout=wait_s)
            passed = min(max(0, since - self._first), len(self._events))
            del self._events[:passed]
            self._first += passed
            return list(self._events)


class DriverActor:
    """Runs one function, while its events can be read and it can be asked to stop."""

    def __init__(self) -> None:
        self._reporter = Reporter()
        self._stop = threading.Event()

    def run(
        self,
        entry: str,
        payload: Mapping[str, Any],
        config: EngineConfig,
        environment: Mapping[str, str],
        folder: str,
    ) -> Any:
        """Calls ``entry(payload, make_pool, on_event, should_stop)`` and returns what it returns.

        Args:
            entry: ``module:function``. ``make_pool(engine_config, on_event)`` makes a pool on this
                cluster whose actors end with this process; ``on_event`` sends an event; ``should_stop`` says
                whether an orderly end is asked for.
            payload: what the function takes. With a true ``begin`` the actors of the pool that it will ask for come up
                while it is imported.
            config: the ``engine`` section.
            environment: variables to set unless they are set here.
            folder: working directory of whoever asks, used if it exists here.
        """
        adopt_environment(environment, folder)
        run = str(payload.get("run_id", ""))
        on_event = counting_commits(self._reporter.event, run)
        early = RayPool(config, on_event, run=run) if payload.get("begin") else None

        def make_pool(asked: EngineConfig, hear: OnEvent, **options: Any) -> RayPool:
            nonlocal early
            pool, early = early, None
            # Whoever asks for another pool must find the places free.
            if pool is not None and (options or asked.model_copy(update={"address": config.address}) != config):
                pool.close()
                pool = None
            if pool is None:
                return RayPool(asked, hear, run=run, **options)
            pool.on_event = hear
            return pool

        try:
            with importing():
                function = resolve(entry)
            return function(payload, make_pool, on_event, self._stop.is_set)
        finally:
            if early is not None:
                early.close()

    def events(self, since: int, wait_s: float) -> list[dict[str, Any]]:
        """See `Reporter.read`."""
        return self._reporter.read(since, wait_s)

    def stop(self) -> None:
        """Asks the function to stop at its next commit."""
        self._stop.set()


def run_on_driver(
    entry: str,
    payload: Mapping[str, Any],
    config: EngineConfig,
    on_event: OnEvent,
    should_stop: Callable[[], bool],
) -> Any:
    """Runs a function in a `DriverActor` on this node and returns its result.

    Args:
        entry: ``module:function``, see `DriverActor.run`.
        payload: picklable argument of the function.
        config: the ``engine`` section, for ``address`` and ``threads``.
        on_event: called in this process for every event, in order.
        should_stop: looked at about four times a second; once true, the function is asked to stop.

    Raises:
        TailorError: raised by the function on purpose.
        WorkerError: the driver process died; what is committed stays, the run can be resumed.
    """
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
    session = ensure_ray(config.address, config.threads)
    try:
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        # Threads: the run, a waiting reader of events, and room for `stop`.
        options: dict[str, Any] = {
            "num_cpus": 0, "max_restarts": 0, "max_concurrency": 4, "scheduling_strategy": here,
        }  # fmt: skip
        driver: Any = ray.remote(**options)(DriverActor).remote()
        try:
            done = driver.run.remote(entry, dict(payload), config, forwarded_environment(), os.getcwd())
            return _follow(driver, done, on_event, should_stop)
        finally:
            ray.kill(driver, no_restart=True)
    finally:
        session.close()


def _follow(driver: Any, done: Any, on_event: OnEvent, should_stop: Callable[[], bool]) -> Any:
    seen, stopping, finished = 0, False, False
    while not finished:
        finished = bool(ray.wait([done], timeout=0)[0])
        news = driver.events.remote(seen, 0.0 if finished else POLL_S)
        ray.wait([news, done], num_returns=2 if finished else 1)
        try:
            events = ray.get(news)
        except ray.exceptions.RayActorError:
            break  # `done` knows why.
        for event in events:
            on_event(event)
        seen += len(events)
        if not stopping and should_stop():
            stopping = True
            driver.stop.remote()
    try:
        return ray.get(done)
    except Exception as error:
        loss_or_error = classify_error(error)
        if isinstance(loss_or_error, ActorLoss):
            raise WorkerError(
                f"the driver process was lost ({loss_or_error.kind}): {loss_or_error.cause}. "
                "What was committed is safe: resume the run"
            ) from None
        raise loss_or_error from None
