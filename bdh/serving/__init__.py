"""Models as a service: the OpenAI API over the engine, sessions, and a page to talk to a model and watch it think."""
