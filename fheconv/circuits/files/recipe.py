"""Writes how a circuit was compiled as plain data, and reads it back from a file that is not trusted.

A `concrete.fhe.Configuration` is an object of Concrete's with some sixty settings. A server compiles a text,
so only those settings count there that the text does not hold already. They are numbers, words and truth
values (`_SETTINGS`), and only they are in files. With a setting that would have a server compute in another
way, such as on a GPU, a circuit cannot be saved.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any

from fheconv.basics.checks import check_number
from fheconv.basics.compile_config import SECURITY_LEVELS, CompileConfig, ParameterRange
from fheconv.basics.errors import InvalidArgumentError

# The fields of a `CompileConfig` that files hold: those on which the parameters depend.
_FIELDS = (
    "p_error",
    "global_p_error",
    "security_level",
    "compress_input",
    "compress_evaluation_keys",
    "parameters",
)
_TRUTH = (True, False)
# The settings of Concrete that files hold, each with the values that it may have. None stands for numbers.
_SETTINGS: dict[str, tuple[Any, ...] | None] = {
    "p_error": None,
    "global_p_error": None,
    "security_level": SECURITY_LEVELS,
    "parameter_selection_strategy": ("v0", "mono", "multi"),
    "multi_parameter_strategy": ("precision", "precision-and-norm2"),
    "enable_tlu_fusing": _TRUTH,
    "loop_parallelize": _TRUTH,
    "compress_evaluation_keys": _TRUTH,
    "compress_input_ciphertexts": _TRUTH,
}
# Those that a circuit in a file cannot have.
_NEVER = (
    "auto_parallelize",
    "composable",
    "dataflow_parallelize",
    "keyset_restriction",
    "range_restriction",
    "use_gpu",
)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Says how a circuit is compiled again from its text.

    keys_given: whether it was compiled for the keys of another circuit. Their parameters are in `specs.json`.
    settings: what its `CompileConfig.configuration` says, as plain data; None if it had none.

    Example:
        >>> Recipe.of(CompileConfig(p_error=0.01)).to_dict()["p_error"]
        0.01
    """

    config: CompileConfig
    keys_given: bool = False
    settings: Mapping[str, Any] | None = None

    @classmethod
    def of(cls, config: CompileConfig, *, keys_given: bool = False) -> "Recipe":
        """Return the recipe of a circuit that was compiled here.

        Raises `InvalidArgumentError` for a `configuration` that files cannot hold.
        """
        given = config.configuration
        settings = None if given is None else _settings_of(given)
        fields = {name: getattr(config, name) for name in _FIELDS}
        return cls(config=CompileConfig(**fields), keys_given=keys_given, settings=settings)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain data, ready for JSON. `from_dict` reads it."""
        return {
            **{name: value for name, value in asdict(self.config).items() if name in _FIELDS},
            # What files of earlier versions do not have is written only where it is needed.
            **({"keys_given": True} if self.keys_given else {}),
            **({} if self.settings is None else {"settings": dict(self.settings)}),
        }

    @classmethod
    def from_dict(cls, data: Any) -> "Recipe":
        """Return the recipe from data that `to_dict` made.

        Raises `InvalidArgumentError`, `AttributeError`, `LookupError`, `TypeError` or `ValueError` for other
        data.
        """
        given = {name: data[name] for name in _FIELDS}
        if given["parameters"] is not None:
            lists = {name: tuple(numbers) for name, numbers in given["parameters"].items()}
            given["parameters"] = ParameterRange(**lists)
        settings = data.get("settings")
        if settings is not None:
            if set(settings) != set(_SETTINGS):
                raise ValueError(f"the settings must be {sorted(_SETTINGS)}")
            for name, value in settings.items():
                _check(name, value)
        keys_given = data.get("keys_given", False) is True
        return cls(config=CompileConfig(**given), keys_given=keys_given, settings=settings)


def _settings_of(configuration: Any) -> dict[str, Any]:
    """Return what files hold of a `concrete.fhe.Configuration`."""
    usual = type(configuration)()
    for name in _NEVER:
        if getattr(configuration, name) != getattr(usual, name):
            raise InvalidArgumentError(
                f"A circuit with configuration.{name}={getattr(configuration, name)!r:.50} cannot be saved; "
                "compile it with this setting as it is by default."
            )
    settings = {}
    for name in _SETTINGS:
        value = getattr(configuration, name)
        settings[name] = value.value if isinstance(value, Enum) else value
    return settings


def _check(name: str, value: Any) -> None:
    """Raise `ValueError` or `InvalidArgumentError` for a value that a setting does not have."""
    allowed = _SETTINGS[name]
    if allowed is None:
        if value is not None:
            check_number(name, value, 1e-300)
            if value >= 1:
                raise ValueError(f"{name} is {value!r:.50}")
    elif not any(type(value) is type(one) and value == one for one in allowed):
        raise ValueError(f"{name} is {value!r:.50}")
