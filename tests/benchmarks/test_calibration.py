"""The benchmark of calibration scores none of the bytes that it trains or searches on, and writes a whole result."""

import json
from pathlib import Path

import pytest
import torch

from bdh.errors import BDHError
from benchmarks import calibration

BLOCK = 32


def test_training_calibration_and_scored_text_are_disjoint_and_in_order() -> None:
    content = bytes(torch.randint(0, 256, (60_000,), generator=torch.Generator().manual_seed(0)).tolist())
    text = calibration.split_text(content, BLOCK, torch.device("cpu"))
    assert bytes(text.train.tolist()) == content[:54_000]
    searched, scored = (tokens.read(0, len(tokens)).tobytes() for tokens in (text.calibration, text.scored))
    assert searched == content[54_000 : 54_000 + 8 * 8 * BLOCK + 1]
    # The last byte of the calibration is predicted there; here it is the first that is read, which is not scored.
    assert scored == content[54_000 + 8 * 8 * BLOCK : 54_000 + 8 * 8 * BLOCK + 3 * 32 * BLOCK + 1]


def test_a_text_without_a_window_to_score_is_refused() -> None:
    needed = 8 * 8 * BLOCK + 32 * BLOCK + 1
    calibration.split_text(bytes(10 * needed), BLOCK, torch.device("cpu"))
    with pytest.raises(BDHError, match=f"has {needed - 1} bytes; it must have {needed}"):
        calibration.split_text(bytes(10 * (needed - 1)), BLOCK, torch.device("cpu"))


def test_the_result_holds_scores_before_and_after_and_every_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["to be ", "or not ", "that is ", "the question\n"]
    numbers = torch.randint(0, len(words), (8000,), generator=torch.Generator().manual_seed(0)).tolist()
    file = tmp_path / "text.txt"
    file.write_text("".join(words[number] for number in numbers))
    given = ["--device", "cpu", "--size", "tiny", "--steps", "30", "--continue_steps", "4"]
    monkeypatch.setattr("sys.argv", ["calibration", "--text", str(file), "--output", str(tmp_path), *given])
    monkeypatch.setitem(calibration.SETTINGS["tiny"], "every", 2)
    calibration.main()
    result = json.loads((tmp_path / "calibration_cpu_tiny.json").read_text())
    assert result["complete"]
    found = result["calibration"]
    assert found["before"]["tokens"] == 4 * (1024 - 256)
    assert list(found["before"]["by_position"]) == ["128", "256", "512", "1024"]
    assert len(found["half_lives"]) == 2
    assert found["search"]["nats_after"] < found["search"]["nats_before"]
    assert found["after"]["past_256_to_1024"] < found["before"]["past_256_to_1024"]
    for variant in ("gated-delta", "gated"):
        by_step = result["continued"][variant]["by_step"]
        assert list(by_step) == ["0", "2", "4"]
        # The gates are new, the weights are not: a model from random weights would have 8 bits per byte.
        assert by_step["0"]["inside"] < result["none"]["inside"] + 1 < 7
