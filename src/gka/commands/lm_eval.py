"""`gka lm-eval`: lm-evaluation-harness's own command, which knows this library's models here."""

import typer


def lm_eval(context: typer.Context) -> None:
    """Run lm-evaluation-harness with this library's models: `--model gka --model_args pretrained=DIR`.

    All arguments are lm_eval's own, and so is --help.
    """
    from gka.evaluation.harness import main

    main(context.args)
