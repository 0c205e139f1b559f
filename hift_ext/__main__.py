# SPDX-License-Identifier: Apache-2.0
# `python -m hift_ext` is the command line of cli.py.
# It leaves with the exit code that `--help` explains.
"""Runs the command line."""

import sys

from hift_ext.cli import main

if __name__ == "__main__":
    sys.exit(main())
