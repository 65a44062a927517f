"""A stream of any length, read through a working context of fixed size."""

from lensjax.session.state import Policy, Refocus, SessionConfig, SessionState, View
from lensjax.session.stream import Session

__all__ = ["Policy", "Refocus", "Session", "SessionConfig", "SessionState", "View"]
