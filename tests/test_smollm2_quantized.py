"""The real model, quantized to 4 bits; in a file of its own, so that it runs while the sliced model is made."""

from collections.abc import Callable
from pathlib import Path

import pytest

import freebits
from examples.demo_model import demo_model
from freebits.calibration.tokens import embedded_text
from freebits.storage.checkpoint import Checkpoint

pytestmark = pytest.mark.smollm2


def test_four_bits_per_weight_need_four_bits_and_change_predictions_little(
    tmp_path: Path, report: Callable[[str], None]
) -> None:
    dense = demo_model()
    facts = freebits.quantize(dense, tmp_path / "four", bits=4, calibration=embedded_text()[0], samples=2)
    n_weights = sum(spec.numel for spec in Checkpoint(dense).specs.values() if len(spec.shape) == 2)
    assert 0.995 < 2 * facts["bytes"]["packed"] / n_weights < 1.004  # half a byte per weight, headers included
    result = freebits.verify(tmp_path / "four", against=dense, limit=1)
    report(f"4 bits: {facts['bytes']['packed']:,} bytes, mean KL {result['mean_kl']:.4f}, ratio {result['ratio']:.4f}")
    assert result["mean_kl"] < 0.15
