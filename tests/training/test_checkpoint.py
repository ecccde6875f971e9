"""Checkpoints on disk: whole or absent, found, rotated, and nothing in them a pickle."""

import json
import os
import random
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from bdh.data.tokenizer import byte_tokenizer
from bdh.errors import BDHError
from bdh.training import checkpoint
from bdh.training.checkpoint import (
    CheckpointStore,
    collect,
    damage,
    find_checkpoint,
    random_state,
    restore_random_state,
)
from bdh.training.config import TrainingConfig
from bdh.training.optimizer import adamw


def make(seed: int) -> tuple[nn.Module, torch.optim.AdamW]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 6, bias=False), nn.Linear(6, 2))
    optimizer = adamw(model.named_parameters(), TrainingConfig())
    model(torch.randn(3, 4)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


BYTES = byte_tokenizer()


def store_with(tmp_path: Path, *steps: int, keep: int = 10, best: dict[int, str] | None = None) -> CheckpointStore:
    store = CheckpointStore(tmp_path / "run" / "checkpoints", keep)
    model, optimizer = make(0)
    for step in steps:
        state: dict[str, Any] = {"best_checkpoint": (best or {}).get(step)}
        store.save(step, collect(model, optimizer), state, BYTES)
    return store


def test_weights_moments_and_random_states_come_back_exactly(tmp_path: Path) -> None:
    model, optimizer = make(1)
    store = CheckpointStore(tmp_path / "checkpoints", 2)
    random.seed(5), np.random.seed(6), torch.manual_seed(7)
    carried = {"synapses.0": torch.randn(2, 3)}
    path = store.save(12, collect(model, optimizer, carried), {"note": [1, 2], "random": random_state()}, BYTES)
    drawn = (random.random(), np.random.rand(), np.random.randn(), torch.rand(3))

    other, other_optimizer = make(2)
    back = {"synapses.0": torch.zeros(2, 3)}
    state = checkpoint.load(path, other, other_optimizer, back)
    restore_random_state(state["random"])
    assert torch.equal(back["synapses.0"], carried["synapses.0"])
    assert len(checkpoint.tokenizer_of(path)) == 256
    assert state["step"] == 12 and state["note"] == [1, 2]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    for a, b in zip(optimizer.state.values(), other_optimizer.state.values(), strict=True):
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    again = (random.random(), np.random.rand(), np.random.randn(), torch.rand(3))
    assert drawn[:3] == again[:3] and torch.equal(drawn[3], again[3])


def test_a_checkpoint_is_safetensors_and_json_only(tmp_path: Path) -> None:
    path = store_with(tmp_path, 3).paths()[0]
    kinds = {file.suffix for file in path.iterdir()}
    assert kinds == {".safetensors", ".json"} and path.name == "checkpoint-0000003"
    assert json.loads((path / "state.json").read_text())["step"] == 3


def test_the_last_k_and_the_best_are_kept(tmp_path: Path) -> None:
    best = "checkpoint-0000002"
    store = store_with(tmp_path, 1, 2, 3, 4, 5, 6, keep=2, best=dict.fromkeys(range(2, 7), best))
    assert [checkpoint.step_of(path) for path in store.paths()] == [2, 5, 6]
    assert (store.directory / "best").readlink() == Path(best)
    assert (store.directory / "latest").readlink() == Path("checkpoint-0000006")
    assert find_checkpoint(tmp_path / "run").name == "checkpoint-0000006"
    assert find_checkpoint(tmp_path / "run", prefer="best").name == best
    assert find_checkpoint(store.directory / "best").name == best


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "a flipped bit": (lambda c: flip_a_bit(next(c.glob("*.safetensors"))), "does not match its checksum"),
    "cut short": (lambda c: os.truncate(next(c.glob("*.safetensors")), 100), "has 100 bytes instead of"),
    "weights gone": (lambda c: next(c.glob("*.safetensors")).unlink(), "is missing"),
    "state gone": (lambda c: (c / "state.json").unlink(), "state.json is missing"),
    "no manifest": (lambda c: (c / "manifest.json").unlink(), r"manifest.json cannot be read \(FileNotFoundError\)"),
    "torn manifest": (lambda c: os.truncate(c / "manifest.json", 9), "manifest.json cannot be read"),
    "empty manifest": (lambda c: (c / "manifest.json").write_text("{}"), "manifest.json is incomplete"),
    "a list": (lambda c: (c / "manifest.json").write_text('["state.json"]'), "manifest.json cannot be read"),
}


@pytest.mark.parametrize("kind", list(DAMAGE))
def test_damage_is_named_and_the_one_before_is_used(tmp_path: Path, kind: str) -> None:
    spoil, message = DAMAGE[kind]
    store = store_with(tmp_path, 1, 2)
    assert damage(store.paths()[1]) is None
    spoil(store.paths()[1])
    path, complaints = store.latest()
    assert path is not None and path.name == "checkpoint-0000001"
    assert len(complaints) == 1 and "checkpoint-0000002 is damaged" in complaints[0]
    with pytest.raises(BDHError, match=f"{message}.*; the newest whole one is .*checkpoint-0000001"):
        find_checkpoint(store.paths()[1])


def test_a_manifest_cannot_point_outside_the_checkpoint(tmp_path: Path) -> None:
    path = store_with(tmp_path, 1).paths()[0]
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["../../secret"] = {"bytes": 1, "sha256": ""}
    (tmp_path / "run" / "secret").write_text("x")
    (path / "manifest.json").write_text(json.dumps(manifest))
    assert damage(path) == "../../secret is missing"


def test_a_half_written_checkpoint_does_not_count(tmp_path: Path) -> None:
    store = store_with(tmp_path, 1)
    (store.directory / ".partial-checkpoint-0000002").mkdir()
    assert [path.name for path in store.paths()] == ["checkpoint-0000001"]
    model, optimizer = make(0)
    store.save(2, collect(model, optimizer), {}, BYTES)
    assert not [p for p in store.directory.iterdir() if p.name.startswith(".")]


def test_a_full_disk_leaves_the_older_ones_and_no_litter(tmp_path: Path) -> None:
    """A real refusal by the operating system: no file of this process may grow beyond 300 bytes."""
    store = store_with(tmp_path, 1)
    model, optimizer = make(0)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            store.save(2, collect(model, optimizer), {}, BYTES)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(p.name for p in store.directory.iterdir()) == ["checkpoint-0000001", "latest"]
    assert store.save(3, collect(model, optimizer), {}, BYTES).name == "checkpoint-0000003"


def test_later_checkpoints_are_set_aside_not_lost(tmp_path: Path) -> None:
    store = store_with(tmp_path, 1, 2, 3)
    moved = store.set_aside_after(1)
    assert [path.name for path in moved] == ["superseded-0-checkpoint-0000002", "superseded-0-checkpoint-0000003"]
    assert [path.name for path in store.paths()] == ["checkpoint-0000001"]
    assert all(damage(path) is None for path in moved)


@pytest.mark.parametrize(
    ("where", "message"),
    [("nowhere", "does not exist"), ("empty", "holds no whole checkpoint"), ("run/x", "does not exist")],
)
def test_where_there_is_no_checkpoint(tmp_path: Path, where: str, message: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(BDHError, match=message):
        find_checkpoint(tmp_path / where)


def test_another_format_is_refused(tmp_path: Path) -> None:
    path = store_with(tmp_path, 1).paths()[0]
    state = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps({**state, "format": 99}))
    with pytest.raises(BDHError, match="has checkpoint format 99; this version of bdh reads up to 2"):
        checkpoint.read_state(path)
