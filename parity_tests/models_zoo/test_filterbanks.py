"""Mel matrices in blocks: the same product without the zeros."""

from __future__ import annotations

import numpy as np
import pytest

from models_zoo.filterbanks import analysis_tables, mel_blocks
from models_zoo.presets import get_frontend, list_frontends


@pytest.mark.parametrize("name", list_frontends())
def test_blocks_put_together_are_the_matrix(name) -> None:
    matrix = analysis_tables(get_frontend(name)).mel
    blocks = mel_blocks(matrix)
    assert sum(block.shape[1] for _, block in blocks) == matrix.shape[1]
    rebuilt = np.zeros_like(matrix)
    start = 0
    for bins, block in blocks:
        assert block[[0, -1]].any(axis=1).all(), "bins that are 0 for all of the block are left in"
        rebuilt[bins, start : start + block.shape[1]] = block
        start += block.shape[1]
    np.testing.assert_array_equal(rebuilt, matrix)


def test_most_products_are_saved() -> None:
    matrix = analysis_tables(get_frontend("mrms")).mel
    assert sum(block.size for _, block in mel_blocks(matrix)) < matrix.size / 3


def test_filters_without_a_bin_and_a_last_block_that_is_not_full() -> None:
    matrix = np.zeros((9, 7), np.float32)
    matrix[4, 6] = 1
    blocks = mel_blocks(matrix, width=3)
    assert [(bins, block.shape) for bins, block in blocks] == [
        (slice(0, 1), (1, 3)),
        (slice(0, 1), (1, 3)),
        (slice(4, 5), (1, 1)),
    ]
    spectrum = np.arange(9, dtype=np.float32)
    parts = [spectrum[bins] @ block for bins, block in blocks]
    np.testing.assert_array_equal(np.concatenate(parts), spectrum @ matrix)
