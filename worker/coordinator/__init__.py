"""
What a coordinator sees and does.

    alerts   what waits and what failed, and what that means in plain words
    retry    "try again": the current state, never an old one
"""

from __future__ import annotations
