"""Loss by position against its definition: a window read at once, token by token."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from bdh.data.blocks import ValidationWindows
from bdh.data.tokens import Tokens
from bdh.errors import BDHError
from bdh.evaluation.by_position import (
    PositionBin,
    bin_edges,
    long_length,
    read_windows,
    score_beyond_block,
    score_by_position,
    score_with_past,
    table,
)
from bdh.evaluation.loss_plot import draw_by_position
from bdh.model import BDHConfig, BDHForCausalLM


def small_model(**settings: object) -> BDHForCausalLM:
    torch.manual_seed(0)
    config = BDHConfig(
        n_layer=2, n_embd=8, n_head=2, mlp_internal_dim_multiplier=4, vocab_size=50, chunk_size=8,
        initializer_range=0.3, dropout=0.5, **settings,  # type: ignore[arg-type]
    )  # fmt: skip
    return BDHForCausalLM(config)


def text(count: int, seed: int = 0) -> Tokens:
    return Tokens([np.random.default_rng(seed).integers(1, 50, count).astype(np.uint8)])


def nats_at_once(model: BDHForCausalLM, window: np.ndarray) -> torch.Tensor:
    """The loss of each token of a window that is read in one forward pass: (T)."""
    ids = torch.from_numpy(window.astype(np.int64))  # (T + 1)
    with torch.no_grad():
        logits = model(ids[None, :-1]).logits[0].double().log_softmax(-1)  # (T, V)
    return -logits.gather(1, ids[1:, None])[:, 0]  # (T)


@pytest.mark.parametrize(
    ("length", "edges"),
    [
        (16384, [128, 256, 512, 1024, 2048, 4096, 8192, 16384]),
        (512, [128, 256, 512]),
        (256, [64, 128, 256]),
        (300, [64, 128, 256, 300]),
        (5, [1, 2, 4, 5]),
        (1, [1]),
    ],
)
def test_bins_double_up_to_the_length(length: int, edges: list[int]) -> None:
    assert bin_edges(length) == edges


def test_a_bin_may_be_given() -> None:
    assert bin_edges(100, 16) == [16, 32, 64, 100] and bin_edges(8, 16) == [8]


@pytest.mark.parametrize("settings", [{}, {"decay": "fixed", "decay_half_lives": [4, 16.0]}])
@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_bins_hold_the_loss_of_windows_read_at_once(settings: dict[str, object], batch_size: int) -> None:
    model, tokens = small_model(**settings), text(200)
    windows = ValidationWindows(tokens, 60)  # three of them, in pieces of 8
    model.train()
    read: list[int] = []
    bins = score_by_position(model, windows, 2.5, batch_size, edges=[10, 40, 60], progress=read.append)
    assert model.training and read[-1] == 180
    model.eval()
    nats = torch.stack([nats_at_once(model, tokens.read(start, 61)) for start in (0, 60, 120)])  # (3, T)
    assert [(entry.after, entry.up_to, entry.tokens) for entry in bins] == [(0, 10, 30), (10, 40, 90), (40, 60, 60)]
    for entry in bins:
        expected = nats[:, entry.after : entry.up_to].mean().item()
        assert entry.loss == pytest.approx(expected, rel=1e-5)
        assert entry.bits_per_byte == pytest.approx(expected / math.log(2) / 2.5, rel=1e-5)


def test_the_windows_are_spread_over_the_text_and_always_the_same() -> None:
    model, tokens = small_model(), text(1000)
    once, again = (score_by_position(model, ValidationWindows(tokens, 50, 4), 1.0) for _ in range(2))
    assert once == again and sum(entry.tokens for entry in once) == 4 * 50


def test_no_piece_is_longer_than_a_chunk() -> None:
    model, lengths = small_model(), []
    model.model.register_forward_hook(
        lambda module, args, kwargs, output: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    score_by_position(model, ValidationWindows(text(100), 60, 1), 1.0)
    assert lengths == [8] * 7 + [4]


def test_positions_begin_anew_with_documents_that_are_kept_apart() -> None:
    model = small_model()
    tokens = np.random.default_rng(0).integers(1, 50, 41).astype(np.uint8)
    tokens[[5, 21, 24]] = 0  # begin documents of 16, 3 and 17 tokens
    (bins,) = [score_by_position(model, ValidationWindows(Tokens([tokens]), 40), 1.0, edges=[4, 16, 40], end_of_text=0)]
    parts = [
        nats_at_once(model.eval(), tokens[begin : end + 1]) for begin, end in ((0, 5), (5, 21), (21, 24), (24, 40))
    ]
    expected = [torch.cat([part[low:high] for part in parts]) for low, high in ((0, 4), (4, 16))]
    assert [entry.tokens for entry in bins] == [4 + 4 + 3 + 4, 1 + 12 + 12] and bins[-1].up_to == 16
    for entry, losses in zip(bins, expected, strict=True):
        assert entry.loss == pytest.approx(losses.mean().item(), rel=1e-5)


def test_tokens_that_are_only_read_are_not_scored() -> None:
    model = small_model().eval()
    ids = np.random.default_rng(0).integers(1, 50, 41).astype(np.int16)
    masked = ids.copy()
    masked[:31] = ~ids[:31]
    bins = score_by_position(model, ValidationWindows(Tokens([masked]), 40), 1.0, edges=[20, 40])
    expected = nats_at_once(model, ids)[30:].mean().item()
    assert [(entry.after, entry.tokens) for entry in bins] == [(20, 10)]
    assert bins[0].loss == pytest.approx(expected, rel=1e-5)
    with pytest.raises(BDHError, match="no token to score"):
        score_by_position(model, ValidationWindows(Tokens([~ids]), 40), 1.0)


def test_the_same_tokens_scored_with_different_pasts() -> None:
    model, tokens = small_model().eval(), text(130)
    windows = ValidationWindows(tokens, 64)  # two
    scores = score_with_past(model, windows, 1.0, [6, 20, None], skip=24, stride=9)
    assert [score.past for score in scores] == [6, 20, None] and {score.tokens for score in scores} == {2 * 40}
    whole = torch.stack([nats_at_once(model, tokens.read(start, 65)) for start in (0, 64)])  # (2, T)
    assert scores[-1].loss == pytest.approx(whole[:, 24:].mean().item(), rel=1e-5)
    for score in scores[:-1]:
        assert score.past is not None
        losses = []
        for start in (0, 64):
            for group in range(24, 64, 9):
                size = min(9, 64 - group)
                window = tokens.read(start + group - score.past, score.past + size + 1)
                losses.append(nats_at_once(model, window)[-size:])
        assert score.loss == pytest.approx(torch.cat(losses).mean().item(), rel=1e-5)


def test_a_stride_of_one_gives_each_token_exactly_the_past() -> None:
    model, tokens = small_model().eval(), text(31)
    (score,) = score_with_past(model, ValidationWindows(tokens, 30), 1.0, [5], stride=1)
    losses = [nats_at_once(model, tokens.read(end - 6, 7))[-1] for end in range(6, 31)]
    assert score.tokens == 25 and score.loss == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)


@pytest.mark.parametrize(
    ("pasts", "more", "words"),
    [
        ([0], {}, "at least 1"),
        ([5], {"stride": 0}, "at least 1"),
        ([20], {"skip": 10}, "skip is 10"),
        ([40], {}, "must have more than skip, 40"),
    ],
)
def test_pasts_that_do_not_fit(pasts: list[int], more: dict[str, int], words: str) -> None:
    with pytest.raises(BDHError, match=words):
        score_with_past(small_model(), ValidationWindows(text(100), 40), 1.0, pasts, **more)  # type: ignore[arg-type]


def test_windows_that_measure_beyond_the_block() -> None:
    assert long_length(100_000, 128) == 1024
    assert long_length(700, 128) == 640 and long_length(257, 128) == 256
    assert long_length(256, 128) is None and long_length(0, 128) is None
    model, tokens = small_model().eval(), text(65)
    beyond = score_beyond_block(model, ValidationWindows(tokens, 64), 16, 1.0)
    assert beyond is not None and (beyond.after, beyond.up_to, beyond.tokens) == (16, 64, 48)
    assert beyond.loss == pytest.approx(nats_at_once(model, tokens.read(0, 65))[16:].mean().item(), rel=1e-5)
    short = Tokens([np.tile(np.array([0, 1, 2, 3], dtype=np.uint8), 17)])  # no document is as long as a block
    assert score_beyond_block(model, ValidationWindows(short, 64), 16, 1.0, end_of_text=0) is None


def test_the_mode_is_restored_after_an_interruption() -> None:
    model = small_model().train()
    pieces = read_windows(model, ValidationWindows(text(100), 40).batches(1), torch.no_grad, None)
    next(pieces)
    assert not model.training
    pieces.close()  # type: ignore[attr-defined]
    assert model.training


def test_the_table_marks_what_is_beyond_the_block() -> None:
    bins = [PositionBin(0, 64, 1.5, 2.25, 1000), PositionBin(64, 128, 1.25, 1.75, 12345)]
    heading, first, second = table(bins, 64)
    assert heading.split() == ["position", "loss", "bits", "per", "byte", "tokens"]
    assert first.split() == ["<=", "64", "1.5000", "2.2500", "1,000"]
    assert second.split()[:5] == ["<=", "128", "1.2500", "1.7500", "12,345"] and second.endswith("training block")
    assert not table(bins, None)[2].endswith("block")


def test_the_picture(tmp_path: Path) -> None:
    bins = [PositionBin(0, 64, 1.5, 2.25, 1000), PositionBin(64, 128, 1.25, 1.75, 12345)]
    draw_by_position({"model": bins, "another": bins[:1]}, 64, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG") and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(BDHError, match="cannot be written"):
        draw_by_position({"model": bins}, None, tmp_path / "missing" / "picture.png")
