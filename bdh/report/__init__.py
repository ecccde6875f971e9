"""One HTML page that compares runs, made of what their folders hold; knows neither torch nor the network."""
