"""The small checkpoints of all families."""

from tests.families.conftest import stock

__all__ = ["stock"]
