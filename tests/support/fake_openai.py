"""A server that answers as OpenAI's does, with given tokens at a given pace: for `serving.py`.

python fake_openai.py PORT [--fail-every N] [--no-usage] [--miscount N]
"""

import argparse
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

parser = argparse.ArgumentParser()
parser.add_argument("port", type=int)
parser.add_argument("--fail-every", type=int, default=0)
parser.add_argument("--no-usage", action="store_true")
parser.add_argument("--miscount", type=int, default=0)
options = parser.parse_args()
#: Seconds before the first token and before each other one.
FIRST_S, NEXT_S = 0.02, 0.002
streams = 0
lock = threading.Lock()


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.whole(200, {"data": [{"id": "fake"}]})

    def do_POST(self):
        global streams
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if body["model"] != "fake":
            self.whole(404, {"error": {"message": "no such model"}})
            return
        messages = body.get("messages")
        prompt = messages[0]["content"][1]["text"] if messages else body["prompt"]
        usage = {
            "prompt_tokens": len(prompt.split()) + options.miscount + (256 if messages else 0),
            "completion_tokens": body["max_tokens"],
        }
        if not body.get("stream"):
            self.whole(200, {"choices": [], "usage": usage})
            return
        with lock:
            streams += 1
            fails = options.fail_every and streams % options.fail_every == 0
        if fails:
            self.whole(503, {"error": {"message": "too busy"}})
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        if messages:
            self.event({"choices": [{"delta": {"role": "assistant", "content": ""}}]})
        for number in range(body["max_tokens"]):
            time.sleep(NEXT_S if number else FIRST_S)
            piece = {"delta": {"content": "a"}} if messages else {"text": "a"}
            self.event({"choices": [{**piece, "finish_reason": None}]})
        last = {"delta": {}} if messages else {"text": ""}
        self.event({"choices": [{**last, "finish_reason": "length"}]})
        if not options.no_usage:
            self.event({"choices": [], "usage": usage})
        self.wfile.write(b"data: [DONE]\n\n")

    def event(self, chunk):
        self.wfile.write(b"data: " + json.dumps(chunk).encode() + b"\n\n")

    def whole(self, status, value):
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(value).encode())

    def log_message(self, *_):
        pass


ThreadingHTTPServer(("127.0.0.1", options.port), Handler).serve_forever()
