"""Corpora: what is on the machine, what must be downloaded, and any file or folder."""

import hashlib
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from bdh.data import corpora
from bdh.data.corpora import load_corpus
from bdh.errors import BDHError


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A real HTTP server on the loopback over a folder; yields the folder and its address."""
    folder = tmp_path / "served"
    folder.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args: object, **kwargs: object) -> None:
            super().__init__(*args, directory=str(folder), **kwargs)  # type: ignore[arg-type]

        def log_message(self, format: str, *args: object) -> None:
            return None

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield folder, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_pydoc_is_english_prose_and_the_same_every_time() -> None:
    text = load_corpus("pydoc").text
    assert len(text) > 300_000 and "The following" in text
    assert text == load_corpus("pydoc").text


def test_stdlib_is_source_without_tests() -> None:
    text = load_corpus("stdlib").text
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
    assert load_corpus("shakespeare", cache_dir=cache).text == play.decode()
    (folder / "input.txt").unlink()
    assert load_corpus("shakespeare", cache_dir=cache).text == play.decode()  # from the cache
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


def test_a_file_is_read_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "a.weird").write_bytes("line\r\nünïcode\0".encode())
    assert load_corpus("pydoc", str(tmp_path / "a.weird")).text == "line\r\nünïcode\0"


def test_a_folder_is_its_text_files_in_order(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name, text in {
        "b.txt": "second",
        "a.md": "first",
        "sub/c.py": "third",
        "image.png": "\0",
        "empty.txt": "",
    }.items():
        (tmp_path / name).write_text(text)
    assert load_corpus("pydoc", str(tmp_path)).text == "first\n\nsecond\n\nthird"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("nothing.txt", None, "does not exist"),
        ("empty.txt", b"", "is empty"),
        ("latin.txt", b"caf\xe9 au lait", "is not UTF-8 text: byte 3 is 0xe9"),
    ],
)
def test_what_is_no_text_is_refused(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(BDHError, match=message):
        load_corpus("pydoc", str(tmp_path / name))


def test_a_folder_without_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"x")
    with pytest.raises(BDHError, match=r"holds no text; looked for files ending in .*\.txt"):
        load_corpus("pydoc", str(tmp_path))
