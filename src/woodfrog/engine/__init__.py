"""Freezing and thawing a process tree in a sandbox: inspect, plan (pure), dump or restore with an undo stack."""
