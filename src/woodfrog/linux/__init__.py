"""What woodfrog needs of Linux: sandboxes, cgroups, network, /proc. Knows errors and telemetry only."""
