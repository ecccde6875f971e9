"""The nginx that deploy/nginx.conf describes, on this machine: other ports, and a folder instead of the system's."""

import os
import re
import shutil
import socket
import subprocess
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

CONF = Path(__file__).parents[2] / "deploy" / "nginx.conf"
NGINX = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin")


def adapted(folder: Path, port: int, replicas: tuple[int, int]) -> Path:
    """The shipped file with this machine's ports and files; nothing else of it is changed."""
    text = CONF.read_text()
    for pattern, instead in (
        (r"listen 8080;", f"listen 127.0.0.1:{port};"),
        (r"server bdh:8000 ", f"server 127.0.0.1:{replicas[0]} "),
        (r"server bdh-2:8000 ", f"server 127.0.0.1:{replicas[1]} "),
        (r"/tmp/", f"{folder}/"),
        (r"/dev/std(err|out)", rf"{folder}/std\1"),
        (r"worker_processes auto;", "worker_processes 2;"),
    ):
        text, count = re.subn(pattern, instead, text)
        assert count, pattern
    path = folder / "nginx.conf"
    path.write_text(text)
    return path


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on."""
    with ExitStack() as stack:
        found = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in found:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in found]


class Nginx:
    """Runs it as long as a `with` block lasts."""

    def __init__(self, folder: Path, port: int, replicas: tuple[int, int]):
        assert NGINX is not None
        self.log = folder / "stdout"
        self.command = [NGINX, "-c", str(adapted(folder, port, replicas)), "-e", str(folder / "stderr"), "-g"]

    def __enter__(self) -> "Nginx":
        own = "user root; " if os.geteuid() == 0 else ""  # or its workers could not write into the folder
        self.process = subprocess.Popen([*self.command, f"{own}daemon off;"])
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.terminate()
        self.process.wait(20)
