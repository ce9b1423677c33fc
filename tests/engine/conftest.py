"""The small checkpoints of all families, for the engine as well."""

from tests.families.conftest import stock

__all__ = ["stock"]
