"""Spells the options of a compilation as Concrete takes them."""

from collections.abc import Mapping
from enum import Enum
from typing import Any

from fheconv.basics.compile_config import LINEAR_P_ERROR, SECURITY_LEVELS, CompileConfig, ParameterRange
from fheconv.circuits.native.binding import RangeRestriction, fhe


def configuration_of(looks_up: bool, config: CompileConfig, within: bytes | None) -> Any:
    """Return Concrete's configuration for a circuit with or without lookups.

    The parameters `within` are those of the keys to compile for, None for keys of its own.
    """
    p_error = config.p_error
    chosen = (p_error, config.global_p_error, config.configuration)
    if not looks_up and all(choice is None for choice in chosen):
        p_error = LINEAR_P_ERROR
    base = fhe.Configuration() if config.configuration is None else config.configuration
    changes: dict[str, Any] = {"dump_artifacts_on_unexpected_failures": False}
    if config.configuration is None or config.compress_input is not None:
        compress = looks_up if config.compress_input is None else config.compress_input
        changes["compress_input_ciphertexts"] = compress
    if config.configuration is None or not config.compress_evaluation_keys:
        changes["compress_evaluation_keys"] = config.compress_evaluation_keys
    for name, value in (("p_error", p_error), ("global_p_error", config.global_p_error)):
        if value is not None:
            changes[name] = value
    if config.security_level != SECURITY_LEVELS[0]:
        changes["security_level"] = type(base.security_level)(config.security_level)
    if config.parameters is not None:
        changes["range_restriction"] = _restriction(config.parameters)
    if within is not None:
        keyset = fhe.ClientSpecs.deserialize(within).program_info.get_keyset_info()
        changes["keyset_restriction"] = keyset.get_restriction()
    return base.fork(**changes)


def saved_configuration(settings: Mapping[str, Any]) -> Any:
    """Return Concrete's configuration with settings of a file."""
    usual = fhe.Configuration()
    given = {}
    for name, value in settings.items():
        kind = type(getattr(usual, name))
        given[name] = kind(value) if issubclass(kind, Enum) else value
    return usual.fork(**given)


def _restriction(parameters: ParameterRange) -> RangeRestriction:
    """Return a range of parameters in the form that Concrete's optimiser takes."""
    restriction = RangeRestriction()
    for size in parameters.log2_polynomial_sizes:
        restriction.add_available_glwe_log_polynomial_size(size)
    for dimension in parameters.glwe_dimensions:
        restriction.add_available_glwe_dimension(dimension)
    for levels in parameters.keyswitch_levels:
        restriction.add_available_ks_level_count(levels)
    return restriction
