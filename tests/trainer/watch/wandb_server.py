"""The part of wandb's server that runs and `wandb sync` talk to, on this machine: it keeps what it is sent."""

import gzip
import json
import re
import threading
from collections import defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

KEY = "a" * 40


class WandbServer(ThreadingHTTPServer):
    """`with WandbServer() as server:`; `server.environment()` points wandb at it. `hang` makes it answer nothing."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.runs: dict[str, StoredRun] = {}
        self.lock = threading.Lock()
        """Whoever asks for a run sees all of what one request has brought."""
        self.hang = threading.Event()
        self.tells_rows = True
        self.closed = threading.Event()
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def __exit__(self, *_) -> None:
        self.closed.set()
        self.shutdown()
        self.server_close()

    def environment(self) -> dict[str, str]:
        return {"WANDB_BASE_URL": f"http://127.0.0.1:{self.server_port}", "WANDB_API_KEY": KEY}

    def handle_error(self, request, client_address) -> None:
        """wandb drops connections as it likes."""


class StoredRun:
    """What the server has of one run."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.lines: dict[str, dict[int, str]] = defaultdict(
            dict
        )  # file → offset → line, as the server keeps them
        self.config, self.alerts, self.exit_code, self.preempted = {}, [], None, False

    def file(self, name: str) -> list[dict]:
        return [json.loads(line) for _, line in sorted(self.lines[name].items())]

    @property
    def history(self) -> list[dict]:
        return self.file("wandb-history.jsonl")

    @property
    def steps(self) -> list[int]:
        return [row["step"] for row in self.history if "step" in row]

    @property
    def summary(self) -> dict:
        return self.file("wandb-summary.json")[-1]

    @property
    def system(self) -> list[dict]:
        return self.file("wandb-events.jsonl")

    def values(self) -> dict:
        """The config without wandb's own part."""
        return {key: entry["value"] for key, entry in self.config.items() if key != "_wandb"}

    def metrics(self) -> list[tuple[str, str | None]]:
        """The defined metrics with the metric on their horizontal axis (wandb numbers the fields)."""
        defined = self.config["_wandb"]["value"]["m"]
        names = [metric.get("1", metric.get("2")) for metric in defined]
        return [
            (name, names[m["5"] - 1] if "5" in m else None) for name, m in zip(names, defined, strict=True)
        ]

    def bucket(self) -> dict:
        entity = {"id": "e", "name": "ent"}
        project = {"id": "p", "name": "project", "entity": entity}
        summary = self.lines["wandb-summary.json"]
        return {
            "id": f"id-{self.name}",
            "name": self.name,
            "displayName": "name",
            "description": "",
            "config": json.dumps(self.config),
            "sweepName": None,
            "project": project,
            "summaryMetrics": summary[max(summary)] if summary else "{}",
            "logLineCount": 0,
            "historyLineCount": len(self.lines["wandb-history.jsonl"]),
            "eventsLineCount": len(self.lines["wandb-events.jsonl"]),
            "historyTail": json.dumps([json.dumps(row) for row in self.history[-1:]]),
            "eventsTail": "[]",
            "tags": [],
            "notes": None,
            "wandbConfig": '{"t": 1}',
            "projectId": "1",
            "state": "running",
        }


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self._body()
        if self.path == "/graphql":
            request = json.loads(body)
            with self.server.lock:
                data = self._answer(_operation(request), request.get("variables") or {})
            return self._reply({"data": data})
        if self.path.endswith("/file_stream"):
            with self.server.lock:
                self._stream(self.path.split("/")[-2], json.loads(body))
        return self._reply({"exitcode": None, "limits": {}})

    def do_PUT(self) -> None:
        self._body()
        self._reply({})

    def do_GET(self) -> None:
        self._reply({})

    def _stream(self, name: str, sent: dict) -> None:
        run = self.server.runs[name]
        for file, chunk in (sent.get("files") or {}).items():
            for i, line in enumerate(chunk["content"]):
                run.lines[file][chunk["offset"] + i] = line
        if sent.get("complete"):
            run.exit_code = sent["exitcode"]
        run.preempted |= bool(sent.get("preempting"))

    def _answer(self, operation: str, variables: dict) -> dict:
        runs, name = self.server.runs, variables.get("name")
        if operation == "RunResumeStatus":
            bucket = runs[name].bucket() if name in runs else None
            return {"model": {"id": "p", "name": "p", "entity": {"id": "e", "name": "ent"}, "bucket": bucket}}
        if operation in ("Viewer", "GetDefaultEntity"):
            return {"viewer": {"id": "v", "entity": "ent", "username": "ent"}}
        if operation == "Run":
            return {"project": {"run": runs[name].bucket() if self.server.tells_rows else None}}
        if operation == "UpsertBucket":
            inserted = name not in runs
            run = runs.setdefault(name, StoredRun(name))
            if variables.get("config"):
                run.config = json.loads(variables["config"])
            return {"upsertBucket": {"bucket": run.bucket(), "inserted": inserted}}
        if operation == "CreateRunFiles":
            url = f"http://{self.headers['Host']}/upload/"
            files = [{"name": file, "uploadUrl": url + file} for file in variables["files"]]
            return {"createRunFiles": {"runID": "x", "uploadHeaders": [], "files": files}}
        if operation == "NotifyScriptableRunAlert":
            runs[variables["runName"]].alerts.append([variables[k] for k in ("title", "text", "severity")])
            return {"notifyScriptableRunAlert": {"success": True}}
        return {}

    def _body(self) -> bytes:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        while self.server.hang.is_set() and not self.server.closed.wait(0.1):
            pass
        return gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body

    def _reply(self, content: dict) -> None:
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_) -> None:
        """Nothing on standard error."""


def _operation(request: dict) -> str:
    """The operation's name; wandb's public API gives it in the query alone."""
    return request.get("operationName") or re.search(r"\b(?:query|mutation)\s+(\w+)", request["query"])[1]
