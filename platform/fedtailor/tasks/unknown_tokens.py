"""Which share of a task's tokens its model's tokenizer does not know."""

from __future__ import annotations

import numpy as np
from transformers import PreTrainedTokenizerBase

from fedtailor.tasks.source import SPLITS
from fedtailor.tasks.store import BLOCK, TaskData
from fedtailor.tasks.tokens import TokenData


def unknown_tokens(data: TaskData, tokens: TokenData, tokenizer: PreTrainedTokenizerBase) -> dict[str, tuple[int, int]]:
    """Of each language's texts, train and test, that clients hold: tokens that are unknown, and all of them.

    A text counts once whoever holds it, as it was cut; a context as often as windows repeat it. Special tokens do not
    count; so a tokenizer whose unknown token also begins or ends texts, as byte-level ones have it, knows every token.

    Args:
        data: what was tokenised.
        tokens: its tokens.
        tokenizer: what they were made with.
    """
    unknown, special = tokenizer.unk_token_id, set(tokenizer.all_special_ids)
    others = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.cls_token_id, tokenizer.sep_token_id)
    real = unknown is not None and unknown not in others
    held = np.zeros(tokens.manifest["rows"], dtype=bool)
    for client in tokens.clients:
        for split in SPLITS:
            held[tokens.rows_of(client.id, split)] = True
    found: dict[str, tuple[int, int]] = {}
    languages = np.array([name for batch in data.batches for name in batch.column("language").to_pylist()])
    for number, (offsets, ids, _, _) in enumerate(tokens.blocks):
        counted = ~np.isin(ids, list(special - {unknown} if real else special))
        sums = [np.concatenate([[0], np.cumsum(one)])[offsets] for one in (counted & (ids == unknown), counted)]
        missing, total = (np.diff(one) * held[number * BLOCK :][: len(one) - 1] for one in sums)
        own_languages = languages[tokens.texts_of(np.arange(len(missing)) + number * BLOCK)]
        for language in np.unique(own_languages).tolist():
            own, before = own_languages == language, found.get(language, (0, 0))
            found[language] = (before[0] + int(missing[own].sum()), before[1] + int(total[own].sum()))
    return {language: counts for language, counts in found.items() if counts[1]}
