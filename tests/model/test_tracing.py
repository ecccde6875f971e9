"""`torch.compile`, `torch.export` and ONNX: the model in one graph, prompts and steps that go on from a state."""

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.export import Dim
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from bdh.model import BDHConfig, BDHForCausalLM, BDHState
from bdh.model.modeling_bdh import solve_unit_lower
from tests.inference.small import random_gates

V = 23
SYNAPSES: list[dict[str, Any]] = [{}, {"decay": "gated", "decay_half_lives": [4, None], "write": "delta"}]
PROMPT = torch.arange(14).view(2, 7) * 5 % V
LONGER = torch.arange(33).view(3, 11) * 7 % V
STEP = torch.tensor([[3], [1], [4]])


@pytest.fixture(params=SYNAPSES, ids=["add", "delta"])
def model(request: pytest.FixtureRequest) -> BDHForCausalLM:
    torch.manual_seed(0)
    config = BDHConfig(
        n_layer=1,
        n_embd=16,
        n_head=2,
        mlp_internal_dim_multiplier=8,
        vocab_size=V,
        initializer_range=0.3,
        chunk_size=16,
        **request.param,
    )
    return random_gates(BDHForCausalLM(config).eval())


def state_of_three() -> BDHState:
    """Sequences at large and different positions, of which float32 phases would be wrong."""
    generator = torch.Generator().manual_seed(1)
    return BDHState([torch.randn(3, 2, 64, 16, generator=generator)], torch.tensor([5, 90_000, 1_000_000]), 1_000_000)


def same(found: Any, expected: Any, tolerance: float = 1e-5) -> bool:
    pairs = list(zip(tree_leaves(found), tree_leaves(expected), strict=True))
    return len(pairs) == 4 and all(torch.allclose(a, b, atol=tolerance, rtol=1e-4) for a, b in pairs)


def test_a_state_is_a_pytree_of_its_tensors() -> None:
    state = state_of_three()
    leaves, spec = tree_flatten(state)
    assert [tuple(leaf.shape) for leaf in leaves] == [(3, 2, 64, 16), (3,), ()]
    again = tree_unflatten(leaves, spec)
    assert isinstance(again, BDHState) and again.length == 1_000_000 and again.position is state.position
    assert all(map(Tensor.is_set_to, again.synapses, state.synapses))


@torch.no_grad()
def test_the_model_compiles_to_one_graph(model: BDHForCausalLM) -> None:
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    expected, outputs = model(PROMPT), compiled(PROMPT)
    assert same(outputs, expected)
    state, plain = outputs.past_key_values, expected.past_key_values
    before = state.synapses[0].clone()
    for number in range(4):  # neither the length of the past nor the position is built into the graph
        with torch.compiler.set_stance("default" if number == 0 else "fail_on_recompile"):
            given = state.synapses[0]
            outputs = compiled(PROMPT[:, number : number + 1], past_key_values=state)
        assert same(outputs, model(PROMPT[:, number : number + 1], past_key_values=plain))
        assert state.length == 8 + number
        assert number or torch.equal(given, before)  # compiled code does not overwrite what came in


@pytest.mark.parametrize("model", [{}], indirect=True)
def test_a_compiled_model_learns_the_same(model: BDHForCausalLM) -> None:
    torch.compiler.reset()
    inputs: dict[str, Any] = {"input_ids": PROMPT, "labels": PROMPT, "position_ids": torch.arange(7)[None]}
    inputs["attention_mask"] = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    expected = torch.autograd.grad(model(**inputs).loss, list(model.parameters()))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(compiled(**inputs).loss, list(model.parameters()))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found, expected, strict=True))


def traced(step: bool, dynamic: bool) -> tuple[dict[str, Any], dict[str, Any] | None, dict[str, Any]]:
    """What an export gets as an example, which sizes are not fixed, and what is computed then."""
    batch, tokens = Dim("batch"), Dim("tokens", max=16)
    if not step:
        return {"input_ids": PROMPT}, {"input_ids": {0: batch, 1: tokens}} if dynamic else None, {"input_ids": LONGER}
    given = {"input_ids": STEP, "past_key_values": state_of_three()}
    sizes = {"input_ids": {0: batch}, "past_key_values": [[{0: batch}], {0: batch}, {}]}
    return given, sizes if dynamic else None, {"input_ids": STEP[:2], "past_key_values": state_of_three().select(PAIR)}


PAIR = torch.tensor([2, 0])


@pytest.mark.parametrize(
    ("step", "dynamic"), [(False, True), (True, True), (False, False)], ids=["prompt", "step", "static"]
)
@torch.no_grad()
def test_torch_export(model: BDHForCausalLM, step: bool, dynamic: bool) -> None:
    given, sizes, then = traced(step, dynamic)
    program = torch.export.export(model, (), kwargs=given, dynamic_shapes=sizes)
    assert not any("solve_triangular" in str(node.target) for node in program.graph.nodes)  # ONNX does not have it
    saved = io.BytesIO()
    torch.export.save(program, saved)
    saved.seek(0)
    given, _, then = traced(step, dynamic)  # anew, as a state is advanced
    inputs = then if dynamic else given
    found = torch.export.load(saved).module()(**inputs)
    given, _, then = traced(step, dynamic)
    assert same(found, model(**(then if dynamic else given)))
    assert found.past_key_values.length == (1_000_001 if step else 11 if dynamic else 7)


@pytest.mark.parametrize(
    ("model", "step"),
    [
        ({}, True),
        (SYNAPSES[1], False),
        pytest.param({}, False, marks=pytest.mark.slow),
        pytest.param(SYNAPSES[1], True, marks=pytest.mark.slow),
    ],
    ids=["add-step", "delta-prompt", "add-prompt", "delta-step"],
    indirect=["model"],
)
@torch.no_grad()
def test_onnx(model: BDHForCausalLM, step: bool, tmp_path: Path) -> None:
    import onnxruntime

    given, sizes, then = traced(step, dynamic=True)
    program = torch.onnx.export(model, (), kwargs=given, dynamic_shapes=sizes, dynamo=True, verbose=False)
    assert program is not None
    program.save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    names = [node.name for node in session.get_inputs()]
    assert len(names) == (4 if step else 1)
    found = session.run(None, {name: leaf.numpy() for name, leaf in zip(names, tree_leaves(then), strict=True)})
    then = traced(step, dynamic=True)[2]
    assert same([torch.from_numpy(leaf) for leaf in found], model(**then))


@pytest.mark.parametrize("kind", ["Dynamo", pytest.param("Onnx", marks=pytest.mark.slow)])
@torch.no_grad()
def test_the_exporters_of_the_library(model: BDHForCausalLM, kind: str) -> None:
    exporters = pytest.importorskip("transformers.exporters")
    exporter, config = getattr(exporters, f"{kind}Exporter")(), getattr(exporters, f"{kind}Config")(dynamic=True)
    given = {"input_ids": PROMPT, "attention_mask": torch.ones_like(PROMPT)}
    prompt = exporter.export(model, given, config)
    longer = {"input_ids": LONGER, "attention_mask": torch.ones_like(LONGER)}
    assert same(prompt(**longer), model(**longer), 1e-4)
    step = exporter.export(model, {"input_ids": STEP, "cache": state_of_three()}, config)
    found = step(input_ids=STEP[:2], cache=state_of_three().select(PAIR))
    assert same(found, model(STEP[:2], past_key_values=state_of_three().select(PAIR)), 1e-4)


@pytest.mark.parametrize("T", [1, 2, 3, 8, 21])
def test_exports_solve_triangular_systems_by_blocks(T: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Repeated tokens, whose keys are alike, are the worst case: a series of powers would lose all digits."""
    L, B = torch.ones(2, T, T).tril(-1), torch.randn(2, T, 4)
    expected = solve_unit_lower(L, B)
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    assert torch.allclose(solve_unit_lower(L, B), expected, atol=1e-5)
