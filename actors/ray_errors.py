"""What an exception from Ray means: a lost process, whose jobs may be retried, or an answer."""

from __future__ import annotations

from dataclasses import dataclass

from ray import exceptions

from fedtailor.core.errors import PlacementError, TailorError, WorkerError

_LOST = (
    exceptions.RayActorError,
    exceptions.ObjectLostError,
    exceptions.NodeDiedError,
    exceptions.WorkerCrashedError,
    exceptions.OutOfMemoryError,
)

_OOM_SIGNS = ("memory monitor", "running low on memory", "out of memory", "(oom)", "oom-kill", "outofmemory")
_STARTS = ("The actor is dead because ", "The actor died because ", "Worker exit detail: ")
_ENDS = (" Some common causes", " Object store memory usage", " The actor never ran", " Refer to the doc")


@dataclass(frozen=True)
class ActorLoss:
    """An actor that will not answer.

    Args:
        kind: ``death``, ``oom``, ``node``, ``hang`` or ``unreachable``.
        cause: one line.
        stack: what its threads did, for a hang.
    """

    kind: str
    cause: str
    stack: str = ""


class GroupLostError(Exception):
    """A group of ranks is gone, whole: one of them died, hung or fell out of step.

    Args:
        loss: the loss of the first rank.
    """

    def __init__(self, loss: ActorLoss) -> None:
        self.loss = loss
        super().__init__(loss)


def classify_error(error: BaseException) -> ActorLoss | TailorError:
    """Tells a loss from an answer.

    Returns:
        The `ActorLoss` if the process or its result is gone, else the error to raise: a `TailorError` of the
        actor comes back as itself; any other exception becomes a `WorkerError` with its traceback.
    """
    if isinstance(error, exceptions.RayTaskError):
        cause = error.cause
        if isinstance(cause, TailorError):
            return cause
        if isinstance(cause, _LOST):
            return classify_error(cause)
        if isinstance(cause, GroupLostError):
            return cause.loss
        return WorkerError(f"{type(cause).__name__} in an actor, not retried:\n{error}")
    if isinstance(error, exceptions.ActorUnschedulableError):
        return PlacementError(f"Ray cannot place an actor: {_line(error)}")
    if isinstance(error, exceptions.RayActorError) and error.actor_init_failed:
        return WorkerError(f"an actor cannot start; are fedtailor and actors installed on all nodes?\n{error}")
    if isinstance(error, _LOST):
        return ActorLoss(_kind(error), _line(error))
    return WorkerError(f"Ray failed with {type(error).__name__}: {error}")


def _kind(error: exceptions.RayError) -> str:
    text = str(error).lower()
    if isinstance(error, exceptions.OutOfMemoryError) or any(sign in text for sign in _OOM_SIGNS):
        return "oom"
    if isinstance(error, exceptions.ActorUnavailableError):
        return "unreachable"
    if isinstance(error, exceptions.NodeDiedError) or "its node has died" in text:
        return "node"
    return "death"


def _line(error: BaseException) -> str:
    """Ray's message without its advice."""
    text = " ".join(str(error).split())
    for start in _STARTS:
        text = text[text.find(start) :] if start in text else text
    for end in _ENDS:
        text = text.partition(end)[0]
    return text.rstrip(". ")
