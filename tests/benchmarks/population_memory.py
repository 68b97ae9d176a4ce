"""Peak memory of driver and actors for a population: ``population_memory.py CLIENTS_PER_LANGUAGE FOLDER``."""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1])]

from tiny import run_tiny, tiny


def main() -> None:
    from actors.ray_pool import RayPool
    from fedtailor.tasks.config import MASAKHANEWS_LANGUAGES

    per_language, folder = int(sys.argv[1]), Path(sys.argv[2])
    exp = tiny(
        folder, f"task.languages=[{','.join(MASAKHANEWS_LANGUAGES)}]", f"task.clients_per_language={per_language}",
        "task.resample=24", "methods=[base]", "personalise.pools=[seen]", "personalise.chunk=40", "base.cohort=16",
        "base.rounds=10", "engine.backend=ray", "engine.actors=2", "fedavg.adapter=lora", "engine.token_budget=4096",
    )  # fmt: skip
    events: list[dict] = []  # type: ignore[type-arg]
    start = time.perf_counter()
    run_tiny(exp, pool=lambda on_event: RayPool(exp.engine, on_event), events=events)
    actors = [e["peak_rss_mb"] for e in events if e["kind"] == "segment"]
    driver = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    clients = per_language * len(MASAKHANEWS_LANGUAGES)
    print(
        json.dumps({"clients": clients, "driver_mb": driver, "actor_mb": max(actors), "s": time.perf_counter() - start})
    )


if __name__ == "__main__":
    main()
