"""The `litft` command: finds the verb, runs it, and turns what went wrong into a line and an exit code."""

from __future__ import annotations

import importlib
import io
import logging
import os
import sys
import traceback

VERBS = {
    "finetune": "fine-tune a model: litft finetune full|lora|qlora|dpo|... --data FILE",
    "data": "look at training data: litft data check|show|stats FILE",
    "generate": "answer a prompt, or every row of a file: litft generate FOLDER --prompt TEXT",
    "evaluate": "loss and answers on rows, against a baseline: litft evaluate FOLDER --data FILE",
    "score": "numbers of a reward model: litft score FOLDER --data FILE --out FILE",
    "chat": "talk to a model in the terminal: litft chat FOLDER",
    "serve": "behind OpenAI's HTTP interface, with a chat page: litft serve FOLDER",
    "merge": "an adapter into its base model: litft merge FOLDER --out DIR",
    "quantize": "into 8 or 4 bits: litft quantize FOLDER --to nf4 --out DIR",
    "export": "for something else to take: litft export FOLDER --to hf --out DIR",
    "report": "a run as a page, or several side by side: litft report RUN... --out FILE",
    "push": "onto the model hub: litft push FOLDER --repo NAME",
    "config": "ready-made configurations: litft config list|show|copy|check NAME",
    "download": "fetch a model from the hub: litft download ID",
    "doctor": "what this machine has, and what is missing: litft doctor",
}


_CHATTY = ("torchao", "torch.utils._pytree", "bitsandbytes.backends.cpu.ops")
"""Loggers that warn, at import, of kernels which this machine can't use anyway."""


def usage() -> str:
    """The text of `litft --help`."""
    from litft import __version__

    verbs = "\n".join(f"  {verb:<10} {text}" for verb, text in VERBS.items())
    return (
        f"litft {__version__}: fine-tune language models on chat data.\n\n"
        f"usage: litft VERB ... [--help] [--debug]\n\n{verbs}\n\n"
        "start here: litft finetune lora --data tutorials/data/quickstart.jsonl\n"
        "exit codes: 0 done, 2 your mistake, 1 ours or a bad loss, 130 Ctrl-C, 143 SIGTERM, 138 SIGUSR1"
    )


def main(argv: list[str] | None = None) -> int:
    """Run a command line; returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in argv
    argv = [word for word in argv if word != "--debug"]
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if argv[0] in ("-V", "--version"):
        from litft import __version__

        print(f"litft {__version__}")
        return 0
    from litft.errors import Failed, UserError

    for name in _CHATTY:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        if argv[0] not in VERBS:
            import difflib

            near = difflib.get_close_matches(argv[0], VERBS, n=1)
            hint = f"; did you mean litft {near[0]}?" if near else f"; one of {', '.join(VERBS)}"
            raise UserError(f"litft {argv[0]}: no such verb{hint}")
        return importlib.import_module(f"litft.cli.{argv[0]}").main(argv[1:]) or 0
    except UserError as error:
        if debug:
            raise
        _say(f"error: {error}", error)
        return 2
    except Failed as error:
        if debug:
            raise
        _say(f"error: {error}", error)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `litft data show F | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if debug:
            raise
        text = str(error).strip().split("\n")[0][:300]
        _say(f"litft failed: {type(error).__name__}: {text}\n(--debug shows where)", error, by_all=True)
        return 1


def _say(text: str, error: Exception, by_all: bool = False) -> None:
    """Print what went wrong, with the notes on it; of several processes of a run the first one does."""
    from litft.engine.secrets import hide

    words, rank = hide("\n".join([text, *getattr(error, "__notes__", [])])), _rank()
    if rank == 0:
        print(words, file=sys.stderr)
    elif by_all:
        from litft.engine.rank_logs import log_of, to_console

        if log := log_of():
            traceback.print_exception(error)
        to_console(f"rank {rank}: {words}" + (f"\n(all of it: {log})" if log else ""))


def _rank() -> int:
    """Of this process, under torchrun, Slurm or what litft has started."""
    said = [os.environ.get(name, "") for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK")]
    return max((int(text) for text in said if text.isdigit()), default=0)


def entry() -> None:
    """What the installed script calls."""
    for stream in (sys.stdout, sys.stderr):  # a row or a file's name may hold what the terminal's encoding lacks
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    sys.exit(main())
