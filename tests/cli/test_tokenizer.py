"""`bdh tokenizer`: from text to a folder that anyone opens, and through training to an export."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

from bdh.cli.main import main
from bdh.data.encoding import Encoder
from bdh.data.tokenizer import load_tokenizer
from tests.conftest import TEXT, TINY, Run, environment

WITHOUT_BDH = """
import json, sys
sys.modules["bdh"] = None  # as if it were not installed
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
talk = [{"role": "user", "content": "Who hatches?"}, {"role": "assistant", "content": "A dragon."}]
print()  # the library may have asked about the model's code, and left the line open
print(json.dumps({
    "ids": [tokenizer(text).input_ids for text in json.loads(sys.argv[2])],
    "chat": tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True),
    "special": [tokenizer.eos_token, tokenizer.bos_token, tokenizer.pad_token, tokenizer.unk_token],
}))
"""

TEXTS = ["The 7 small dragons hatch.", "", "é 🐉 שלום\r\n\t", "<|endoftext|> and <|im_start|>"]


def opened_elsewhere(folder: Path) -> dict[str, object]:
    """What `AutoTokenizer` makes of a folder in a process without bdh, its stdin closed."""
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_BDH, str(folder), json.dumps(TEXTS)],
        cwd=folder.parent, env=environment(), capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("kind", ["bpe", "wordpiece", "unigram", "bytes"])
def test_train_info_encode_decode(tmp_path: Path, bdh: Run, kind: str) -> None:
    lines = [json.dumps({"text": line}) for line in TEXT.splitlines()]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    done = bdh("tokenizer", "train", "--kind", kind, "--vocab_size", 400, "--output", "tok", "--data.path", "a.jsonl")
    assert done.returncode == 0, done.stderr
    assert f"tok is a {kind} tokenizer of " in done.stdout
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} <= {
        p.name for p in tmp_path.glob("tok/*")
    }

    info = json.loads(bdh("tokenizer", "info", "tok", "--data.path", "a.jsonl", "--json").stdout)
    assert info["end_of_text"] == "<|endoftext|>" and len(info["special_tokens"]) == 6 and info["chat_template"]
    assert info["bytes_per_token"] == pytest.approx(info["text_bytes"] / info["text_tokens"])
    assert info["text_bytes"] == sum(len(line.encode()) for line in TEXT.splitlines())
    assert info["bytes_per_token"] > {"bytes": 0.9, "unigram": 1.05}.get(kind, 1.5)

    if kind == "bpe":
        text = "The 12 small dragons hatch"
        ids = bdh("tokenizer", "encode", "tok", text).stdout.split()
        assert bdh("tokenizer", "decode", "tok", *ids).stdout == text + "\n"
        assert bdh("tokenizer", "decode", "tok", input=" ".join(ids)).stdout == text + "\n"


def test_what_is_spelled_is_not_meant_unless_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)

    def said(*argv: str) -> str:
        assert main(["tokenizer", *argv]) == 0
        return capsys.readouterr().out

    said("train", "--kind", "bytes", "--output", "tok")
    assert said("encode", "tok", "a<|endoftext|>") == " ".join(map(str, b"a<|endoftext|>")) + "\n"
    assert said("encode", "tok", "a<|endoftext|>", "--special") == "97 255\n"
    assert said("decode", "tok", "97", "255") == "a<|endoftext|>\n"
    assert said("encode", "tok", "--special", "a<|endoftext|>") == "97 255\n"
    assert (
        said("decode", "tok", "97", "255", "--skip_special") == said("decode", "tok", "--skip_special", "97") == "a\n"
    )
    assert said("encode", "tok", "é", "--tokens") == '"Ã" "©"\n'
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("é\nab\n".encode())))
    assert said("encode", "bytes").splitlines() == ["195 169 10", "97 98 10"]


def test_decode_never_shows_half_a_character(bdh: Run, tmp_path: Path) -> None:
    """Fed id by id through a pipe, every prefix of what it prints is text."""
    process = subprocess.Popen(
        [sys.executable, "-m", "bdh", "tokenizer", "decode", "bytes"],
        cwd=tmp_path, env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    output, _ = process.communicate(" ".join(map(str, "é 🐉 ש".encode())).encode(), timeout=60)
    assert output.decode() == "é 🐉 ש\n"


def test_a_vocabulary_from_training_to_the_export(tmp_path: Path, bdh: Run) -> None:
    lines = [json.dumps({"text": line, "id": n}) for n, line in enumerate(TEXT.splitlines())]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    bdh("tokenizer", "train", "--vocab_size", 500, "--output", "tok", "--data.path", "a.jsonl")
    done = bdh("train", "--data.path", "a.jsonl", "--data.tokenizer", "tok", "--run_dir", "run", *TINY)
    assert done.returncode == 0, done.stderr
    assert "bits per byte" in done.stdout
    (tmp_path / "tok").rename(tmp_path / "moved")  # a run keeps its own
    done = bdh("train", "--resume", "run", "--training.max_steps", 45)
    assert done.returncode == 0 and "the text is" not in done.stdout, done.stdout + done.stderr

    for folder in ("moved", "run/model"):
        seen = opened_elsewhere(tmp_path / folder)
        tokenizer = load_tokenizer(str(tmp_path / folder))
        assert seen["ids"] == [tokenizer.encode(text) for text in TEXTS]
        assert seen["ids"][:3] == [ids.tolist() for ids in Encoder(tokenizer)(TEXTS[:3])]
        assert seen["special"] == ["<|endoftext|>", "<|startoftext|>", "<|pad|>", "<|unk|>"]
        assert seen["chat"] == (
            "<|im_start|>user\nWho hatches?<|im_end|>\n<|im_start|>assistant\nA dragon.<|im_end|>\n"
            "<|im_start|>assistant\n"
        )
    done = bdh("generate", "--model", "run/model", "--prompt", "The ", "--max_new_tokens", 12, "--seed", 1)
    assert done.returncode == 0 and done.stdout.startswith("The "), done.stderr
    streamed = bdh(
        "generate", "--model", "run/model", "--prompt", "The ", "--max_new_tokens", 12, "--seed", 1, "--stream"
    )
    assert streamed.stdout == done.stdout
    done = bdh(
        "eval", "--model", "run/model", "--data.path", "a.jsonl", "--data.block_size", 16, "--carry_state", "--json"
    )
    assert json.loads(done.stdout)["perplexity_per_byte"] == pytest.approx(
        2 ** json.loads(done.stdout)["bits_per_byte"]
    )
