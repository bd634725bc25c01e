"""The translator: an engine that needs no hardware virtualization (docs/translator.md)."""

from skep.engine.translate.engine import TranslateEngine

__all__ = ["TranslateEngine"]
