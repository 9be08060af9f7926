"""How transformers and peft learn of these models when they are imported, before or after `import gka`.

`import gka` loads neither. It notes the model types where transformers looks them up, so that its Auto
classes open our folders; transformers then imports `transformers.models.<type>` for a type's classes, and
finds `gka.models` there. peft learns which maps adapters change where no `target_modules` are given.
`gka.models` knows its own format alone: `gka.checkpoints`, which adds the others, is imported after it, and
found under the former names of its modules too.
"""

import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec, PathFinder
from types import MappingProxyType, ModuleType
from typing import Any

MODEL_TYPES = ("gka", "hybrid_qwen3", "hybrid_qwen2", "hybrid_llama", "hybrid_qwen3_moe")
"""What config.json calls our models and the released hybrids."""

_CONFIGURATIONS = "transformers.models.auto.configuration_auto"
_ADAPTERS = "peft.utils.constants"
_ALIASES = {f"transformers.models.{name}" for name in MODEL_TYPES}
# Former modules, for one release: (today's, names that changed too, what a warning says).
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
    """Tell those that are loaded, and the others as soon as they are."""
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
    """Our maps have a Llama's names, so each method's default is what it is for a Llama."""
    for name, table in vars(module).items():
        if name.endswith("_MODULES_MAPPING") and "llama" in table:
            table.setdefault("gka", table["llama"])


def _add_formats(_: ModuleType) -> None:
    import_module("gka.checkpoints")


_TELL: dict[str, Callable[[ModuleType], None]] = {
    "gka.models": _add_formats,
    _CONFIGURATIONS: _tell_transformers,
    _ADAPTERS: _tell_peft,
}


class _Finder:
    """Finds the modules that are to be told of us, and the aliases; all else is left to the others."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname in _ALIASES:
            # a type that transformers has itself is its own
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
    """A module's own loader, and what is to be done once the module has run."""

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
    """A module under another name than its `home`; loaded when a name of it is asked for."""

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
