"""Server of models: the OpenAI API, sessions, the activity of neurons, and a web page."""
