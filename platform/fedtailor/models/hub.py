"""Base models by name: a preset, a hub id or a local folder."""

from __future__ import annotations

from fedtailor.models.classifier import load_classifier, load_tokenizer

__all__ = ["load_classifier", "load_tokenizer"]
