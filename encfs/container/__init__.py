"""Run a command in the root filesystem of an image: namespaces, mounts, users. Not a sandbox (docs/images.md).

    serve (this process: FUSE, signals, exit code) ─ init (another process: namespaces, root) ─ the command

Not here: opening the artifact (`encfs.artifact`), which tree is served (`encfs.image`).
"""
