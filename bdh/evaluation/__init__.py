"""Evaluation: how well a model predicts, by position and by the length of the past."""
