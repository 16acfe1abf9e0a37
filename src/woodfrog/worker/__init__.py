"""The process inside a sandbox that runs the user's code behind one listening Unix socket."""
