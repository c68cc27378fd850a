"""Retrieval: databases of embeddings in clip-retrieval's layout, indexes over them, and the neighbours of samples."""
