"""Container Storage Interface: the node plugin that mounts, hands descriptors over, and holds no key."""
