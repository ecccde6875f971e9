"""Routes of other servers that are not supported here, and the alternatives to them."""

CHAT = "use POST /v1/chat/completions"
TEXT_ONLY = "this server reads and writes text only; there is no alternative here"
ALTERNATIVES = {  # by path: why it is not supported, and the alternative
    "/v1/responses": f"the Responses API is not supported; {CHAT}, or POST /v1/sessions for conversations that the "
    "server keeps",
    "/v1/conversations": "conversations of the Responses API are not supported; use POST /v1/sessions",
    "/v1/assistants": "the Assistants API is not supported; use POST /v1/sessions",
    "/v1/threads": "the Assistants API is not supported; use POST /v1/sessions",
    "/v1/embeddings": "embeddings are not supported, as the model is not trained to make any; use a model for "
    "embeddings, or echo and logprobs of POST /v1/completions to score texts",
    "/v1/moderations": f"moderations are not supported; {CHAT}",
    "/v1/messages": f"the Messages API is not supported; {CHAT}",
    "/v1/rerank": "reranking is not supported; use echo and logprobs of POST /v1/completions to score texts",
    "/v1/score": "this route is not supported; use echo and logprobs of POST /v1/completions to score texts",
    "/v1/audio": f"audio is not supported; {TEXT_ONLY}",
    "/v1/images": f"images are not supported; {TEXT_ONLY}",
    "/v1/files": "files are not supported; use bdh generate --prompts FILE for many prompts",
    "/v1/batches": "batches are not supported; use bdh generate --prompts FILE for many prompts, or several prompts in "
    "one POST /v1/completions",
    "/v1/fine_tuning": "fine-tuning is not supported by the server; use bdh train --init_from MODEL",
    "/api/generate": "this is not the API of Ollama; use POST /v1/completions",
    "/api/chat": f"this is not the API of Ollama; {CHAT}",
    "/api/tags": "this is not the API of Ollama; use GET /v1/models",
}


def alternative_to(path: str) -> str | None:
    """The message for a client that calls a route of another server; None for any other path."""
    return next(
        (words for route, words in ALTERNATIVES.items() if path == route or path.startswith(f"{route}/")),
        None,
    )
