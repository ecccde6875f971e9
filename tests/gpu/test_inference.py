"""On an NVIDIA GPU: the fast runner against the model, and requests that do not depend on who is beside them."""

import random
from typing import Any

import pytest
import torch

from bdh.inference.engine import Engine
from bdh.inference.llm import LLM
from bdh.inference.request import Event, Request
from bdh.inference.runner import cast
from bdh.inference.runner_cuda import CUDARunner
from bdh.inference.sampling_params import SamplingParams
from bdh.model import BDHConfig, BDHForCausalLM, BDHState
from tests.inference.small import BYTES
from tests.inference.test_engine import drain, random_request, texts

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


def model_of(dtype: torch.dtype = torch.float32, **sizes: Any) -> BDHForCausalLM:
    torch.manual_seed(0)
    model = BDHForCausalLM(BDHConfig(**sizes)).eval()
    with torch.no_grad():
        for name, parameter in model.model.layer.named_parameters():
            if name.startswith("gates.") and name != "gates.decay_rate":
                parameter.normal_(std=0.1)
    return cast(model.to("cuda"), dtype)


def error(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


ODD: dict[str, Any] = {"n_embd": 96, "n_head": 3, "mlp_internal_dim_multiplier": 10, "n_layer": 2}
HALF_LIVES = [4.0, None, 300.0]


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        ODD,
        {"decay": "fixed"},
        {"decay": "gated"},
        {"decay": "gated", "write": "delta"},
        {**ODD, "write": "delta"},
        *(
            {**ODD, "decay": decay, "decay_half_lives": HALF_LIVES, "write": write}
            for decay in ("fixed", "gated")
            for write in ("add", "delta")
        ),
    ],
    ids=str,
)
@pytest.mark.parametrize(("dtype", "bar"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
@torch.inference_mode()
def test_the_runner_equals_the_model(sizes: dict[str, Any], dtype: torch.dtype, bar: float) -> None:
    """Prefill, decoding past a flush, one row and many, states carried, far along."""
    model = model_of(**sizes)
    state = BDHState.zeros(model.config, 1, "cuda")
    state.position += 1_000_000
    start = state.clone()
    ids = torch.randint(256, (1, 700), device="cuda")
    expected = model(ids, past_key_values=state, use_cache=True).logits[0]  # (T, V)
    tokens = ids[0].tolist()
    runner = CUDARunner(model_of(dtype, **sizes), 40)
    runner.write_state(7, start)
    assert error(runner.prefill(7, tokens[:600]), expected[599]) < bar
    for t in range(600, 640):
        assert error(runner.decode([7], [tokens[t]])[0], expected[t]) < bar
    carried = runner.read_state(7)
    for slot in range(40):
        runner.write_state(slot, carried)
    for t in range(640, 660):  # as matrix products
        logits = runner.decode(range(40), [tokens[t]] * 40)
        assert max(error(row, expected[t]) for row in logits) < bar
    assert error(runner.prefill(3, tokens[660:]), expected[699]) < bar


@pytest.mark.parametrize("gates", [{}, {"decay": "gated"}, {"decay": "gated", "write": "delta"}], ids=str)
def test_random_requests_each_equal_to_running_alone(gates: dict[str, Any]) -> None:
    model = model_of(n_layer=2, n_embd=64, mlp_internal_dim_multiplier=16, initializer_range=0.3, **gates)
    rng = random.Random(3)
    requests = [random_request(rng, f"request {i}") for i in range(60)]
    requests = [request for request in requests if request.params.regex is None]
    shared, alone = Engine(CUDARunner(model, 16)), Engine(CUDARunner(model, 1), prefix_cache_bytes=0)
    for request in requests:
        shared.add(request)
    got = texts(drain(shared))
    for request in requests:
        alone.add(request)
        for key, tokens in texts(drain(alone)).items():
            assert got[key] == tokens, request


def test_llm_chooses_the_fast_runner_and_goes_on_from_a_session() -> None:
    llm = LLM(model_of(n_layer=2, n_embd=64, mlp_internal_dim_multiplier=16), BYTES)
    assert isinstance(llm.runner, CUDARunner) and llm.runner.dtype == torch.bfloat16
    params = SamplingParams(max_new_tokens=40, seed=1)
    assert llm.generate("Hello", params)[0].text == llm.generate("Hello", params)[0].text
    session = llm.session()
    session.read("Once upon a time ")
    text = "".join(delta.text for delta in session.write(params))
    assert text == llm.generate("Once upon a time ", params)[0].text
    assert [event.token for event in _greedy(llm.engine)] == [event.token for event in _greedy(llm.engine)]


def _greedy(engine: Engine) -> list[Event]:
    engine.add(Request([1, 2, 3], SamplingParams(max_new_tokens=30, temperature=0)))
    return drain(engine)
