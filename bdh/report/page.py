"""The page: the runs as JSON, and the styles and scripts that draw them, in one file without a link to anywhere."""

import base64
import hashlib
import html
import json
from pathlib import Path
from typing import Any

import numpy as np

from bdh import __version__
from bdh.report.runs import Run, thin

FOLDER = Path(__file__).parent / "page"
SCRIPTS = ("elements.js", "scales.js", "lines.js", "chart.js", "tables.js", "curves.js", "neurons.js", "main.js")
# In JSON inside <script>: what could end the element, begin a comment, or end a line of JavaScript.
ESCAPES = {ord(sign): f"\\u{ord(sign):04x}" for sign in "<>&\u2028\u2029"}


def render(runs: list[Run], made: str) -> str:
    """The whole page.

    What runs say stands in it as JSON only, and scripts put it on the page as text only. The page's policy lets nothing
    run but the script it came with, and lets nothing be loaded at all.

    Args:
        runs: What to compare.
        made: When, for people.
    """
    style = (FOLDER / "report.css").read_text(encoding="utf-8")
    parts = [(FOLDER / name).read_text(encoding="utf-8") for name in SCRIPTS]
    script = '"use strict";\n(() => {\n' + "\n".join(parts) + "\n})();\n"
    policy = (
        f"default-src 'none'; style-src '{digest(style)}'; script-src '{digest(script)}'; base-uri 'none'; "
        "form-action 'none'"
    )
    data = {"made": made, "version": __version__, "runs": [as_json(run) for run in runs]}
    filled = {
        "POLICY": html.escape(policy),
        "TITLE": html.escape(f"{', '.join(run.name for run in runs)} - bdh report"),
        "STYLE": style,
        "DATA": json.dumps(data, allow_nan=False).translate(ESCAPES),
        "SCRIPT": script,
    }
    pieces = (FOLDER / "report.html").read_text(encoding="utf-8").split("%%")
    return "".join(filled[piece] if number % 2 else piece for number, piece in enumerate(pieces))


def digest(text: str) -> str:
    """The hash of an inline script or style, as a Content-Security-Policy names it."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def as_json(run: Run) -> dict[str, Any]:
    steps, tokens, seconds = run.places
    chosen, _ = thin(steps, tokens)
    at = np.searchsorted(steps, chosen)
    return {
        "name": run.name,
        "settings": run.settings,
        "notes": run.notes,
        "places": [numbers(steps[at]), numbers(tokens[at]), numbers(seconds[at])],
        "series": {name: [numbers(x), numbers(y)] for name, (x, y) in sorted(run.series.items())},
        "samples": [[step, texts] for step, texts in sorted(run.samples.items())],
    }


def numbers(values: np.ndarray) -> list[float]:
    """Numbers with as many digits as can be seen; whole ones without a point."""
    return [int(v) if v == int(v) and abs(v) < 2**53 else float(f"{v:.6g}") for v in values.tolist()]
