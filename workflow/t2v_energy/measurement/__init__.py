"""Stage 2: protocols, the batch runner, the raw record and its validity, seals."""
