"""Container images as artifacts: what is particular to them. Not here: mounting, encrypting, registries."""
