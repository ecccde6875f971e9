"""Faster implementations of the model's functions, for training and inference; `dispatch` chooses them."""
