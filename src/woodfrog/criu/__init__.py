"""The one caller of the `criu` binary: where it is, its options, what its log means."""
