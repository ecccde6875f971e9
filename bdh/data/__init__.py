"""Text to tokens to blocks. This room knows neither models nor training."""
