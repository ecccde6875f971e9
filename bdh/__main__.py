"""`python -m bdh` is `bdh`."""

from bdh.cli.main import entry

entry()
