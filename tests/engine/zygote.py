"""Real processes without the seconds that imports take: one process imports everything, and forks the others.

Started as a script it reads requests, a line of JSON each, and answers each with one. `Zygote` is the other end.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


class Zygote:
    """Starts, watches and ends processes that are forked from one with everything imported."""

    def __init__(self) -> None:
        tests = Path(__file__).parents[1]
        paths = [tests.parent, tests, tests / "engine", os.environ.get("PYTHONPATH", "")]
        env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths))}
        self._server = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
        )

    def start(self, function: str, out: Path, **arguments: Any) -> int:
        """Call a function of `jobs.py` in a process of its own, its output in the file `out`; returns its id."""
        return self._ask(start=function, out=str(out), arguments=arguments)

    def wait(self, process: int, seconds: float = 120) -> int:
        """The exit code, or minus the signal that ended it."""
        until = time.monotonic() + seconds
        while (code := self.poll(process)) is None:
            if time.monotonic() > until:
                os.kill(process, signal.SIGKILL)
                raise TimeoutError(f"process {process} ran for more than {seconds} s")
            time.sleep(0.01)
        return code

    def poll(self, process: int) -> int | None:
        """As `wait`; None where it still runs."""
        return self._ask(poll=process)

    def close(self) -> None:
        """End it."""
        self._server.kill()
        self._server.wait()

    def _ask(self, **request: Any) -> Any:
        assert self._server.stdin and self._server.stdout
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline())


def _serve() -> None:
    import jobs

    codes: dict[int, int] = {}
    for line in sys.stdin:
        request = json.loads(line)
        if "start" in request:
            answer: int | None = os.fork()
            if not answer:
                _become(getattr(jobs, request["start"]), request)
        else:
            process = request["poll"]
            if process not in codes:
                found, status = os.waitpid(process, os.WNOHANG)
                if found:
                    codes[process] = os.waitstatus_to_exitcode(status)
            answer = codes.get(process)
        print(json.dumps(answer), flush=True)


def _become(job: Any, request: dict[str, Any]) -> None:
    code = 99
    try:
        os.setpgid(0, 0)
        out = os.open(request["out"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(out, 1)
        os.dup2(out, 2)
        code = job(**request["arguments"]) or 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    _serve()
