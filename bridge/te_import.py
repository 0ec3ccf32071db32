"""Import of Transformer Engine, made safe for megatron-core; says why it cannot be used where it cannot.

megatron-core imports Transformer Engine in dozens of places and goes on without it on an ImportError, in some places
only on a ModuleNotFoundError. Installations that lack a part raise other errors: RuntimeError where pip installed the
meta package alone, FileNotFoundError or OSError where a library is missing. Then no module of megatron-core could be
imported. So importing this package adds a finder that turns every such error into a ModuleNotFoundError. It acts only
when somebody imports Transformer Engine, and changes nothing about an installation that works.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
from collections.abc import Callable
from importlib import metadata
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from megatron_embed.bridge.errors import UserError

NAME = "transformer_engine"
#: the versions that megatron-core 0.16.1 knows, from the one on which this package's layers have been computed
SUPPORTED = ">=2.11,<2.12"
NOT_INSTALLED = "it is not installed"
WAY_OUT = f"pip install 'transformer-engine[pytorch]{SUPPORTED}', or pip uninstall transformer-engine"


class _Finder(MetaPathFinder):
    """Finder of Transformer Engine alone.

    Attributes:
        problem: why the first import failed, or None; later imports fail at once.
    """

    def __init__(self) -> None:
        self.problem: str | None = None
        self._asks_others = False

    def find_spec(self, fullname: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Return the spec that the other finders find, with a guarded loader."""
        if fullname != NAME or self._asks_others:
            return None
        self._asks_others = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._asks_others = False
        if spec is not None and spec.loader is not None:
            execute = functools.partial(self._execute, spec.loader.exec_module)
            spec.loader.exec_module = execute  # type: ignore[method-assign]
        return spec

    def _execute(self, execute: Callable[[ModuleType], None], module: ModuleType) -> None:
        if self.problem is None and (version := unsupported_version()) is not None:
            self.problem = f"version {version} is not supported"
        if self.problem is None:
            try:
                execute(module)
                importlib.import_module(f"{NAME}.pytorch")  # an import of the whole passes over its ImportError
            except Exception as error:
                self.problem = f"its import fails ({type(error).__name__}: {' '.join(str(error).split())})"
        if self.problem is not None:
            raise ModuleNotFoundError(f"Transformer Engine: {self.problem}", name=NAME)


_finder = _Finder()


def guard() -> None:
    """Make failing imports of Transformer Engine raise ModuleNotFoundError from now on. Idempotent."""
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)


def unsupported_version() -> str | None:
    """Return the installed version if megatron-core does not know it, else None."""
    from packaging.specifiers import SpecifierSet

    try:
        version = metadata.version("transformer-engine")
    except metadata.PackageNotFoundError:
        return None
    return None if SpecifierSet(SUPPORTED).contains(version, prereleases=True) else version


def problem() -> str | None:
    """Import Transformer Engine; return why it cannot be used, or None where it can.

    Raises:
        UserError: the installed version is outside of :data:`SUPPORTED`.
    """
    if importlib.util.find_spec(NAME) is None:
        return NOT_INSTALLED
    if (version := unsupported_version()) is not None:
        raise UserError(
            f"transformer-engine: found version {version}; wanted {SUPPORTED}, which megatron-core knows: {WAY_OUT}"
        )
    try:
        importlib.import_module(f"{NAME}.pytorch")
    except ImportError as error:
        return _finder.problem or str(error)
    return None
