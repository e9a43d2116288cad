"""`kdkernels teacher-serve`: a teacher's hidden states over HTTP."""

import argparse
import signal
import sys
from threading import Event

from kdkernels.errors import InputError, MissingPackage
from kdkernels.training import with_reason
from kdkernels.training.processes.exits import DONE, UNUSABLE, end


def add(commands) -> None:
    command = commands.add_parser(
        "teacher-serve",
        help="serve a teacher's hidden states",
        description="Answers runs whose recipe has [teacher] url with the last hidden states of a model, in its own "
        "dtype, and once with its lm_head. Whoever reaches the port may ask: there is no password. Ends with SIGTERM "
        "or Ctrl-C.",
    )
    command.set_defaults(run=_run)
    add = command.add_argument
    add("model", metavar="MODEL", help="directory or hub name: a model, or an adapter on one")
    add("--host", default="127.0.0.1", help="address to listen on (default: %(default)s, this machine alone)")
    add("--port", type=int, default=8710, help="0: any that is free (default: %(default)s)")
    add("--dtype", choices=("float32", "bfloat16"), help="of the weights (default: bfloat16 on a GPU, else float32)")
    add("--attention", choices=("auto", "flash_attention_2", "sdpa", "eager"), default="auto",
        help="implementation, as in a recipe (default: %(default)s)")  # fmt: skip


def _run(options: argparse.Namespace) -> int:
    ended = Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    try:
        with with_reason():
            from kdkernels.training.serving import listening, service  # torch, transformers: seconds
        answering = service(options.model, options.dtype, options.attention)
        with listening(answering, options.host, options.port) as http:
            about = answering.about
            size = about["hidden"] * (4 if about["dtype"] == "float32" else 2)
            print(
                f"{options.model}: hidden states of {about['hidden']} numbers in {about['dtype']}, {size} bytes a "
                f"token, at http://{options.host}:{http.server_port} ([teacher] url); model {about['model'][:12]}",
                file=sys.stderr,
                flush=True,
            )
            ended.wait()
    except (InputError, MissingPackage) as error:
        return end(UNUSABLE, error)
    return DONE
