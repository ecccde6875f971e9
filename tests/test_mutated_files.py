"""Files that a user can hold, changed at random: each is read as it is, or refused in one line; never a traceback."""

import copy
import json
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from bdh.cli import train
from bdh.errors import BDHError
from bdh.inference.llm import LLM
from bdh.inference.sampling_params import SamplingParams
from bdh.inference.state_file import checksum
from bdh.model.export import save_export
from bdh.model.published import convert, to_published
from bdh.training.checkpoint import _fingerprint, find_checkpoint, tokenizer_of
from bdh.training.config import validate
from bdh.training.export import describe, export_checkpoint, load_any
from tests.inference.small import CHAT, small_model

SEED = 20
VALUES: list[Any] = [
    *(None, True, -1, 0, 1, 3, 10**9, 2**63, 10**400, -0.5, float("nan"), float("inf"), 1e-320),
    *("", "x", "</s>", [], [None], [1, "x"], {}, {"a": 1}, [[[]]], "\ud800", "é" * 50),
]


def refused_or_read(read: Callable[[], object]) -> str | None:
    """Why a file is refused, None if it is read. Fails for any exception that is not a user's error in one line."""
    try:
        read()
    except BDHError as error:
        text = str(error)
        assert text and len(text) < 700 and "Traceback" not in text and "ignore_mismatched_sizes" not in text
        assert "\n" not in text, text
        return text
    return None


def use(folder: Path) -> None:
    """Loads an export, and writes with it."""
    llm = LLM(folder, device="cpu", max_batch_size=1)
    llm.generate("a", SamplingParams(max_new_tokens=1))


def mutate_bytes(path: Path, chance: random.Random) -> None:
    data = bytearray(path.read_bytes())
    match chance.randrange(4):
        case 0:
            del data[chance.randrange(len(data)) :]
        case 1:
            data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        case 2:
            data[: chance.randrange(1, 64)] = chance.randbytes(8)
        case 3:
            start = chance.randrange(len(data))
            data[start : start + 8] = chance.randbytes(8)
    path.write_bytes(data)


def mutate_json(value: Any, chance: random.Random) -> Any:
    """A copy with one value replaced, removed or added."""
    value = copy.deepcopy(value)
    holders: list[Any] = []

    def find(part: Any) -> None:
        if isinstance(part, dict | list) and part:
            holders.append(part)
            for one in part.values() if isinstance(part, dict) else part[:20]:
                find(one)

    find(value)
    if not holders or chance.random() < 0.05:
        return chance.choice(VALUES)
    holder = holders[0] if chance.random() < 0.4 else chance.choice(holders)
    key = chance.choice(list(holder)) if isinstance(holder, dict) else chance.randrange(len(holder))
    if chance.random() < 0.15:
        del holder[key]
    else:
        holder[key] = chance.choice(VALUES)
    return value


def mutate_header(path: Path, chance: random.Random) -> None:
    """Changes what a safetensors file says about its tensors."""
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    name = chance.choice([name for name in header if name != "__metadata__"])
    match chance.randrange(4):
        case 0:
            header[name]["dtype"] = chance.choice(["F8_E4M3", "I32", "U8", "F16", "BF16", "BOOL", "X"])
        case 1:
            header[name]["shape"] = chance.choice([[], [1], [10**9, 10**9], header[name]["shape"][::-1], [0]])
        case 2:
            header[name + "x"] = header.pop(name)
        case 3:
            header = mutate_json(header, chance)
    changed = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(changed)) + changed + data[8 + size :])


def mutate_numbers(path: Path, chance: random.Random) -> None:
    """Changes a number, a type or a shape of a tensor, all else being as it should."""
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    name = chance.choice(sorted(tensors))
    tensor = tensors[name].clone()
    match chance.randrange(4):
        case 0 if tensor.is_floating_point():
            tensor.view(-1)[chance.randrange(tensor.numel())] = chance.choice([float("nan"), float("inf"), -1e30])
        case 1:
            tensor = tensor.to(chance.choice([torch.float8_e4m3fn, torch.int8, torch.float64, torch.bool]))
        case 2:
            tensor = tensor[:-1].clone() if tensor.dim() else tensor
        case _:
            tensor = tensor.reshape(-1).clone()
    save_file({**tensors, name: tensor}, path, metadata)


def mutate(folder: Path, chance: random.Random) -> str:
    """Changes one file of a folder; its name."""
    names = sorted(path.name for path in folder.iterdir() if path.suffix in (".json", ".safetensors", ".jinja"))
    path = folder / chance.choice([name for name in names if name != "manifest.json"])
    if path.suffix == ".safetensors":
        chance.choice([mutate_bytes, mutate_header, mutate_numbers])(path, chance)
    elif path.suffix == ".json" and chance.random() < 0.85:
        path.write_text(json.dumps(mutate_json(json.loads(path.read_text()), chance)), encoding="utf-8")
    else:
        mutate_bytes(path, chance)
    return path.name


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mutated") / "tiny"
    save_export(small_model(vocab_size=262), CHAT, folder, "A tiny model for tests.\n")
    return folder


@pytest.mark.parametrize("block", range(4))
def test_exports(export: Path, tmp_path: Path, block: int) -> None:
    chance = random.Random(SEED + block)
    refused = 0
    for number in range(80):
        folder = tmp_path / "export"
        shutil.copytree(export, folder)
        name = mutate(folder, chance)
        try:
            refused += refused_or_read(lambda: use(folder)) is not None
        except Exception as error:
            raise AssertionError(f"block {block}, change {number}, of {name}: {error!r}") from error
        shutil.rmtree(folder)
    assert refused > 5


def test_published_files(tmp_path: Path) -> None:
    chance = random.Random(SEED)
    tensors = to_published(small_model(vocab_size=256))
    metadata = {"config": json.dumps({"n_layer": 2, "n_embd": 16, "dropout": 0.1, "rope_theta": 65536.0})}
    name, target = tmp_path / "source.safetensors", tmp_path / "export"
    refused = 0
    for number in range(60):
        save_file(tensors, name, metadata)
        match number % 4:
            case 0:
                mutate_bytes(name, chance)
            case 1:
                mutate_header(name, chance)
            case 2:
                mutate_numbers(name, chance)
            case 3:
                changed = mutate_json(json.loads(metadata["config"]), chance)
                save_file(tensors, name, {"config": json.dumps(changed)})
        refused += refused_or_read(lambda: convert(name, target, {})) is not None
        shutil.rmtree(target, ignore_errors=True)
    assert refused > 20


def pickled(path: Path, chance: random.Random) -> None:
    tensors = to_published(small_model(vocab_size=256))
    torch.save(tensors, path)
    mutate_bytes(path, chance)


ODD_PICKLES: dict[str, Callable[[dict[str, torch.Tensor]], Any]] = {
    "a list": lambda tensors: list(tensors.values()),
    "a number": lambda tensors: 3,
    "nothing": lambda tensors: {},
    "text": lambda tensors: dict.fromkeys(tensors, "x"),
    "no phases": lambda tensors: {**tensors, "attn.freqs": torch.zeros(0)},
    "phases that are NaN": lambda tensors: {**tensors, "attn.freqs": torch.full((1, 1, 1, 64), float("nan"))},
    "phases that are denormal": lambda tensors: {**tensors, "attn.freqs": torch.full((1, 1, 1, 64), 1e-44)},
    "whole phases": lambda tensors: {**tensors, "attn.freqs": torch.ones(1, 1, 1, 64, dtype=torch.int64)},
    "meta": lambda tensors: {name: tensor.to("meta") for name, tensor in tensors.items()},
    "float8": lambda tensors: {name: tensor.to(torch.float8_e4m3fn) for name, tensor in tensors.items()},
    "complex": lambda tensors: {name: tensor.to(torch.complex64) for name, tensor in tensors.items()},
    "no dimensions": lambda tensors: {name: torch.zeros(()) for name in tensors},
    "NaN": lambda tensors: {**tensors, "decoder": tensors["decoder"] * float("nan")},
    "infinity": lambda tensors: {**tensors, "lm_head": tensors["lm_head"] + float("inf")},
    "numbers as names": lambda tensors: {**tensors, 3: torch.zeros(1)},
    "odd settings": lambda tensors: {"model": tensors, "config": {"n_layer": 10**9, "dropout": 10**400}},
    "odd settings of another kind": lambda tensors: {"model": tensors, "config": ["x"]},
}


@pytest.mark.parametrize("kind", ODD_PICKLES)
def test_pickles_of_something_else(tmp_path: Path, kind: str) -> None:
    torch.save(ODD_PICKLES[kind](to_published(small_model(vocab_size=256))), tmp_path / "source.pt")
    reason = refused_or_read(lambda: convert(tmp_path / "source.pt", tmp_path / "export", {}))
    readable = ("no phases", "phases", "whole phases", "numbers as names", "odd settings of another kind")
    assert (reason is None) == kind.startswith(readable), reason


def test_files_that_are_no_pickles(tmp_path: Path) -> None:
    chance = random.Random(SEED)
    name = tmp_path / "source.pt"
    texts = [b"", b"hello\n", b"cos\nsystem\n(S'true'\ntR.", b"PK\x03\x04", b"\x80\x02.", b"{}", b"(dp0\n."]
    for data in texts:
        name.write_bytes(data)
        assert refused_or_read(lambda: convert(name, tmp_path / "export", {})) is not None, data
    for _ in range(20):
        pickled(name, chance)
        refused_or_read(lambda: convert(name, tmp_path / "export", {}))
        shutil.rmtree(tmp_path / "export", ignore_errors=True)


def seal(folder: Path) -> None:
    """Makes a checkpoint's manifest agree with its files, as somebody who changed them would."""
    files = [path for path in sorted(folder.iterdir()) if path.name != "manifest.json"]
    (folder / "manifest.json").write_text(json.dumps({path.name: _fingerprint(path) for path in files}))


@pytest.mark.parametrize("sealed", [True, False])
def test_checkpoints(finished_run: Path, tmp_path: Path, sealed: bool) -> None:
    chance = random.Random(SEED + sealed)
    source = find_checkpoint(finished_run)
    refused = 0
    for number in range(80 if sealed else 5):
        folder = tmp_path / "checkpoints" / source.name
        shutil.copytree(source, folder)
        name = mutate(folder, chance)
        if sealed:
            seal(folder)

        def read() -> None:
            path = find_checkpoint(folder)
            describe(path)
            tokenizer_of(path)
            load_any(path)
            export_checkpoint(path, tmp_path / "export")

        try:
            refused += refused_or_read(read) is not None
        except Exception as error:
            raise AssertionError(f"change {number}, of {name}: {error!r}") from error
        shutil.rmtree(tmp_path / "checkpoints")
        shutil.rmtree(tmp_path / "export", ignore_errors=True)
    assert refused > (10 if sealed else 4)


def test_settings_of_checkpoints(finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings of wrong types or names in a checkpoint with right checksums, read by `bdh train --resume`."""
    chance = random.Random(SEED)
    folder = tmp_path / "checkpoints" / find_checkpoint(finished_run).name
    shutil.copytree(find_checkpoint(finished_run), folder)
    original = json.loads((folder / "state.json").read_text())
    monkeypatch.setattr("bdh.cli.train.finish", lambda config, checkpoint: validate(config))
    refused = 0
    for number in range(100):
        config = original["config"]
        if number % 2:
            config = mutate_json(config, chance)
        else:  # one setting, of any section
            section = chance.choice([name for name, value in config.items() if isinstance(value, dict)])
            name = chance.choice(sorted(config[section]))
            config = {**config, section: {**config[section], name: chance.choice(VALUES)}}
        (folder / "state.json").write_text(json.dumps({**original, "config": config}), encoding="utf-8")
        seal(folder)
        try:
            refused += refused_or_read(lambda: train.run(["--resume", str(folder)])) is not None
        except Exception as error:
            raise AssertionError(f"change {number}, {config}: {error!r}") from error
    assert refused > 50


@pytest.mark.parametrize("sealed", [True, False])
def test_sessions(export: Path, tmp_path: Path, sealed: bool) -> None:
    chance = random.Random(SEED + sealed)
    llm = LLM(export, device="cpu", max_batch_size=1)
    session = llm.session("Be kind.")
    list(session.send("Hi", SamplingParams(max_new_tokens=3)))
    saved, changed = tmp_path / "saved.safetensors", tmp_path / "changed.safetensors"
    session.save(saved)
    tensors = load_file(saved)
    with safe_open(saved, "pt") as file:
        original = dict(file.metadata())
    refused = 0
    for number in range(60):
        shutil.copy(saved, changed)
        if not sealed:
            chance.choice([mutate_bytes, mutate_header])(changed, chance)
        else:
            metadata = {name: text for name, text in original.items() if name != "sha256"}
            parts = {name: tensor.clone() for name, tensor in tensors.items()}
            if number % 3 == 0:
                name = chance.choice(sorted(metadata))
                metadata[name] = chance.choice(["", "x", "-1", "1e9", "[]", "{}", str(10**30)])
            elif number % 3 == 1:
                metadata["session"] = json.dumps(mutate_json(json.loads(metadata["session"]), chance))
            else:
                name = chance.choice(sorted(parts))
                parts[name] = chance.choice([parts[name][:0], parts[name].to(torch.int8), parts[name] * -7 + 1])
            save_file(parts, changed, {**metadata, "sha256": checksum(parts, metadata)})

        def read() -> None:
            again = llm.load_session(changed)
            list(again.send("And?", SamplingParams(max_new_tokens=1)))

        try:
            refused += refused_or_read(read) is not None
        except Exception as error:
            raise AssertionError(f"change {number}: {error!r}") from error
    assert refused > 20
