"""Text in, text out: many prompts, streams, stop strings, choices, chats, interruptions."""

import gc
import signal
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import bdh
from bdh.data.tokenizer import byte_tokenizer
from bdh.data.vocabulary import train_tokenizer
from bdh.errors import BDHError
from bdh.inference.llm import LLM, Prompt, sample_texts
from bdh.inference.outputs import Delta, TextRequest
from bdh.inference.request import Request
from bdh.inference.runner import ModelRunner
from bdh.inference.sampling_params import SamplingParams
from bdh.model.export import save_export
from bdh.model.model_card import model_card
from tests.inference.small import (
    BYTES,
    CHAT,
    PLAIN_BYTES,
    Tripwire,
    ctrl_c_works,
    letters,
    small_llm,
    small_model,
)

GREEDY = SamplingParams(max_new_tokens=10, temperature=0)


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    """Each test leaves it idle."""
    llm = small_llm()
    yield llm
    assert not llm.engine.busy and not llm.outputs


def alone(prompt: str | list[int], params: SamplingParams) -> str:
    """What the plain runner makes of a prompt, one request at a time."""
    return LLM(ModelRunner(small_model(), 1), BYTES).generate(prompt, params)[0].text


# ------------------------------------------------------------------------------------------------------- generate


def test_greedy_is_what_the_model_itself_finds_likeliest(llm: LLM) -> None:
    model, ids = small_model(), list(b"ab")
    for _ in range(10):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    (completion,) = llm.generate("ab", GREEDY)
    (choice,) = completion.choices
    assert choice.tokens == ids[2:] and completion.text == BYTES.decode(ids[2:]) and choice.finish_reason == "length"
    assert completion.prompt == "ab" and completion.prompt_tokens == [97, 98]
    assert llm.generate([97, 98], GREEDY) == [completion]


def test_many_prompts_come_back_in_order_whatever_their_length(llm: LLM) -> None:
    prompts = [chr(97 + i % 26) * (1 + i % 7) for i in range(30)]
    params = [letters(max_new_tokens=1 + (5 * i) % 13, seed=i) for i in range(30)]
    completions = llm.generate(prompts, params)
    assert [completion.prompt for completion in completions] == prompts
    assert [completion.text for completion in completions] == [alone(*pair) for pair in zip(prompts, params)]
    mixed: list[Prompt] = ["a", [98]]
    assert [completion.text for completion in llm.generate(mixed, GREEDY)] == [alone("a", GREEDY), alone("b", GREEDY)]
    assert llm.generate([]) == []


def test_more_prompts_than_the_queue_holds(llm: LLM) -> None:
    small = small_llm(n_slots=2)
    small.engine.queue_size = 3
    stream = small.stream("x", letters(max_new_tokens=60))
    first = next(stream)
    completions = small.generate(["abc"] * 12, letters(max_new_tokens=5))
    assert {completion.text for completion in completions} == {alone("abc", letters(max_new_tokens=5))}
    assert first.text + "".join(delta.text for delta in stream) == alone("x", letters(max_new_tokens=60))


def test_a_mistake_is_told_before_anything_is_written(llm: LLM) -> None:
    before = llm.engine.stats.prefill_tokens
    with pytest.raises(BDHError, match="prompt 2: the prompt is empty"):
        llm.generate(["a", ""], GREEDY)
    with pytest.raises(BDHError, match=r"^the prompt is empty"):
        llm.generate("", GREEDY)
    with pytest.raises(BDHError, match="character 1 is half of one"):
        llm.generate("a\ud800", GREEDY)
    with pytest.raises(BDHError, match="prompt 2: the prompt is a dict; give text"):
        llm.generate(["a", {}], GREEDY)  # type: ignore[arg-type]
    with pytest.raises(BDHError, match="the prompt is a list of something else"):
        llm.stream([97, "b"], GREEDY)  # type: ignore[list-item]
    with pytest.raises(BDHError, match="token that the model does not know"):
        llm.generate([97, 256], GREEDY)
    with pytest.raises(BDHError, match="there are 3 prompts and 2 params"):
        llm.generate(["a", "b", "c"], [GREEDY, GREEDY])
    for prompts, kind in ((None, "NoneType"), (42, "int"), ({"a": 1}, "dict"), (iter("ab"), "str_\\w*iterator")):
        with pytest.raises(BDHError, match=f"the prompts are a {kind}; give a text, a list of token ids, or a list"):
            llm.generate(prompts)  # type: ignore[arg-type]
    for params in (42, {"n": 1}, "greedy", [GREEDY, None]):
        with pytest.raises(BDHError, match="the params are no SamplingParams"):
            llm.generate(["a", "b"], params)  # type: ignore[arg-type]
    assert llm.engine.stats.prefill_tokens == before


def test_best_of_returns_the_likeliest(llm: LLM) -> None:
    drawn = llm.generate("ab", letters(n=5, logprobs=0))[0].choices
    best = llm.generate("ab", letters(n=2, best_of=5))[0].choices
    likeliest = sorted(drawn, key=lambda choice: -(choice.cumulative_logprob or 0) / len(choice.tokens))
    assert [choice.tokens for choice in best] == [choice.tokens for choice in likeliest[:2]]
    assert [choice.index for choice in best] == [0, 1] and all(choice.logprobs is None for choice in best)
    assert best[0].cumulative_logprob == pytest.approx(sum(entry.logprob for entry in likeliest[0].logprobs or ()))


def test_logprobs_are_the_models(llm: LLM) -> None:
    (choice,) = llm.generate("ab", replace(GREEDY, logprobs=3))[0].choices
    with torch.no_grad():
        logits = small_model()(torch.tensor([[97, 98, *choice.tokens[:-1]]])).logits[0, 1:].log_softmax(-1)
    assert choice.logprobs is not None and [entry.token for entry in choice.logprobs] == choice.tokens
    for entry, row in zip(choice.logprobs, logits, strict=True):
        assert entry.logprob == pytest.approx(float(row[entry.token]), abs=1e-4)
        assert [token for token, _ in entry.top] == row.topk(3).indices.tolist()


def test_stop_strings_and_end_tokens_are_no_part_of_the_text(llm: LLM) -> None:
    whole = llm.generate("ab", letters(max_new_tokens=60))[0].text
    stop = whole[20:23]
    cut = llm.generate("ab", letters(max_new_tokens=60, stop=("no such text", stop)))[0].choices[0]
    assert cut.text == whole[: whole.index(stop)] and cut.finish_reason == "stop"
    assert len(cut.tokens) == len(cut.text) + 3
    token = ord(whole[30])
    cut = llm.generate("ab", letters(max_new_tokens=60, stop_token_ids=(token,)))[0].choices[0]
    assert cut.text == whole[: whole.index(chr(token))] and cut.finish_reason == "stop" and cut.tokens[-1] == token


def test_constrained_text(llm: LLM) -> None:
    params = SamplingParams(max_new_tokens=40, regex="(yes|no), [a-z]{3}", seed=1)
    text = llm.generate("Well? ", params)[0].text
    assert text.split(", ")[0] in ("yes", "no") and len(text.split(", ")[1]) == 3
    with pytest.raises(BDHError, match="regex"):
        llm.stream("a", SamplingParams(regex="("))
    choice = llm.generate("a", SamplingParams(regex="")).pop().choices[0]
    assert choice.text == "" and choice.tokens == [255] and choice.finish_reason == "stop"  # the end of a text
    with pytest.raises(BDHError, match="nothing but an empty text"):
        small_llm(PLAIN_BYTES).generate("a", SamplingParams(regex=""))


def test_beam_search_finds_likelier_text_than_the_greedy_one(llm: LLM) -> None:
    def logprob(tokens: list[int]) -> float:
        with torch.no_grad():
            logits = small_model()(torch.tensor([[97, 98, *tokens[:-1]]])).logits[0, 1:].log_softmax(-1)
        return float(logits[range(len(tokens)), tokens].sum())

    params = SamplingParams(max_new_tokens=6, num_beams=4, n=2)
    first, second = llm.generate(["ab"], params)[0].choices
    greedy = llm.generate("ab", replace(GREEDY, max_new_tokens=6))[0].choices[0]
    assert logprob(first.tokens) >= max(logprob(second.tokens), logprob(greedy.tokens)) - 1e-4
    assert first.tokens != second.tokens and first.finish_reason == "length" and len(first.tokens) == 6
    token = first.tokens[3]
    ended = llm.generate("ab", replace(params, stop_token_ids=(token,)))[0].choices
    assert all(token not in choice.tokens[:-1] for choice in ended)
    with pytest.raises(BDHError, match="presence_penalty"):
        llm.generate("ab", replace(params, presence_penalty=1.0))
    with pytest.raises(BDHError, match="the prompt is empty"):
        llm.generate("", params)
    with pytest.raises(BDHError, match="num_beams is 4, which cannot be streamed"):
        llm.stream("ab", params)


def test_a_progress_bar_only_where_it_is_asked_for(llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    llm.generate(["a", "b"], GREEDY)
    assert capsys.readouterr() == ("", "")
    llm.generate(["a", "b"], GREEDY, progress=True)
    shown = capsys.readouterr()
    assert shown.out == "" and "100%" in shown.err


# --------------------------------------------------------------------------------------------------------- stream


def test_a_stream_is_the_completion_in_pieces(llm: LLM) -> None:
    params = letters(n=3, max_new_tokens=20, logprobs=1, stop=("e",))
    choices = llm.generate("ab", params)[0].choices
    deltas = list(llm.stream("ab", params))
    for choice in choices:
        own = [delta for delta in deltas if delta.index == choice.index]
        assert "".join(delta.text for delta in own) == choice.text
        assert [token for delta in own for token in delta.tokens] == choice.tokens
        entries = [entry for delta in own for entry in delta.logprobs or ()]
        assert [entry.token for entry in entries] == choice.tokens
        assert sum(entry.logprob for entry in entries) == pytest.approx(choice.cumulative_logprob)
        assert [delta.finish_reason for delta in own] == [None] * (len(own) - 1) + [choice.finish_reason]
        assert all(delta.text for delta in own[:-1])
    assert {delta.index for delta in deltas[:6]} == {0, 1, 2}  # in turn


def test_pieces_are_whole_characters(llm: LLM) -> None:
    pieces = [delta.text for delta in llm.stream("ab", SamplingParams(seed=1, max_new_tokens=80))]
    assert "".join(pieces) == llm.generate("ab", SamplingParams(seed=1, max_new_tokens=80))[0].text


def test_closing_a_stream_frees_its_slot(llm: LLM) -> None:
    free = len(llm.engine.free)
    stream = llm.stream("ab", letters(n=2))
    assert len(llm.engine.free) == free  # nothing happens before it is asked for
    assert {delta.index for delta in (next(stream), next(stream), next(stream))} == {0, 1}
    assert len(llm.engine.free) == free - 2
    stream.close()  # type: ignore[attr-defined]
    assert len(llm.engine.free) == free and not llm.engine.busy
    next(llm.stream("ab", letters()))  # let go of
    gc.collect()
    assert len(llm.engine.free) == free and not llm.engine.busy


def test_a_stream_closed_in_the_midst_of_a_step_waits_for_its_end() -> None:
    """As the garbage collector may do."""
    streams: list[Iterator[Delta]] = []
    llm = LLM(Tripwire(small_model(), 2, 3, streams.clear), BYTES)
    streams.append(llm.stream("x", letters()))
    next(streams[0])
    assert llm.generate("ab", letters())[0].text == alone("ab", letters())
    assert not streams and not llm.engine.busy and llm.engine.stats.cancelled == 1


def test_streams_and_prompts_side_by_side(llm: LLM) -> None:
    params = letters(max_new_tokens=25)
    one, other = llm.stream("one", params), llm.stream("other", replace(params, seed=3))
    text = next(one).text + next(other).text
    assert llm.generate("third", params)[0].text == alone("third", params)
    text += "".join(delta.text for delta in one) + "".join(delta.text for delta in other)
    both = alone("one", params), alone("other", replace(params, seed=3))
    assert text == both[0][0] + both[1][0] + both[0][1:] + both[1][1:]


def test_what_is_chosen_at_the_end_cannot_be_streamed(llm: LLM) -> None:
    with pytest.raises(BDHError, match="best_of is 3, which cannot be streamed"):
        llm.stream("ab", letters(best_of=3))


# ------------------------------------------------------------------------------------------- when things go wrong


def test_ctrl_c_ends_the_requests_and_leaves_the_engine_usable() -> None:
    llm = LLM(Tripwire(small_model(), 2, 5, lambda: signal.raise_signal(signal.SIGINT)), BYTES)
    kept = llm.stream("x", letters())
    text = next(kept).text
    with ctrl_c_works(), pytest.raises(KeyboardInterrupt):
        llm.generate(["ab"] * 8, letters(max_new_tokens=100))
    assert len(llm.outputs) == 1 and len(llm.engine.free) == 1 and not llm.engine.waiting
    assert text + "".join(delta.text for delta in kept) == alone("x", letters())
    assert llm.generate("ab", letters())[0].text == alone("ab", letters())


def test_a_failure_reaches_all_and_the_next_request_begins_anew() -> None:
    def fail() -> None:
        raise RuntimeError("out of luck")

    llm = LLM(Tripwire(small_model(), 2, 5, fail), BYTES)
    stream = llm.stream("x", letters())
    next(stream)
    with pytest.raises(RuntimeError, match="out of luck"):
        llm.generate(["ab"] * 4, letters())
    with pytest.raises(RuntimeError, match="out of luck"):
        list(stream)
    assert not llm.outputs and llm.generate("ab", letters())[0].text == alone("ab", letters())


def test_a_failure_does_not_keep_the_old_engines_states() -> None:
    def fail() -> None:
        raise RuntimeError("out of luck")

    llm = LLM(Tripwire(small_model(), 2, 25, fail), BYTES)
    prompt = "a beginning that many share " * 20
    llm.generate([prompt + "x", prompt + "y"], letters(max_new_tokens=3))
    old = llm.engine
    assert len(old.prefixes) == 1
    with pytest.raises(RuntimeError, match="out of luck"):
        llm.generate([prompt + "x"] * 4, letters(n=3))
    assert len(old.prefixes) == 0 and not old.busy and not old.waiting and not old.reading and not old.writing


def test_a_request_that_is_refused_takes_no_memory(llm: LLM) -> None:
    tracemalloc.start()
    with pytest.raises(BDHError, match="the prompt is empty"):
        llm.start(TextRequest(Request([], SamplingParams(n=100_000))))
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 1_000_000


def test_a_grammar_that_cannot_go_on_is_one_requests_error() -> None:
    tokenizer = train_tokenizer("unigram", ['{"a": "ab cd", "b": [1, 2]} '] * 5, 40)
    schema = {"properties": {"a": {"type": "string", "maxLength": 9}, "é": {}}, "required": ["a", "é"]}  # has no "é"
    llm = LLM(small_model(vocab_size=len(tokenizer)), tokenizer)
    others = SamplingParams(seed=1, max_new_tokens=80)
    stream = llm.stream("ab cd", others)
    text = next(stream).text
    stuck = SamplingParams(json_schema={"type": "object", **schema}, seed=0)
    with pytest.raises(BDHError, match="the constrained output cannot go on"):
        llm.generate("ab", stuck)
    first, second, third = llm.generate(["ab cd", "ab", "ab cd"], [others, stuck, others])
    assert second.choices == [] and "cannot go on" in (second.error or "")
    with pytest.raises(BDHError, match="the constrained output cannot go on"):
        assert second.text
    assert first == third == llm.generate("ab cd", others)[0]
    text += "".join(delta.text for delta in stream)
    assert text == llm.generate("ab cd", others)[0].text and not llm.engine.busy


# ----------------------------------------------------------------------------------------------------------- chats


def test_a_chat_without_a_template_is_a_transcript(llm: LLM) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    completion = llm.chat(messages, letters())
    assert completion.prompt == "Be brief.\n\nUser: Hello\nAssistant:"
    assert completion.text == alone(completion.prompt, letters()).lstrip()
    assert list(llm.stream_chat(messages, letters()))[-1].finish_reason == "length"


def test_a_new_turn_ends_an_answer_of_a_transcript(llm: LLM) -> None:
    completion = llm.chat([{"role": "user", "content": "Hi"}], SamplingParams(regex=" yes\nUser: (a|b)", seed=0))
    assert completion.text == "yes" and completion.choices[0].finish_reason == "stop"


def test_the_next_turn_of_a_chat_goes_on_from_the_kept_state() -> None:
    """Also where an answer was cut by a stop string, and whatever the tokenizer's template."""
    question = {"role": "user", "content": "Do you see the dragon over there?"}
    for tokenizer, settings in ((BYTES, {"regex": " yes, [a-z]{4}\nUser: "}), (CHAT, {"regex": "yes, [a-z]{4}"})):
        llm = small_llm(tokenizer)
        params = SamplingParams(seed=0, max_new_tokens=40, **settings)  # type: ignore[arg-type]
        first = llm.chat([question], params)
        read = llm.engine.stats.prefill_tokens
        answer = {"role": "assistant", "content": first.text}
        second = llm.chat([question, answer, question], params)
        assert first.text.startswith("yes, ") and second.text.startswith("yes, ")
        assert llm.engine.stats.prefix_hits == 1
        assert llm.engine.stats.prefill_tokens - read < len(first.prompt_tokens) + 5
        fresh = small_llm(tokenizer).chat([question, answer, question], params)
        assert second.choices == fresh.choices and fresh.cached_tokens == 0
        assert second.cached_tokens == llm.engine.stats.prefix_tokens_saved > 0


def test_a_chat_template_says_how_an_answer_ends() -> None:
    llm = small_llm(CHAT)
    end = CHAT.convert_tokens_to_ids("<|im_end|>")
    completion = llm.chat([{"role": "user", "content": "Hi"}], letters(262, logit_bias={end: 100.0}))
    assert completion.prompt == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert completion.choices[0].tokens == [end] and completion.choices[0].finish_reason == "stop"
    assert completion.text == "" and end not in llm.end_token_ids and CHAT.eos_token_id in llm.end_token_ids


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "there are no messages"),
        ([{"role": "user"}], r"messages\[0\] is no message"),
        ([{"role": "user", "content": "a"}, "b"], r"messages\[1\] is no message"),
        ([{"role": "user", "content": "\ud800"}], "not valid text"),
    ],
)
def test_what_is_no_conversation_is_refused(llm: LLM, messages: list[dict[str, str]], message: str) -> None:
    with pytest.raises(BDHError, match=message):
        llm.chat(messages)


def test_a_template_that_does_not_take_the_messages() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(BDHError, match="the chat template does not take these messages: roles must alternate"):
        small_llm_with(tokenizer).chat([{"role": "user", "content": "a"}])
    tokenizer.chat_template = "{% for"
    with pytest.raises(BDHError, match="the chat template does not take"):
        small_llm_with(tokenizer).chat([{"role": "user", "content": "a"}])


def small_llm_with(tokenizer: object) -> LLM:
    return LLM(small_model(), tokenizer)  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------- models, samples, exports


def test_an_export_is_loaded(tmp_path: Path) -> None:
    model = small_model()
    save_export(model, BYTES, tmp_path / "model", model_card("a test", model.config, []))
    assert bdh.LLM(tmp_path / "model").generate("ab", GREEDY)[0].text == alone("ab", GREEDY)
    assert LLM(str(tmp_path / "model"), BYTES, max_batch_size=1).runner.n_slots == 1


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BDHError, match="does not exist"):
        LLM(tmp_path / "none")
    with pytest.raises(BDHError, match="give one beside it"):
        LLM(small_model())
    with pytest.raises(BDHError, match="the tokenizer has 261 tokens, the model 256"):
        LLM(small_model(), CHAT)
    for size in (0, 2.5, True, "8"):
        with pytest.raises(BDHError, match=f"max_batch_size is {size!r}; it must be a whole number, at least 1"):
            LLM(small_model(), BYTES, max_batch_size=size)  # type: ignore[arg-type]
    with pytest.raises(BDHError, match="the device is to be tpu"):
        LLM(small_model(), BYTES, device="tpu")


def test_samples_leave_the_model_and_the_process_as_they_were() -> None:
    model = small_model().train()
    params = letters(max_new_tokens=12, seed=5)
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    texts = sample_texts(model, BYTES, ["x", "The "], params)
    assert torch.equal(torch.rand(1), expected) and model.training
    assert all(not p.is_inference() and p.requires_grad for p in model.parameters())
    assert texts == [alone("x", params), alone("The ", params)] == sample_texts(model, BYTES, ["x", "The "], params)
    assert sample_texts(model, BYTES, ["x"], replace(params, seed=6)) != texts[:1]
    with pytest.raises(BDHError, match="the prompt is empty"):
        sample_texts(model, BYTES, [""], params)
    assert model.training
