"""A run's values reach the Prometheus text of a node, on the local cluster that has no dashboard."""

from __future__ import annotations

import threading
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from event_schema import problems
from fake_worker import stage
from prometheus_client.parser import text_string_to_metric_families

from actors.metrics import counting_commits
from actors.ray_pool import RayPool
from fedtailor.core.messages import SegmentJob, SegmentResult
from fedtailor.core.settings import EngineConfig
from fedtailor.experiment.execute import Execution
from fedtailor.storage.journal import stamp
from fedtailor.tracking.events import name_of

pytestmark = pytest.mark.ray

STAGE = "strategy/fake/seed1"
OWN = {"run", "stage", "actor", "kind", "le"}
Values = dict[tuple[str, frozenset[tuple[str, str]]], float]


@dataclass(frozen=True)
class Played:
    results: list[SegmentResult]
    values: Values
    events: list[dict[str, Any]]


@pytest.fixture(scope="module")
def played(cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Played]:
    """Two rounds of four segments, 2 + 3 + 4 + 5 clients; an actor dies once; then what the node says."""
    events: list[dict[str, Any]] = []
    tell = counting_commits(events.append, "r1")
    pool = RayPool(
        EngineConfig(actors=2, num_cpus=0.5), events.append, worker="costly_worker:CostlyWorker",
        merge="fake_worker:merge", run="r1",
    )  # fmt: skip
    pool.open(stage(tmp_path_factory.mktemp("metrics"), kill=[2]))
    with Scraper() as scraper:
        for round in range(2):
            clients = [tuple(f"c{i}-{k}" for k in range(i + 2)) for i in range(4)]
            jobs = [SegmentJob(STAGE, round, i, names) for i, names in enumerate(clients)]
            results = pool.run(jobs, None, lambda _: None)
            tell({"kind": "progress", "stage": STAGE, "done": round + 1, "total": 2, "clients": 13})
        scraper.wait_for("commits_total", "peak_rss_bytes", "losses_total", "clients_per_second")
    yield Played(results, scraper.values, [event for event in events if "event" in event])
    pool.close()


class Scraper:
    """Looks at the node while a run goes on, as Prometheus does, and keeps the newest value of each name.

    A gauge is shown once for every value that its process sent, so a look afterwards may find none.
    """

    def __init__(self) -> None:
        self.values: Values = {}
        self.looks = 0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._scrape)

    def __enter__(self) -> Scraper:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def _scrape(self) -> None:
        while not self._end.wait(0.2):
            self.values |= exported()
            self.looks += 1

    def wait_for(self, *names: str) -> None:
        """Returns some looks after all names were there: processes send apart from each other."""
        limit, complete = time.monotonic() + 60, None
        while complete is None or self.looks < complete + 5:
            there = {name for name, _ in list(self.values)}
            if complete is None and {f"ray_fedtailor_{name}" for name in names} <= there:
                complete = self.looks
            assert self._thread.is_alive()
            assert time.monotonic() < limit, f"only {sorted(there)}"
            time.sleep(0.1)


def exported() -> Values:
    """Samples of this run on the node, with tags of its own only; pools of other tests left theirs there too."""
    port = ray.nodes()[0]["MetricsExportPort"]
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
        text = answer.read().decode()
    families = text_string_to_metric_families(text)
    return {
        (sample.name, frozenset((k, v) for k, v in sample.labels.items() if k in OWN)): sample.value
        for family in families
        for sample in family.samples
        if "fedtailor_" in sample.name and sample.labels.get("run") == "r1"
    }


def value(found: Values, name: str, **tags: str) -> float:
    return found[f"ray_fedtailor_{name}", frozenset({"run": "r1", "stage": STAGE, **tags}.items())]


def test_the_driver_counts_clients_rejections_losses_retries_and_commits(played: Played) -> None:
    found = played.values
    assert value(found, "clients_total") == 2 * 13
    assert value(found, "rejected_clients_total", kind="rejected") == 2
    assert value(found, "losses_total", kind="death") == 2
    assert value(found, "retries_total") >= 2
    assert value(found, "commits_total") == 2


def test_speed_queue_and_the_times_of_rounds_are_shown(played: Played) -> None:
    found = played.values
    assert value(found, "clients_per_second") > 0
    assert value(found, "segments_waiting") == 0
    assert value(found, "round_seconds_count") == 2
    assert value(found, "round_seconds_bucket", le="+Inf") == 2


def test_a_counter_stays_while_nothing_new_is_counted(played: Played) -> None:
    name = "ray_fedtailor_clients_total"
    for _ in range(5):
        assert name in {found for found, _ in exported()}
        time.sleep(0.3)


def test_each_actor_tells_its_memory(played: Played) -> None:
    found = played.values
    actors = [dict(tags) for name, tags in found if name == "ray_fedtailor_peak_rss_bytes"]
    assert {tags["actor"] for tags in actors} <= {"0", "1"}
    assert all(value(found, "peak_rss_bytes", actor=tags["actor"]) > 10e6 for tags in actors)
    assert actors
    assert not [name for name, _ in found if name == "ray_fedtailor_gpu_bytes"], "there is no GPU"


def test_what_a_pool_tells_of_a_killed_actor_is_as_the_table_of_events_says(played: Played) -> None:
    kept: list[dict[str, Any]] = []
    for event in played.events:
        Execution._pool_event(SimpleNamespace(emit=kept.append), event)  # type: ignore[arg-type]
    stamped = [stamp(event, "r1", number) for number, event in enumerate(kept, start=1)]
    assert {name_of(event) for event in stamped} >= {"pool/actor_lost", "pool/actor_replaced", "pool/job_retried"}
    assert [problem for event in stamped for problem in problems(event)] == []


def test_a_client_s_costs_name_the_actor_that_played_it(played: Played) -> None:
    results = played.results
    assert {cost.actor for result in results for cost in result.costs.values()} <= {0, 1}
    assert all(cost.attempt == result.attempt for result in results for cost in result.costs.values())
    assert set(results[0].costs) == {"c0-0", "c0-1"}
