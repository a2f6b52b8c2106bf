"""``python -m dmh.service``: the launcher process behind `dmh.open`.  Not for use by hand.

Reads its configuration from standard input, writes one line to the ready descriptor (``ready PATH``, or an error's
class and text), and ends when the program that started it hangs up.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys

from dmh.config import Config
from dmh.errors import ConfigError, DmhError
from dmh.service.launcher import Launcher


def main() -> int:
    """Exit status 0 for an orderly end."""
    parser = argparse.ArgumentParser(prog="dmh.service")
    parser.add_argument("--ready-fd", type=int, required=True)
    parser.add_argument("--parent", type=int, required=True)
    arguments = parser.parse_args()
    ready_fd = arguments.ready_fd
    logging.basicConfig(level=logging.WARNING, format="dmh launcher: %(levelname)s: %(message)s", stream=sys.stderr)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # through the context managers: nothing is left behind
    os.set_inheritable(ready_fd, False)

    def say(line: str) -> None:
        os.write(ready_fd, (line.replace("\n", "\x1f") + "\n").encode())
        os.close(ready_fd)

    try:
        launcher = Launcher(Config.from_wire(sys.stdin.read()))
        launcher.start()
    except (DmhError, OSError) as error:
        kind = "ServiceError" if isinstance(error, (OSError, ConfigError)) else type(error).__name__
        say(f"{kind} {error}")
        return 1
    with launcher:
        launcher.end_with(arguments.parent)
        say(f"ready {launcher.socket_path}")
        launcher.run()
        return 1 if launcher.failure else 0


if __name__ == "__main__":
    sys.exit(main())
