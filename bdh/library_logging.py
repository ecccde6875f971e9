"""Log levels of the libraries that bdh uses."""

import logging
import os


def quiet_libraries() -> None:
    """Suppresses the remarks of libraries about themselves, and the progress bars of huggingface_hub."""
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
