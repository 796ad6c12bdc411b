"""Random models in real file layouts, for serve and for tests."""
