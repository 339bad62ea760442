"""Imports what the native part uses of Concrete."""

import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # concrete-python 2.11 imports the deprecated pkg_resources
    from concrete import fhe
    from concrete.compiler import RangeRestriction
    from concrete.fhe.compilation.composition import CompositionClause, CompositionRule
    from concrete.fhe.compilation.module_compiler import FunctionDef, ModuleCompiler

__all__ = ["CompositionClause", "CompositionRule", "FunctionDef", "ModuleCompiler", "RangeRestriction", "fhe"]
