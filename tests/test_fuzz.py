"""Folders that a grammar has spoiled are read as what they are, or refused in one line."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fuzz.spoiling import CODECS, golden_contents, read, run, write


@pytest.mark.parametrize("codec", CODECS)
def test_what_is_not_spoiled_is_read(codec: str, tmp_path: Path) -> None:
    write(golden_contents(codec), tmp_path)
    assert read(tmp_path)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_what_is_spoiled_is_read_or_refused(data: st.DataObject) -> None:
    run(lambda below: data.draw(st.integers(0, below - 1)))


def test_most_of_what_is_spoiled_is_refused_and_not_all() -> None:
    numbers = np.random.default_rng(0)
    found = [run(lambda below: int(numbers.integers(below))) for _ in range(300)]
    assert 5 < sum(found) < 150  # a history or a bias may say anything
