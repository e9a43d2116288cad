"""`kdkernels teacher-serve`: a model's hidden states over HTTP, for runs elsewhere."""

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import torch

from kdkernels.data.tokenizers import vocabulary_hash
from kdkernels.errors import InputError
from kdkernels.teachers.served import Service
from kdkernels.training.models.loading import load_frozen
from kdkernels.training.run.identity import digest, identify

LARGEST = 1 << 28  # bytes of a request


def service(path: str, dtype: str | None = None, attention: str = "auto") -> Service:
    """What answers for the model at `path`, on this machine's accelerator where it has one.

    Args:
        path: directory or hub name of a model with its tokenizer; an adapter's directory is merged into its base.
        dtype: of the weights; bfloat16 on an accelerator by default, else float32.
        attention: as in a recipe.

    Raises:
        InputError: there is no such model.
    """
    accelerated = torch.accelerator.is_available()
    dtype = dtype or ("bfloat16" if accelerated else "float32")
    model, tokenizer = load_frozen(path, "MODEL", dtype, attention)
    device = torch.accelerator.current_accelerator() if accelerated else torch.device("cpu")
    identity = digest([identify({"MODEL": path}), dtype])
    return Service(model.to(device), identity, vocabulary_hash(tokenizer))


@contextmanager
def listening(answering: Service, host: str, port: int) -> Iterator[ThreadingHTTPServer]:
    """A server that answers until the context ends. Raises InputError where the port cannot be had."""

    class Handler(_Handler):
        answer = staticmethod(answering.answer)

    class Listening(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request, address):
            """A client that went away asks again."""

    try:
        http = Listening((host, port), Handler)
    except (OSError, OverflowError) as error:
        raise InputError(f"--host {host} --port {port}: cannot be listened on: {error}") from error
    with http:
        thread = Thread(target=http.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield http
        finally:
            http.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    answer: Callable[[str, bytes], bytes]

    def do_GET(self):
        self._answer(b"")

    def do_POST(self):
        size = self.headers.get("Content-Length", "")
        if size.isdecimal() and int(size) <= LARGEST:
            self._answer(self.rfile.read(int(size)))
        else:
            self.close_connection = True
            self._send(413, f"expected a Content-Length of at most {LARGEST}, got {size!r}".encode())

    def _answer(self, body: bytes) -> None:
        try:
            status, content = 200, self.answer(self.path, body)
        except LookupError as error:
            status, content = 404, str(error).encode()
        except ValueError as error:
            status, content = 400, str(error).encode()
        except Exception as error:  # of any kind: the model's code ran
            traceback.print_exc()
            status, content = 500, f"{type(error).__name__}: {error}".encode()
        self._send(status, content)

    def _send(self, status: int, content: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments):
        pass
