"""Errors that end a command with an exit code of their own (cli.py)."""

from __future__ import annotations


class ConfigError(ValueError):
    """The user's config or input cannot be honoured (exit code 2). The message is one line and carries the numbers."""


class CheckFailedError(RuntimeError):
    """A check that the project promises has failed (exit code 3)."""
