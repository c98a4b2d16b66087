"""Presidio as a further recogniser, of names and places, where its package and its language model are installed."""

from collections.abc import Iterable
from typing import Any

from gateway.config import PrivacySettings
from gateway.errors import ConfigError
from gateway.recognise import Span
from gateway.redact import Redactor

__all__ = ["Presidio", "redactor_of"]


class Presidio:
    """Asks Presidio's engine, in one language. `engine` is an `AnalyzerEngine`; without one, Presidio's own default.

    Raises ConfigError where the package or its language model is missing.
    """

    def __init__(self, engine: Any = None, *, language: str = "en") -> None:
        self._engine = engine if engine is not None else _default_engine()
        self._language = language

    def find(self, text: str) -> Iterable[Span]:
        return [
            Span(found.start, found.end, found.entity_type.lower())
            for found in self._engine.analyze(text=text, language=self._language)
        ]


def _default_engine() -> Any:
    try:
        from presidio_analyzer import AnalyzerEngine  # an extra: most installations have none

        return AnalyzerEngine()
    except (ImportError, OSError, SystemExit) as error:  # its model's loader exits where the download fails
        raise ConfigError(
            f"privacy.presidio is on, but Presidio cannot start ({error}): install understudy[privacy] and a model"
            " for it (python -m spacy download en_core_web_lg), or set it to false"
        ) from error


def redactor_of(settings: PrivacySettings) -> Redactor:
    """The redactor that the settings ask for. Raises ConfigError."""
    return Redactor(settings.patterns, (Presidio(),) if settings.presidio else (), salt=settings.salt)
