"""A hub on this machine: answers huggingface_hub over HTTP and keeps what is committed."""

from __future__ import annotations

import base64
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class StandInHub:
    """Repositories as dictionaries of files, with the log of their commits.

    ``refuse`` makes commits fail with this status; ``hold`` lets commits wait until it is set.
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.commits: list[dict[str, Any]] = []
        self.created: list[dict[str, Any]] = []
        self.tokens: list[str | None] = []
        self.refuse: int | None = None
        self.hold = threading.Event()
        self.hold.set()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args: Any) -> None:
                pass

            def answer(self, content: Any, status: int = 200) -> None:
                body = json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def do_GET(self) -> None:
                place = re.fullmatch(r"/api/models/[^/]+/[^/]+/tree/[^/]+/?([^?]*)\??.*", self.path)
                if place is None:
                    return self.answer({"error": self.path}, 404)
                found = [name for name in hub.files if name.startswith(place[1])]
                return self.answer([{"type": "file", "path": n, "size": 1, "oid": "0" * 40} for n in found])

            def do_POST(self) -> None:
                hub.tokens.append(self.headers.get("Authorization"))
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if self.path == "/api/repos/create":
                    hub.created.append(json.loads(body))
                    name = hub.created[-1]["name"]
                    return self.answer({"url": f"{hub.endpoint}/me/{name}", "name": f"me/{name}"})
                if self.path == "/api/validate-yaml":
                    return self.answer({"errors": [], "warnings": []})
                if "/preupload/" in self.path:
                    wanted = json.loads(body)["files"]
                    ways = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in wanted]
                    return self.answer({"files": ways})
                hub.hold.wait(30)
                if hub.refuse is not None:
                    return self.answer({"error": "refused"}, hub.refuse)
                hub.commit(self.path.rpartition("/")[2], body)
                return self.answer(
                    {"commitUrl": f"https://huggingface.co/me/x/commit/{'a' * 40}", "commitOid": "a" * 40}
                )

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"
        # How long `shutdown` waits at most.
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,))
        self.thread.start()

    def commit(self, branch: str, body: bytes) -> None:
        entry: dict[str, Any] = {"branch": branch, "added": [], "deleted": []}
        for line in body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                entry["message"] = value["summary"]
            elif item["key"] == "file":
                self.files[value["path"]] = base64.b64decode(value["content"])
                entry["added"].append(value["path"])
            elif item["key"] == "deletedFile":
                del self.files[value["path"]]
                entry["deleted"].append(value["path"])
        self.commits.append(entry)

    def close(self) -> None:
        self.hold.set()
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()
