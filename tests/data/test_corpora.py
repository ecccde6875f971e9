"""Corpora: what is on the machine, and what must be downloaded."""

import hashlib
from pathlib import Path

import pytest

from bdh.data import corpora
from bdh.data.corpora import load_corpus
from bdh.errors import BDHError


def test_pydoc_is_english_prose_and_the_same_every_time() -> None:
    text = load_corpus("pydoc")
    assert sum(map(len, text)) > 300_000 and any("The following" in topic for topic in text)
    assert text == load_corpus("pydoc")


def test_stdlib_is_source_without_tests() -> None:
    text = "".join(load_corpus("stdlib"))
    assert len(text) > 5_000_000 and "class OrderedDict" in text
    assert "test_bigmem" not in text.split("class OrderedDict")[0][:1000]
    assert text.count("unittest.main()") < 30


def test_shakespeare_is_downloaded_once_and_checked(
    serve: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, address = serve
    play = b"First Citizen:\nBefore we proceed any further, hear me speak.\n"
    (folder / "input.txt").write_bytes(play)
    monkeypatch.setattr(corpora, "SHAKESPEARE_SHA256", hashlib.sha256(play).hexdigest())
    monkeypatch.setenv("BDH_SHAKESPEARE_URL", f"{address}/input.txt")
    cache = str(tmp_path / "cache")
    assert load_corpus("shakespeare", cache_dir=cache) == [play.decode()]
    (folder / "input.txt").unlink()
    assert load_corpus("shakespeare", cache_dir=cache) == [play.decode()]  # from the cache
    assert [p.name for p in (tmp_path / "cache").iterdir()] == ["tinyshakespeare.txt"]


def test_a_wrong_download_is_not_kept(serve: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, address = serve
    (folder / "input.txt").write_text("a captive portal's login page")
    monkeypatch.setenv("BDH_SHAKESPEARE_URL", f"{address}/input.txt")
    with pytest.raises(BDHError, match="did not return the tinyshakespeare text"):
        load_corpus("shakespeare", cache_dir=str(tmp_path / "cache"))
    assert not (tmp_path / "cache").exists()


def test_offline_names_two_ways_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BDH_SHAKESPEARE_URL", "http://127.0.0.1:9/input.txt")
    with pytest.raises(
        BDHError, match=r"cannot be reached .*put the text at .*tinyshakespeare\.txt by hand, or .*pydoc"
    ):
        load_corpus("shakespeare", cache_dir=str(tmp_path))


def test_a_spoiled_cache_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "tinyshakespeare.txt").write_text("To be")
    with pytest.raises(BDHError, match="wrong checksum"):
        load_corpus("shakespeare", cache_dir=str(tmp_path))
