"""What tests of the server share: a tiny export, and one server that all may use."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from bdh.model.export import save_export
from tests.inference.small import CHAT, small_model
from tests.serving.guarded import Guarded, guarded_server
from tests.serving.running import Running, running


@pytest.fixture(scope="session")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with bytes, special tokens and a chat template, untrained."""
    folder = tmp_path_factory.mktemp("export") / "tiny"
    save_export(small_model(vocab_size=262), CHAT, folder, "A tiny model for tests.\n")
    return folder


@pytest.fixture(scope="session")
def server(export: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server of that model without keys or limits, as `bdh serve --model tiny=DIR` starts it. Leave it as it was."""
    folder = tmp_path_factory.mktemp("server")
    with running(folder, "--model", f"tiny={export}", "--serve.sessions.folder", folder / "sessions") as it:
        yield it


@pytest.fixture(scope="session")
def gated_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server of a model whose first head decays and whose tokens write by the delta rule. Leave it as it was."""
    folder = tmp_path_factory.mktemp("gated")
    model = small_model(vocab_size=262, decay="gated", decay_half_lives=[16, None], write="delta")
    save_export(model, CHAT, folder / "tiny", "A tiny model for tests.\n")
    with running(folder, "--model", f"tiny={folder / 'tiny'}") as it:
        yield it


@pytest.fixture(scope="session")
def guarded(export: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    """A server of that model with keys and small limits. Leave it as it was."""
    with guarded_server(export, tmp_path_factory.mktemp("guarded")) as it:
        yield it
