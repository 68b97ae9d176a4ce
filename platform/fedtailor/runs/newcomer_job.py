"""What ``fedtailor personalise`` is asked for, and every check that needs no weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fedtailor.core.errors import ConfigError, DataError, StorageError
from fedtailor.methods.fedp2eft import FedP2EFTConfig
from fedtailor.models.classifier import load_tokenizer
from fedtailor.runs.newcomer import Prepared, missing_device, prepare, with_overrides
from fedtailor.runs.newcomer_data import Columns, Labelled, labelled
from fedtailor.runs.newcomer_files import Use, read_table
from fedtailor.runs.newcomer_psg import TrainedPsg, checked_fingerprint, open_psg
from fedtailor.runs.newcomer_split import hold_out, limited, refuse_single_class, shared_texts
from fedtailor.runs.storage import Storage

TEST_FRACTION = 0.2


@dataclass(frozen=True)
class Request:
    """What the user asked for.

    Args:
        run_id: run with the trained generator.
        data: file, folder or hub id to learn from (`newcomer_files.read_table`).
        budget: r.
        out: folder to make; must not be there or be empty.
        storage: where the run is.
        seed: of the run; default: its first.
        test: like ``data``, to score on; default: a share of ``data`` is held out.
        test_fraction: that share; default `TEST_FRACTION`.
        columns: names of the columns.
        language: code for the record; changes no number.
        words: ``key=value`` overrides of ``fedp2eft.finetune``.
        merge: also write the whole model with the adapter merged.
        limit: most rows of ``data`` to use.
        base: another copy of the base model.
        device: ``cpu`` or ``cuda``.
    """

    run_id: str
    data: str
    budget: int
    out: Path
    storage: str = "./runs"
    seed: int | None = None
    test: str | None = None
    test_fraction: float | None = None
    columns: Columns = field(default_factory=Columns)
    language: str = ""
    words: Sequence[str] = ()
    merge: bool = False
    limit: int | None = None
    base: Path | None = None
    device: str = "cpu"


@dataclass(frozen=True)
class Ready:
    """A request that passed every check that needs no weights.

    Args:
        request: as asked.
        psg: trained generator and base folder.
        cfg: the method's configuration, overridden.
        fingerprint: of the base model.
        train: rows to learn from.
        test: rows to score on.
        tokens: both, tokenised.
        overlap: held-out rows whose text is trained on as well (only where the user gave the held-out rows).
    """

    request: Request
    psg: TrainedPsg
    cfg: FedP2EFTConfig
    fingerprint: str
    train: Labelled
    test: Labelled
    tokens: Prepared
    overlap: int


def check(request: Request) -> Ready:
    """Opens the run, reads the data and tokenises it; loads no weights and writes nothing.

    Raises:
        TailorError: the first thing that cannot work; see `newcomer_psg`, `newcomer_files`, `newcomer_data`.
    """
    _refuse_options(request)
    storage = Storage(request.storage)
    psg = open_psg(storage, request.run_id, request.seed, request.budget, request.base)
    cfg = with_overrides(psg.cfg, request.words)
    train, test = _read(request, psg)
    fingerprint = checked_fingerprint(storage, psg)
    tokens = prepare(load_tokenizer(psg.base), train, test, psg.exp.task.max_length)
    return Ready(request, psg, cfg, fingerprint, train, test, tokens, shared_texts(train, test))


def _refuse_options(request: Request) -> None:
    problems = []
    if request.test is not None and request.test_fraction is not None:
        problems.append("--test and --test-fraction exclude each other: give one")
    if request.test_fraction is not None and not 0 < request.test_fraction < 1:
        problems.append(f"--test-fraction {request.test_fraction:g}: must be between 0 and 1")
    if request.limit is not None and request.limit < 2:
        problems.append(f"--limit {request.limit}: must be 2 or more")
    if request.seed is not None and request.seed < 0:
        problems.append(f"--seed {request.seed}: must be 0 or more")
    if (why := missing_device(request.device)) is not None:
        problems.append(why)
    if problems:
        raise ConfigError(problems)
    out = request.out.expanduser()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise StorageError(f"--out {out} is there already and not an empty folder")


def _read(request: Request, psg: TrainedPsg) -> tuple[Labelled, Labelled]:
    """Rows to learn from and rows to score on."""
    data = _labelled(request.data, "train", request.columns, psg)
    if request.limit is not None:
        data = limited(data, request.limit, psg.seed)
    refuse_single_class(data, psg.labels)
    if request.test is None:
        fraction = TEST_FRACTION if request.test_fraction is None else request.test_fraction
        return hold_out(data, fraction, psg.seed)
    test = _labelled(request.test, "test", request.columns, psg)
    if (data.pairs is None) != (test.pairs is None):
        with_pairs, without = (data, test) if test.pairs is None else (test, data)
        raise DataError(
            f"{with_pairs.name} has pairs of texts ({with_pairs.columns.text}, {with_pairs.columns.pair}), "
            f"{without.name} has single texts; name both columns with --text and --pair"
        )
    return data, test


def _labelled(source: str, use: Use, columns: Columns, psg: TrainedPsg) -> Labelled:
    return labelled(read_table(source, use), columns, psg.labels)
