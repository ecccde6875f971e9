"""Activity of neurons and synapses during a generation, for the web page."""
