"""What schemathesis imports in its own process: most requests name the model that there is, and ask for little.

Otherwise nearly all would be refused for the few things that the description of the API cannot say. What is no valid
value is left as it is.
"""

from typing import Any

import schemathesis

MOST = {
    "max_tokens": 32,
    "max_completion_tokens": 32,
    "min_tokens": 1,
    "n": 2,
    "best_of": 4,
}  # of the server under test
VOCABULARY = 262


@schemathesis.hook
def before_call(context: Any, case: Any, kwargs: dict[str, Any]) -> None:
    """Changes the body that is about to be sent."""
    body = case.body
    if not isinstance(body, dict):
        return
    if isinstance(body.get("model"), str):
        body["model"] = "tiny"
    for name, most in MOST.items():
        if is_whole(body.get(name)) and body[name] > most:
            body[name] = body[name] % most + 1
    if case.path == "/v1/completions" and body.get("max_tokens") == 0 and not body.get("echo"):
        body["max_tokens"] = 1
    for name in ("stop_token_ids", "prompt", "tokens"):
        tokens = body.get(name)
        if isinstance(tokens, list) and all(map(is_whole, tokens)):
            body[name] = [token if token < 0 else token % VOCABULARY for token in tokens]


def is_whole(value: object) -> bool:
    return type(value) is int
