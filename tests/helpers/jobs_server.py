"""The Hub of the tests with the routes of its jobs, whose commands run as processes of this machine.

A job is started, listed by labels, followed by its logs as server-sent events, and cancelled. Its command runs in a
folder of its own with the variables and secrets that were submitted, and the image's Python: one that installs
wheels with pip as a container would, and has everything else installed already.
"""

import json
import os
import re
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import parse_qs, urlsplit

from helpers.hub_server import MOMENT, Handler, HubServer, Refusal

ENDED = ("COMPLETED", "CANCELED", "ERROR", "DELETED")
MACHINES = {"cpu-basic": None, "a10g-small": "1", "a10g-largex2": "2"}
_PYTHON = """\
#!/bin/sh
PIP="{python} -m pip install --quiet --no-deps --no-index --no-compile"
if [ "$1 $2" = "-m pip" ]; then
  for word in "$@"; do
    echo "$word" >> "$SITE.pip"
    case "$word" in
      *.whl*) $PIP --target "$SITE" "${{word%%[[]*}}" || exit 1 ;;
    esac
  done
  exit 0
fi
PYTHONPATH="$SITE" exec {python} "$@"
"""


@dataclass
class Job:
    """A job, as it was submitted, and its process.

    Attributes:
        spec: What was submitted; its secrets are those alone who run it ever read.
        folder: Where its process runs.
        lines: What it has printed.
        stage: As the Hub names it.
    """

    id: str
    namespace: str
    spec: dict[str, Any]
    folder: Path
    lines: list[str] = field(default_factory=list)
    stage: str = "RUNNING"
    message: str | None = None
    process: subprocess.Popen[str] | None = None

    def shown(self) -> dict[str, Any]:
        """What the Hub shows of it: names of secrets, never their values."""
        return {
            "id": self.id,
            "createdAt": MOMENT,
            "dockerImage": self.spec.get("dockerImage"),
            "spaceId": self.spec.get("spaceId"),
            "command": self.spec["command"],
            "arguments": self.spec["arguments"],
            "environment": self.spec["environment"],
            "secrets": dict.fromkeys(self.spec.get("secrets", {})),
            "flavor": self.spec["flavor"],
            "labels": self.spec.get("labels"),
            "status": {"stage": self.stage, "message": self.message},
            "owner": {"id": "0", "name": self.namespace, "type": "user"},
        }


class JobsServer(HubServer):
    """The server; a context manager.

    Attributes:
        jobs: All jobs, in order.
        container: Returns the command that runs in place of a job's own; None runs its own.
        folder: In which each job has a folder.
    """

    def __init__(
        self, tokens: dict[str, str], folder: Path, container: Callable[[Job], list[str]] | None = None
    ) -> None:
        super().__init__(tokens)
        self.RequestHandlerClass = JobsHandler
        self.jobs: list[Job] = []
        self.container = container
        self.folder = folder
        image = folder / "image"
        image.mkdir(parents=True)
        (image / "python3").write_text(_PYTHON.format(python=sys.executable))
        (image / "python3").chmod(0o755)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for job in self.jobs:
            self.stop(job, signal.SIGKILL)
        super().__exit__(kind, error, trace)

    def stop(self, job: Job, number: int) -> None:
        """Send a signal to all processes of a job."""
        if job.process is not None and job.process.poll() is None:
            os.killpg(job.process.pid, number)

    def start(self, job: Job) -> None:
        """Run a job's command."""
        job.folder.mkdir(parents=True)
        environment = {
            "PATH": f"{self.folder / 'image'}:{os.environ['PATH']}",
            "HOME": str(job.folder),
            "SITE": str(job.folder / "site"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "TOKENIZERS_PARALLELISM": "false",
        }
        if self.container is not None:
            environment["PYTHONPATH"] = os.environ.get("PYTHONPATH", "")
        job.process = subprocess.Popen(
            job.spec["command"] if self.container is None else self.container(job),
            cwd=job.folder,
            env={**environment, **job.spec["environment"], **job.spec.get("secrets", {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        threading.Thread(target=self._watch, args=(job, job.process), daemon=True).start()
        if "timeoutSeconds" in job.spec:
            timer = threading.Timer(job.spec["timeoutSeconds"], self._time_out, args=(job,))
            timer.daemon = True
            timer.start()

    def _watch(self, job: Job, process: subprocess.Popen[str]) -> None:
        for line in process.stdout or ():
            job.lines.append(line.rstrip("\n"))
        status = process.wait()
        if job.stage == "RUNNING":
            job.message = None if status == 0 else f"Job failed with exit code: {status}"
            job.stage = "COMPLETED" if status == 0 else "ERROR"

    def _time_out(self, job: Job) -> None:
        if job.stage == "RUNNING":
            job.stage, job.message = "ERROR", "Job timeout"
            self.stop(job, signal.SIGTERM)


class JobsHandler(Handler):
    """The routes of the jobs beside those of the Hub."""

    server: JobsServer
    ROUTES = (
        *Handler.ROUTES,
        ("GET", r"/api/jobs/hardware", "hardware"),
        ("GET", r"/api/jobs/(?P<namespace>[\w-]+)", "list_jobs"),
        ("POST", r"/api/jobs/(?P<namespace>[\w-]+)", "run_job"),
        ("GET", r"/api/jobs/(?P<namespace>[\w-]+)/(?P<job_id>\w+)", "inspect_job"),
        ("POST", r"/api/jobs/(?P<namespace>[\w-]+)/(?P<job_id>\w+)/cancel", "cancel_job"),
    )

    def _answer(self, method: str) -> None:
        """Answer a request; logs are streamed while others are answered."""
        found = re.fullmatch(r"/api/jobs/([\w-]+)/(\w+)/logs", urlsplit(self.path).path)
        if found is None:
            return super()._answer(method)
        self.server.requests.append((self.command, self.path, True))
        user = self.server.tokens.get((self.headers.get("Authorization") or "").removeprefix("Bearer "))
        job = next((job for job in self.server.jobs if (job.namespace, job.id) == (found[1], found[2])), None)
        if job is None or user != job.namespace:
            self.send_response(404)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return None
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True
        try:
            self._event("===== Job started at 2025-01-01 00:00:00 =====")
            sent = 0
            while True:
                ended = job.stage in ENDED
                for line in job.lines[sent:]:
                    self._event(line)
                    sent += 1
                if ended:
                    return None
                time.sleep(0.02)
        except (BrokenPipeError, ConnectionResetError):
            return None

    def _event(self, line: str) -> None:
        self.wfile.write(f"data: {json.dumps({'timestamp': MOMENT, 'data': line})}\n\n".encode())
        self.wfile.flush()

    def _own(self, namespace: str) -> None:
        if self.user is None:
            raise Refusal(401, "Invalid username or password.")
        if self.user != namespace:
            raise Refusal(403, f"You don't have the rights to run jobs under {namespace!r}")

    def _job(self, namespace: str, job_id: str) -> Job:
        self._own(namespace)
        for job in self.server.jobs:
            if (job.namespace, job.id) == (namespace, job_id):
                return job
        raise Refusal(404, "Job not found")

    def hardware(self) -> None:
        machines = []
        for name, gpus in MACHINES.items():
            gpu = {"type": "gpu", "model": "A10G", "quantity": gpus, "vram": "24 GB", "manufacturer": "Nvidia"}
            machine = {"name": name, "prettyName": name, "cpu": "4 vCPU", "ram": "15 GB", "accelerator": gpus and gpu}
            machines.append({**machine, "unitCostMicroUSD": 16667, "unitCostUSD": 0.016667, "unitLabel": "minute"})
        self._json(machines)

    def run_job(self, namespace: str) -> None:
        self._own(namespace)
        spec = json.loads(self.body)
        if spec["flavor"] not in MACHINES:
            raise Refusal(400, f"Invalid flavor {spec['flavor']}")
        if not ("dockerImage" in spec) ^ ("spaceId" in spec):
            raise Refusal(400, "one of dockerImage and spaceId is required")
        for texts in (spec.get("labels", {}), spec["environment"], spec.get("secrets", {})):
            if not all(isinstance(text, str) for pair in texts.items() for text in pair):
                raise Refusal(400, "labels, environment and secrets must be texts")
        for pair in spec.get("labels", {}).items():
            if not all(re.fullmatch(r"[A-Za-z0-9_-]{1,100}", text) for text in pair):
                raise Refusal(400, f"Invalid label {pair}")
        job_id = secrets.token_hex(12)
        job = Job(job_id, namespace, spec, self.server.folder / job_id)
        self.server.jobs.append(job)
        self.server.start(job)
        self._json(job.shown())

    def list_jobs(self, namespace: str) -> None:
        self._own(namespace)
        query = parse_qs(urlsplit(self.path).query)
        wanted = dict(label.split("=", 1) for label in query.get("label", []))
        found = [job for job in self.server.jobs if job.namespace == namespace]
        found = [job for job in found if wanted.items() <= (job.spec.get("labels") or {}).items()]
        self._json([job.shown() for job in found if job.stage in query.get("stage", [job.stage])])

    def inspect_job(self, namespace: str, job_id: str) -> None:
        self._json(self._job(namespace, job_id).shown())

    def cancel_job(self, namespace: str, job_id: str) -> None:
        job = self._job(namespace, job_id)
        if job.stage == "RUNNING":
            job.stage = "CANCELED"
            self.server.stop(job, signal.SIGTERM)
        self._json(job.shown())
