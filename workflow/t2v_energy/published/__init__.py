"""The study's own measurements, as its authors published them."""
