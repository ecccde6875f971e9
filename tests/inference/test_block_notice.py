"""A model without decay that has read past its training block says so, once."""

import asyncio
import logging
from pathlib import Path

import httpx
import pytest

from bdh.inference.async_llm import AsyncLLM
from bdh.inference.llm import LLM
from bdh.inference.runner import ModelRunner
from bdh.inference.sampling_params import SamplingParams
from bdh.model import BDHForCausalLM
from bdh.model.export import save_export
from bdh.model.model_card import model_card
from tests.cli.terminal import Terminal
from tests.conftest import Run
from tests.inference.small import BYTES, CHAT, small_model
from tests.serving.running import running

GREEDY = {"temperature": 0.0, "min_new_tokens": 1}


def trained_on(block_size: int | None, vocab_size: int = 256, **decay: object) -> BDHForCausalLM:
    model = small_model(vocab_size=vocab_size)
    model.config.training_block_size = block_size
    for name, value in decay.items():
        setattr(model.config, name, value)
    return model


def listened(model: BDHForCausalLM) -> tuple[LLM, list[str]]:
    llm = LLM(ModelRunner(model, 2), BYTES)
    lines: list[str] = []
    llm.notify = lines.append
    return llm, lines


def test_it_says_so_once_and_only_past_the_block() -> None:
    llm, lines = listened(trained_on(10))
    llm.generate("abcde", SamplingParams(max_new_tokens=6, **GREEDY))  # type: ignore[arg-type]  # the last is not read
    assert lines == []
    llm.generate(["abcde", "abc"], SamplingParams(max_new_tokens=7, **GREEDY))  # type: ignore[arg-type]
    llm.generate("a" * 50, SamplingParams(max_new_tokens=7, **GREEDY))  # type: ignore[arg-type]
    (line,) = lines
    assert "past the 10 tokens of its training block" in line and "bdh calibrate MODEL" in line and "\n" not in line


def test_a_long_prompt_is_enough() -> None:
    llm, lines = listened(trained_on(10))
    llm.generate("a" * 11, SamplingParams(max_new_tokens=1))
    assert len(lines) == 1


def test_what_a_session_has_read_counts() -> None:
    llm, lines = listened(trained_on(40))
    session = llm.session()
    session.read("a" * 30)
    assert lines == []
    session.read("a" * 12)
    assert len(lines) == 1


def test_beam_search_counts_too() -> None:
    llm, lines = listened(trained_on(10))
    llm.generate("abcde", SamplingParams(max_new_tokens=8, num_beams=2))
    assert len(lines) == 1


def test_never_where_the_block_is_not_known_or_the_model_decays() -> None:
    params = SamplingParams(max_new_tokens=20)
    for model in (trained_on(None), trained_on(10, decay="fixed", decay_half_lives=[4.0, 8.0])):
        llm, lines = listened(model)
        llm.generate("abc", params)
        assert lines == []


def test_a_model_that_calibrate_is_not_for_is_not_sent_there() -> None:
    llm, lines = listened(trained_on(10, write="delta"))
    llm.generate("abc", SamplingParams(max_new_tokens=20))
    assert len(lines) == 1 and "calibrate" not in lines[0]


def test_without_a_listener_it_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    async def many() -> None:
        async with AsyncLLM(trained_on(10), BYTES) as model:
            await asyncio.gather(*(model.generate("abc", SamplingParams(max_new_tokens=20)) for _ in range(3)))

    with caplog.at_level(logging.WARNING, "bdh.inference"):
        asyncio.run(many())
    assert [record.levelname for record in caplog.records if "training block" in record.getMessage()] == ["WARNING"]


@pytest.fixture
def export(tmp_path: Path) -> Path:
    model = trained_on(20, 262)
    save_export(model, CHAT, tmp_path / "small", model_card("small", model.config, []))
    return tmp_path / "small"


def test_generate_says_it_on_stderr(export: Path, tmp_path: Path, bdh: Run) -> None:
    given = ["generate", "--model", "small", "--prompt", "The ", "--seed", 1, "--max_new_tokens"]
    assert bdh(*given, 8).stderr == ""
    expected = "notice: small has read past the 20 tokens of its training block, and has no decay: its text becomes "
    expected += "unreliable; bdh calibrate small --data.path TEXT --output DIR gives it a decay\n"
    plain, streamed = bdh(*given, 60), bdh(*given, 60, "--stream")
    assert plain.returncode == streamed.returncode == 0 and plain.stdout == streamed.stdout
    assert plain.stderr == streamed.stderr == expected


def test_a_stream_is_not_interrupted_by_it(export: Path, tmp_path: Path) -> None:
    bias = '{"65": 100}'  # A, again and again
    given = ["--prompt", "The ", "--max_new_tokens", 60, "--stream", "--logit_bias", bias]
    terminal = Terminal("generate", "--model", "small", *given, cwd=tmp_path)
    terminal.expect("The " + "A" * 60)
    terminal.expect("notice: small has read past the 20 tokens")
    assert terminal.end()[0] == 0


def test_chat_says_it_once(export: Path, bdh: Run) -> None:
    done = bdh("chat", "--model", "small", "--seed", 1, "--max_new_tokens", 12, input="hello\nhello\nhello\n")
    assert done.returncode == 0 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("notice: small has read past the 20 tokens")


def test_a_server_logs_it_once(export: Path, tmp_path: Path) -> None:
    with running(tmp_path, "--model", "small") as server:
        for _ in range(3):
            asked = {"model": "small", "prompt": "The ", "max_tokens": 40}
            assert httpx.post(f"{server.url}/v1/completions", json=asked, timeout=60).status_code == 200
        assert server.log.read_text().count("has read past the 20 tokens of its training block") == 1
