"""A process that asks a job of several hosts, over one connection: the etcd client needs an environment of its own."""

from __future__ import annotations

import json
import subprocess
import threading
from pathlib import Path
from typing import Any

from elastic.errors import JobFailed, SettingsError
from elastic.host.process import module_command
from elastic.launch.sharing import key_of, read_credentials, read_secret
from elastic.settings import agent_environment

Files = tuple[Path | None, ...]


class Asker:
    """Asks the agent that coordinates the job `job`. `files` are etcd's CA, certificate, key and password file, `tls` the hosts'
    certificate, key and CA; None where there is none. Raises SettingsError. Nothing secret is in the arguments of a process."""

    def __init__(self, job: str, etcd: str, secret_file: Path, files: Files, tls: Files) -> None:
        names = ("ca", "cert", "key", "password_file")
        found = read_credentials(*tls)
        self._question: dict[str, Any] = {
            "etcd": etcd,
            "files": {name: str(file.absolute()) for name, file in zip(names, files, strict=True) if file is not None},
            "job": job,
            "secret": key_of(read_secret(secret_file)),
            "credentials": None if found is None else found.to_json(),
        }
        self._lock = threading.Lock()
        command, pipe = module_command("elastic.agent.asking"), subprocess.PIPE
        self._process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, errors="replace", env=agent_environment()
        )

    def __enter__(self) -> Asker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Returns the answer to a request, of any thread. Raises SettingsError if it is refused, or there is no such job; JobFailed without
        an answer."""
        with self._lock:
            line = self._asked(request)
        answer = json.loads(line)
        if "error" in answer:
            raise SettingsError(answer["error"])
        return answer["answer"]

    def _asked(self, request: dict[str, Any]) -> str:
        question, self._question = self._question, {}
        process = self._process
        stdin, stdout, stderr = process.stdin, process.stdout, process.stderr
        if stdin is None or stdout is None or stderr is None:
            raise JobFailed("the connection to the job has ended")
        try:
            stdin.write(json.dumps({**question, "request": request} if question else request) + "\n")
            stdin.flush()
        except BrokenPipeError:
            raise JobFailed("the connection to the job has ended") from None
        line = stdout.readline()
        if not line:
            raise JobFailed(stderr.read().strip() or "the connection to the job has ended")
        return line

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.communicate()
