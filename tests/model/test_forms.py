"""Quadratic, chunked and recurrent are one function, from any state and position and for any split of a sequence."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bdh.model import BDHConfig, BDHForCausalLM, BDHState
from bdh.model.modeling_bdh import (
    attend,
    attention_chunked,
    attention_quadratic,
    attention_recurrent,
    rotary_phases,
    rotate,
    write_synapses,
)

seeds = st.integers(0, 2**32 - 1)


def close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    scale = b.norm().item() or 1.0
    return bool((a - b).norm().item() <= tolerance * scale)


@settings(max_examples=80, deadline=None)
@given(
    seed=seeds,
    B=st.integers(1, 3),
    h=st.integers(1, 4),
    T=st.integers(1, 40),
    pairs=st.integers(1, 12),
    D=st.integers(1, 12),
    chunk=st.integers(1, 45),
    start=st.integers(0, 2_000_000),
    with_state=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_three_forms_agree(
    seed: int, B: int, h: int, T: int, pairs: int, D: int, chunk: int, start: int, with_state: bool, dtype: torch.dtype
) -> None:
    tolerance = 1e-4 if dtype == torch.float32 else 1e-11
    random = torch.Generator().manual_seed(seed)
    N = 2 * pairs
    X = torch.randn(B, h, T, N, generator=random, dtype=dtype).relu()
    x = torch.randn(B, T, D, generator=random, dtype=dtype)
    S = torch.randn(B, h, N, D, generator=random, dtype=dtype) * (3.0 if with_state else 0.0)
    R = rotate(X, *rotary_phases(torch.arange(start, start + T)[None], N, 65536.0, dtype))

    # straight from the definition: A_t = R_t S + sum over s<t of (R_t . R_s) x_s, one pair of tokens at a time
    expected = torch.einsum("bhtn,bhnd->bhtd", R, S)
    for t in range(T):
        for s in range(t):
            expected[:, :, t] += (R[:, :, t] * R[:, :, s]).sum(-1, keepdim=True) * x[:, None, s]
    after = S + torch.einsum("bhtn,btd->bhnd", R, x)

    A = attention_quadratic(R, x, S)
    chunked, S_chunked = attention_chunked(R, x, S.clone(), chunk)
    recurrent, S_recurrent = attention_recurrent(R, x, S.clone())
    chosen, S_chosen = attend(R, x, S.clone(), chunk)
    assert S_chosen is not None
    for result in (A, chunked, recurrent, chosen):
        assert close(result, expected, tolerance)
    for result in (write_synapses(R, x, S.clone()), S_chunked, S_recurrent, S_chosen):
        assert close(result, after, tolerance)
    if not with_state:
        assert close(attend(R, x, None, chunk)[0], expected, tolerance)


@settings(max_examples=60, deadline=None)
@given(
    seed=seeds,
    h=st.integers(1, 3),
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=5),
    goes_on=st.booleans(),
    chunk=st.integers(1, 30),
    start=st.integers(0, 100_000),
)
def test_documents_in_a_row_are_read_as_if_apart(
    seed: int, h: int, lengths: list[int], goes_on: bool, chunk: int, start: int
) -> None:
    random = torch.Generator().manual_seed(seed)
    N, D, T = 6, 5, sum(lengths)
    X = torch.randn(1, h, T, N, generator=random, dtype=torch.float64).relu()
    x = torch.randn(1, T, D, generator=random, dtype=torch.float64)
    S = torch.randn(1, h, N, D, generator=random, dtype=torch.float64)
    R = rotate(X, *rotary_phases(torch.arange(start, start + T)[None], N, 65536.0, torch.float64))
    first = 0 if goes_on else 1  # document 0 goes on from S, any other begins
    ids = torch.cat([torch.full((n,), first + i) for i, n in enumerate(lengths)])[None]

    apart, begin = [], 0
    after = S
    for i, n in enumerate(lengths):
        part = slice(begin, begin + n)
        before = S if first + i == 0 else torch.zeros_like(S)
        apart.append(attention_quadratic(R[:, :, part], x[:, part], before))
        after = write_synapses(R[:, :, part], x[:, part], before.clone())
        begin += n
    expected = torch.cat(apart, dim=2)

    assert close(attention_quadratic(R, x, S, ids), expected, 1e-11)
    assert close(write_synapses(R, x, S.clone(), ids), after, 1e-11)
    for form in (
        attention_chunked(R, x, S.clone(), chunk, ids),
        attention_recurrent(R, x, S.clone(), ids),
        attend(R, x, S.clone(), chunk, ids),
    ):
        assert form[1] is not None
        assert close(form[0], expected, 1e-11)
        assert close(form[1], after, 1e-11)
    if not goes_on:
        assert close(attend(R, x, None, chunk, ids)[0], expected, 1e-11)


@settings(max_examples=60, deadline=None)
@given(
    seed=seeds,
    B=st.integers(1, 3),
    h=st.sampled_from([1, 2, 4]),
    L=st.integers(1, 3),
    T=st.integers(2, 30),
    chunk=st.integers(1, 32),
    past=st.integers(0, 300_000),
    data=st.data(),
)
def test_any_split_of_a_sequence_agrees(
    seed: int, B: int, h: int, L: int, T: int, chunk: int, past: int, data: st.DataObject
) -> None:
    torch.manual_seed(seed)
    config = BDHConfig(
        n_layer=L, n_embd=8, n_head=h, mlp_internal_dim_multiplier=4, vocab_size=19, initializer_range=0.4
    )
    model = BDHForCausalLM(config).eval()
    tokens = torch.randint(19, (B, T))
    start = BDHState.zeros(config, B)
    start.synapses = [torch.randn_like(S) for S in start.synapses]
    start.position += past  # as if that many tokens had been read
    cuts = sorted(data.draw(st.sets(st.integers(1, T - 1), max_size=5)))

    with torch.no_grad():
        whole = model(tokens, past_key_values=start.clone())
        model.config.chunk_size = chunk
        state, pieces = start.clone(), []
        for piece in tokens.tensor_split(cuts, dim=1):
            output = model(piece, past_key_values=state)
            state = output.past_key_values
            pieces.append(output.logits)
    assert close(torch.cat(pieces, dim=1), whole.logits, 1e-4)
    assert state.position.tolist() == [past + T] * B and state.length == T
    for S, expected in zip(state.synapses, whole.past_key_values.synapses, strict=True):
        assert close(S, expected, 1e-4)


def test_gradients_flow_through_a_carried_state() -> None:
    torch.manual_seed(0)
    config = BDHConfig(
        n_layer=2, n_embd=8, n_head=2, mlp_internal_dim_multiplier=4, vocab_size=11, initializer_range=0.4
    )
    model = BDHForCausalLM(config).double().eval()
    tokens = torch.randint(11, (2, 12))

    def gradients(*lengths: int) -> list[Tensor]:
        state = BDHState.zeros(config, 2, dtype=torch.float64)
        logits = []
        for piece in tokens.split(list(lengths), dim=1):
            output = model(piece, past_key_values=state)
            state = output.past_key_values
            logits.append(output.logits)
        loss = torch.cat(logits, dim=1).square().mean()
        return list(torch.autograd.grad(loss, list(model.parameters())))

    whole = gradients(12)
    for split in ((5, 7), (1, 1, 10), (11, 1), (1,) * 12):
        for a, b in zip(gradients(*split), whole, strict=True):
            assert close(a, b, 1e-9)


def test_gradient_reaches_the_state_that_came_in() -> None:
    torch.manual_seed(0)
    config = BDHConfig(
        n_layer=1, n_embd=8, n_head=2, mlp_internal_dim_multiplier=4, vocab_size=11, initializer_range=0.4
    )
    model = BDHForCausalLM(config).double()
    S = torch.randn(1, 2, 16, 8, dtype=torch.float64, requires_grad=True)

    def output(S: Tensor) -> Tensor:
        state = BDHState([S], torch.zeros(1, dtype=torch.int64), 0)
        result: Tensor = model.eval()(torch.tensor([[3, 1, 4]]), past_key_values=state, use_cache=True).logits
        return result

    assert torch.autograd.gradcheck(output, (S,), atol=1e-6)


def test_phases_keep_their_digits_at_any_position() -> None:
    """Against exact integer arithmetic: the phase in turns, as a fraction of a large power of two."""
    for position in (0, 1, 1000, 10**6, 10**9):
        cos, sin = rotary_phases(torch.tensor([[position]]), 64, 65536.0, torch.float32)
        for i in range(32):
            numerator = int(65536.0 ** (-2 * i / 64) / (2 * torch.pi) * 2**62)
            turns = (position * numerator % 2**62) / 2**62
            angle = torch.tensor(turns * 2 * torch.pi, dtype=torch.float64)
            tolerance = 1e-6 + position * 1e-15
            assert abs(cos[0, 0, 0, 2 * i] - angle.cos()) < tolerance
            assert abs(sin[0, 0, 0, 2 * i + 1] - angle.sin()) < tolerance
            assert sin[0, 0, 0, 2 * i] == -sin[0, 0, 0, 2 * i + 1]


def test_a_token_never_sees_itself_or_what_follows() -> None:
    torch.manual_seed(0)
    config = BDHConfig(
        n_layer=2, n_embd=8, n_head=2, mlp_internal_dim_multiplier=4, vocab_size=11, initializer_range=0.4
    )
    model = BDHForCausalLM(config).eval()
    tokens = torch.randint(11, (1, 10))
    changed = tokens.clone()
    changed[0, 6:] = (changed[0, 6:] + 1) % 11
    a, b = model(tokens).logits, model(changed).logits
    assert torch.equal(a[:, :6], b[:, :6]) and not torch.allclose(a[:, 6:], b[:, 6:])


def test_the_model_keeps_documents_apart() -> None:
    config = BDHConfig(n_layer=3, n_embd=16, n_head=2, mlp_internal_dim_multiplier=4, vocab_size=50, chunk_size=4)
    torch.manual_seed(0)
    model = BDHForCausalLM(config).double().eval()
    past, tail, other = (torch.randint(0, 50, (2, n)) for n in (7, 5, 6))
    with torch.no_grad():
        state = model(past).past_key_values
        whole = model(torch.cat([past, tail], dim=1)).logits[:, -5:]
        alone = model(other)
        ids = torch.tensor([[0] * 5 + [1] * 6] * 2)
        both = model(torch.cat([tail, other], dim=1), past_key_values=state, document_ids=ids)
    assert torch.allclose(both.logits[:, :5], whole, atol=1e-9)
    assert torch.allclose(both.logits[:, 5:], alone.logits, atol=1e-9)
    word = torch.randint(0, 50, (2, 1))  # what is left is the state of the last document alone
    a, b = (model(word, past_key_values=output.past_key_values).logits for output in (both, alone))
    assert torch.allclose(a, b, atol=1e-9)


def test_forget_puts_single_sequences_back_to_the_beginning() -> None:
    config = BDHConfig(n_layer=2, n_embd=8, n_head=2, mlp_internal_dim_multiplier=4, vocab_size=50)
    torch.manual_seed(0)
    model = BDHForCausalLM(config).eval()
    with torch.no_grad():
        state = model(torch.randint(0, 50, (3, 9))).past_key_values.forget(torch.tensor([False, True, False]))
    assert state.position.tolist() == [9, 0, 9]
    assert all(S[1].abs().sum() == 0 and S[0].abs().sum() > 0 for S in state.synapses)
