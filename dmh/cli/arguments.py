"""Types of command-line arguments that commands share: what the configuration accepts, refused in argparse's words."""

from __future__ import annotations

import argparse

from dmh.config import parse_duration, parse_size


def size(text: str) -> int:
    """Bytes: ``512MiB``, ``4096``."""
    try:
        return parse_size(int(text) if text.isdecimal() else text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def duration(text: str) -> float:
    """Seconds: ``250ms``, ``5min``."""
    try:
        return parse_duration(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
