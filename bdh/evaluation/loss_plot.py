"""The picture of loss by position."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from bdh.errors import BDHError, error_text
from bdh.evaluation.by_position import PositionBin


def draw_by_position(curves: Mapping[str, Sequence[PositionBin]], block_size: int | None, path: Path) -> None:
    """Draws bits per byte over the position, on a logarithmic axis, as a PNG file.

    Args:
        curves: Bins by the name of their curve.
        block_size: Tokens of a training block, marked in the picture; None if not known.
        path: The file to write.

    Raises:
        BDHError: The file cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), dpi=120)
    for name, bins in curves.items():
        axes.plot([entry.up_to for entry in bins], [entry.bits_per_byte for entry in bins], marker="o", label=name)
    edges = sorted({entry.up_to for bins in curves.values() for entry in bins})
    axes.set_xscale("log", base=2)
    axes.set_xticks(edges, [str(edge) for edge in edges], rotation=30 if len(edges) > 8 else 0)
    axes.minorticks_off()
    if block_size is not None:
        axes.axvline(block_size, color="#888888", linestyle="--", linewidth=1, label=f"training block, {block_size}")
    axes.set_xlabel("position up to (tokens)")
    axes.set_ylabel("bits per byte")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        figure.savefig(temporary, format="png")
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise BDHError(f"{path} cannot be written: {error_text(error)}") from error
    finally:
        pyplot.close(figure)
