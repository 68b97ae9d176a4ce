"""Errors, one leaf per kind of blame. Each carries the exit code that the command line ends with."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches


class TailorError(Exception):
    """Base of all errors that fedtailor raises on purpose; shown without a traceback."""

    exit_code = 1

    def __init_subclass__(cls, exit_code: int | None = None) -> None:
        cls.exit_code = cls.exit_code if exit_code is None else exit_code


class ConfigError(TailorError, exit_code=2):
    """The configuration cannot run. Holds every problem that was found, not just the first.

    Args:
        problems: one sentence each, naming the key, the value and the allowed values.
    """

    def __init__(self, problems: Sequence[str] | str) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class DataError(TailorError, exit_code=3):
    """A dataset is missing, damaged or unusable; names the file and line or the client."""


class ModelError(TailorError, exit_code=3):
    """A base model or tokenizer is missing, incomplete or of an unsupported architecture."""


class CapabilityError(TailorError, exit_code=2):
    """A method needs something that the chosen engine or adapter cannot do."""


class PlacementError(TailorError, exit_code=4):
    """The requested resources do not exist on this machine or cluster."""


class StorageError(TailorError, exit_code=5):
    """A run folder, artifact or lock is in a state that forbids going on."""


class LockedError(StorageError):
    """Another process that is alive has this run or artifact."""


class ClientError(TailorError, exit_code=6):
    """A client failed inside data or method code; says where.

    Args:
        client: client id.
        stage: stage key, e.g. ``strategy/fedp2eft/seed42``.
        round: round or chunk index, from 0.
        cause: text of the original error.
    """

    def __init__(self, client: str, stage: str, round: int, cause: str) -> None:
        self.client, self.stage, self.round, self.cause = client, stage, round, cause
        super().__init__(f"client {client}, {stage}, round {round}: {cause}")

    def __reduce__(self) -> tuple[type[ClientError], tuple[str, str, int, str]]:
        return ClientError, (self.client, self.stage, self.round, self.cause)


class MethodError(TailorError, exit_code=6):
    """A method breaks a rule of `fedtailor.federated.method`; names the method, the rule and what was found instead."""


class RoundError(TailorError, exit_code=6):
    """A round has no valid update, or fewer than the quorum; the last good state is kept."""


class SweepError(TailorError, exit_code=6):
    """Trials of a sweep failed; the others are kept, and the same words try the failed ones again."""


class TrackingError(TailorError, exit_code=7):
    """W&B did not take a run, or not all of it; the run folder is complete, and a later sync adds what is missing."""


class JudgeError(TailorError, exit_code=7):
    """A judge's endpoint is down, or judgements are missing; the others are kept, the same words ask for the rest."""


class WorkerError(TailorError, exit_code=6):
    """Actors died or hung more often than the retry policy allows."""


class Interrupted(TailorError, exit_code=130):
    """The run was asked to stop (Ctrl-C or SIGTERM) and stopped at a commit; it can be resumed."""


@contextmanager
def reported_as(kind: type[TailorError], where: str, *errors: type[BaseException]) -> Iterator[None]:
    """Turns a library's error into one of ours: ``where: what it says``.

    Args:
        kind: which one of ours.
        where: begins the message: the place or key, and what is wrong with it.
        errors: what the library raises.
    """
    try:
        yield
    except errors as error:
        raise kind(f"{where}: {error}") from error


def nearest(name: str, known: Iterable[str], cutoff: float = 0.5) -> str | None:
    """The most similar name, if one is similar enough (`difflib`'s ratio, 0 to 1)."""
    return next(iter(get_close_matches(name, list(known), 1, cutoff)), None)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of a sentence about an unknown name.

    >>> did_you_mean("lra", ["base", "lora"]), did_you_mean("xyz", ["lora"])
    ("; did you mean 'lora'?", '')
    """
    near = nearest(name, (other for other in known if other != name))
    return f"; did you mean '{near}'?" if near else ""


def listed(names: Sequence[object], most: int = 5, separator: str = ", ") -> str:
    """The first few names.

    >>> listed(["a", "b", "c"], 2)
    'a, b and 1 more'
    """
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return separator.join(map(str, names[:most])) + more
