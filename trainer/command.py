"""What the commands beside run.py share: a mistake in what was asked for is one sentence and exit code 2."""

import sys
from collections.abc import Callable
from functools import wraps


def command(name: str) -> Callable[[Callable[[list[str]], None]], Callable[[list[str]], int]]:
    """A decorator that makes a program called `name` of a function of its arguments: it returns the exit code."""

    def decorate(main: Callable[[list[str]], None]) -> Callable[[list[str]], int]:
        @wraps(main)
        def program(argv: list[str]) -> int:
            try:
                main(argv)
            except (OSError, ValueError) as error:
                print(f"{name}: {' '.join(str(error).split())}", file=sys.stderr)
                return 2
            return 0

        return program

    return decorate
