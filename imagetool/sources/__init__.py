"""Where plaintext comes from: each module turns one kind of input into entries for the EROFS writer."""
