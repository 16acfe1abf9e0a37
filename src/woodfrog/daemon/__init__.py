"""woodfrogd: HTTP API, control loop, journal; the only place that chooses parts."""
