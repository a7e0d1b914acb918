"""What the tar archives of layers mean: as images, flattened into one, and put together again byte for byte."""
