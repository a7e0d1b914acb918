"""Keys: key files, the keyring that wraps an artifact's secrets, and the providers that open it."""
