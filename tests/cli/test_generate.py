"""`bdh generate`: its flags, files of prompts, and what happens when it is interrupted."""

import fcntl
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers.utils import logging

from bdh.cli.main import main
from bdh.cli.prompts import SEED_STRIDE
from bdh.cli.settings import SETTINGS, from_text
from bdh.cli.terminal import visible
from bdh.data.vocabulary import train_tokenizer
from bdh.inference.llm import LLM
from bdh.inference.sampling_params import SamplingParams
from bdh.model.export import save_export
from bdh.model.model_card import model_card
from tests.cli.terminal import Terminal
from tests.conftest import environment
from tests.inference.small import small_model

Generate = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module", autouse=True)
def quiet() -> Iterator[None]:
    """As in a process of its own, where `bdh` says so before the library is loaded."""
    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()


@pytest.fixture
def generate(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Generate:
    """`bdh generate ARGS…` with the tiny model, in this process and the test's folder: exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*argv: object) -> tuple[int, str, str]:
        code = main(["generate", "--model", str(finished_run / "model"), *map(str, argv)])
        sys.stdout.flush()
        return (code, *capfd.readouterr())

    return run


def lines_of(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.split("\n")[:-1]]


# --------------------------------------------------------------------------------------------------------- one prompt


def test_flags_are_the_fields_with_their_defaults() -> None:
    usual = SamplingParams()
    assert set(SamplingParams.__dataclass_fields__) - set(SETTINGS) == set()
    for name, (_, words) in SETTINGS.items():
        if told := re.search(r"\(default (.*)\)", words):
            assert told[1] == str(getattr(usual, name))
        else:
            assert getattr(usual, name) in (None, (), False)


def test_all_settings_arrive(finished_run: Path, generate: Generate) -> None:
    flags = {
        **{"max_new_tokens": 9, "min_new_tokens": 2, "temperature": 0.9, "top_k": 40, "top_p": 0.9, "min_p": 0.01},
        **{"typical_p": 0.95, "repetition_penalty": 1.1, "presence_penalty": 0.1, "frequency_penalty": 0.1},
        **{"stop_token_ids": 7, "logit_bias": '{"101": -5, "32": 1.5}', "logprobs": 1, "n": 2, "best_of": 3, "seed": 5},
    }
    argv = [word for name, value in flags.items() for word in (f"--{name}", value)]
    code, out, err = generate("--prompt", "The ", *argv, "--stop", "a b", "--stop", "zz", "--ignore_eos")
    assert (code, err) == (0, "")
    lists = {"stop_token_ids": (7,), "logit_bias": {101: -5, 32: 1.5}}
    params = SamplingParams(**{**flags, **lists}, stop=("a b", "zz"), ignore_eos=True)  # type: ignore[arg-type]
    choices = LLM(finished_run / "model").generate("The ", params)[0].choices
    shown = re.split(r"---------- \d of 2\n", out)[1:]
    for part, choice in zip(shown, choices, strict=True):
        assert part.startswith(f"The {choice.text}\n") and choice.logprobs is not None
        assert len(re.findall(r'^ +-[0-9.]+  ".+" +".+" -[0-9.]+$', part, re.MULTILINE)) == len(choice.tokens)
        assert f"{choice.logprobs[0].logprob:.4f}  " in part


def test_constraints_and_beams(generate: Generate, tmp_path: Path) -> None:
    assert re.fullmatch(r"x[0-9]{5}\n", generate("--prompt", "x", "--regex", "[0-9]{5}")[1])
    (tmp_path / "schema.json").write_text('{"type": "boolean"}')
    assert generate("--prompt", "x", "--json_schema", "@schema.json")[1] in ("xtrue\n", "xfalse\n")
    assert generate("--prompt", "x", "--json_schema", '{"const": 5}')[1] == "x5\n"
    code, out, _ = generate("--prompt", "The ", "--num_beams", 3, "--n", 2, "--max_new_tokens", 6)
    assert code == 0 and out.count("---------- ") == 2
    code, out, _ = generate("--prompt", "The ", "--max_new_tokens", 3, "--logprobs", 0, "--stream")
    assert code == 0 and len(re.findall(r'^ +-\d+\.\d{4}  ".+"$', out, re.MULTILINE)) == 3


def test_a_terminal_gets_pictures_of_control_characters(finished_run: Path, tmp_path: Path, generate: Generate) -> None:
    prompt = "\x1b[31mThe"
    argv = ["--prompt", prompt, "--max_new_tokens", 400, "--seed", 1, "--stream"]
    terminal = Terminal("generate", "--model", finished_run / "model", *argv, cwd=tmp_path)
    code, shown = terminal.end()
    assert code == 0 and shown.startswith("␛[31mThe")
    assert not {c for c in shown if unicodedata.category(c) == "Cc"} - {"\r", "\n", "\t"}
    text = LLM(finished_run / "model").generate(prompt, SamplingParams(max_new_tokens=400, seed=1))[0].text
    assert shown.replace("\r\n", "\n") == visible(f"{prompt}{text}\n")
    assert any(unicodedata.category(c) == "Cc" for c in text) and prompt in generate(*argv)[1]


def test_settings_from_what_is_typed(tmp_path: Path) -> None:
    (tmp_path / "schema.json").write_text("{}")
    for name, text, value in [
        ("top_k", "3", 3),
        ("temperature", "1e-1", 0.1),
        ("ignore_eos", "true", True),
        ("stop", "END", "END"),
        ("stop", "5", "5"),
        ("stop", '["a", "b"]', ["a", "b"]),
        ("stop", '"\\n"', "\n"),
        ("regex", "[0-9]", "[0-9]"),
        ("regex", "12", "12"),
        ("stop_token_ids", "[1, 2]", [1, 2]),
        ("logit_bias", '{"101": -5, "x": 1}', {101: -5, "x": 1}),
        ("logit_bias", "[" * 10**5, "[" * 10**5),
        ("json_schema", "{}", "{}"),
        ("json_schema", f"@{tmp_path}/schema.json", "{}"),
    ]:
        assert from_text(name, text) == value


# --------------------------------------------------------------------------------------------------- a file of prompts


def test_lines_come_in_order_and_are_what_each_prompt_alone_gives(
    finished_run: Path, generate: Generate, tmp_path: Path
) -> None:
    objects: list[dict[str, Any]] = [
        {"prompt": "The 1 ", "max_new_tokens": 30},
        {"prompt": "Größe\u2028", "n": 2},
        {"messages": [{"role": "user", "content": "hello"}], "temperature": 0, "seed": None},
        {"prompt": "The 1 ", "seed": 7, "logprobs": 1, "stop": "a"},
        {"prompt": "x", "json_schema": {"const": True}},
        {"prompt": "x", "logit_bias": {"101": 100}},
    ]
    (tmp_path / "p.jsonl").write_text("\n\n".join(json.dumps(o) for o in objects))
    code, out, err = generate("--prompts", "p.jsonl", "--seed", 3, "--max_new_tokens", 5)
    assert (code, err) == (0, "")
    llm = LLM(finished_run / "model")
    for index, (line, given) in enumerate(zip(lines_of(out), objects, strict=True)):
        kind = "prompt" if "prompt" in given else "messages"
        assert line["index"] == index and line[kind] == given[kind] and re.fullmatch("[0-9a-f]{16}", line["model"])
        own = {name: value for name, value in given.items() if name != kind and value is not None}
        if "logit_bias" in own:
            own["logit_bias"] = {101: 100}
        params = SamplingParams(**{"max_new_tokens": 5, "seed": 3 + index * SEED_STRIDE, **own})  # type: ignore[arg-type]
        alone = (llm.chat if kind == "messages" else lambda *a: llm.generate(*a)[0])(given[kind], params)  # type: ignore
        assert [c["text"] for c in line["choices"]] == [c.text for c in alone.choices]
        assert [c["tokens"] for c in line["choices"]] == [c.tokens for c in alone.choices]
        assert [c["finish_reason"] for c in line["choices"]] == [c.finish_reason for c in alone.choices]
        assert line["settings"]["seed"] == params.seed
    assert lines_of(out)[3]["choices"][0]["logprobs"][0].keys() == {"token", "logprob", "top"}
    assert "Größe" in out and "logprobs" not in lines_of(out)[0]["choices"][0]
    assert generate("--prompts", "p.jsonl", "--seed", 3, "--max_new_tokens", 5, "--batch_size", 1)[1] == out


def test_an_output_torn_anywhere_is_completed(generate: Generate, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("The 1 \r\n\nThe 2 ä\n  The 3\n" + "x\n")
    argv = ["--prompts", "p.txt", "--seed", 3, "--max_new_tokens", 20, "--n", 2]
    code, out, err = generate(*argv, "--output", "out.jsonl")
    assert (code, out, err) == (0, "out.jsonl has the answers to all 4 prompts\n", "")
    whole = (tmp_path / "out.jsonl").read_bytes()
    assert [line["prompt"] for line in lines_of(whole.decode())] == ["The 1 ", "The 2 ä", "  The 3", "x"]
    assert generate(*argv)[1].encode() == whole
    lines = whole.splitlines(keepends=True)
    second = len(lines[0])
    inside_a_character = whole.index("ä".encode()) + 1
    for size in (0, 5, second - 1, second, second + 10, inside_a_character, second + 300, len(whole) - 1, len(whole)):
        (tmp_path / "out.jsonl").write_bytes(whole[:size])
        code, out, err = generate(*argv, "--output", "out.jsonl")
        assert (code, err) == (0, "") and (tmp_path / "out.jsonl").read_bytes() == whole
        done = whole[:size].count(b"\n")
        assert ("notice: out.jsonl has" in out) == (0 < done < 4)
    with (tmp_path / "p.txt").open("a") as file:
        file.write("y\n")
    assert generate(*argv, "--output", "out.jsonl")[0] == 0  # more prompts: the file goes on
    assert (tmp_path / "out.jsonl").read_bytes().startswith(whole)


def test_an_output_that_is_something_else_is_refused(generate: Generate, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("The 1 \nThe 2 \n")
    (tmp_path / "fewer.txt").write_text("The 1 \n")
    (tmp_path / "other.txt").write_text("The 1 \nThe 3 \n")
    assert generate("--prompts", "p.txt", "--seed", 3, "--max_new_tokens", 5, "--output", "out.jsonl")[0] == 0
    typed = ["--dtype", "float32", "--output", "typed.jsonl"]
    assert generate("--prompts", "p.txt", "--seed", 3, "--max_new_tokens", 5, *typed)[0] == 0
    for name, content in [
        ("thesis", b"years"),
        ("lines", b"one\ntwo\n"),
        ("json", b'{"index": 1}\n'),
        ("bin", b"\xff\0"),
    ]:
        (tmp_path / f"{name}.jsonl").write_bytes(content)
    (tmp_path / "zero.jsonl").symlink_to("/dev/zero")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    same = ["--seed", "3", "--max_new_tokens", "5"]
    cases: list[tuple[list[str], str]] = [
        (["p.txt", "--seed", "3"], 'line 1 has other settings: {"max_new_tokens": 5, "seed": 3}; name another file'),
        (["p.txt", "--seed", "4", "--max_new_tokens", "5"], "line 1 has other settings"),
        (["p.txt", *same, "--dtype", "float32"], "line 1 has other dtype: null"),
        (["p.txt", *same, "--output", "typed.jsonl"], 'line 1 has other dtype: "float32"'),
        (["fewer.txt", *same], "line 2 is one more than there are prompts"),
        (["other.txt", *same], 'line 2 has other prompt: "The 2 "'),
        *((["p.txt", "--output", f"{name}.jsonl"], "is not an answer") for name in ("thesis", "lines", "json", "bin")),
        (["p.txt", "--output", "out.txt"], "--output out.txt must be a file that ends in .jsonl"),
        (["p.txt", "--output", "zero.jsonl"], "--output zero.jsonl must be a file that ends in .jsonl"),
        (["p.txt", "--output", "no/where.jsonl"], "--output no/where.jsonl cannot be written: No such file"),
    ]
    for argv, words in cases:
        output = [] if "--output" in argv else ["--output", "out.jsonl"]
        code, out, err = generate("--prompts", *argv, *output)
        assert (code, out) == (2, "") and words in err and err.count("\n") == 1, err
        assert err.startswith("bdh generate: error: ")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before
    with (tmp_path / "out.jsonl").open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert (
            "out.jsonl is being written by another process"
            in generate("--prompts", "p.txt", "--output", "out.jsonl")[2]
        )


def test_a_full_disk_leaves_what_can_be_gone_on_with(generate: Generate, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("".join(f"The {n} small\n" for n in range(9)))
    argv = ["--prompts", "p.txt", "--seed", 3, "--max_new_tokens", 20, "--output", "out.jsonl"]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        code, out, err = generate(*argv)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (code, out) == (2, "")
    assert err == "bdh generate: error: --output out.jsonl cannot be written: File too large\n"
    torn = (tmp_path / "out.jsonl").read_bytes()
    assert 1 <= torn.count(b"\n") < 9 and not torn.endswith(b"\n")
    assert generate(*argv)[0] == 0
    assert (tmp_path / "out.jsonl").read_bytes().startswith(torn) and len(
        lines_of((tmp_path / "out.jsonl").read_text())
    ) == 9


def test_mistakes_are_one_line(generate: Generate, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("The 1 \n")
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    (tmp_path / "p.csv").write_text("x")
    cases: list[tuple[list[object], str]] = [
        ([], "one of the arguments --prompt --prompts is required"),
        (["--prompt", "x", "--prompts", "p.txt"], "not allowed with argument --prompt"),
        (["--prompt", "x", "--output", "o.jsonl"], "--output is for --prompts"),
        (["--prompts", "p.txt", "--stream"], "--stream is for one --prompt"),
        (["--prompt", "x", "--stream", "--n", 2], "n is 2; --stream shows one text"),
        (["--prompt", "x", "--stream", "--best_of", 2], "best_of is 2"),
        (["--prompt", "x", "--batch_size", 0], "batch_size is 0; it must be at least 1"),
        (["--prompt", "x", "--top_kk", 1], "--top_kk is not an option; did you mean --top_k?"),
        (["--prompt", "x", "--top_p", 2], "top_p is 2.0; it must be above 0 and at most 1"),
        (["--prompt", "x", "--dtype", "int3"], "invalid choice: 'int3'"),
        (["--prompt", "x", "--quantization", "int3"], "invalid choice: 'int3'"),
        (["--prompt", "x", "--regex", "("], "regex"),
        (["--prompt", "x", "--json_schema", "@nowhere"], "nowhere cannot be read: No such file"),
        (["--prompt", "x", "--stop_token_ids", 1, "x"], "element 2 of stop_token_ids is x; it must be a whole number"),
        (["--prompt", "x", "--logit_bias", "{"], "logit_bias is '{'; it must map token ids to numbers"),
        (["--prompt", "x", "--logit_bias", '{"x": 1}'], "logit_bias has the token 'x'; it must be a whole number"),
        (["--prompt", "x", "--logit_bias", '{"256": 1}'], "logit_bias has the token 256"),
        (["--prompt", "x", "--stop_token_ids", 256], "stop_token_ids has the token 256"),
        (["--prompt", "x", "--stop", os.fsdecode(b"caf\xe9")], "stop is not valid text"),
        (["--prompts", "p.txt", "--seed", -1], "seed is -1; it must be at least 0"),
        (["--prompts", "nowhere.txt"], "nowhere.txt cannot be read: No such file"),
        (["--prompts", "."], ". must end in .txt"),
        (["--prompts", "p.csv"], "p.csv must end in .txt (a prompt a line) or .jsonl"),
        (["--prompts", "empty.txt"], "empty.txt holds no prompts"),
        (["--prompts", "latin.txt"], "latin.txt is not UTF-8 text: byte 3"),
    ]
    for argv, words in cases:
        code, out, err = generate(*argv)
        assert (code, out) == (2, "") and words in err and err.count("\n") == 1, (argv, err)


def test_mistakes_in_a_line_name_it(generate: Generate, tmp_path: Path) -> None:
    cases = {
        "{": "it is not JSON",
        "[" * 100_000: "it is not JSON",
        "5": 'it must be a JSON object with either "prompt" or "messages"',
        "{}": "it must be a JSON object",
        '{"prompt": "x", "messages": []}': "it must be a JSON object",
        '{"prompt": 5}': "the prompt must be text",
        '{"prompt": null}': "the prompt must be text",
        '{"prompt": ""}': "the prompt is empty",
        '{"prompt": "\\ud800"}': "there is half of a character in it",
        '{"prompt": "x", "stop": "\\ud800"}': "there is half of a character in it",
        '{"messages": "x"}': "messages must be a list",
        '{"messages": []}': "there are no messages",
        '{"messages": [{"role": "user"}]}': "messages[0] is no message",
        '{"prompt": "x", "max_new_tokns": 5}': "max_new_tokns is not a setting; did you mean max_new_tokens?",
        '{"prompt": "x", "max_new_tokens": "5"}': "max_new_tokens is '5'; it must be a whole number",
        '{"prompt": "x", "top_p": 2}': "top_p is 2; it must be above 0",
        '{"prompt": "x", "regex": "("}': "regex",
        '{"prompt": "x", "logit_bias": {"a": 1}}': "logit_bias has the token 'a'",
        '{"prompt": "x", "logit_bias": {"1": "a"}}': "logit_bias of token 1 is 'a'; it must be a number",
        '{"prompt": "x", "stop_token_ids": [256]}': "stop_token_ids has the token 256",
    }
    for line, words in cases.items():
        (tmp_path / "p.jsonl").write_text(f'{{"prompt": "fine"}}\n\n{line}\n')
        code, out, err = generate("--prompts", "p.jsonl", "--output", "out.jsonl")
        assert (code, out) == (2, "") and err.count("\n") == 1, err
        assert f"p.jsonl line 3: {words}" in err and not (tmp_path / "out.jsonl").exists()


def test_a_prompt_that_cannot_be_answered_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    tokenizer = train_tokenizer("unigram", ['{"a": "ab cd", "b": [1, 2]} '] * 5, 40)
    model = small_model(vocab_size=len(tokenizer))
    save_export(model, tokenizer, tmp_path / "model", model_card("a test", model.config, []))
    properties = {"a": {"type": "string", "maxLength": 9}, "é": {}}  # it has no "é"
    schema = {"type": "object", "properties": properties, "required": ["a", "é"]}
    objects: list[dict[str, Any]] = [{"prompt": "ab"}, {"prompt": "cd", "json_schema": schema}, {"prompt": "ab cd"}]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, objects)))
    argv = ["generate", "--model", "model", "--prompts", "p.jsonl", "--seed", "3", "--max_new_tokens", "99"]
    told = "bdh generate: error: 1 of 3 prompts could not be answered; the lines of these have an error that says why\n"
    assert main([*argv, "--output", "out.jsonl"]) == 2
    assert capfd.readouterr() == ("", told)
    whole = (tmp_path / "out.jsonl").read_bytes()
    lines = lines_of(whole.decode())
    assert ["choices" in line for line in lines] == [True, False, True] and lines[1]["prompt"] == "cd"
    assert "the constrained output cannot go on" in lines[1]["error"]
    for size in (len(whole), whole.index(b'"error"') + 12, whole.index(b'"error"') + 3):
        (tmp_path / "out.jsonl").write_bytes(whole[:size])
        assert main([*argv, "--output", "out.jsonl"]) == 2
        assert capfd.readouterr().err == told and (tmp_path / "out.jsonl").read_bytes() == whole
    assert main(argv) == 2
    assert capfd.readouterr() == (whole.decode(), told)


# -------------------------------------------------------------------------------------------------------- interrupted


@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_run_is_gone_on_with(
    kill: signal.Signals, finished_run: Path, generate: Generate, tmp_path: Path
) -> None:
    (tmp_path / "p.txt").write_text("".join(f"The {n} small\n" for n in range(24)))
    argv = ["--prompts", "p.txt", "--seed", 3, "--max_new_tokens", 300, "--output", "out.jsonl", "--batch_size", 4]
    process = subprocess.Popen(
        [sys.executable, "-m", "bdh", "generate", "--model", str(finished_run / "model"), *map(str, argv)],
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # a suite run with & ignores it
    )
    output = tmp_path / "out.jsonl"
    until = time.monotonic() + 120
    while not output.exists() or output.read_bytes().count(b"\n") < 3:
        assert time.monotonic() < until and process.poll() is None
        time.sleep(0.02)
    process.send_signal(kill)
    _, err = process.communicate(timeout=60)
    torn = output.read_bytes()
    done = torn.count(b"\n")
    assert 3 <= done < 24
    if kill is signal.SIGINT:
        assert process.returncode == 130
        assert err == f"interrupted: out.jsonl has {done} of 24 answers; the same command goes on from there\n"
    code, out, _ = generate(*argv)
    assert code == 0 and out.startswith(f"notice: out.jsonl has {done} of 24 answers; going on from there\n")
    whole = output.read_bytes()
    assert whole.startswith(torn[: torn.rindex(b"\n")])
    output.unlink()
    assert generate(*argv)[0] == 0 and output.read_bytes() == whole


def test_progress_is_shown_on_a_terminal_only(finished_run: Path, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("".join(f"The {n} small\n" for n in range(8)))
    script = f"{sys.executable} -m bdh generate --model {finished_run / 'model'} --prompts p.txt --max_new_tokens 300"
    (tmp_path / "script").write_text(f"exec {script} > lines.jsonl\n")
    terminal = Terminal(tmp_path / "script", cwd=tmp_path, program=["sh"])
    code, shown = terminal.end()
    assert code == 0 and "prompts" in shown and "/8" in shown and "index" not in shown
    assert [line["index"] for line in lines_of((tmp_path / "lines.jsonl").read_text())] == list(range(8))
