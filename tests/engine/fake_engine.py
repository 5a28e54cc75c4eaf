"""A stand-in for `lmdeploy serve api_server`, run as a process: `fake_engine.py PORT`. The question decides what it does."""

import json
import os
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *words: object) -> None:
        pass

    def do_GET(self) -> None:
        said = json.dumps({"data": [{"id": "fake"}]}).encode() if self.path == "/v1/models" else b""
        self.send_response(200 if said or self.path == "/health" else 404)
        self.send_header("Content-Length", str(len(said)))
        self.end_headers()
        self.wfile.write(said)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.headers["Authorization"] != f"Bearer {os.environ['FAKE_KEY']}":
            self.send_response(401)
            self.end_headers()
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        question = body["messages"][-1]["content"]
        self.tell({"choices": [{"delta": {"content": str(os.getpid())}, "finish_reason": None}]})
        if question == "die":
            time.sleep(0.2)
            os._exit(9)
        self.tell({"choices": [{"delta": {}, "finish_reason": "stop"}]})
        self.tell({"choices": [], "usage": {"prompt_tokens": 4, "completion_tokens": 1}})
        self.wfile.write(b"data: [DONE]\n\n")

    def tell(self, event: object) -> None:
        self.wfile.write(b"data: " + json.dumps(event).encode() + b"\n\n")
        self.wfile.flush()


if __name__ == "__main__":
    print("starting", flush=True)
    if sys.argv[2:] == ["broken"]:
        sys.exit("no graphics card here")
    ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
