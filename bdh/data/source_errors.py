"""One-line messages for the many exceptions of `datasets` and the hub."""

import os
import re
from errno import EACCES, EDQUOT, EFBIG, ENOSPC, ENOTDIR, EPERM, EROFS
from pathlib import Path

from bdh.data.settings import SourceConfig
from bdh.errors import BDHError

UNREACHABLE = {"ConnectionError", "OfflineModeIsEnabled", "TimeoutError", "HfHubHTTPError", "HTTPError"}
UNWRITABLE = {EACCES, EPERM, EROFS, ENOTDIR}
# What the libraries say of a setting, and how we do: {0} is the source, {1} … what the pattern found.
SETTINGS = (
    (
        r"BuilderConfig '([^']+)' not found\. Available: (\[[^\]]*\])",
        "data.config {1} is not a configuration of {0}; there are {2}",
    ),
    (
        r"Couldn't find cache for .* for config '([^']+)' Available configs in the cache: (\[[^\]]*\])",
        "data.config {1} of {0} is not in the cache, and the hub is not asked; there are {2}",
    ),
    (
        r"Config name is missing\..*?available configs: (\[[^\]]*\])",
        "data: {0} has several configurations; choose one with --data.config: {1}",
    ),
    (
        r"Unknown split \"([^\"]+)\"\. Should be one of (\[[^\]]*\])",
        "data.split {1} is not a split of {0}; there are {2}",
    ),
    (r"Instruction \"[^\"]*\" corresponds to no data", "data: {0} has no rows"),
    (r"Bad split: (\S+)\. Available splits: (\[[^\]]*\])", "data.split {1} is not a split of {0}; there are {2}"),
)


def explain(error: BaseException, source: SourceConfig) -> str:
    """One line for an exception of reading `source`: what was wrong, and what to do."""
    chain = causes(error)
    kinds = {kind.__name__ for link in chain for kind in type(link).__mro__}
    text = " ".join(" ".join(str(link) for link in chain).split())
    name = f"data: {source.path}"

    for pattern, words in SETTINGS:
        if match := re.search(pattern, text):
            return words.format(source.path, *(_listed(group) for group in match.groups()))
    full = [link for link in chain if isinstance(link, OSError) and link.errno in (ENOSPC, EFBIG, EDQUOT)]
    if full:
        return f"{name} cannot be prepared in {cache_folder()}: {full[0].strerror}; make room, or set HF_HOME"
    if (problem := cache_problem(chain)) is not None:
        return f"{name} cannot be prepared: {problem}"
    if "Permission denied" in text or "Read-only file system" in text:
        return f"{name} cannot be read or prepared: {reason(chain)}; {cache_folder()} must be writable, or set HF_HOME"
    if "GatedRepoError" in kinds or re.search(r"\bgated dataset\b", text):
        return f"{name} is gated: ask for access on its page on the hub, then log in with: hf auth login"
    if "Dataset scripts are no longer supported" in text:
        return f"{name} needs a script to be read, which is not run; try its copy: --data.revision refs/convert/parquet"
    if "RevisionNotFoundError" in kinds:
        return f"data.revision {source.revision} does not exist for {source.path}"
    if offline() and kinds & UNREACHABLE:
        return f"{name} is not in the cache, and HF_HUB_OFFLINE forbids to fetch it; unset it, or give a local path"
    if kinds & {"DataFilesNotFoundError", "EmptyDatasetError"}:
        return f"{name} holds no files that can be read as text"
    if kinds & {"DatasetNotFoundError", "RepositoryNotFoundError"}:
        return (
            f"{name} is neither a file here nor a dataset on the hub that can be read; check the name, or, if it is "
            "private, log in with: hf auth login"
        )
    if kinds & UNREACHABLE:
        return f"{name} cannot be reached ({reason(chain)}); check the connection, or give a local path"
    return f"{name} cannot be read: {reason(chain)}"


def cache_problem(chain: list[BaseException]) -> str | None:
    """The message for a cache folder of the Hugging Face libraries that cannot be made or written; None for others."""
    from huggingface_hub import constants

    folders = [Path(folder).expanduser().absolute() for folder in (constants.HF_HOME, cache_folder())]
    for link in chain:
        if not isinstance(link, OSError) or not isinstance(link.filename, str):
            continue
        path = Path(link.filename).absolute()
        above = any(folder.is_relative_to(path) for folder in folders)
        inside = any(path.is_relative_to(folder) for folder in folders)
        if above or (inside and link.errno in UNWRITABLE):
            return f"{folders[0]} must be writable ({path}: {link.strerror}), or set HF_HOME to a folder that is"
    return None


def offline() -> bool:
    """Whether the user has forbidden to ask the hub."""
    settings = (os.environ.get(name, "").upper() for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"))
    return any(value in ("1", "ON", "YES", "TRUE") for value in settings)


def causes(error: BaseException) -> list[BaseException]:
    """An exception and those it came from, the outermost first."""
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)
    return chain


def reason(chain: list[BaseException]) -> str:
    """Our own message if there is one, else the innermost that says something, in one line of bounded length."""
    for link in chain:
        if isinstance(link, BDHError):
            return " ".join(str(link).split())
    for link in reversed(chain):
        words = " ".join(str(link).split())
        if words:
            return words[:200]
    return type(chain[0]).__name__


def cache_folder() -> Path:
    """The folder of the cache of `datasets`."""
    from datasets import config

    return Path(config.HF_DATASETS_CACHE)


def _listed(text: str) -> str:
    return ", ".join(re.findall(r"'([^']+)'", text)) if text.startswith("[") else text
