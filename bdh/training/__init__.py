"""Training: the configuration, the loop, and everything that makes a run survive."""
