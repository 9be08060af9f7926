"""The command line of lm-evaluation-harness with the model `gka` registered.

lm_eval has no entry points for models, so its own command does not know `--model gka`. This command does,
and with it `--model hf` loads this library's models, too:

    gka lm-eval --model gka --model_args pretrained=runs/first --tasks ...
    python -m gka.evaluation.harness --model gka ...
"""

import sys
from collections.abc import Sequence
from importlib.util import find_spec

from gka.errors import InputError


def register() -> None:
    """Register the model `gka` with lm_eval, and this library's models with the Auto classes.

    Raises:
        InputError: lm_eval is not installed.
    """
    if find_spec("lm_eval") is None:
        raise InputError(
            'lm_eval is not installed; install it with pip install -e ".[eval]" in a checkout, or anywhere '
            'with pip install "lm-eval>=0.4.13,<0.5"'
        )
    import gka.evaluation.harness_model  # noqa: F401  (registers itself)


def main(arguments: Sequence[str]) -> None:
    """Run lm_eval's command with these arguments.

    Raises:
        InputError: lm_eval is not installed.
        SystemExit: as lm_eval's command does.
    """
    register()
    from lm_eval.__main__ import cli_evaluate  # pyright: ignore[reportMissingImports]

    before = sys.argv
    sys.argv = ["gka lm-eval", *arguments]  # where that command reads them
    try:
        cli_evaluate()
    finally:
        sys.argv = before


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except InputError as error:
        sys.exit(f"gka: {error}")
