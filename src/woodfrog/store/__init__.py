"""Bytes at rest: durable writes, content-addressed blobs and source trees."""
