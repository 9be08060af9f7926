"""Register our models with transformers and peft, whether these are imported before or after `import gka`.

`import gka` loads neither. It adds the model types to transformers' table, so that Auto classes open our
folders: transformers imports `transformers.models.<type>` for a type's classes, and gets `gka.models`. peft
gets the default `target_modules` of adapters. `gka.models` knows only its own format, so `gka.checkpoints`,
which adds the others, is imported after it, and transformers is told the names of `gka.parallel.styles`.
Former names of modules lead to the present ones.
"""

import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec, PathFinder
from types import MappingProxyType, ModuleType
from typing import Any

MODEL_TYPES = ("gka", "hybrid_qwen3", "hybrid_qwen2", "hybrid_llama", "hybrid_qwen3_moe")
"""Values of `model_type` in config.json: our models and the released hybrids."""

_CONFIGURATIONS = "transformers.models.auto.configuration_auto"
_ADAPTERS = "peft.utils.constants"
TP_LAYER, TP_PART, TP_WORDS, TP_SAME = _STYLES = ("gka_layer", "gka_part", "gka_words", "gka_same")
"""Styles of transformers' tensor parallelism, which `gka.parallel.styles` defines."""
_ALIASES = {f"transformers.models.{name}" for name in MODEL_TYPES}
# Former modules, kept for one release: (present module, renamed names, text of the warning).
_FORMER = {
    "gka.models.adapters": (
        "gka.checkpoints",
        {"ADAPTERS": "FORMATS", "Adapter": "Format", "adapter_of": "format_of"},
        "gka.models.adapters is gka.checkpoints now: ADAPTERS is FORMATS, Adapter is Format",
    ),
    "gka.models.loading": (
        "gka.checkpoints.open", {}, "gka.models.loading is gka.checkpoints.open now",
    ),
}  # fmt: skip


def announce() -> None:
    """Register with the packages that are loaded now, and with the others when they are imported."""
    if any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return
    for name, tell in _TELL.items():
        if name in sys.modules:
            tell(sys.modules[name])
    sys.meta_path.insert(0, _Finder())


def _tell_transformers(module: ModuleType) -> None:
    for model_type in MODEL_TYPES:
        module.CONFIG_MAPPING_NAMES.setdefault(model_type, "GKAConfig")


def _tell_peft(module: ModuleType) -> None:
    """Give each adapter method its Llama default, because our projections have Llama's names."""
    for name, table in vars(module).items():
        if name.endswith("_MODULES_MAPPING") and "llama" in table:
            table.setdefault("gka", table["llama"])


def _add_rooms_above(_: ModuleType) -> None:
    """Let the models open other formats, and transformers split them over processes."""
    import_module("gka.checkpoints")
    parallel = import_module("transformers.integrations.tensor_parallel")
    for name in _STYLES:
        parallel.ParallelInterface.register(name, _Style(name))


class _Style:
    """A style of transformers' tensor parallelism, of a module that loads when a model is split."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(import_module("gka.parallel.styles").STYLES[self.name], attribute)


_TELL: dict[str, Callable[[ModuleType], None]] = {
    "gka.models": _add_rooms_above,
    _CONFIGURATIONS: _tell_transformers,
    _ADAPTERS: _tell_peft,
}


class _Finder:
    """Finds aliases and the modules in `_TELL`; leaves all others to the next finder."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname in _ALIASES:
            # A type that transformers itself has comes first.
            known = PathFinder.find_spec(fullname, path)
            return known or ModuleSpec(fullname, _Alias("gka.models"))  # pyright: ignore[reportArgumentType]
        if fullname in _FORMER:
            home, renamed, text = _FORMER[fullname]
            warnings.warn(text, DeprecationWarning, stacklevel=2)
            return ModuleSpec(fullname, _Alias(home, renamed))  # pyright: ignore[reportArgumentType]
        if fullname not in _TELL:
            return None
        spec = PathFinder.find_spec(fullname, path)
        if spec is not None and spec.loader is not None:
            spec.loader = _Then(spec.loader, _TELL[fullname])  # pyright: ignore
        return spec


class _Then:
    """A module's own loader, followed by a function of the loaded module."""

    def __init__(self, loader: Any, then: Callable[[ModuleType], None]):
        self.loader, self.then = loader, then

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        self.then(module)


class _Alias:
    """A second name of module `home`, which is loaded when one of its names is looked up."""

    def __init__(self, home: str, renamed: Mapping[str, str] = MappingProxyType({})) -> None:
        self.home, self.renamed = home, renamed

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        def attribute(name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")
            return getattr(import_module(self.home), self.renamed.get(name, name))

        vars(module)["__getattr__"] = attribute
