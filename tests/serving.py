"""An HTTP server on this machine that runs while a test needs it."""

import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = tuple[int, dict[str, str], bytes]


@contextmanager
def serving(answer: Callable[[str], Answer], sent: Callable[[str, int], object]) -> Iterator[str]:
    """Run a server and yield its address.

    Args:
        answer: function that takes a path and returns the status, the headers and the complete body. The server sends
            only a range of the body if a client requests one.
        sent: function that the server calls with the path and the number of bytes that it has sent.
    """

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

        def do_HEAD(self) -> None:
            self.reply(with_body=False)

        def do_GET(self) -> None:
            self.reply(with_body=True)

        def reply(self, with_body: bool) -> None:
            path = self.path.partition("?")[0]
            status, headers, body = answer(path)
            if status == 200 and (range_ := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))):
                status, body = 206, body[int(range_[1]) : int(range_[2]) + 1]
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body)), "Accept-Ranges": "bytes"}.items():
                self.send_header(name, value)
            self.end_headers()
            if with_body:
                self.wfile.write(body)
                sent(path, len(body))

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
