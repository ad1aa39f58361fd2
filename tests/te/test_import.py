"""Transformer Engine is there, and Megatron-Core knows."""

import importlib.metadata
from pathlib import Path

from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.models.backends import LocalSpecProvider

from mole_mega.models.backend import backend_called
from mole_mega.platform.te import why_unusable

CONSTRAINTS = Path(__file__).parents[2] / "constraints-te.txt"


def test_it_imports_without_a_gpu():
    assert HAVE_TE and why_unusable() == ""


def test_it_is_the_version_that_the_constraints_name():
    assert f"transformer_engine=={importlib.metadata.version('transformer_engine')}" in CONSTRAINTS.read_text().split()


def test_the_local_backend_stays_megatron_cores_own():
    assert type(backend_called("local").modules) is LocalSpecProvider
