"""The miniature: a world of small pictures and captions, and the code that makes a T5, a Flux and a VAE for it."""
