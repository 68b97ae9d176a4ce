"""Token vectors to start from: a short pretraining cannot learn which words go together, counting can.

Positive pointwise mutual information of tokens within a window, context counts ** 0.75, factorised by a truncated SVD
(Levy, Goldberg and Dagan, TACL 2015, sections 2 and 3): rows of U sqrt(S). The output bias starts at the tokens' log
frequencies, so that the first steps are not spent on learning these.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
from scipy.sparse import coo_array, csr_array
from sklearn.utils.extmath import randomized_svd

from fedtailor.core.seeding import seed_for
from fedtailor.models.pretrain_blocks import Rows

Floats = npt.NDArray[np.float32]

WINDOW = 5

SMOOTHING = 0.75


def token_vectors(rows: Mapping[str, Rows], vocabulary: int, special: Sequence[int], size: int, seed: int) -> Floats:
    """Vectors of all tokens, float32 (vocabulary, size), standard deviation 1 over all that occur; else zeros.

    Args:
        rows: train rows by stream.
        vocabulary: number of tokens.
        special: ids that are neither counted nor given a vector.
        size: columns; those beyond the vocabulary's rank are zero.
        seed: of the SVD's random projection.
    """
    information = _positive_information(_counts(rows, vocabulary, special))
    vectors = np.zeros((vocabulary, size), dtype=np.float32)
    if not information.nnz:
        return vectors
    rank = min(size, vocabulary)
    u, s, _ = randomized_svd(information, rank, n_iter=3, random_state=seed_for(seed, "pretrain", "svd") % 2**32)
    present = np.diff(information.indptr) > 0
    vectors[present, :rank] = (u * np.sqrt(s))[present]  # the others' rows hold rounding noise
    return np.asarray(vectors / vectors[present].std(), dtype=np.float32)


def log_frequencies(rows: Sequence[Rows], vocabulary: int, special: Sequence[int]) -> Floats:
    """Log of each token's share of the rows, special tokens apart, float32 (vocabulary,); half a count is added."""
    counts = sum((np.bincount(part.ravel(), minlength=vocabulary) for part in rows), np.zeros(vocabulary)) + 0.5
    counts[list(special)] = 0.5
    return np.asarray(np.log(counts / counts.sum()), dtype=np.float32)


def _counts(rows: Mapping[str, Rows], vocabulary: int, special: Sequence[int]) -> csr_array:
    """How often two tokens stand at most `WINDOW` apart, weighted by 1 / distance; symmetric."""
    shape = (vocabulary, vocabulary)
    total = csr_array(shape, dtype=np.float32)
    for stream in sorted(rows):
        for distance in range(1, WINDOW + 1):
            left, right = rows[stream][:, :-distance].ravel(), rows[stream][:, distance:].ravel()
            kept = ~(np.isin(left, special) | np.isin(right, special))
            weights = np.full(int(kept.sum()), 1 / distance, dtype=np.float32)
            total = total + coo_array((weights, (left[kept], right[kept])), shape=shape).tocsr()
    return total + total.T


def _positive_information(counts: csr_array) -> csr_array:
    """max(0, log p(i, j) / (p(i) p(j)^0.75)), the latter normalised."""
    cells = counts.tocoo()
    token = np.bincount(cells.row, cells.data.astype(np.float64), counts.shape[0])
    context = token**SMOOTHING
    context /= max(context.sum(), 1.0)
    information = np.log(cells.data / (token[cells.row] * context[cells.col]))
    kept = information > 0
    values = information[kept].astype(np.float32)
    return csr_array((values, (cells.row[kept], cells.col[kept])), shape=counts.shape)
