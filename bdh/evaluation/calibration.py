"""Calibration: a half-life for the synapses of a model that was trained without decay.

Without decay the contributions of all tokens add up, and a model is unreliable beyond the length of its training block.
A fixed decay that is found after training keeps it usable at any length; no weight changes. The half-lives are those
with the least loss on windows of several training blocks: first one for all heads, then one per head where that pays.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bdh.data.blocks import ValidationWindows
from bdh.data.tokens import Tokens
from bdh.errors import BDHError
from bdh.evaluation.by_position import PositionBin, Precision, bin_edges, score_by_position
from bdh.model import BDHConfig, BDHForCausalLM
from bdh.model.model_card import Section, model_card
from bdh.model.modeling_bdh import BDHGates

GRID = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0, 2.0, 4.0)  # common half-lives to try, in training blocks
REFINEMENTS = (2**0.5, 2**0.25)  # factors to try around the best one, either way
HEAD_FACTORS = (4.0, 2.0)  # factors to try for each head, either way, one pass each
HEAD_RANGE = (1 / 64, 16.0)  # half-lives of a head, in training blocks

HalfLives = list[float | int | None]


@dataclass(frozen=True)
class Calibration:
    """The result of a search.

    Attributes:
        half_lives: Tokens, one per head.
        block_size: Tokens of a training block.
        length: Tokens of a window.
        windows: Windows of the search, and of each of the two tables.
        loss_before: Loss on the windows of the search without decay, nats per token.
        loss_after: The same with the half-lives.
        before: The table by position without decay, on other windows where the text has them.
        after: The same with the half-lives.
    """

    half_lives: HalfLives
    block_size: int
    length: int
    windows: int
    loss_before: float
    loss_after: float
    before: list[PositionBin]
    after: list[PositionBin]


def check_calibratable(config: BDHConfig, name: str) -> None:
    """Refuses a model that was trained with decay or with the delta rule. Raises BDHError."""
    if config.decay != "none":
        raise BDHError(
            f"{name} already decays (decay {config.decay}); bdh calibrate is for models trained without decay"
        )
    if config.write != "add":
        raise BDHError(
            f"{name} was trained with write {config.write}; bdh calibrate is for models with decay none and write add"
        )


def set_decay(model: BDHForCausalLM, half_lives: HalfLives | None) -> None:
    """Gives a model a fixed decay, or none; its weights stay as they are."""
    config = model.config
    config.decay_half_lives = None if half_lives is None else list(half_lives)
    config.decay = "none" if half_lives is None else "fixed"
    model.model.layer.gates = None if half_lives is None else BDHGates(config)


def split_windows(tokens: Tokens, length: int, count: int) -> tuple[ValidationWindows, ValidationWindows]:
    """Windows to search on, and others to report on; the same ones where the text has one window only."""
    search, report = (ValidationWindows(tokens, length, 2 * count) for _ in range(2))
    if len(search) > 1:
        search.starts, report.starts = search.starts[::2], report.starts[1::2]
    return search, report


def calibrate(
    model: BDHForCausalLM,
    tokens: Tokens,
    bytes_per_token: float,
    *,
    block_size: int,
    length: int,
    windows: int = 4,
    batch_size: int = 4,
    per_head: bool = True,
    precision: Precision,
    end_of_text: int | None = None,
    say: Callable[[str], None] = lambda line: None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Calibration:
    """Searches the half-lives with the least loss, and leaves them in the model.

    Args:
        model: Trained without decay, on the device to use.
        tokens: Held-out text.
        bytes_per_token: Average bytes of a token.
        block_size: Tokens of a training block.
        length: Tokens of a window; several blocks.
        windows: Windows of the search.
        batch_size: Windows of one forward pass.
        per_head: Whether to search a half-life for each head, after one for all.
        precision: Makes the context of a forward pass.
        end_of_text: The token that begins a document, if documents are kept apart.
        say: Called with a line for each half-life that was tried.
        progress: Called with the number of evaluations done, and of those there are at most.

    Raises:
        BDHError: No half-life has less loss than no decay; the model is then as it was.
    """
    check_calibratable(model.config, "the model")
    search_windows, report_windows = split_windows(tokens, length, windows)
    heads = model.config.n_head
    total = 3 + len(GRID) + 2 * len(REFINEMENTS) + (2 * heads * len(HEAD_FACTORS) if per_head and heads > 1 else 0)
    done = 0

    def table(half_lives: HalfLives | None, windows: ValidationWindows, edges: Sequence[int]) -> list[PositionBin]:
        nonlocal done
        set_decay(model, half_lives)
        bins = score_by_position(
            model, windows, bytes_per_token, batch_size, edges=edges, precision=precision, end_of_text=end_of_text
        )
        done += 1
        progress(done, total)
        return bins

    def loss_of(half_lives: HalfLives | None) -> float:
        (entry,) = table(half_lives, search_windows, [length])
        say(f"{describe(half_lives):<40}  loss {entry.loss:.4f}")
        return entry.loss

    try:
        without = loss_of(None)
        half_lives, loss = search_common(loss_of, block_size, heads)
        if loss >= without:
            raise BDHError(
                f"no half-life has less loss than no decay, {without:.4f} nats per token in windows of {length} "
                "tokens; the model needs no calibration, and nothing is written"
            )
        if per_head and heads > 1:
            half_lives, loss = search_heads(loss_of, half_lives, loss, block_size)
        edges = bin_edges(length)
        before, after = table(None, report_windows, edges), table(half_lives, report_windows, edges)
    except BaseException:
        set_decay(model, None)
        raise
    # The model has the half-lives of the last table.
    return Calibration(half_lives, block_size, length, len(search_windows), without, loss, before, after)


def search_common(loss_of: Callable[[HalfLives], float], block_size: int, heads: int) -> tuple[HalfLives, float]:
    """The half-life with the least loss that all heads share, by a grid and refinements; and that loss."""
    losses = {half_life: loss_of([half_life] * heads) for half_life in grid(block_size)}
    for factor in REFINEMENTS:
        best = min(losses, key=losses.__getitem__)
        for half_life in (rounded(best / factor), rounded(best * factor)):
            if half_life not in losses:
                losses[half_life] = loss_of([half_life] * heads)
    best = min(losses, key=losses.__getitem__)
    return [best] * heads, losses[best]


def search_heads(
    loss_of: Callable[[HalfLives], float], half_lives: HalfLives, loss: float, block_size: int
) -> tuple[HalfLives, float]:
    """Half-lives by head and their loss, by coordinate descent from common ones; changes that lower it are kept."""
    low, high = (rounded(share * block_size) for share in HEAD_RANGE)
    for factor in HEAD_FACTORS:
        for head, present in enumerate(half_lives):
            assert present is not None
            for half_life in (rounded(present * factor), rounded(present / factor)):
                if not low <= half_life <= high:
                    continue
                candidate = [*half_lives[:head], half_life, *half_lives[head + 1 :]]
                if (its_loss := loss_of(candidate)) < loss:
                    half_lives, loss = candidate, its_loss
                    break  # the other direction leads away
    return half_lives, loss


def grid(block_size: int) -> list[float]:
    """Common half-lives to try, in tokens, ascending."""
    return sorted({rounded(share * block_size) for share in GRID})


def rounded(half_life: float) -> float:
    """A half-life in tokens with three digits after the point, at least a quarter of a token."""
    return max(round(half_life, 3), 0.25)


def describe(half_lives: HalfLives | None) -> str:
    """Half-lives in words."""
    if half_lives is None:
        return "no decay"
    if len(set(half_lives)) == 1:
        return f"half-life {half_lives[0]:g} tokens"
    return f"half-lives {', '.join(f'{half_life:g}' for half_life in half_lives)} tokens"


def comparison(result: Calibration) -> list[str]:
    """Bits per byte by position before and after, as lines of text."""
    lines = [f"{'position':>12}  {'before':>8}  {'after':>8}  {'tokens':>12}  (bits per byte)"]
    for before, after in zip(result.before, result.after, strict=True):
        beyond = "  beyond the training block" if before.after >= result.block_size else ""
        lines.append(
            f"{f'<= {before.up_to}':>12}  {before.bits_per_byte:8.4f}  {after.bits_per_byte:8.4f}  "
            f"{before.tokens:12,}{beyond}"
        )
    return lines


def calibrated_card(config: BDHConfig, result: Calibration, text: str, source: Path) -> str:
    """The model card of a calibrated export: the sections of the card in the folder `source`, and the calibration."""
    title, sections = read_card(source / "README.md")
    title = title or source.resolve().name
    rows = {
        "decay": f"fixed, {describe(result.half_lives)}, found after training; the weights are unchanged",
        "text": text,
        "searched on": f"{result.windows} windows of {result.length:,} tokens",
        "training block": f"{result.block_size:,} tokens",
        "loss there": f"{result.loss_before:.4f} nats per token before, {result.loss_after:.4f} after",
    }
    for before, after in zip(result.before, result.after, strict=True):
        row = f"bits per byte, positions {before.after + 1:,} to {before.up_to:,}"
        rows[row] = f"{before.bits_per_byte:.3f} before, {after.bits_per_byte:.3f} after"
    if any(heading == "Validation" for heading, _ in sections):
        rows["section Validation"] = "measured before the calibration"
    return model_card(f"{title}, calibrated", config, [*sections, ("Calibration", rows)])


def read_card(path: Path) -> tuple[str | None, list[Section]]:
    """Title and sections of a card that `model_card` wrote, without those that it writes of itself."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None, []
    head, *parts = text.split("\n## ")
    title = next((line[2:] for line in head.splitlines() if line.startswith("# ")), None)
    sections: list[Section] = []
    for part in parts:
        heading, *lines = part.splitlines()
        cells = [line.removeprefix("| ").removesuffix(" |").split(" | ", 1) for line in lines if line.startswith("| ")]
        rows = {cell[0]: cell[1] for cell in cells if len(cell) == 2 and set(cell[0]) != {"-"} and cell[0]}
        if heading != "Architecture" and rows:
            sections.append((heading, rows))
    return title, sections
