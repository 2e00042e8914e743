"""Embeddings of texts: labs 1001 to 1008."""
