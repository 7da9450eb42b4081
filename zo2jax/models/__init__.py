"""Models as lists of blocks, and their Hugging Face files."""
