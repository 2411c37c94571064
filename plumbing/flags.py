"""Command lines from dataclasses: a field is a flag, its default the default, and the comment behind it the help.

A comment on a line of its own is the heading of the flags below it; a field without a comment is no flag.
"""

import argparse
import difflib
import inspect
import os
import re
import sys
import typing
from dataclasses import MISSING, fields, is_dataclass

USAGE = "[flags], which --help lists"
METAVARS = {int: "N", float: "X", str: "NAME"}


def comments_of(cls):
    """-> {field: (heading, help)}, from the source of a dataclass and of those that it builds on."""
    out = {}
    for part in reversed([c for c in cls.__mro__ if is_dataclass(c)]):
        heading = None
        for line in inspect.getsource(part).splitlines():
            if alone := re.fullmatch(r"    # (.*)", line):
                heading = alone[1]
            elif behind := re.fullmatch(r"    (\w+): .*?  # (.*)", line):
                out[behind[1]] = heading, behind[2]
    return out


def or_none(kind):
    """The parser of a flag that also takes the word none."""

    def parse(text):
        return None if text == "none" else kind(text)

    parse.__name__ = f"{kind.__name__} or none"
    return parse


def takes_none(field):
    return type(None) in typing.get_args(field.type)


def add_flags(parser, cls, leave_out=(), defaults=None, title="", others={}):
    """Add the fields of the dataclass `cls` as flags. What is not given does not turn up in the parsed namespace.

    defaults: an instance of cls whose values --help shows; title: the heading of the fields that are under none;
    others: {field: another name of its flag}.
    """
    comments, groups = comments_of(cls), {None: parser.add_argument_group(title) if title else parser}
    for field in fields(cls):
        if field.name in leave_out:
            continue
        if f"--{field.name.replace('_', '-')}" in parser._option_string_actions:
            raise ValueError(f"{cls.__module__}: {cls.__name__}.{field.name} has the name of another flag: rename it")
        if field.name not in comments:
            continue
        heading, text = comments[field.name]
        if heading not in groups:
            groups[heading] = parser.add_argument_group(heading)
        default = getattr(defaults, field.name) if defaults else field.default
        if not (default is None or default is False or default == "" or default is MISSING):
            text += f" ({default[0]} {default[1]})" if isinstance(default, tuple) else f" ({default})"
        how = dict(default=argparse.SUPPRESS, help=text.replace("%", "%%"), required=field.default is MISSING)
        kinds = [kind for kind in typing.get_args(field.type) if kind is not type(None)]
        if bool in kinds and len(kinds) > 1:  # on, off, or a number
            off = dict(dest=field.name, action="store_false", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
            groups[heading].add_argument(f"--no-{field.name}", **off)
            how.update(nargs="?", const=True, type=kinds[1], metavar="N")
        elif bool in (field.type, *kinds):
            how.update(action=argparse.BooleanOptionalAction)
        elif typing.get_origin(field.type) is tuple:
            how.update(nargs=2, type=float, metavar=("LO", "HI"))
        else:
            kind = kinds[0] if kinds else field.type
            if kind not in METAVARS:
                what = "int, float, str or bool, one of these or None, or a tuple of two numbers"
                raise ValueError(f"{cls.__module__}: {cls.__name__}.{field.name} is {kind}, and a flag takes {what}")
            how.update(type=or_none(kind) if kinds else kind, metavar=METAVARS[kind])
        names = [field.name, *([others[field.name]] if field.name in others else [])]
        groups[heading].add_argument(*[f"--{name.replace('_', '-')}" for name in names], dest=field.name, **how)


class Parser(argparse.ArgumentParser):
    def parse_known_args(self, args=None, namespace=None):
        """Refuses an empty value: a variable of the shell that is not set would be taken for a flag that is not."""
        args = sys.argv[1:] if args is None else args
        for before, arg in zip(["", *args], args):
            if not arg or re.fullmatch(r"--[\w-]+=", arg):
                self.error(f"{arg.strip('=') or before} has an empty value: give it one, or leave it out")
        return super().parse_known_args(args, namespace)

    def error(self, message):
        """Names, beside a flag that there is not, one that may be meant."""
        if message.startswith("unrecognized arguments"):
            for flag in re.findall(r"--[\w-]+", message):
                known = [*self._option_string_actions]
                near = [k for k in known if k.startswith(flag)] or difflib.get_close_matches(flag, known, 1, 0.7)
                message += f"; did you mean {near[0]}?" if near else ""
            if os.path.exists(message.rpartition(" ")[2]):
                message += "; if the shell made these names of a pattern, write it in quotes"
        super().error(message)


def early_parser(program, *names):
    """Of the flags --NAME that say which other flags there are; the others are left for make_parser's."""
    parser = Parser(program, usage=f"%(prog)s {USAGE}", add_help=False, allow_abbrev=False)
    for name in names:
        parser.add_argument(f"--{name}")
    return parser


def make_parser(program, description, usage=USAGE):
    def style(prog):
        return argparse.RawDescriptionHelpFormatter(prog, max_help_position=30, width=120)

    return Parser(
        program, usage=f"%(prog)s {usage}", description=description, formatter_class=style, allow_abbrev=False
    )
