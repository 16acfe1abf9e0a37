"""Where instances run: start, capture, restore, call, stop."""
