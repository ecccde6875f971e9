"""The observer does what the model does, in any pieces, and leaves no trace in it."""

from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bdh.insight import Observer, Record
from bdh.insight.activity_record import bins_of, raster_of
from bdh.model import BDHConfig
from tests.insight.plain import VARIANTS, gates_of, random_state, small_model

MODEL = small_model(1)
TOKENS = torch.randint(0, 20, (40,), generator=torch.Generator().manual_seed(2)).tolist()


@settings(max_examples=40)
@given(
    length=st.integers(1, 40),
    skipped=st.integers(0, 40),
    cuts=st.sets(st.integers(1, 39)),
    position=st.integers(0, 10**6),
    with_state=st.booleans(),
)
def test_it_gives_the_models_logits_in_any_pieces(
    length: int, skipped: int, cuts: set[int], position: int, with_state: bool
) -> None:
    tokens = TOKENS[:length]
    skipped = min(skipped, length - 1)
    given = random_state(MODEL, position) if with_state else None
    kept = given.clone() if given is not None else None
    with torch.no_grad():
        expected = MODEL(torch.tensor([tokens]), past_key_values=kept, use_cache=True, output_hidden_states=True)
    before = given.clone() if given is not None else None

    observer = Observer(MODEL, 64, given)
    ends = sorted({skipped, length, *(cut for cut in cuts if cut < length)} - {0})
    outputs, start = [], 0
    for end in ends:
        outputs.append((observer.skip if end <= skipped else observer.read)(tokens[start:end]))
        start = end
    with torch.no_grad():
        logits = MODEL.lm_head(torch.cat(outputs))
    assert torch.allclose(logits, expected.logits[0], rtol=1e-9, atol=1e-10)
    for mine, S in zip(observer.state.synapses, expected.past_key_values.synapses, strict=True):
        assert torch.allclose(mine, S, rtol=1e-9, atol=1e-10)

    record = observer.record
    assert record.tokens == tokens[skipped:]
    assert record.start == skipped + (position if with_state else 0)
    x = torch.stack(expected.hidden_states[:-1])[:, 0, skipped:]  # (L, T, D)
    assert torch.allclose(record.vectors[: len(record)].transpose(0, 1), x, rtol=1e-9, atol=1e-10)
    X = (x @ MODEL.model.layer.encoder.weight.T).relu()  # (L, T, n)
    shares = torch.from_numpy(record.shares[: len(record)]).T
    assert torch.allclose(shares, (X > 0).float().mean(-1))
    assert torch.equal(torch.from_numpy(record.rasters[: len(record)]), raster_of(X.transpose(0, 1), 6))
    if given is not None and before is not None:
        assert all(torch.equal(S, T) for S, T in zip(given.synapses, before.synapses, strict=True))
    if with_state or skipped:
        assert record.base is not None and int(record.base.position[0]) == record.start
    else:
        assert record.base is None and record.start == 0


@pytest.mark.parametrize(("decay", "write"), VARIANTS)
@pytest.mark.parametrize("pieces", [[12], [1, 9, 1, 1]])
def test_the_record_keeps_what_the_gates_did(
    decay: Literal["none", "fixed", "gated"], write: Literal["add", "delta"], pieces: list[int]
) -> None:
    model = small_model(4, decay=decay, write=write)
    observer, start = Observer(model, 16), 0
    for length in pieces:
        observer.read(TOKENS[start : start + length])
        start += length
    record = observer.record
    h, N = model.config.n_head, model.config.neurons_per_head
    with torch.no_grad():
        out = model.model(torch.tensor([TOKENS[:12]]), output_hidden_states=True)
    for layer, x in enumerate(out.hidden_states[:-1]):  # (1, T, D)
        gates = zip((record.log_decay, record.write_strength), gates_of(model, x[0]), strict=True)
        for kept, expected in gates:  # (max_tokens, L, h), (T, h)
            assert (kept is None) == (expected is None)
            assert kept is None or expected is None or torch.allclose(kept[:12, layer], expected, rtol=1e-9)
        if record.key_lengths is not None:
            X = (x[0] @ model.model.layer.encoder.weight.T).relu().view(12, h, N)  # (T, h, N)
            assert torch.allclose(record.key_lengths[:12, layer], X.norm(dim=-1), rtol=1e-9)
    assert (record.attention is None) == (record.key_lengths is None) == (write == "add")
    module = model.model.layer.gates
    assert module is None or not (module._forward_hooks or module.attention._forward_hooks)


def test_nobody_else_is_observed() -> None:
    observer = Observer(MODEL, 8)
    observer.read([1, 2, 3])
    with torch.no_grad():
        MODEL(torch.tensor([[4, 5]]))
    assert observer.record.tokens == [1, 2, 3]
    with pytest.raises(IndexError):
        observer.read([99])  # no such token
    assert not MODEL.model.layer.encoder._forward_hooks


def test_a_token_takes_the_bytes_that_are_promised() -> None:
    observer = Observer(MODEL, 8)
    L, D, n = MODEL.config.n_layer, MODEL.config.n_embd, MODEL.config.n_neurons
    assert observer.record.token_nbytes == L * (8 * D + n + 4)
    gated = Observer(small_model(1, decay="gated", write="delta"), 8)
    h = gated.model.config.n_head
    assert gated.record.token_nbytes == L * (8 * D + n + 4 + 8 * (3 * h + h * D))
    config = BDHConfig(decay="gated", write="delta")
    assert Record(BDHConfig(), 2).token_nbytes == 7704 and Record(config, 2).token_nbytes == 32568


def test_rasters_show_the_strongest_of_each_bin() -> None:
    assert [bins_of(n) for n in (2, 128, 256, 258, 384, 32768)] == [2, 128, 256, 129, 192, 256]
    X = torch.tensor([[0.0, 1e-9, 0.25, 1.0, 4.0, 5.0, 400.0]])
    assert raster_of(X, 16).tolist() == [[0, 1, 64, 128, 255, 255, 255]]
    X = torch.zeros(1, 770)
    X[0, 9], X[0, 769] = 4.0, 1.0  # bins of four; the last has two neurons
    assert raster_of(X, 16).tolist() == [[0, 0, 255, *[0] * 189, 128]]
    assert torch.equal(raster_of(X.bfloat16(), 16), raster_of(X, 16))
