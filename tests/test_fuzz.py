"""A randomly spoiled folder is either read, or refused with an error of one line."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fuzz.spoiling import CODECS, golden_contents, read, run, write


@pytest.mark.parametrize("codec", CODECS)
def test_a_sound_folder_is_read(codec: str, tmp_path: Path) -> None:
    write(golden_contents(codec), tmp_path)
    assert read(tmp_path)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_a_spoiled_folder_is_read_or_refused(data: st.DataObject) -> None:
    run(lambda below: data.draw(st.integers(0, below - 1)))


def test_most_spoiled_folders_are_refused_but_not_all() -> None:
    generator = np.random.default_rng(0)
    is_read = [run(lambda below: int(generator.integers(below))) for _ in range(300)]
    assert 5 < sum(is_read) < 150  # because any history and any bias is valid
