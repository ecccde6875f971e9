"""One script a claim; `results/` holds what was measured, on what, when."""
