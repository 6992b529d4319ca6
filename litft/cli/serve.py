"""`litft serve FOLDER`: a model behind OpenAI's HTTP interface, and a page to chat with it."""

from __future__ import annotations

import os
import sys

from litft.cli.generate import MODEL, add_loading, load
from litft.cli.parsing import Parser, positive
from litft.errors import UserError

KEY = "LITFT_API_KEY"


def main(argv: list[str]) -> int:
    """Run the verb; returns the exit code."""
    parser = Parser(
        "litft serve",
        "Serve a model: /v1/chat/completions, /v1/completions and /v1/models as OpenAI has them, a page to chat at /,\n"
        "/health and /metrics. Ctrl-C or SIGTERM ends it.",
        "litft serve runs/0001-lora --port 8000",
    )
    add = parser.add_argument
    add("FOLDER", help=MODEL)
    add("--host", default="127.0.0.1", help="the address to listen on (127.0.0.1: this machine only)")
    add("--port", type=int, default=8000, metavar="N", help="0 takes any free one (8000)")
    add(
        "--api_key",
        metavar="KEY",
        help=f"what clients have to send; better given as ${KEY}, which no process list shows",
    )
    add("--slots", type=positive, default=16, metavar="N", help="answers that grow at once (16)")
    add("--max_queue", type=positive, default=256, metavar="N", help="answers that may wait; then 429 (256)")
    add("--max_tokens", type=positive, default=4096, metavar="N", help="most tokens of an answer (4096)")
    add("--max_body_kb", type=positive, default=1024, metavar="N", help="largest request in KiB; then 413 (1024)")
    add_loading(parser)
    args = parser.parse(argv)
    try:
        import fastapi  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise UserError(f"litft serve needs {error.name}\nmend: pip install 'litft[serve]'") from error
    from litft.serve.server import Server, is_local, listen, model_name

    key = args.api_key if args.api_key is not None else os.environ.get(KEY) or None
    if key is not None and (not key.isascii() or not key.isprintable() or key != key.strip() or not key):
        raise UserError(f"--api_key (or ${KEY}): printable ASCII characters, without blanks around them")
    with listen(args.host, args.port) as sock:
        bundle = load(args)
        name, (host, port) = model_name(args.FOLDER), sock.getsockname()[:2]
        url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

        def ready() -> None:
            print(f"serving {name} at {url}, a chat page there too; Ctrl-C ends", flush=True)
            print(f"try: {_example(url, name, key is not None)}", flush=True)

        if key is None and not is_local(args.host):
            print(f"warning: {args.host} is open to others, and there is no --api_key", file=sys.stderr)
        limits = {"max_queue": args.max_queue, "max_tokens": args.max_tokens, "max_body": args.max_body_kb << 10}
        Server(bundle, sock, name=name, api_key=key, slots=args.slots, ready=ready, **limits).run()
    return 0


def _example(url: str, name: str, keyed: bool) -> str:
    """A line for the shell that asks the server something by OpenAI's client."""
    key = f"__import__('os').environ['{KEY}']" if keyed else "'none'"
    asked = f"model={name!r}, messages=[{{'role': 'user', 'content': 'Hello'}}]"
    call = f"OpenAI(base_url='{url}/v1', api_key={key}).chat.completions.create({asked})"
    return f'python -c "from openai import OpenAI; print({call}.choices[0].message.content)"'
