"""The fused layer against the model's own code and autograd."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bdh.data.tokenizer import save_tokenizer
from bdh.data.vocabulary import train_tokenizer
from bdh.kernels.dispatch import use_kernels
from bdh.kernels.fused_layer import FusedLayer
from bdh.kernels.layer_operations import Dropout
from bdh.kernels.torch.operations import dropout_mask
from bdh.kernels.triton.operations import TILES, Tiles, TritonOperations
from bdh.model import BDHConfig, BDHForCausalLM, BDHState
from bdh.model.modeling_bdh import STATE
from bdh.training.run_log import read_metrics
from tests.conftest import TEXT
from tests.training.launching import SMALL, train_all

CPU = torch.device("cpu")


def make_model(seed: int = 0, dtype: torch.dtype = torch.float64, **sizes: Any) -> BDHForCausalLM:
    torch.manual_seed(seed)
    usual = {"n_layer": 1, "n_embd": 6, "n_head": 2, "mlp_internal_dim_multiplier": 8, "vocab_size": 11, "dropout": 0.0}
    model = BDHForCausalLM(BDHConfig(**{**usual, "initializer_range": 0.4, **sizes})).to(dtype).train()
    if model.model.layer.gates is not None:
        for parameter in model.model.layer.gates.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
    return model


def half_lives(decay: str, n_head: int) -> dict[str, Any]:
    """Return short half-lives, and a last head that never decays."""
    return {} if decay == "none" else {"decay_half_lives": [0.5 * 4**k for k in range(n_head - 1)] + [None]}


def random_state(model: BDHForCausalLM, position: Tensor, dtype: torch.dtype) -> BDHState:
    zeros = BDHState.zeros(model.config, len(position), dtype=dtype).synapses
    return BDHState([torch.randn_like(S).requires_grad_() for S in zeros], position, int(position.max()))


def run(
    model: BDHForCausalLM,
    kernels: str,
    x: Tensor,
    state: BDHState | None = None,
    max_saved_bytes: int | None = None,
    **kwargs: Any,
) -> list[Tensor]:
    """Return the output of all layers, the synapses after, and the gradients of all inputs and weights."""
    use_kernels(model.model.layer, kernels, CPU)
    if max_saved_bytes is not None and isinstance(model.model.layer.kernels, FusedLayer):
        model.model.layer.kernels.max_saved_bytes = max_saved_bytes
    x = x.clone().requires_grad_()
    before = [] if state is None else state.synapses
    carried = {} if state is None else {"past_key_values": BDHState(before, state.position, state.length)}
    out = model.model(inputs_embeds=x, use_cache=state is not None, **carried, **kwargs)
    results = [out.last_hidden_state, *([] if state is None else getattr(out, STATE).synapses)]
    random = torch.Generator().manual_seed(5)
    loss = sum((y * torch.randn(y.shape, generator=random, dtype=torch.float64)).sum() for y in results)
    assert isinstance(loss, Tensor)
    wanted = [x, *before, *model.model.layer.parameters()]
    return [*results, *torch.autograd.grad(loss, wanted)]


def assert_close(actual: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    assert len(actual) == len(expected)
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert (a - b).norm() <= tolerance * (1 + b.norm())


GATED = [  # decay, write, T, chunk, carried, saves
    ("gated", "add", 13, 16, False, False),
    ("gated", "add", 21, 8, True, True),
    ("gated", "delta", 13, 16, False, False),
    ("fixed", "delta", 13, 8, True, True),
    ("gated", "delta", 21, 8, False, False),
]


@pytest.mark.parametrize(
    ("decay", "write", "T", "chunk", "carried", "saves"),
    [
        *(
            ("none", "add", T, chunk, carried, saves)
            for T, chunk in [(1, 8), (13, 16), (21, 8)]
            for carried in [False, True]
            for saves in [False, True]
        ),
        *GATED,
    ],
)
def test_triton_equals_the_model(
    decay: str, write: str, T: int, chunk: int, carried: bool, saves: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for kernel in TILES:  # so that small sizes take several
        monkeypatch.setitem(TILES[kernel], torch.float32, Tiles(16, 16, 16, 4, 2))
    sizes: dict[str, Any] = {"n_embd": 20, "mlp_internal_dim_multiplier": 3, "n_layer": 2, "chunk_size": chunk}
    model = make_model(dtype=torch.float32, **sizes, decay=decay, write=write, **half_lives(decay, 2))
    x = torch.randn(2, T, 20)
    kwargs: dict[str, Any] = {"document_ids": torch.arange(T).expand(2, T) // 5}
    if carried:
        kwargs["state"] = random_state(model, torch.tensor([3, 10**6]), torch.float32)
    expected = run(model, "reference", x, **kwargs)
    monkeypatch.setattr("bdh.kernels.dispatch.make_operations", lambda *args: TritonOperations())
    if saves:
        enable_saving(monkeypatch)
    # The gradient of the log-decay is a sum of differences, which float32 rounds.
    assert_close(run(model, "torch", x, **kwargs), expected, 1e-5 if decay == "none" else 5e-4)


def enable_saving(monkeypatch: pytest.MonkeyPatch, max_bytes: int = 1 << 30) -> None:
    """Make TritonOperations save X, R and Z in so many bytes, as those of Hopper do for some sizes."""
    monkeypatch.setattr(TritonOperations, "should_save_activations", lambda *sizes: True)
    monkeypatch.setattr("bdh.kernels.dispatch.max_saved_bytes", lambda device: max_bytes)


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    B=st.integers(1, 3),
    h=st.integers(1, 8),
    T=st.integers(1, 40),
    D=st.integers(1, 9),
    multiplier=st.integers(1, 2),
    L=st.integers(1, 2),
    chunk=st.integers(1, 45),
    start=st.sampled_from([0, 3, 1000, 10**6]),
    with_state=st.booleans(),
    with_documents=st.booleans(),
    max_bytes=st.sampled_from([0, 1 << 30]),
    decay=st.sampled_from(["none", "fixed", "gated"]),
    write=st.sampled_from(["add", "delta"]),
)
def test_outputs_and_gradients_equal_those_of_the_model(
    seed: int,
    B: int,
    h: int,
    T: int,
    D: int,
    multiplier: int,
    L: int,
    chunk: int,
    start: int,
    with_state: bool,
    with_documents: bool,
    max_bytes: int,
    decay: str,
    write: str,
) -> None:
    multiplier *= 2 * h
    sizes: dict[str, Any] = {
        "n_layer": L,
        "n_head": h,
        "n_embd": D,
        "mlp_internal_dim_multiplier": multiplier,
        "chunk_size": chunk,
    }
    model = make_model(seed, **sizes, decay=decay, write=write, **half_lives(decay, h))
    x = torch.randn(B, T, D, dtype=torch.float64)
    state = random_state(model, torch.arange(B) + start, torch.float64) if with_state else None
    kwargs: dict[str, Any] = {"document_ids": (torch.rand(B, T) < 0.2).cumsum(1)} if with_documents else {}
    expected = run(model, "reference", x, state, **kwargs)
    assert_close(run(model, "torch", x, state, max_bytes, **kwargs), expected, 1e-8)


@pytest.mark.parametrize("T", [1, 5, 16, 17, 300])  # of chunks of 16; 300 also of one chunk, in blocks
@pytest.mark.parametrize("silent", ["tokens", "neurons"])
def test_silent_rows_give_no_activity_and_finite_gradients(T: int, silent: str) -> None:
    model = make_model(n_embd=8, chunk_size=16 if T < 300 else 300)
    x = torch.randn(2, T, 8, dtype=torch.float64)
    with torch.no_grad():
        if silent == "neurons":
            model.model.layer.encoder.weight.zero_()
        else:
            model.model.layer.encoder.weight[:, 0] = -x[0, 0, 0].sign()
            x[:, ::2] = 0
    results = run(model, "torch", x)
    assert all(result.isfinite().all() for result in results)
    assert_close(results, run(model, "reference", x), 1e-9)


def test_float32_and_bfloat16_are_as_close_to_the_truth_as_the_plain_form() -> None:
    sizes: dict[str, Any] = {"n_layer": 3, "n_embd": 32, "n_head": 4, "chunk_size": 16, "initializer_range": 0.2}
    model = make_model(dtype=torch.float32, **sizes)
    x = torch.randn(4, 40, 32)
    state = random_state(model, torch.tensor([0, 5, 100, 1000]), torch.float32)
    exact = make_model(dtype=torch.float64, **sizes)
    exact.load_state_dict(model.state_dict())
    truth = run(exact, "reference", x.double(), state.to(dtype=torch.float64))
    assert_close([y.double() for y in run(model, "torch", x, state)], truth, 1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        plain, ours = (run(model, kernels, x, state) for kernels in ("reference", "torch"))
    assert all(result.dtype == torch.float32 for result in ours)
    assert relative_error(ours, truth) < 1.2 * relative_error(plain, truth) < 0.1


def relative_error(actual: list[Tensor], truth: list[Tensor]) -> float:
    """Return the mean relative error of tensors."""
    return sum(((a - b).norm() / b.norm()).item() for a, b in zip(actual, truth, strict=True)) / len(truth)


# ------------------------------------------------------------------------------------------------ dropout


def test_dropout_is_drawn_from_torchs_generator_and_used_alike_both_ways() -> None:
    """Against the plain form with the masks that the seed stands for, which a hook applies before the decoder."""
    model = make_model(n_head=3, mlp_internal_dim_multiplier=6, n_embd=8, chunk_size=5)
    x = torch.randn(2, 12, 8, dtype=torch.float64)  # three chunks, the last with two tokens
    model.config.dropout = 0.3
    torch.manual_seed(7)
    actual = run(model, "torch", x)
    after = torch.get_rng_state()
    torch.manual_seed(7)
    assert_close(run(model, "torch", x), actual, 0)
    assert not torch.allclose(run(model, "torch", x)[0], actual[0])

    torch.manual_seed(7)
    seed = int(torch.randint(2**63 - 1, ()))
    assert torch.equal(torch.get_rng_state(), after)
    masks = [dropout_mask(torch.empty(6, 5, 16), Dropout(0.3, seed, head)) for head in range(3)]  # 3 x (G, C, N)
    mask = torch.cat([kept.view(2, 15, 16)[:, :12] != 0 for kept in masks], dim=-1) / 0.7  # (B, T, n)
    model.config.dropout = 0.0
    hook = model.model.layer.decoder.register_forward_pre_hook(lambda module, given: (given[0] * mask,))
    assert_close(actual, run(model, "reference", x), 1e-10)
    hook.remove()
    expected = run(model.eval(), "reference", x)
    model.config.dropout = 0.3
    state = torch.get_rng_state()
    assert_close(run(model, "torch", x), expected, 1e-10)
    assert torch.equal(torch.get_rng_state(), state)


# ------------------------------------------------------------------------------------------------ memory


def saved_bytes(work: Callable[[], Any]) -> int:
    """Return the bytes that a forward pass saves for its backward pass; `work` returns the results, to keep them."""
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        held = work()
    assert held is not None
    return sum(storages.values())


def test_nothing_of_all_neurons_is_kept_where_there_is_no_room() -> None:
    model = make_model(n_embd=8, n_head=4, mlp_internal_dim_multiplier=128)  # 1024 neurons
    x = torch.randn(2, 20, 8, dtype=torch.float64)

    def saved(kernels: str) -> int:
        use_kernels(model.model.layer, kernels, CPU)
        if isinstance(model.model.layer.kernels, FusedLayer):
            model.model.layer.kernels.max_saved_bytes = 0
        return saved_bytes(lambda: model.model(inputs_embeds=x))

    weights = sum(p.numel() * p.element_size() for p in model.model.layer.parameters())
    one_tensor = 2 * 20 * 1024 * 8
    assert saved("torch") < one_tensor < saved("reference") - weights
    with torch.no_grad():
        assert saved("torch") == 0


def test_neurons_are_kept_where_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(dtype=torch.float32, n_embd=8, n_head=2, mlp_internal_dim_multiplier=32, n_layer=2, dropout=0.2)
    x = torch.randn(2, 20, 8)
    monkeypatch.setattr("bdh.kernels.dispatch.make_operations", lambda *args: TritonOperations())
    size = 2 * 3 * (2 * 20 * 256 * 4)  # bytes of X, R and Z of both layers
    actual = []
    for max_bytes in (0, size - 1, size):
        enable_saving(monkeypatch, max_bytes)
        use_kernels(model.model.layer, "torch", CPU)
        torch.manual_seed(1)
        actual.append(saved_bytes(lambda: model.model(inputs_embeds=x)))
    assert actual[0] == actual[1] and actual[2] - actual[1] == size
    torch.manual_seed(1)
    first = run(model, "torch", x)  # from saved activations; below from recomputed ones
    enable_saving(monkeypatch, 0)
    torch.manual_seed(1)
    assert_close(run(model, "torch", x), first, 1e-5)


# ------------------------------------------------------------------------------------------------ where it does not go


def test_padding_hooks_and_single_tokens_take_the_plain_form() -> None:
    model = make_model(n_layer=2, n_embd=8).eval()
    layer = model.model.layer
    tokens = torch.randint(11, (2, 9))
    mask = torch.ones_like(tokens)
    mask[1, :4] = 0
    use_kernels(layer, "reference", CPU)
    expected = model(tokens, attention_mask=mask).logits
    use_kernels(layer, "torch", CPU)
    assert layer.kernels is not None
    embeds = model.model.embed_tokens(tokens)
    state = BDHState.zeros(model.config, 2, dtype=torch.float64)

    def goes(embeds: Tensor, mask: Tensor | None = None, state: BDHState | None = None) -> bool:
        assert layer.kernels is not None
        return layer.kernels.begin(layer, embeds, mask, state, None) is not None

    assert goes(embeds) and goes(embeds, torch.ones_like(tokens)) and goes(embeds, None, state) and goes(embeds[:, :1])
    assert not goes(embeds, mask) and not goes(embeds[:, :1], None, state)
    assert torch.equal(model(tokens, attention_mask=mask).logits, expected)
    seen: list[Tensor] = []
    hook = layer.encoder_v[1].register_forward_hook(lambda module, given, output: seen.append(output))
    model(tokens)
    hook.remove()
    assert len(seen) == 2 and goes(embeds)


def test_frozen_weights_leave_the_gradient_of_x() -> None:
    model = make_model(n_embd=8)
    x = torch.randn(2, 7, 8, dtype=torch.float64)
    expected = run(model, "reference", x)[1]
    model.requires_grad_(False)
    use_kernels(model.model.layer, "torch", CPU)
    x.requires_grad_()
    out = model.model(inputs_embeds=x).last_hidden_state
    (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)).sum().backward()
    assert x.grad is not None
    assert_close([x.grad], [expected], 1e-10)


# ------------------------------------------------------------------------------------------------ training runs

RUN = [
    *SMALL,
    *("--data.path", "text.txt", "--training.max_steps", "12", "--training.eval_interval", "6"),
    *("--training.warmup_steps", "2", "--model.chunk_size", "12", "--model.dropout", "0", "--checkpoint.interval", "6"),
]


@pytest.mark.slow
def test_a_run_learns_the_same_however_it_is_computed(tmp_path: Path) -> None:
    """With carried synapses, by heads in two processes, going on from a checkpoint, and in another form."""
    (tmp_path / "text.txt").write_text(TEXT)
    save_tokenizer(train_tokenizer("bytes", (), 0), tmp_path / "words")
    dropping = ("--model.dropout", "0.2", "--training.schedule", "constant")
    carried = ("--training.carry_state", "true", "--data.tokenizer", "words")

    def argv(name: str, kernels: str, *more: object) -> list[object]:
        return [*RUN, "--run_dir", name, "--model.kernels", kernels, *more]

    jobs: list[tuple[int, list[object]]] = [
        (1, argv("plain", "reference")),
        (1, argv("carried", "torch", *carried)),
        (1, argv("plain_carried", "reference", *carried)),
        (2, argv("heads", "torch", "--distributed.tensor_parallel", "2")),
        (1, argv("whole", "torch", *dropping)),
        (1, argv("half", "torch", *dropping, "--training.max_steps", "6")),
        (1, ["--resume", "half", "--training.max_steps", "12"]),
        (1, ["--resume", "plain", "--model.kernels", "torch", "--training.max_steps", "14"]),
    ]
    said = train_all(jobs, tmp_path)
    assert "notice: model.kernels was reference and is now torch" in said
    actual = {run.name: losses(run) for run in tmp_path.iterdir() if (run / "metrics.jsonl").exists()}
    assert actual["plain"][14:] and len(actual["whole"]) == 14
    assert actual["carried"] == pytest.approx(actual["plain_carried"], abs=1e-4)
    assert actual["heads"] == pytest.approx(actual["plain"][:14], abs=1e-4)
    assert actual["half"] == actual["whole"] != pytest.approx(actual["heads"], abs=1e-4)
    assert "kernels" not in json.loads((tmp_path / "carried" / "model" / "config.json").read_text())


def losses(run: Path) -> list[float]:
    records = read_metrics(run / "metrics.jsonl")
    return [record[name] for record in records for name in ("loss", "validation_loss") if name in record]
