"""Tar archives as container tools read them, for hostile input: streaming, bounded, strict; or in place (`file`).

Where readers of tar differ, this one follows Go's `archive/tar` (docker, containerd, podman, umoci are built on it),
and refuses what that reads in another way than GNU tar does. Python's `tarfile` is not used: it applies global headers,
skips damaged ones, reads names and PAX records without bound, and keeps every member in memory.
"""
