"""Snapshots: manifest, compatibility, catalogue; capture and materialise, where engine and store meet."""
