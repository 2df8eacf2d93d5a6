"""Text to batches: sources (text in), cache (tokens on disk), layouts (examples cut out of tokens), prefetch, show."""
