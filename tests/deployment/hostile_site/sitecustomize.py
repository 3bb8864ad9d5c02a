"""Loaded by every Python process of a hostile site, as its owner put it first on the path."""

import sys

if any("flwr-clientapp" in word for word in sys.orig_argv):
    from tests.deployment.hostile_client import infect

    infect()
