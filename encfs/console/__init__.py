"""What the commands of both packages share: options, output, how they end. No library module imports it."""
