"""Problems that can be graded."""

from stepsal.tasks import chain

__all__ = ["chain"]
