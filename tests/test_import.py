"""What `import gka` and `gka --help` load, and that the public names are there."""

import subprocess
import sys

import pytest

import gka

HEAVY = ("transformers", "matplotlib", "accelerate", "datasets", "triton")


def loaded_after(code: str) -> set[str]:
    """Top-level packages that a fresh interpreter has loaded after `code`."""
    script = (
        f"{code}\nimport sys; print('\\n' + ' '.join({{m.split('.')[0] for m in sys.modules}}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    return set(done.stdout.splitlines()[-1].split())


def test_import_and_help_load_nothing_heavy() -> None:
    """`import gka` and `gka --help` stay without transformers, matplotlib and their friends."""
    assert not loaded_after("import gka").intersection(HEAVY)
    ask = "sys.argv = ['gka', '--help']\ntry: main()\nexcept SystemExit: pass"
    assert not loaded_after(f"import sys; from gka.commands.main import main\n{ask}").intersection(
        HEAVY
    )


def test_the_layer_needs_torch_only() -> None:
    """Using the layer and the ops does not load transformers either."""
    code = "import gka, torch; gka.GatedKalmaNet(8, head_dim=4, num_heads=2)(torch.zeros(1, 3, 8))"
    assert not loaded_after(code).intersection(("transformers", "accelerate", "matplotlib"))


def test_every_public_name_loads() -> None:
    """All of `gka.__all__` exist and are listed by dir(); another name is an AttributeError."""
    for name in gka.__all__:
        assert getattr(gka, name) is not None
        assert name in dir(gka)
    with pytest.raises(AttributeError, match="nonsense"):
        _ = gka.nonsense  # pyright: ignore[reportAttributeAccessIssue]


def test_a_checkout_on_the_path_knows_its_version(monkeypatch: pytest.MonkeyPatch) -> None:
    """Results name the library's version where it is not installed, and so has no metadata."""
    import importlib.metadata

    from gka.evaluation.results import environment
    from gka.training.run import versions

    def nothing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", nothing)
    monkeypatch.setattr("gka.training.run.version", nothing)
    assert environment()["gated-kalmanet"] == versions()["gated-kalmanet"] == gka.__version__
