"""Measure speed: `python -m benchmarks.run NAME [options]`; `NAME --help` lists the options."""

import sys
from importlib import import_module

BENCHMARKS = {
    "op": ("benchmarks.op.bench", "the op and the layer against their peers on a GPU"),
    "heads": ("benchmarks.op.heads", "trains the model whose heads `op --keys trained` reads"),
    "cpu": ("benchmarks.op.cpu", "the chunk-wise form against token by token on this CPU"),
    "tune": (
        "benchmarks.op.tune",
        "the Triton kernels' launch configurations, measured and stored",
    ),
    "decode": ("benchmarks.decode.bench", "one token a sequence on states in place"),
    "model": (
        "benchmarks.model.training",
        "training steps of whole models, by mixer and size, on a GPU",
    ),
    "scale": (
        "benchmarks.scale.bench",
        "training steps on 1 to 8 GPUs: shards, split sequences, both",
    ),
    "first-step": (
        "benchmarks.model.first_step",
        "a compiled model's first step, with an empty and with a full cache",
    ),
    "generation": ("benchmarks.model.generation", "tokens/s of a decoder, against attention"),
    "prefill": ("benchmarks.model.prefill", "reading and resuming a long prompt"),
    "host": ("benchmarks.host.launches", "the host's time to launch a call's kernels"),
    "resources": ("benchmarks.host.resources", "registers and shared memory of every kernel"),
}


def main(arguments: list[str] | None = None) -> None:
    """Run the benchmark that the first argument names, with the others as its options."""
    name, *rest = (sys.argv[1:] if arguments is None else arguments) or [""]
    if name not in BENCHMARKS:
        known = "\n".join(f"  {known:11} {what}" for known, (_, what) in BENCHMARKS.items())
        if name in ("-h", "--help"):
            print(f"{__doc__}\n\n{known}")
            return
        sys.exit(f"there is no benchmark {name!r}; there are\n{known}" if name else known)
    import_module(BENCHMARKS[name][0]).main(rest)


if __name__ == "__main__":
    main()
