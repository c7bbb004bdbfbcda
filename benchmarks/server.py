"""A real `gearshift serve` process for measurements, on free ports, with its CPU time."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

READY = re.compile(r"ready: gRPC on (\S+), HTTP on (\S+)")


@dataclass(frozen=True, slots=True)
class Serving:
    """Where the server listens, and its process."""

    grpc: str
    http: str
    pid: int

    def cpu_s(self) -> float:
        """CPU seconds the server has used so far."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def serving(repository: Path, flags: Sequence[str] = ()) -> Iterator[Serving]:
    """Start a server, wait until it is ready, stop it with SIGTERM."""
    command = [sys.executable, "-m", "server", "serve", "--models", str(repository), "--grpc-port", "0"]
    command += ["--http-port", "0", "--log-format", "console", *flags]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        seen = []
        for line in process.stderr:
            seen.append(line)
            if ready := READY.search(line):
                break
        else:
            raise RuntimeError("the server did not start:\n" + "".join(seen))
        yield Serving(ready[1], ready[2], process.pid)
    finally:
        process.terminate()
        process.communicate(timeout=60)
