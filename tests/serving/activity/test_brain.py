"""The brain view over HTTP, by a real server."""

import json
from typing import Any

import httpx

from bdh.serving.activity.schemas import BrainChunk, BrainTrace, NeuronDetails, TokenDetails
from tests.inference.small import LETTERS
from tests.serving.running import Running

BIAS = {str(token): value for token, value in LETTERS.items()}
ASKED = {"model": "tiny", "max_tokens": 12, "seed": 3, "logit_bias": BIAS, "brain": True}


def stream(server: Running, path: str, **fields: object) -> list[dict[str, Any]]:
    """The pieces of a stream."""
    with httpx.stream("POST", f"{server.url}{path}", json={**ASKED, "stream": True, **fields}, timeout=60) as answer:
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def get(server: Running, path: str) -> Any:
    answer = httpx.get(f"{server.url}/v1/brain/{path}", timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_streams_tell_what_is_kept(server: Running) -> None:
    prompt = "A dragon"
    chats = stream(server, "/v1/chat/completions", messages=[{"role": "user", "content": prompt}])
    texts = stream(server, "/v1/completions", prompt=prompt)
    for pieces in (chats, texts):
        chunks = [BrainChunk.model_validate(piece["brain"]) for piece in pieces if "brain" in piece]
        tokens = [token for chunk in chunks for token in chunk.tokens]
        [id] = {chunk.trace for chunk in chunks}
        assert [token.index for token in tokens] == list(range(len(tokens)))
        trace = BrainTrace.model_validate(get(server, id))
        assert trace.tokens == tokens and trace.model == "tiny" and trace.bins == 128
        assert prompt in "".join(token.text for token in tokens if token.prompt)
        assert sum(not token.prompt for token in tokens) == 12
        assert all(len(token.share) == len(token.raster) == trace.n_layer == 2 for token in tokens)
    texts_of_choices = "".join(piece["choices"][0]["text"] for piece in texts if piece["choices"])
    assert texts_of_choices == "".join(token.text for token in tokens if not token.prompt)


def test_tokens_and_neurons_can_be_asked_about(server: Running) -> None:
    answer = httpx.post(f"{server.url}/v1/completions", json={**ASKED, "prompt": "A dragon"}, timeout=60).json()
    id = answer["brain"]["trace"]
    assert answer["brain"] == {"trace": id}
    last = len(get(server, id)["tokens"]) - 1
    assert last == 8 + 12 - 1
    for index in (0, last):
        told = get(server, f"{id}/tokens/{index}")
        details = TokenDetails.model_validate(told)
        assert details.model_dump(by_alias=True) == told and details.index == index
        assert [layer.layer for layer in details.layers] == [0, 1]
        assert all(bool(layer.read) == bool(layer.sources) == (index > 0) for layer in details.layers)
        assert all(layer.neurons and layer.written for layer in details.layers)
    best = details.layers[1].neurons[0]
    told = get(server, f"{id}/neurons/1/{best.neuron}")
    neuron = NeuronDetails.model_validate(told)
    assert neuron.model_dump() == told and neuron.of == last + 1
    activity = {token.index: token.activity for token in neuron.tokens}
    assert abs(activity[last] - best.activity) < 1e-4

    assert httpx.delete(f"{server.url}/v1/brain/{id}").status_code == 204
    for method in ("GET", "DELETE"):
        assert httpx.request(method, f"{server.url}/v1/brain/{id}").status_code == 404


def test_gates_are_told_of_models_that_have_them(server: Running, gated_server: Running) -> None:
    for one in (server, gated_server):
        id = httpx.post(f"{one.url}/v1/completions", json={**ASKED, "prompt": "A dragon"}, timeout=60).json()["brain"]
        tokens = [TokenDetails.model_validate(get(one, f"{id['trace']}/tokens/{index}")) for index in (0, 19)]
        layers = [layer for token in tokens for layer in token.layers]
        if one is server:
            assert all(layer.log_decay is None and layer.write_strength is None for layer in layers)
            continue
        assert all(
            bool(layer.read) == bool(layer.sources) == (token is tokens[1])
            for token in tokens
            for layer in token.layers
        )
        for layer in layers:
            assert layer.log_decay is not None and layer.write_strength is not None
            assert layer.log_decay[0] < 0 and layer.log_decay[1] == 0
            assert len(layer.write_strength) == 2 and all(0 < beta < 1 for beta in layer.write_strength)
        assert len({str(layer.log_decay) for layer in layers}) > 1  # they depend on the token


def test_mistakes_are_answered_as_such(server: Running) -> None:
    id = httpx.post(f"{server.url}/v1/completions", json={**ASKED, "prompt": "A"}).json()["brain"]["trace"]
    cases = {
        f"{id}/tokens/999": 404,
        f"{id}/tokens/{10**30}": 404,
        f"{id}/tokens/-1": 400,
        f"{id}/tokens/x": 400,
        f"{id}/neurons/2/0": 404,
        f"{id}/neurons/0/128": 404,
        f"{id}/neurons/0/1e3": 400,
        "trc_" + 32 * "0": 404,
        "trc_" + 32 * "x": 400,
        f"{id}0": 400,
        f"{id}/nothing": 404,
    }
    for path, status in cases.items():
        answer = httpx.get(f"{server.url}/v1/brain/{path}")
        assert answer.status_code == status, path
        assert "\n" not in answer.json()["error"]["message"] and answer.json()["error"]["type"]


def test_the_api_is_described(server: Running) -> None:
    description = httpx.get(f"{server.url}/openapi.json").json()
    details = description["paths"]["/v1/brain/{trace}/tokens/{index}"]["get"]
    assert {"200", "400", "401", "404", "429"} <= details["responses"].keys()
    parameters = {one["name"]: one["schema"] for one in details["parameters"]}
    assert parameters["trace"]["pattern"] == "^trc_[0-9a-f]{32}$" and parameters["index"]["minimum"] == 0
    synapse = description["components"]["schemas"]["BrainSynapse"]
    assert list(synapse["properties"]) == ["from", "to", "strength"] == synapse["required"]
