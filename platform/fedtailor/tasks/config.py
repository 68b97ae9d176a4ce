"""Which data, and how it becomes clients. Defaults are FedP2EFT's (section 4.1.1, A.1, A.4)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from fedtailor.core.settings import Named, Natural, Positive, Rate

MASAKHANEWS_LANGUAGES: tuple[str, ...] = (
    "amh", "eng", "fra", "hau", "ibo", "lin", "lug", "orm", "pcm", "run", "sna", "som", "swa", "tir", "xho", "yor",
)  # fmt: skip
"""ISO 639-3 codes, the paper's 16 languages."""

AUTO = "auto"
"""Value of a key that names a column: look for it by its usual names."""


class TaskConfig(Named):
    """Which data, and how it becomes clients (FedP2EFT section 4.1.1).

    Keys that are not given follow the task, see `TaskEntry.defaults`; the values below are MasakhaNEWS's.
    """

    when_absent: ClassVar[Mapping[str, Any]] = {
        "subset": None,
        "pools": ("seen", "unseen"),
        "sorted_share": None,
        "test_split": "mirror",
        "variant": None,
        "domains": (),
        "stride": 128,
        "validation_per_class": 0,
        "dealing": None,
        "min_size": None,
        "context": True,
    }

    name: str = "cldr"
    path: str | None = None
    """Local folder of the dataset (``fed_aya``, ``dolly``: or the file itself); else $FEDTAILOR_DATA is looked in, else
    the hub (not for ``fed_aya``). ``texts`` and ``instructions`` need it: a file, a folder of files, or a hub id."""
    subset: Literal["cola", "sst2", "qnli", "mnli", "qqp", "v1", "v2", "dataset1", "dataset2"] | None = None
    """glue, flan: which of its data sets. squad: which version, ``v2`` with questions that have no answer."""
    variant: Literal["paper", "solvable"] | None = None
    """pf2lora_synthetic only: which regressions; see the task."""
    domains: tuple[str, ...] = ()
    """webnlg only: the domains of each client, several joined by +; default: the task's own eight clients."""
    languages: tuple[str, ...] = MASAKHANEWS_LANGUAGES
    clients_per_language: Positive = 10
    """n clients per language and pool; 16 x 10 x 2 = 320 in the paper (xnli: 15 x 20 x 2 = 600)."""
    clients_kept: Positive | None = None
    """Keep the first so many of them with the texts that they have in the whole task, drop the others' texts."""
    pools: tuple[Literal["seen", "unseen"], ...] = ("seen", "unseen")
    """``[seen]``: all texts go to seen clients, and there are no unseen ones (PF2LoRA)."""
    alpha: Rate = 0.5
    """Dirichlet concentration of the label skew; large is IID."""
    sorted_share: Annotated[float, Field(ge=0, le=1)] | None = None
    """Label skew in the place of ``alpha``: this share of the train texts is sorted by label and cut into a contiguous
    block for each client, the rest is dealt out IID (PF2LoRA's tables; the text of the paper says the opposite)."""
    dealing: Literal["task_specific", "dirichlet"] | None = None
    """dolly and flan, with ``pools=[seen]``: how all rows become ``clients_per_language`` clients in all (pFedGPT).
    ``task_specific``: each has one task alone. ``dirichlet``: shares of each task by ``alpha``; test rows follow. None:
    every category of dolly is dealt evenly to clients of its own."""
    min_size: Positive | None = None
    """With ``dealing=dirichlet``: fewest training rows of a client; with fewer, shares are drawn anew. None: 40, as in
    pFedGPT's code, but a quarter of the mean where that is less."""
    test_split: Literal["mirror", "blocks"] = "mirror"
    """With ``sorted_share``: every client's test texts have the class shares of its train texts, or the test texts are
    sorted and cut like the train texts, so that clients at the border of two classes differ."""
    validation_per_class: Natural = 0
    """n > 0: so many training rows of each class (of instructions: of each group) are a validation pool that the server
    sees. Methods that ask for it (`Method.validation_pool`) tune on it and do not train on it; the others do."""
    max_length: Annotated[int, Field(ge=4)] = 256
    """Tokens kept of a text, special tokens included."""
    stride: Natural = 128
    """squad only: tokens that two neighbouring windows of a context share which is too long for ``max_length``."""
    test_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.3
    """Share of the texts held out for test, where the source has no test split (cldr, squad)."""
    drop_duplicates: bool = False
    """Drop test texts that also occur in a train split (the source's own leaks). xnli has none to drop: a premise
    goes to one pool and one split only."""
    train_per_pool: Positive = 2000
    """xnli only: train pairs of each language and pool, or half of the source's rows where that is less."""
    test_per_pool: Positive = 500
    """xnli only: test pairs of each language and pool, or half of the source's rows where that is less."""
    resample: Natural = 0
    """0: partition the texts. n > 0: every client draws n train texts (and n // 3 + 1 test texts) with
    replacement from its language, for population studies of any size."""
    template: str = "auto"
    """Generation only: ``chat`` (the tokenizer's own chat template), ``alpaca``, ``alpaca_input`` (with a section for
    what follows an instruction's first empty line), ``alpaca_short`` (without its first sentence), ``llama3``,
    ``plain`` (a line break before the response), ``auto``: the tokenizer's where it has one, else ``alpaca``; or a text
    file with the slots ``{instruction}`` and ``{response}``."""
    overlong: Literal["cut_prompt", "drop"] = "cut_prompt"
    """Generation only: what becomes of an example whose prompt and response exceed ``max_length`` tokens, in train and
    test alike: the prompt's instruction is cut at its end (the response then too, if it alone is too long), or the
    example is left out. Both are counted."""
    context: bool = True
    """dolly only: the context of an instruction belongs to it. False leaves it out, as pFedGPT's code does."""
    max_examples: Annotated[int, Field(ge=3)] | None = None
    """instructions, fed_aya, dolly, flan, and texts that name their clients, for small machines: most examples of a
    client, train and test together; the first after shuffling by seed. None: all."""
    names: Rate = 0.5
    """cldr_instruct only: concentration of each kind of names, in units of ``alpha``. At 0.5 a third of an average
    client's examples are names, which have to be known; the rest follow rules, which can be learned from others."""
    unseen: tuple[str, ...] = ()
    """Tasks whose data names the clients: ids of the unseen pool. Default of fed_aya: 21-27 and 34 (A.1)."""
    text_column: str = AUTO
    """texts only: column of the text. ``auto``: the first of the usual names that is there (`tasks.columns`)."""
    pair_column: str | None = AUTO
    """texts only: column of the second text of a pair. ``auto``: what belongs to the text column's name; None: none."""
    label_column: str = AUTO
    """texts only: column of the class, a name or a whole number."""
    client_column: str | None = "client"
    """texts and instructions only, as are the three below: column or key that names the client. ``auto`` (default of
    texts): by its usual names. None (texts only), or none found: texts are dealt to clients."""
    group_column: str | None = None
    """Column of the group (language) that a result is reported by; None: one group."""
    split_column: str | None = AUTO
    """Column that says of a row whether it is for train, validation or test. ``auto``: ``split``, where there is one;
    None: no column does."""
    split: str = "train"
    """Split of a data set from the hub."""
    reference_unseen_partition: bool = False
    """Repeat a mistake of the reference code's xnli: deal the unseen pool by the row numbers that the seen pool's
    labels gave, whatever labels these rows have, so that unseen clients have hardly any label skew."""

    @field_validator("subset", mode="before")
    @classmethod
    def _subset(cls, value: Any) -> Any:
        return value.lower().replace("-", "") if isinstance(value, str) else value  # CoLA, SST-2

    @field_validator("pools")
    @classmethod
    def _pools(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if value not in (("seen",), ("seen", "unseen")):
            raise ValueError("allowed: [seen], [seen,unseen]")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> TaskConfig:
        if self.clients_kept is not None and self.clients_kept > self.clients_per_language:
            raise ValueError(
                f"'task.clients_kept': {self.clients_kept} is above 'task.clients_per_language' = "
                f"{self.clients_per_language} (allowed: 1 ... {self.clients_per_language})"
            )
        if self.variant is not None and self.name != "pf2lora_synthetic":
            raise ValueError("'task.variant' is of task=pf2lora_synthetic alone")
        if self.reference_unseen_partition and self.resample:
            raise ValueError("'task.reference_unseen_partition' and 'task.resample' exclude each other: give one")
        if self.reference_unseen_partition and self.pools == ("seen",):
            raise ValueError("'task.reference_unseen_partition' deals the unseen pool, and 'task.pools' has none")
        if self.validation_per_class and self.resample:
            raise ValueError("'task.validation_per_class' and 'task.resample' exclude each other: clients share rows")
        if self.dealing is not None:
            if self.name not in ("dolly", "flan"):
                raise ValueError("'task.dealing' is of task=dolly and task=flan alone")
            if self.pools != ("seen",):
                raise ValueError("'task.dealing' deals all rows to seen clients: set task.pools=[seen]")
            if self.sorted_share is not None or self.resample:
                raise ValueError("'task.dealing' excludes 'task.sorted_share' and 'task.resample': each deals the rows")
        if self.min_size is not None and self.dealing != "dirichlet":
            raise ValueError("'task.min_size' is of task.dealing=dirichlet alone")
        for key in ("resample", "reference_unseen_partition"):
            if self.sorted_share is not None and getattr(self, key):
                raise ValueError(f"'task.sorted_share' and 'task.{key}' exclude each other: both deal texts to clients")
        return self

    @property
    def title(self) -> str:
        """How tables name it: ``xnli``, ``glue/cola``, ``pf2lora_synthetic/paper``."""
        part = self.subset or self.variant
        return self.name if part is None else f"{self.name}/{part}"

    @property
    def clients_used(self) -> int:
        """Clients of one language in one pool that take part: ``clients_kept``, else ``clients_per_language``."""
        return self.clients_kept or self.clients_per_language

    @field_validator("unseen", mode="before")
    @classmethod
    def _unseen(cls, value: Any) -> Any:
        # Ids of clients are often numbers; YAML and the command line then read them as such.
        if isinstance(value, (list, tuple)):
            return tuple(str(v) if isinstance(v, int) and not isinstance(v, bool) else v for v in value)
        return value

    @field_validator("languages")
    @classmethod
    def _languages(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value or len(set(value)) != len(value):
            raise ValueError("needs at least one language and no repeats")
        return value
