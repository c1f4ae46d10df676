"""What an adapter does: spectra, subspace similarity, amplification, collisions, counts; as data, text and one page."""
