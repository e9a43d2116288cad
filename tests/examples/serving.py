"""A server that answers as vLLM's does where it is asked for the log-probabilities of texts."""

import json
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import torch


def answer(teacher, entries, listed, body):
    """vLLM's JSON: prompt_logprobs of each text, the first None; the token that stands there is listed too.

    listed: how many entries the server allows, as vLLM's max_logprobs.
    """
    choices = []
    for index, ids in enumerate(body["prompt"]):
        with torch.no_grad():
            log_p = teacher(torch.tensor([ids])).logits[0, :-1, :entries].double().log_softmax(-1)
        places = [None]
        for row, token in zip(log_p, ids[1:], strict=True):
            found = {*row.topk(min(body["prompt_logprobs"], listed)).indices.tolist(), token}
            places.append({str(entry): {"logprob": row[entry].item(), "rank": None} for entry in found})
        choices.append({"index": index, "prompt_logprobs": places})
    return {"choices": choices[::-1]}  # in no particular order


@contextmanager
def server(teacher, entries, listed):
    """The address of one that serves until the context ends."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            said = json.dumps(answer(teacher, entries, listed, body)).encode()
            self.send_response(200)
            self.end_headers()
            self.wfile.write(said)

        def log_message(self, *arguments):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = Thread(target=http.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{http.server_port}"
        finally:
            http.shutdown()
            thread.join()
