"""Ctrl-C that ends a program without a traceback. A file that is run imports this before torch, which takes seconds."""

import sys
from pathlib import Path

STOPPED_BY_HAND = 130  # exit code after Ctrl-C, as a shell has it


def quiet(kind, error, trace):
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)


def as_program(main):
    """main() of a file that is run: Ctrl-C, where nobody else takes it, ends it without a traceback."""
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(STOPPED_BY_HAND)


run = Path(getattr(sys.modules["__main__"], "__file__", None) or ".").resolve()
if Path(__file__).resolve().parents[1] in run.parents[:2]:  # a file of ours; whoever else imports it keeps their ways
    sys.excepthook = quiet
