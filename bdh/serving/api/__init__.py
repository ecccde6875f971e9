"""Routes of the OpenAI API: schemas, request handling, streams, errors."""
