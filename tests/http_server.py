"""An HTTP server on this host that stalls, drops, lies and answers with errors, as a test asks."""

import http.server
import threading
import time
import urllib.parse
from collections import Counter


class Server:
    """Serves a folder; `faults` maps a file's name to what goes wrong at its first requests, in order."""

    def __init__(self, folder):
        self.folder, self.faults, self.requests = folder, {}, Counter()
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                server.answer(self)

            def log_message(self, *arguments):
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/data"
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()

    def answer(self, handler):
        name = urllib.parse.unquote(handler.path.removeprefix("/data/"))
        self.requests[name] += 1
        path = self.folder / name
        if not path.is_file():
            handler.send_error(404)
            return
        data = path.read_bytes()
        fault = self.faults[name].pop(0) if self.faults.get(name) else None
        if fault == "error":
            handler.send_error(404)
            return
        body = {
            "drop": data[: len(data) // 2],
            "stall": data[: len(data) // 2],
            "short": data[:-1024],
            "page": b"<html>busy</html>",
            "lie": data[:2000] + bytes(byte ^ 255 for byte in data[2000:2100]) + data[2100:],
        }.get(fault, data)
        length = {"drop": len(data), "stall": len(data), "endless": 10**13}.get(fault, len(body))
        handler.send_response(200)
        handler.send_header("Content-Length", str(length))
        handler.end_headers()
        handler.wfile.write(body)
        if fault == "stall":
            time.sleep(3)
        if fault == "endless":
            try:
                while True:
                    handler.wfile.write(bytes(2**20))
            except OSError:  # the other side has had enough
                pass
