"""Calibration finds the half-lives with the least loss, and changes nothing else."""

from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from bdh.data.blocks import ValidationWindows, generator
from bdh.data.tokens import Tokens
from bdh.errors import BDHError
from bdh.evaluation.by_position import score_by_position
from bdh.evaluation.calibration import (
    GRID,
    Calibration,
    calibrate,
    calibrated_card,
    comparison,
    grid,
    read_card,
    search_common,
    search_heads,
    set_decay,
    split_windows,
)
from bdh.model import BDHConfig, BDHForCausalLM
from bdh.model.model_card import model_card
from tests.conftest import TEXT

BLOCK, LENGTH, CUT = 16, 128, 25_000
DATA = np.frombuffer(TEXT.encode(), dtype=np.uint8)
HELD_OUT = Tokens([DATA[CUT:]])


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    """Weights of a small model that was trained without decay, on blocks of 16 bytes."""
    torch.manual_seed(0)
    model = new_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    starts = generator(0, 1, 0).integers(0, CUT - BLOCK - 1, (120, 16))
    for step in starts:
        batch = torch.from_numpy(np.stack([DATA[start : start + BLOCK + 1] for start in step]).astype(np.int64))
        logits = model(batch[:, :-1], use_cache=False).logits  # (B, T, V)
        optimizer.zero_grad()
        F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()).backward()
        optimizer.step()
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def new_model(**settings: object) -> BDHForCausalLM:
    sizes = {"n_layer": 2, "n_embd": 16, "n_head": 2, "mlp_internal_dim_multiplier": 16, "dropout": 0.0}
    return BDHForCausalLM(BDHConfig(**sizes, training_block_size=BLOCK, **settings))  # type: ignore[arg-type]


@pytest.fixture
def model(weights: dict[str, torch.Tensor]) -> BDHForCausalLM:
    model = new_model()
    model.load_state_dict(weights)
    return model.eval()


def run(model: BDHForCausalLM, **settings: object) -> Calibration:
    given = {"block_size": BLOCK, "length": LENGTH, "precision": nullcontext, "windows": 3, **settings}
    return calibrate(model, HELD_OUT, 1.0, **given)  # type: ignore[arg-type]


def test_it_makes_the_loss_flat_beyond_the_block(model: BDHForCausalLM, weights: dict[str, torch.Tensor]) -> None:
    lines: list[str] = []
    counts: list[tuple[int, int]] = []
    result = run(model, say=lines.append, progress=lambda done, total: counts.append((done, total)))
    assert result.loss_after < 0.8 * result.loss_before
    assert result.before[-1].loss > 1.5 * result.before[0].loss  # it falls apart
    assert result.after[-1].loss < 0.7 * result.before[-1].loss
    assert model.config.decay == "fixed" and model.config.decay_half_lives == result.half_lives
    assert len(result.half_lives) == 2 and all(life is not None and 0 < life < 100 for life in result.half_lives)
    assert model.state_dict().keys() == weights.keys()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert len(lines) == counts[-1][0] - 2 and all(done <= total for done, total in counts)
    assert lines[0].startswith("no decay ") and f"{result.loss_before:.4f}" in lines[0]


def test_what_it_reports_is_what_the_model_then_does(model: BDHForCausalLM) -> None:
    result = run(model)
    search, report = split_windows(HELD_OUT, LENGTH, 3)
    (entry,) = score_by_position(model, search, 1.0, 4, edges=[LENGTH])
    assert entry.loss == result.loss_after
    assert score_by_position(model, report, 1.0, 4) == result.after
    set_decay(model, None)
    assert score_by_position(model, report, 1.0, 4) == result.before


def test_one_half_life_for_all_heads(model: BDHForCausalLM) -> None:
    alone = run(model, per_head=False)
    assert alone.half_lives[0] == alone.half_lives[1]
    set_decay(model, None)
    assert run(model).loss_after <= alone.loss_after


def test_a_model_that_no_decay_helps_is_left_as_it_is(model: BDHForCausalLM) -> None:
    torch.nn.init.zeros_(model.lm_head.weight)  # predicts the same, whatever it has read
    with pytest.raises(BDHError, match="needs no calibration"):
        run(model)
    assert model.config.decay == "none" and model.config.decay_half_lives is None and not model.config.has_gates


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"decay": "fixed"}, "already decays .decay fixed"),
        ({"decay": "gated", "write": "delta"}, "already decays .decay gated"),
        ({"write": "delta"}, "write delta"),
    ],
)
def test_models_that_it_is_not_for(settings: dict[str, object], words: str) -> None:
    with pytest.raises(BDHError, match=words):
        run(new_model(**settings))


def test_the_windows_of_the_table_are_others_than_those_of_the_search() -> None:
    search, report = split_windows(HELD_OUT, LENGTH, 3)
    assert len(search) == len(report) == 3 and not set(search.starts.tolist()) & set(report.starts.tolist())
    search, report = split_windows(Tokens([DATA[: LENGTH + 1]]), LENGTH, 3)
    assert search.starts.tolist() == report.starts.tolist() == [0]
    assert isinstance(search, ValidationWindows)


def test_the_search_finds_a_half_life_between_those_of_the_grid() -> None:
    def loss_of(half_lives: list[float | int | None]) -> float:
        assert all(half_lives)
        return sum(abs(np.log2(float(life or 0)) - np.log2(11.0)) for life in half_lives)

    half_lives, loss = search_common(loss_of, 16, 3)
    assert half_lives == [11.314] * 3 and loss == loss_of(half_lives)
    assert grid(16) == [16 * share for share in GRID] and grid(2) == [0.25, 0.5, 1, 2, 4, 8]


def test_heads_get_half_lives_of_their_own() -> None:
    target = (2.0, 8.0, 32.0)

    def loss_of(half_lives: list[float | int | None]) -> float:
        pairs = zip(half_lives, target, strict=True)
        return 1 + sum(abs(np.log2(float(life or 0)) - np.log2(wanted)) for life, wanted in pairs)

    start: list[float | int | None] = [8.0, 8.0, 8.0]
    assert search_heads(loss_of, start, loss_of(start), 16) == ([2.0, 8.0, 32.0], 1.0)
    assert start == [8.0, 8.0, 8.0]
    assert search_heads(loss_of, start, 1.0, 16) == (start, 1.0)  # nothing is better


def test_the_card_keeps_the_sections_it_finds(model: BDHForCausalLM, tmp_path: Path) -> None:
    result = run(model)
    given = [("Data", {"text": "a.txt", "odd": "a | b"}), ("Validation", {"loss": "1.2 nats a token"})]
    (tmp_path / "README.md").write_text(model_card("small at step 5", model.config, given))
    assert read_card(tmp_path / "README.md") == ("small at step 5", given)
    card = calibrated_card(model.config, result, "held out.txt", tmp_path)
    title, sections = read_card_of(card, tmp_path)
    assert title == "small at step 5, calibrated" and sections[:2] == given
    heading, rows = sections[2]
    assert heading == "Calibration" and len(sections) == 3
    assert rows["text"] == "held out.txt" and rows["training block"] == "16 tokens"
    assert rows["searched on"] == "3 windows of 128 tokens" and "before the calibration" in rows["section Validation"]
    last = f"{result.before[-1].bits_per_byte:.3f} before, {result.after[-1].bits_per_byte:.3f} after"
    assert rows["bits per byte, positions 65 to 128"] == last
    assert card.count("## Architecture") == card.count("## How to load it") == 1


def test_a_card_that_is_missing_or_of_another_kind(model: BDHForCausalLM, tmp_path: Path) -> None:
    assert read_card(tmp_path / "README.md") == (None, [])
    (tmp_path / "README.md").write_text("# Words\n\nonly words\n\n## More\n\nand more\n")
    assert read_card(tmp_path / "README.md") == ("Words", [])


def test_the_lines_of_the_comparison(model: BDHForCausalLM) -> None:
    result = run(model)
    heading, *rows = comparison(result)
    assert heading.split()[:3] == ["position", "before", "after"] and len(rows) == len(result.before) == 3
    assert rows[-1].split()[:2] == ["<=", "128"] and rows[-1].endswith("beyond the training block")
    assert f"{result.after[-1].bits_per_byte:.4f}" in rows[-1] and not rows[0].endswith("block")


def read_card_of(card: str, folder: Path) -> tuple[str | None, list[tuple[str, dict[str, str]]]]:
    (folder / "card.md").write_text(card)
    return read_card(folder / "card.md")
